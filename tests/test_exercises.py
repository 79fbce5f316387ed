"""Proof that the exercises lead where they should.

1. The solutions equal rspo.py, and the examples in the exercises are true of them.
2. The check passes the solutions, fails the blanks, and says how far one is.
3. Typical wrong answers get the hint for just that mistake.
4. What cannot be read, stops, or returns no numbers is said in a sentence with its line.
"""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from itertools import product
from textwrap import dedent

import pytest
import torch
from conftest import ROOT

import rspo

sys.path.append(str(ROOT / "exercises"))
import check
import solutions

NAMES = [exercise.name for exercise in check.EXERCISES]
BLANKS, SOLVED = ROOT / "exercises/exercises.py", ROOT / "exercises/solutions.py"
GRADED = [[0.5], [-1.5, 2.0], [0.1, 0.5, 0.2, 1.0], [1.0, 0.5, 1.0, 1.0, -2.0], [0.3] * 4,
          torch.randn(7, generator=torch.Generator().manual_seed(0)).double().tolist()]
GROUPS = GRADED + [list(row) for n in range(1, 6) for row in product((0, 1), repeat=n)]
N_OF_ALL = f"of {len(NAMES)} done"
pytestmark = pytest.mark.filterwarnings("ignore:n = .* < 2k")


def functions(path) -> dict:
    return {node.name: node for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)}


def binary(rewards) -> bool:
    return set(rewards) <= {0, 1}


@pytest.fixture
def report_with(tmp_path):
    """The report on the solutions with some functions replaced; text is put at the end."""
    def report(text: str) -> str:
        path = tmp_path / "exercises.py"
        path.write_text(f"{SOLVED.read_text()}\nimport torch\n\n{dedent(text).strip()}\n")
        return check.report(path)
    return report


# ---------------------------------------------------------------- 1. the solutions

@pytest.mark.parametrize("name, ours, fits", [
    ("pass_at_k", rspo.pass_at_k, lambda r, k: binary(r)),
    ("weights_by_counting", rspo.pass_at_k_weights, lambda r, k: binary(r)),
    ("pass_at_k_weights", rspo.pass_at_k_weights, lambda r, k: binary(r)),
    ("max_at_k_weights", rspo.max_at_k_weights, lambda r, k: True),
    ("leave_one_out_weights", rspo.leave_one_out_weights, lambda r, k: k < len(r)),
    ("group_max_weights", rspo.group_max_weights, lambda r, k: len(r) % k == 0),
])
def test_a_solution_equals_rspo(name, ours, fits):
    cases = [(r, k) for r in GROUPS for k in range(1, len(r) + 1) if fits(r, k)]
    assert len(cases) > 20
    for rewards, k in cases:
        found = torch.tensor(getattr(solutions, name)(rewards, k), dtype=torch.float64)
        torch.testing.assert_close(found, ours(rewards, k), rtol=1e-12, atol=1e-12)


def test_the_solved_loss_equals_rspo_with_its_gradient():
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(50, 6, generator=g).requires_grad_()  # (B, A)
    tokens = torch.randint(0, 4, (50, 6), generator=g)  # (B, A)  0 ends, some never do
    weights = torch.randn(50, generator=g)  # (B,)
    solved = solutions.policy_gradient_loss(logprobs, tokens, weights, 0)
    lengths = [row.index(0) + 1 if 0 in row else 6 for row in tokens.tolist()]
    assert set(lengths) == {1, 2, 3, 4, 5, 6}
    flat = torch.cat([row[:length] for row, length in zip(logprobs, lengths)])  # (N,)
    ours = rspo.policy_gradient_loss(
        flat, weights.repeat_interleave(torch.tensor(lengths)), num_samples=50)
    torch.testing.assert_close(solved, ours)
    grads = [torch.autograd.grad(loss, logprobs)[0] for loss in (solved, ours)]
    torch.testing.assert_close(*grads)


def test_only_hitchhikers_are_what_the_share_counts():
    for rewards in filter(binary, GROUPS):
        for k in range(1, len(rewards) + 1):
            fair = solutions.pass_at_k_weights(rewards, k)
            assert solutions.hitchhiking_share(rewards, fair) == 0
    assert solutions.hitchhiking_share([0, 1, 0, 0], [4] * 4) == 3 / 4


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_an_exercise_are_true_of_its_solution(name):
    text = ast.get_docstring(functions(BLANKS)[name])
    known = {**vars(solutions), "torch": torch}
    example = doctest.DocTestParser().get_doctest(text, known, name, None, 0)
    assert len(example.examples) >= 2
    assert doctest.DocTestRunner().run(example).failed == 0


# ---------------------------------------------------------------- 2. how far one is

def test_the_exercises_are_those_that_are_checked_and_solved():
    assert list(functions(BLANKS)) == list(functions(SOLVED)) == NAMES
    for name, node in functions(BLANKS).items():
        asked = [argument.arg for argument in node.args.args]
        assert asked == list(inspect.signature(getattr(solutions, name)).parameters)
        for part in ("Returns ", ">>> ", "Hint: ", "Read: "):
            assert part in ast.get_docstring(node), (name, part)


@pytest.mark.parametrize("exercise", check.EXERCISES, ids=NAMES)
def test_k_1_comes_first_and_each_mistake_is_one(exercise):
    """A mistake that gave the right numbers would never be told; two alike would hide one."""
    if exercise.name == "policy_gradient_loss":
        weights = exercise.calls[0][2]
        assert binary(weights.tolist())  # k = 1: the weights are the rewards
    elif exercise.name == "hitchhiking_share":
        assert exercise.calls[0][0] == exercise.calls[0][1]
    else:
        assert exercise.calls[0][1] == 1
    right = [getattr(solutions, exercise.name)(*call) for call in exercise.calls]
    for mistake, hint in exercise.mistakes:
        given = [check.attempt(mistake, *call) for call in exercise.calls]
        bad = [i for i, pair in enumerate(zip(given, right)) if not check.equal(*pair)]
        assert bad, hint
        told = [text for other, text in exercise.mistakes
                if check.explains(other, right, exercise.calls, given, bad[0])]
        assert told[0] == hint


def test_the_solutions_pass_all():
    assert f"All {len(NAMES)} done" in check.report(SOLVED)


def test_the_blanks_fail_all_and_the_command_says_so():
    unchanged = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", BLANKS], cwd=ROOT)
    if unchanged.returncode:
        pytest.skip("exercises.py is being filled in here")
    done = subprocess.run([sys.executable, ROOT / "exercises/check.py"], cwd=ROOT.parent,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"0 {N_OF_ALL}; next: {NAMES[0]}" in done.stdout
    assert not re.search(r"^\d done", done.stdout, flags=re.M)
    assert "not filled in yet" in done.stdout and "Hint: " in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_is_next_wherever_it_is(report_with, name):
    line = re.search(rf"def {name}\(.*?NotImplementedError$", BLANKS.read_text(), flags=re.M | re.S)
    text = report_with(line[0])
    assert f"done; next: {name}\n" in text and "not filled in yet" in text


def test_what_is_wrong_is_told_from_what_is_not_begun(report_with):
    blank = re.search(rf"def {NAMES[0]}\(.*?NotImplementedError$", BLANKS.read_text(),
                      flags=re.M | re.S)
    text = report_with(f"{blank[0]}\n\n\ndef {NAMES[2]}(rewards, weights):\n    return 7.0")
    states = re.findall(r"^\d (.{4}) \w+$", text, flags=re.M)
    assert states == ["    ", "done", "no  ", *["done"] * (len(NAMES) - 3)]


def test_make_exercises_is_there():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^exercises: \.venv/ready\n\t\.venv/bin/python exercises/check\.py$",
                     makefile, flags=re.M)
    assert re.search(r"^\.PHONY:.* exercises\b", makefile, flags=re.M)
    assert "# make exercises " in makefile


# ---------------------------------------------------------------- 3. typical mistakes

def others(line: str, rivals="rewards[:i] + rewards[i + 1:]", size="k - 1") -> str:
    """A loop over the answers, as a student writes it; `line` is a team's gain."""
    return f"""
        out = []
        for i, r in enumerate(rewards):
            if k == 1:
                out.append(r)
                continue
            others = {rivals}
            gains = [{line} for S in combinations(others, {size})]
            out.append(k * sum(gains) / len(gains))
        return out"""


BY_VALUE = "[x for x in rewards if x != r]"
CENTRED = """
        w = max_at_k_weights(rewards, k)
        return [x - (sum(w) - x) / (len(w) - 1) for x in w]"""
UP_TO_END = "m = (tokens == end).long(); m = (m.cumsum(1) - m == 0).float()"
WRONG = [
    ("pass_at_k", "return 1 - (1 - sum(rewards) / len(rewards)) ** k", "plug-in"),
    ("pass_at_k", "n, c = len(rewards), sum(rewards)\n        return comb(n - c, k) / comb(n, k)",
     "all k are wrong"),
    ("pass_at_k", "return float(any(rewards[:k]))", "one team only"),
    ("pass_at_k", "return sum(rewards) / len(rewards)", "does not know k"),
    ("group_max_weights", "return [max(rewards[i - i % k:i - i % k + k]) "
                          "for i in range(len(rewards))]", "factor k is missing"),
    ("group_max_weights", "return [k * max(rewards)] * len(rewards)", "own group"),
    ("group_max_weights", "return [k * max(rewards[i:i + k]) for i in range(0, len(rewards), k)]",
     "returns a list of 2, but must return a list of 4 numbers"),
    ("hitchhiking_share", "return sum(w for r, w in zip(rewards, weights) if not r) / sum(weights)",
     "all weights are 0"),
    ("hitchhiking_share", """
        return sum(w for r, w in zip(rewards, weights) if r) / (sum(weights) or 1)""",
     "share of the right answers"),
    ("weights_by_counting", others("r * (max(S) == 0)").replace("k * sum", "sum"),
     "factor k is missing"),
    ("weights_by_counting", others("r * (max(S) == 0)", "rewards"), "not a rival of itself"),
    ("weights_by_counting", others("r * (max(S) == 0)", BY_VALUE), "a tie"),
    ("weights_by_counting", others("r * (max(S) == 0)").replace(" / len(gains)", ""),
     "a share is needed"),
    ("weights_by_counting", others("max(S) == 0"), "earns nothing"),
    ("pass_at_k_weights", "return weights_by_counting(rewards, k)", "still computing after"),
]
for formula, hint in [
        ("comb(n - c, k - 1) / comb(n - 1, k - 1)", "factor k is missing"),
        ("k * comb(n - c, k) / comb(n, k)", "is of the metric"),
        ("k * comb(n - c, k - 1) / comb(n, k - 1)", "not a rival of itself"),
        ("k * comb(n - c, k - 1) / comb(n - k, k - 1)", "n - 1 rivals, not n - k"),
        ("k * comb(n - c - 1, k - 1) / comb(n - 1, k - 1)", "n - c wrong rivals"),
        ("k * (1 - c / n) ** (k - 1)", "plug-in")]:
    WRONG.append(("pass_at_k_weights", "n, c = len(rewards), sum(rewards)\n        "
                  f"return [{formula} * r for r in rewards]", hint))
WRONG += [
    ("max_at_k_weights", others("max(r - max(S), 0)").replace("k * sum", "sum"),
     "factor k is missing"),
    ("max_at_k_weights", others("r - max(S)"), "never below 0"),
    ("max_at_k_weights", others("max(r, *S)"), "hitchhike"),
    ("max_at_k_weights", others("r if r > max(S) else 0"), "ahead of the second best"),
    ("max_at_k_weights", others("r if r >= max(S) else 0"), "In a tie"),
    ("max_at_k_weights", others("max(r - sum(S) / len(S), 0)"), "not their mean"),
    ("max_at_k_weights", others("max(r - max(S), 0)", "rewards"), "not a rival of itself"),
    ("max_at_k_weights", others("max(r - max(S), 0)", BY_VALUE), "a tie"),
    ("max_at_k_weights", others("max(r - max(S), 0)").replace("k == 1", "False"),
     "at k = 1 there are no rivals"),
    ("max_at_k_weights", "rewards.sort()\n        import solutions\n"
     "        return solutions.max_at_k_weights(rewards, k)", "changes its arguments"),
    ("leave_one_out_weights", CENTRED, "Compute them anew"),
    ("leave_one_out_weights", CENTRED.replace("(sum(w) - x) / (len(w) - 1)", "sum(w) / len(w)"),
     "holds the answer's own"),
    ("leave_one_out_weights", """
        return [w - (sum(rewards) - r) / (len(rewards) - 1)
                for w, r in zip(max_at_k_weights(rewards, k), rewards)]""", "not of rewards"),
]
LOSS = "-(weights * (logprobs * m).sum(1)).mean()"
for mask, result, hint in [
        ("m = torch.ones_like(logprobs)", LOSS, "padding is counted"),
        ("m = (tokens == end).cumsum(1) <= 1", LOSS, "padding is counted"),
        ("m = (tokens == end).cumsum(1) == 0", LOSS, "end token is dropped"),
        ("m = tokens != end", LOSS, "And padding is counted"),
        (UP_TO_END, "(weights * (logprobs * m).sum(1)).mean()", "the sign"),
        (UP_TO_END, "-(weights * (logprobs * m).sum(1)).sum()", "number of answers B"),
        (UP_TO_END, "-(weights[:, None] * logprobs * m).sum() / m.sum()", "whatever their lengths"),
        (UP_TO_END, "-(weights[:, None] * logprobs * m).mean()", "whatever their lengths"),
        (UP_TO_END, "-(weights * (logprobs * m).sum(1) / m.sum(1)).mean()", "favors short"),
        (UP_TO_END, "-(weights * logprobs * m).sum() / len(weights)", "weights[:, None]"),
        (UP_TO_END, LOSS + ".item()", "without its gradient")]:
    WRONG.append(("policy_gradient_loss", f"{mask}\n        return {result}", hint))


@pytest.mark.parametrize("name, body, hint", WRONG, ids=[f"{w[0]}: {w[2]}" for w in WRONG])
def test_a_typical_mistake_gets_its_hint(report_with, name, body, hint):
    arguments = ", ".join(inspect.signature(getattr(solutions, name)).parameters)
    text = report_with(f"    def {name}({arguments}):\n        {body.strip()}")
    assert f"done; next: {name}\n" in text
    assert hint in " ".join(text.split())
    assert "Traceback" not in text and max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------- 4. a sentence, not a traceback

BEFORE = SOLVED.read_text().count("\n") + 3  # lines before those that `report_with` is given


@pytest.mark.parametrize("text, line, said", [
    ("def pass_at_k(rewards, k):\n    pass", 1, "returns None, but must return a value"),
    ("def pass_at_k(rewards, k):\n    n = 4\n    return n / 0", 3, "stops with ZeroDivisionError"),
    ("def pass_at_k(rewards):\n    return 0", 1, "takes 1 positional argument but 2 were given"),
    ("def pass_at_k(rewards, k):\n    return [0.5]", 1, "returns a list of 1, but must return one"),
    ("def pass_at_k(rewards, k):\n    return 'half'", 1, "returns str (half), but must return one"),
    ("def pass_at_k(rewards, k):\n    exit()", 2, "stops with SystemExit"),
    ("def pass_at_k(rewards, k):\n    while True:\n        k = k", 0, "still computing after"),
    ("def pass_at_k(rewards, k):\n    return 1 -", 2, "SyntaxError: invalid syntax."),
    ("x = 1\nx = y", 2, "NameError: name 'y' is not defined."),
    ("del pass_at_k", None, "has no function pass_at_k any more"),
    ("def group_max_weights(rewards, k):\n    return (x for x in rewards)", 1,
     "returns generator"),
    ("old = pass_at_k\ndef pass_at_k(rewards, k):\n    p = old(rewards, k)\n    rewards.sort()\n"
     "    return p", 2, "changes its arguments"),
    ("def policy_gradient_loss(logprobs, tokens, weights, end):\n"
     "    return (logprobs * weights.view(7)).sum()", 2, "stops with RuntimeError"),
])
def test_it_is_said_in_a_sentence_with_its_line(report_with, monkeypatch, text, line, said):
    monkeypatch.setattr(check, "SECONDS", 1)
    shown = report_with(text)
    assert said in " ".join(shown.split())
    assert "Traceback" not in shown
    if line:
        assert f"exercises.py, line {BEFORE + line}:" in shown
