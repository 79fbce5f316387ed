"""How far are you with exercises.py? `make exercises` shows it, with a hint for what comes next.

Every exercise is a few calls, k = 1 first, and must give the numbers of solutions.py. If it does
not, its numbers are compared with those of typical mistakes (the second half of this file). The
hint of a mistake is shown only if it explains the numbers of every call.
"""

import copy
import inspect
import signal
import textwrap
import traceback
import warnings
from itertools import combinations
from math import comb
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import solutions

BLANKS = Path(__file__).with_name("exercises.py")
SECONDS = 3  # for one call: longer than any takes that does not list a million teams


class Exercise(NamedTuple):
    name: str
    calls: list  # arguments of each call, k = 1 first
    hint: str  # if no typical mistake explains the numbers
    mistakes: list  # (function, hint) pairs


# -------- run what was written

def load(path: Path) -> dict:
    """All names that the file defines. Raises whatever is wrong with the file."""
    names = {"__name__": "exercises"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return names


def attempt(function, *arguments):
    """What a call returns, or the exception that stopped it."""
    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def numbers(value) -> Tensor | None:
    """A returned value as float64, or None if it is no number and no list of numbers."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of tensors with a gradient in a list
            value = torch.as_tensor(value)
    except Exception:  # whatever was returned
        return None
    return None if value.is_complex() else value.detach().double()


def equal(one, other) -> bool:
    """The same shape and numbers, up to the rounding of float32."""
    one, other = numbers(one), numbers(other)
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=1e-5, atol=1e-8)


# -------- say what is wrong

def trouble(given, expected, before, after) -> str | None:
    """What is wrong with the outcome of a call, in a sentence; None if nothing is."""
    if isinstance(given, TimeoutError):
        return (f"is still computing after {SECONDS} s: is a loop endless, or are teams listed "
                "that could be counted?")
    if isinstance(given, (Exception, SystemExit)):
        return f"stops with {reason(given)}."
    if given is None:
        return "returns None, but must return a value: is there no `return`?"
    size = numbers(expected).numel()
    wanted = "one number" if numbers(expected).ndim == 0 else f"a list of {size} numbers"
    if numbers(given) is None:
        return f"returns {type(given).__name__} ({short(given)}), but must return {wanted}."
    if numbers(given).shape != numbers(expected).shape:
        shape = tuple(numbers(given).shape)
        what = f"a list of {shape[0]}" if len(shape) == 1 else f"the shape {shape}"
        return f"returns {what if shape else 'one number'}, but must return {wanted}."
    if short(before) != short(after):
        return "changes its arguments: x.sort() and x[i] = ... do; sorted(x) and list(x) copy."
    if not equal(given, expected):
        return f"gives {short(given)}, but should give {short(expected)}."
    if isinstance(expected, Tensor) and not getattr(given, "requires_grad", False):
        return ("gives the right number without its gradient: stay with torch, without float(), "
                ".item(), .detach() or torch.no_grad().")
    return None


def reason(error) -> str:
    """The kind of an exception and the first line of its message."""
    message = str(getattr(error, "msg", error)).strip()  # .msg: of a SyntaxError, without its place
    return f"{type(error).__name__}: {(message.splitlines() or ['no message'])[0].rstrip('.')}"


def short(value) -> str:
    """A value in a few figures: 4 digits, and the first of many numbers."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        items = [short(item) for item in value]
        if len(items) > 12:
            items = [*items[:4], f"... {len(items)} in all"]
        return f"[{', '.join(items)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]


def line_of(function, error, path: Path) -> str:
    """Where it stopped, or else where the function begins."""
    lines = [frame.lineno for frame in traceback.extract_tb(getattr(error, "__traceback__", None))
             if frame.filename == str(path)]
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not lines and code is not None and code.co_filename == str(path):
        lines = [code.co_firstlineno]
    return f"{path.name}, line {lines[-1]}" if lines else path.name


def explains(mistake, right, calls: list, given: list, first: int) -> bool:
    """Does a mistake give the same at every call? Where either stops, both must at the first."""
    for i, call in enumerate(calls):
        wrong = attempt(mistake, *copy.deepcopy(call))
        stopped = [isinstance(each, BaseException) for each in (wrong, given[i])]
        if i == first and equal(wrong, right[i]):
            return False
        if any(stopped) and i == first and type(wrong) is not type(given[i]):
            return False
        if not any(stopped) and not equal(wrong, given[i]):
            return False
    return True


def look_at(exercise: Exercise, names: dict, path: Path) -> str | None:
    """What is wrong with an exercise, and its hint, in a few lines; None if it is right."""
    function, solution = names.get(exercise.name), getattr(solutions, exercise.name)
    if not callable(function):
        return f"{path.name} has no function {exercise.name} any more: take back its `def` line."
    right = [solution(*copy.deepcopy(call)) for call in exercise.calls]
    copies = copy.deepcopy(exercise.calls)
    given = []
    for call in copies:
        late = given and isinstance(given[-1], TimeoutError)  # one endless loop is enough
        given.append(given[-1] if late else attempt(function, *call))
    found = [trouble(*each) for each in zip(given, right, exercise.calls, copies)]
    first = next((i for i, sentence in enumerate(found) if sentence), None)
    if first is None:
        return None
    place = line_of(function, given[first], path)
    if isinstance(given[first], NotImplementedError):
        return f"{place}: not filled in yet.\nHint: {exercise.hint}"
    hints = [hint for mistake, hint in exercise.mistakes
             if explains(mistake, right, exercise.calls, given, first)]
    arguments = ", ".join(short(each) for each in exercise.calls[first])
    return (f"{place}:\n{exercise.name}({arguments})\n{found[first]}\n"
            f"Hint: {(hints or [exercise.hint])[0]}")


def report(path: Path = BLANKS) -> str:
    """The whole state of a file of exercises, as text."""
    names = attempt(load, path)
    if isinstance(names, (Exception, SystemExit)):
        line = getattr(names, "lineno", None)
        place = f"{path.name}, line {line}" if line else line_of(load, names, path)
        return (f"0 of {len(EXERCISES)} done: the file cannot be run.\n"
                f"{place}: {reason(names)}.")
    wrong = {each.name: look_at(each, names, path) for each in EXERCISES}
    left = [name for name in wrong if wrong[name]]
    states = {name: "done" if not text else "" if "not filled in" in text else "no"
              for name, text in wrong.items()}
    lines = [f"{i} {states[name]:4} {name}" for i, name in enumerate(wrong, 1)]
    if not left:
        return "\n".join([*lines, f"All {len(wrong)} done. Read rspo.py next."])
    lines.append(f"{len(wrong) - len(left)} of {len(wrong)} done; next: {left[0]}")
    for line in wrong[left[0]].splitlines():
        lines.append(textwrap.fill(line, 96, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


# -------- typical mistakes: what they give, and their hints

def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def without(rewards, i) -> list:
    return rewards[:i] + rewards[i + 1:]


def each(weight):
    """A mistake that weighs each answer by weight(rewards, i, k)."""
    return lambda rewards, k: [weight(rewards, i, k) for i in range(len(rewards))]


def count(formula):
    """A mistake that is a formula of n, c and k alone."""
    return lambda rewards, k: formula(len(rewards), sum(rewards), k)


def closed(formula):
    """A mistake that gives formula(n, c, k) to the right answers."""
    return each(lambda r, i, k: formula(len(r), sum(r), k) * r[i])


def all_wrong(teams) -> float:
    return mean(not any(team) for team in teams)


def lead(gain):
    """A mistake that takes another gain than max(R_i - best, 0) over the teams of rivals."""
    def weight(r, i, k):
        if k == 1:
            return r[i]
        return k * mean(gain(r[i], team) for team in combinations(without(r, i), k - 1))
    return each(weight)


def rivals(of):
    """A mistake that takes other rivals of answer i than the n - 1 others."""
    def weight(r, i, k):
        if k == 1:
            return r[i]
        return k * mean(max(r[i] - max(team), 0) for team in combinations(of(r, i), k - 1))
    return each(weight)


def baseline(of):
    """A mistake that subtracts another baseline than that of the others among themselves."""
    def weight(r, i, k):
        weights = solutions.max_at_k_weights(r, k)
        return weights[i] - of(r, i, k, weights)
    return each(weight)


def among_themselves(r, i, k) -> list:
    return solutions.max_at_k_weights(without(r, i), k)


def no_factor(solution):
    return lambda rewards, k: [weight / k for weight in solution(rewards, k)]


FACTOR = ("the factor k is missing. Pass@k = 1 - (1 - w)^k has the slope k (1 - w)^(k-1). At k = 1 "
          "it does not show.")
HITCHHIKES = ("wrong answers hitchhike here. Pay what an answer adds to the best of its rivals, "
              "not the best of its whole team.")
BY_VALUE = ("an equal answer is a rival, too (a tie). Leave out answer i by its place, "
            "rewards[:i] + rewards[i + 1:], not all answers of its value.")
ITSELF = ("an answer is not a rival of itself: there are n - 1 rivals. If it votes on its own "
          "weight, the weight is biased.")
TEAM_OF_K = "answer i is one of the k, so its rivals in a team are k - 1."
WRONG_PAID = "a wrong answer earns nothing: multiply by its reward R_i."

PASS_AT_K = Exercise(
    "pass_at_k",
    [([1, 0, 0, 0], 1), ([1, 0, 0, 0], 2), ([1, 0, 1, 0, 0], 2), ([1, 1, 1, 0], 2),
     ([0, 0, 0], 2), ([0, 0, 1, 0], 4)],
    "how many teams of k can be made of the n - c wrong answers? math.comb counts them.",
    [(count(lambda n, c, k: 1 - (1 - c / n) ** k),
      "this is the plug-in 1 - (1 - c/n)^k. It is biased (too low): it draws an answer twice. A "
      "team has k different answers: count teams with math.comb."),
     (count(lambda n, c, k: comb(n - c, k) / comb(n, k)),
      "this is the chance that all k are wrong. You want the rest, 1 minus it."),
     (count(lambda n, c, k: comb(c, k) / comb(n, k)),
      "this is the chance that all k are right. One right answer is enough."),
     (count(lambda n, c, k: c / n), "this is pass@1: it does not know k."),
     (lambda rewards, k: max(rewards[:k]),
      "this looks at one team only, the first k. Take the mean over all teams of k.")])

GROUP_MAX = Exercise(
    "group_max_weights",
    [([1, 0, 1], 1), ([1, 0, 0, 0], 2), ([0, 0, 1, 0, 0, 0], 3), ([0.2, 0.5, 0.1, 0.9], 2),
     ([1, 0, 0, 0], 4), ([-1.0, -2.0, 0.5, 0.0], 2)],
    "rewards[start:start + k] is a group. Each of its k members gets k times its max.",
    [(no_factor(solutions.group_max_weights),
      "the factor k is missing: a group of k has one maximum, and its k members share it."),
     (each(lambda r, i, k: k * max(r[i % (len(r) // k)::len(r) // k])),
      "a group is k answers side by side: the first k, then the next k."),
     (each(lambda r, i, k: k * r[i] * (r[i] == max(r[i - i % k:i - i % k + k]))),
      "here only the best of a group is paid. In this exercise all k members are, wrong or not: "
      "that is the point."),
     (each(lambda r, i, k: k * max(r)),
      "the maximum is of an answer's own group, not of all n answers."),
     (each(lambda r, i, k: sum(r[i - i % k:i - i % k + k])),
      "this is the sum of the group. Only its best counts: k times its max."),
     (lambda r, k: [k * max(r[start:start + k]) for start in range(0, len(r), k)],
      "one weight per answer, not per group: repeat each group's k times.")])

HITCHHIKING = Exercise(
    "hitchhiking_share",
    [([1, 0, 1, 0], [1, 0, 1, 0]), ([1, 0, 0, 0], [4, 4, 4, 4]),
     ([1, 0, 0, 1, 0, 0, 0], [2, 2, 2, 2, 0, 0, 0]), ([1, 0, 0, 0, 0], [3, 1, 0, 0, 0]),
     ([0, 0, 0], [0, 0, 0])],
    "add up the weights where the reward is 0, then divide by the sum of all weights.",
    [(lambda r, w: sum(x for x, reward in zip(w, r) if reward == 0) / sum(w),
      "if all weights are 0, their sum is 0, too. Then nobody hitchhikes: return 0."),
     (lambda r, w: sum(x * reward for x, reward in zip(w, r)) / sum(w) if sum(w) else 0,
      "this is the share of the right answers. Take those of reward 0."),
     (lambda r, w: sum(x * reward for x, reward in zip(w, r)) / sum(w),
      "this is the share of the right answers. Take those of reward 0."),
     (lambda r, w: sum(x for x, reward in zip(w, r) if reward == 0) / len(w),
      "divide by the sum of all weights, not by the number of answers."),
     (lambda r, w: sum(x for x, reward in zip(w, r) if reward == 0),
      "this is the credit of the wrong answers. Divide it by the sum of all weights."),
     (lambda r, w: mean(x > 0 for x, reward in zip(w, r) if reward == 0),
      "this counts answers. Add up their weights instead: some are paid more than others."),
     (lambda r, w: sum(x > 0 for x, reward in zip(w, r) if reward == 0) / sum(x > 0 for x in w),
      "this counts answers. Add up their weights instead: some are paid more than others.")])

COUNTING = Exercise(
    "weights_by_counting",
    [([1, 0, 1], 1), ([1, 0, 0, 0, 1], 2), ([1, 0, 1, 0, 0, 0], 3), ([1, 1, 1, 0], 2),
     ([0, 0, 0], 2), ([1, 0, 0], 3)],
    "for each answer: list the teams of k - 1 others, count those without a right answer, divide "
    "by the number of teams, times k, times R_i.",
    [(no_factor(solutions.weights_by_counting), FACTOR),
     (each(lambda r, i, k: k * all_wrong(combinations(r, k - 1)) * r[i]), ITSELF),
     (each(lambda r, i, k: k * all_wrong(combinations(without(r, i), k)) * r[i]), TEAM_OF_K),
     (each(lambda r, i, k: k * all_wrong(combinations([x for x in r if x != r[i]], k - 1)) * r[i]),
      BY_VALUE),
     (each(lambda r, i, k: k * all_wrong(combinations(without(r, i), k - 1))), WRONG_PAID),
     (each(lambda r, i, k: r[i] if k == 1 else k * all_wrong(
         combinations(without(r, i), k - 1))), WRONG_PAID),
     (each(lambda r, i, k: k * (1 - all_wrong(combinations(without(r, i), k - 1))) * r[i]),
      "this counts the teams with a right rival. An answer is paid where all rivals are wrong."),
     (each(lambda r, i, k: k * r[i] * sum(not any(s) for s in combinations(without(r, i), k - 1))),
      "a share is needed: divide by the number of teams of k - 1 rivals."),
     (each(lambda r, i, k: k * r[i] / comb(len(r), k) * sum(
         not any(s) for s in combinations(without(r, i), k - 1))),
      "divide by the number of teams that were listed, C(n-1, k-1), not by C(n, k)."),
     (each(lambda r, i, k: k * mean(max(r[i], *s, 0) for s in combinations(without(r, i), k - 1))),
      HITCHHIKES)])

CLOSED_FORM = Exercise(
    "pass_at_k_weights",
    [([1, 0, 1], 1), ([1, 0, 0, 0, 1], 2), ([1, 0, 0, 0, 0, 1, 1, 0], 3), ([0, 0, 0, 0], 2),
     ([1, 1, 1, 0], 3), ([1] * 12 + [0] * 12, 12)],
    "C(wrong rivals, k - 1) teams of all C(n - 1, k - 1) are all wrong. comb gives 0 where there "
    "are too few.",
    [(no_factor(solutions.pass_at_k_weights), FACTOR),
     (closed(lambda n, c, k: k * comb(n - c, k) / comb(n, k)),
      "C(n-c, k) / C(n, k) is of the metric: k of n answers. Here answer i is given: k - 1 of the "
      "other n - 1."),
     (closed(lambda n, c, k: k * comb(n - c, k) / comb(n - 1, k)), TEAM_OF_K),
     (closed(lambda n, c, k: k * comb(n - c - 1, k - 1) / comb(n - 1, k - 1)),
      "a right answer has n - c wrong rivals: answer i is not one of the wrong ones."),
     (closed(lambda n, c, k: k * comb(n - c, k - 1) / comb(n, k - 1)), ITSELF),
     (closed(lambda n, c, k: k * comb(n - c, k - 1) / comb(n - k, k - 1)),
      "there are n - 1 rivals, not n - k: only answer i is set aside. Divide by C(n-1, k-1)."),
     (closed(lambda n, c, k: k * (1 - c / n) ** (k - 1)),
      "this is the plug-in k (1 - c/n)^(k-1). It is biased: c counts answer i itself. Count teams "
      "of rivals with math.comb."),
     (closed(lambda n, c, k: k * (1 - (c - 1) / (n - 1)) ** (k - 1)),
      "this draws a rival twice, and is biased. A team has different rivals: count teams with "
      "math.comb."),
     (each(lambda r, i, k: k * comb(len(r) - sum(r), k - 1) / comb(len(r) - 1, k - 1)), WRONG_PAID),
     (closed(lambda n, c, k: k * (1 - comb(n - c, k - 1) / comb(n - 1, k - 1))),
      "this is the chance of a right rival. An answer is paid where all rivals are wrong.")])

GRADED = Exercise(
    "max_at_k_weights",
    [([0.5, 0.0, 1.0], 1), ([-1.0, 0.5, 2.0], 1), ([0.0, 0.5, 1.0], 2),
     ([0.1, 0.5, 0.2, 1.0, 0.7], 3), ([1.0, 0.5, 1.0], 2), ([0.5, 0.5, 1.0, 0.0, 1.0], 3),
     ([1, 0, 0, 1], 2), ([-1.0, 0.5, -2.0], 2)],
    "for each answer and each team of k - 1 others: how far is it ahead of the best of them? Take "
    "the mean over the teams, times k.",
    [(no_factor(solutions.max_at_k_weights), FACTOR),
     (each(lambda r, i, k: k * mean(
         max(r[i] - max(s), 0) for s in combinations(without(r, i), k - 1))),
      "at k = 1 there are no rivals, and max() of nothing stops: return the rewards."),
     (each(lambda r, i, k: k * mean(
         max(r[i] - max(s, default=0), 0) for s in combinations(without(r, i), k - 1))),
      "at k = 1 there are no rivals: W_i = R_i, below 0, too."),
     (lead(lambda reward, team: reward - max(team)),
      "who is behind the best of the team adds nothing: max(R_i - max(S), 0), never below 0."),
     (lead(lambda reward, team: max(reward, *team)), HITCHHIKES),
     (lead(lambda reward, team: reward * (reward > max(team))),
      "the best of a team adds only what it is ahead of the second best: R_i - max(S)."),
     (lead(lambda reward, team: reward * (reward >= max(team))),
      "the best of a team adds only what it is ahead of the second best: R_i - max(S). In a tie "
      "that is 0."),
     (lead(lambda reward, team: max(reward - mean(team), 0)),
      "the best rival of a team counts, max(S), not their mean."),
     (rivals(lambda r, i: r), ITSELF),
     (rivals(lambda r, i: [x for x in r if x != r[i]]), BY_VALUE),
     (each(lambda r, i, k: r[i] if k == 1 else k * mean(
         max(r[i] - max(s), 0) for s in combinations(without(r, i), k))), TEAM_OF_K)])

LEAVE_ONE_OUT = Exercise(
    "leave_one_out_weights",
    [([1, 0, 0], 1), ([1, 0, 0], 2), ([1, 0, 0, 1, 0], 2), ([0.0, 0.5, 1.0, 0.5], 2),
     ([1, 1, 1, 0, 1], 3), ([0.1, 0.5, 0.2, 1.0, 0.7], 3)],
    "call max_at_k_weights on the others alone, with the same k, and take the mean of what it "
    "returns.",
    [(baseline(lambda r, i, k, weights: mean(weights)),
      "the mean of all weights holds the answer's own: that baseline is biased. Leave it out."),
     (baseline(lambda r, i, k, weights: mean(without(weights, i))),
      "these weights of the others still had answer i as a rival, so the baseline depends on it: "
      "biased. Compute them anew without answer i."),
     (baseline(lambda r, i, k, weights: mean(without(r, i))),
      "the baseline is a mean of weights, not of rewards: at k = 1 they are the same."),
     (baseline(lambda r, i, k, weights: sum(among_themselves(r, i, k)) / len(r)),
      "without answer i there are n - 1 left: divide by n - 1."),
     (baseline(lambda r, i, k, weights: sum(among_themselves(r, i, k)) / max(len(r) - k, 1)),
      "the mean is over all n - 1 others: divide by n - 1, not by n - k."),
     (each(lambda r, i, k: mean(among_themselves(r, i, k))),
      "this is the baseline b_i alone. Subtract it from W_i."),
     (each(lambda r, i, k: mean(among_themselves(r, i, k)) - solutions.max_at_k_weights(r, k)[i]),
      "the sign is turned: W_i - b_i."),
     (no_factor(solutions.leave_one_out_weights), FACTOR)])


# -------- the loss

def batch(logprobs, tokens, weights) -> tuple:
    """Arguments of the loss; the end token is 0."""
    logprobs = torch.tensor(logprobs, requires_grad=True)  # (B, A)  as a model's would
    return logprobs, torch.tensor(tokens), torch.tensor(weights), 0


def up_to_the_end(tokens, end) -> Tensor:
    ends = (tokens == end).long()  # (B, A)
    return ends.cumsum(1) - ends == 0  # (B, A)


def masked(mask, divide=lambda total, written, weights: total.sum() / len(weights), sign=-1):
    """A mistake in which tokens count, or in what the sum is divided by."""
    def loss(logprobs, tokens, weights, end):
        written = mask(tokens, end)  # (B, A)
        total = weights * (logprobs * written).sum(1)  # (B,)
        return sign * divide(total, written, weights)
    return loss


def everything(tokens, end) -> Tensor:
    return torch.ones_like(tokens)


PADDING = ("padding is counted. What follows the first end token is no part of the answer, even if "
           "it is the end token again.")
NO_END = "the end token is dropped. The model chose to stop there, so it must learn that, too."
NUMBER_OF_TOKENS = ("it is divided by the number of tokens. Divide by the number of answers B, "
                    "whatever their lengths.")

LOSS = Exercise(
    "policy_gradient_loss",
    [batch([[-1.0, -0.5], [-3.0, -0.25]], [[7, 0], [5, 0]], [1.0, 0.0]),  # k = 1: the rewards
     batch([[-1.0, -0.5, -4.0], [-2.0, -0.25, -0.75]], [[7, 0, 9], [5, 6, 0]], [1.5, 0.5]),
     batch([[-1.0, -0.5, -4.0, -3.0], [-2.0, -0.25, -0.75, -1.5], [-0.5, -1.0, -1.5, -8.0]],
           [[7, 0, 0, 0], [5, 6, 8, 4], [0, 9, 0, 9]], [4.0, -1.0, 0.0]),
     batch([[-0.5, -1.0, -2.0, -0.25]], [[3, 4, 0, 0]], [2.0])],
    "three steps: a mask (B, A) of the tokens up to the first end token, included; the sum over "
    "each row, (B,); then minus the weighted sum, divided by B.",
    [(masked(up_to_the_end, sign=1),
      "the sign: an optimizer goes down, so the loss is minus the weighted sum."),
     (masked(everything), PADDING),
     (masked(lambda tokens, end: (tokens == end).cumsum(1) <= 1), PADDING),
     (masked(lambda tokens, end: (tokens == end).cumsum(1) == 0), NO_END),
     (masked(lambda tokens, end: tokens != end), NO_END + " And padding is counted."),
     (masked(up_to_the_end, lambda total, written, weights: total.sum() / written.sum()),
      NUMBER_OF_TOKENS),
     (masked(up_to_the_end, lambda total, written, weights: total.sum() / written.numel()),
      NUMBER_OF_TOKENS),
     (masked(everything, lambda total, written, weights: total.sum() / written.numel()),
      PADDING + " And " + NUMBER_OF_TOKENS),
     (masked(up_to_the_end, lambda total, written, weights: (total / written.sum(1)).mean()),
      "each answer is divided by its own length: that favors short right ones. Sum over the "
      "tokens of an answer."),
     (masked(up_to_the_end, lambda total, written, weights: total.sum()),
      "divide by the number of answers B."),
     (masked(up_to_the_end, lambda total, written, weights: total.sum() / (weights != 0).sum()),
      "divide by the number of all answers B, also those of weight 0."),
     (lambda logprobs, tokens, weights, end: -(
         weights * logprobs * up_to_the_end(tokens, end)).sum() / len(weights),
      "weights (B,) times a (B, A) tensor weighs columns, not answers: use weights[:, None], "
      "(B, 1), or sum over the tokens first.")])

EXERCISES = [PASS_AT_K, GROUP_MAX, HITCHHIKING, COUNTING, CLOSED_FORM, GRADED, LEAVE_ONE_OUT, LOSS]

if __name__ == "__main__":
    print(report())
