"""pass@k and max@k curves with 95 % intervals: of models, runs or samples files.

    python evaluate.py                          the toy model
    python evaluate.py --model toy runs/NAME    before, after, and the change
    python evaluate.py --model samples.jsonl    what sample.py wrote
    python evaluate.py --model Qwen2.5-Math-1.5B --data math500,aime2024

Each estimate is unbiased (Chen et al. 2021). The interval asks: would it hold for other problems
like these (and other seeds)? Two models are compared problem by problem. Beside the figure stand
its numbers (.csv) and, in a folder, the samples: the same command goes on where it was stopped.

Shapes: S seeds, M problems, n samples of each, K evaluated ks.
"""

from pathlib import Path

from lib import cli

SETTINGS = {
    "model": cli.Setting("what to evaluate: as in train.py, or a .jsonl of sample.py", kind=list),
    "k": cli.Setting("ks to report, such as 1,8,64 (default: powers of two)", kind=str),
    **{name: cli.SETTINGS[name] for name in ("data", "n", "temperature", "max_new_tokens",
                                             "sampler", "dtype", "load_in_4bit", "limit", "seed")},
    "out": cli.Setting("figure to write", Path("runs/evaluate.png"), kind=Path),
}
if __name__ == "__main__":
    cli.refuse_early(lambda: cli.parse(__doc__, SETTINGS))

import argparse
import csv
import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rspo
import sample
from lib import tasks
from lib.cli import UserError
from lib.tasks import Problem

# 97.5 % quantiles of Student's distribution at 1, 2, ... degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
# one look per curve in every figure, told apart in grey, too: colour, marker, dashes
LOOKS = [dict(zip(("color", "marker", "linestyle"), look), markersize=4) for look in (
    ("#555555", "s", "--"), ("#0072b2", "o", "-"), ("#d55e00", "^", "-."),
    ("#009e73", "v", ":"), ("#cc79a7", "D", "-"), ("#e69f00", "x", "--"))]


@dataclass(frozen=True)
class Curve:
    name: str  # what was evaluated
    metric: str  # "pass" or "max"
    ks: tuple[int, ...]
    values: Tensor  # (M, K) or (S, M, K): estimate of each problem at each k
    problems: tuple[str, ...]  # the M problem ids
    data: str = ""  # the data set, where it is known
    more: dict[str, Tensor] = field(default_factory=dict)  # other columns, (M,) or (S,) each


class Answer(NamedTuple):
    text: str
    finished: bool
    tokens: int


# ---------------------------------------------------------------- numbers

def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n."""
    return tuple(2**i for i in range(n.bit_length()))


def check_ks(ks: tuple[int, ...], n: int, name: str) -> None:
    for k in ks:
        if not 1 <= k <= n:
            raise UserError(f"k is {k}, but {name} has n = {n} samples per problem, and pass@k "
                            "has an unbiased estimate for 1 <= k <= n only")


def make_curve(name: str, problems: list[Problem], rewards: list[list[float]],
               ks: tuple[int, ...] | None = None) -> Curve:
    """Curve of rewards [M][n] at ks (default: powers of two up to n). UserError where k > n."""
    n = min(map(len, rewards))
    ks = ks or powers_of_two(n)
    check_ks(ks, n, name)
    graded = any(p.graded for p in problems)
    estimate = rspo.max_at_k if graded else rspo.pass_at_k
    if len(set(map(len, rewards))) == 1:
        values = torch.stack([estimate(rewards, k) for k in ks], -1)  # (M, K)
    else:
        values = torch.stack([torch.stack([estimate(r, k) for k in ks]) for r in rewards])
    return Curve(name, "max" if graded else "pass", ks, values, tuple(p.id for p in problems))


def describe_answers(groups: list[list[Answer]], rewards) -> dict[str, Tensor]:
    """What else n answers say, (M,) each: maj@n, mean tokens, share cut off.

    maj@n is the reward of the most frequent answer. What was cut off has no vote; a tie is shared.
    """
    def majority(group: list[Answer], values) -> float:
        votes: dict[str, list[float]] = {}
        for answer, value in zip(group, values):
            if answer.finished:
                votes.setdefault(tasks.vote(answer.text), []).append(value)
        most = max(map(len, votes.values()), default=0)
        winners = [mean(values) for values in votes.values() if len(values) == most]
        return mean(winners) if winners else 0.0

    mean = lambda values: sum(values) / len(values)
    columns = {f"maj@{min(map(len, groups))}": map(majority, groups, rewards),
               "tokens": (mean([answer.tokens for answer in group]) for group in groups),
               "cut off": (mean([not answer.finished for answer in group]) for group in groups)}
    return {name: torch.tensor(list(values)).double() for name, values in columns.items()}


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """(S, M, K) or (M, K) -> mean and half width of its 95 % interval, (K,) each; NaN if M = 1.

    Var(mean) = Var(seed means) / S + Var(problem means) / M: a little too wide rather than too
    narrow. Student's quantile, at the degrees of freedom of Welch and Satterthwaite.
    """
    values = values if values.ndim == 3 else values[None]
    S, M, _ = values.shape
    problems = values.mean(0).var(0) / M  # (K,)
    seeds = values.mean(1).var(0) / S if S > 1 else torch.zeros_like(problems)  # (K,)
    total = problems + seeds
    freedom = total**2 / (problems**2 / max(M - 1, 1) + seeds**2 / max(S - 1, 1))  # (K,)
    quantile = torch.tensor([student(f) for f in freedom.nan_to_num(1).tolist()])  # (K,)
    return values.mean((0, 1)), quantile * total.sqrt()


def student(freedom: float) -> float:
    """97.5 % quantile of Student's distribution."""
    if freedom < len(STUDENT) + 1:
        return STUDENT[max(int(freedom), 1) - 1]
    return 1.96 + 2.37 / freedom + 2.8 / freedom**2


def difference(after: Curve, before: Curve) -> tuple[tuple[int, ...], Tensor, Tensor] | None:
    """Shared ks, mean of after - before by problem, half width; None if nothing is shared."""
    ks = tuple(k for k in after.ks if k in before.ks)
    shared = [problem for problem in after.problems if problem in before.problems]
    if not ks or not shared or after.metric != before.metric:
        return None
    picked = []
    for curve in (after, before):
        row_of = {problem: i for i, problem in enumerate(curve.problems)}
        rows = curve.values[..., [row_of[problem] for problem in shared], :]
        picked.append(rows[..., [curve.ks.index(k) for k in ks]])  # (.., M', K')
    return ks, *interval(picked[0] - picked[1])


# ---------------------------------------------------------------- tables and figures

def summary(curves: list[Curve]) -> list[dict]:
    """The numbers of table and file: a row per data set, model, what it is held against, metric."""
    rows = []
    for curve in curves:
        first = next(other for other in curves if other.data == curve.data)
        own = {f"{curve.metric}@{k}": curve.values[..., [i]] for i, k in enumerate(curve.ks)}
        own |= {name: values[:, None] for name, values in curve.more.items()}
        found = [("", metric, *interval(values)) for metric, values in own.items()]
        if curve is not first and (change := difference(curve, first)):
            found += [(first.name, f"{curve.metric}@{k}", *both) for k, *both in zip(*change)]
        shared = len({*curve.problems} & {*first.problems})
        rows += [{"data": curve.data, "model": curve.name, "minus": minus, "metric": metric,
                  "mean": mean.item(), "half_width_95": half.item(),
                  "problems": shared if minus else len(curve.problems)}
                 for minus, metric, mean, half in found]
    return rows


def table(curves: list[Curve]) -> str:
    """Text of at most 100 columns: for each data set a line per curve, its change below."""
    rows, lines = summary(curves), []
    short = lambda text: text if len(text) <= 34 else f"...{text[-31:]}"
    for data in dict.fromkeys(row["data"] for row in rows):
        cells: dict[tuple, dict[str, str]] = {}  # (model, minus) -> metric -> cell
        for row in (row for row in rows if row["data"] == data):
            cells.setdefault((row["model"], row["minus"]), {})[row["metric"]] = cell(row)
        labels = {key: f"  minus {short(key[1])}" if key[1] else short(key[0]) for key in cells}
        columns = list(dict.fromkeys(metric for each in cells.values() for metric in each))
        width = max(map(len, [short(data), *labels.values()]))
        wide = 2 + max(len(text) for each in cells.values() for text in [*each.values(), *each])
        size = max(1, (100 - width) // wide)
        for part in (columns[i:i + size] for i in range(0, len(columns), size)):
            lines += ["", f"{short(data):{width}}" + "".join(f"{c:>{wide - 1}s} " for c in part)]
            for key, each in cells.items():
                if set(part) & set(each):
                    texts = [f"{each.get(c, '-'):>{wide}s}" for c in part]
                    lines.append(f"{labels[key]:{width}}" + "".join(texts))
    counts = ", ".join(dict.fromkeys(str(len(curve.problems)) for curve in curves))
    star = "; * = a change whose interval excludes 0" if any(row["minus"] for row in rows) else ""
    lines.append(f"95 % intervals over {counts} problems{star}")
    return "\n".join(line.rstrip() for line in lines[1:])


def cell(row: dict) -> str:
    """.479+-.049; a change has a sign, and a star where its interval excludes 0."""
    mean, half, change = row["mean"], row["half_width_95"], bool(row["minus"])
    star = "*" if change and abs(mean) > half else " "
    digits = 3 if abs(mean) < 10 else 1
    text = f"{mean:{'+' if change else ''}.{digits}f}+-{half:.{digits}f}{star}"
    return re.sub(r"(?<!\d)0\.", ".", text)


def draw_curves(axes, curves: list[Curve]) -> None:
    """All curves with their 95 % bands, k on a log axis."""
    several = len({curve.data for curve in curves}) > 1
    for i, curve in enumerate(curves):
        (mean, half), look = interval(curve.values), LOOKS[i % len(LOOKS)]
        axes.plot(curve.ks, mean, label=curve.name + f", {curve.data}" * several, **look)
        axes.fill_between(curve.ks, mean - half, mean + half, color=look["color"], alpha=0.15)
    ks = sorted({k for curve in curves for k in curve.ks})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k (answers sampled, the best one counts)",
             ylabel=f"{curves[0].metric}@k on held-out problems")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot(curves: list[Curve], path: Path, title: str) -> None:
    """All curves in one figure."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves)
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def plot_history(rows: list[dict], path: Path) -> None:
    """Six panels over the steps of a run: thin = each step, thick = mean of the last ten."""
    best = next(key for key in rows[0] if key.endswith("@k"))
    panels = {"reward": "mean reward", best: f"{best} at the training k",
              "entropy": "entropy (nats per answer)", "zero_weight_prompts": "without signal",
              "completion_tokens": "tokens per answer", "grad_norm": "gradient norm, unclipped"}
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axis, (column, title) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items()):
        steps, values = zip(*((row["step"], row[column]) for row in rows))
        axis.plot(steps, values, color=LOOKS[1]["color"], alpha=0.3, linewidth=0.8)
        axis.plot(steps, running_mean(values), color=LOOKS[1]["color"], linewidth=2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def running_mean(values, size: int = 10) -> list[float]:
    parts = (values[max(0, i - size + 1):i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


# ---------------------------------------------------------------- the script

def read_samples(path: Path) -> tuple[list[Problem], list[list[Answer]], str]:
    """Problems [M], answers [M][n] and data set of a samples file. UserError with its line."""
    problems, groups, data = [], [], set()
    for number, row in cli.read_rows(path):
        try:
            texts = [row[name] for name in ("id", "problem", "answer", "task", "data")]
            group = [Answer(each["text"], bool(each["finished"]), int(each["tokens"]))
                     for each in row["answers"]]
            if not all(isinstance(x, str) for x in [*texts, *(each.text for each in group)]):
                raise TypeError("id, problem, answer, task, data and texts must be text")
            if not group or not all(0 <= each.tokens < 2**31 for each in group):
                raise ValueError("no answers, or impossible tokens")
            problems.append(Problem(*texts[:4]))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path}, line {number}: not a row of sample.py "
                            f"({type(error).__name__}: {error})") from error
        groups.append(group)
        data.add(row["data"])
    if len(data) != 1:
        raise UserError(f"samples file {path} holds {len(data)} data sets, but must hold one")
    return problems, groups, data.pop()


def evaluate(args: argparse.Namespace, source: str, name: str) -> list[Curve]:
    """Curves of one --model entry, one per data set: a samples file is read, a model sampled."""
    try:
        ks = tuple(sorted({int(k) for k in args.k.split(",")})) if args.k else None
    except ValueError:
        raise UserError(f"--k is {args.k!r}, but must be a number or a list (1,4,16)") from None
    if source.endswith(".jsonl"):
        given = [word for word in sample.SAMPLING[2:] if getattr(args, word) is not None]
        if given and all(each.endswith(".jsonl") for each in args.model):
            raise UserError(f"{cli.flag(given[0])} does not apply to samples that are drawn "
                            "already: leave it out")
        curve = curve_of(Path(source), name, ks)
        if args.data and curve.data not in args.data.split(","):
            raise UserError(f"{source} holds answers to {curve.data!r}, not to --data {args.data}")
        return [curve]
    args = argparse.Namespace(**{**vars(args), "model": source})
    sample.settle(args)
    check_ks(ks or (1,), args.n, f"--model {source}")
    files = {}
    for data in args.data.split(","):
        state = hashlib.sha256(repr(sample.settings_of(args, data)).encode()).hexdigest()[:8]
        stem = "-".join(re.sub(r"[^\w.]", "-", Path(part).name) for part in (source, data))
        files[args.out.with_suffix("") / f"{stem}-{state}.jsonl"] = data
    sample.sample_files(args, files)
    return [curve_of(path, name, ks) for path in files]


def curve_of(path: Path, name: str, ks: tuple[int, ...] | None) -> Curve:
    """Curve of a samples file, graded now."""
    problems, groups, data = read_samples(path)
    rewards, _ = tasks.grade_all(problems, groups)
    more = describe_answers(groups, rewards)
    return replace(make_curve(name, problems, rewards, ks), data=data, more=more)


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(__doc__, SETTINGS, argv)
    args.model, args.out = args.model or ["toy"], args.out or SETTINGS["out"].default
    names = [Path(source).name for source in args.model]
    curves = [curve for source, name in zip(args.model, names)
              for curve in evaluate(args, source, name if names.count(name) == 1 else source)]
    order = list(dict.fromkeys(curve.data for curve in curves))
    curves.sort(key=lambda curve: order.index(curve.data))
    print(table(curves))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, args.out, ", ".join(order))
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        rows = summary(curves)
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"figure: {args.out}; its numbers: {args.out.with_suffix('.csv')}")


if __name__ == "__main__":
    cli.run_script(main)
