"""pass@k and max@k curves with 95 % intervals: of models, runs or samples files.

    python evaluate.py                          the toy model
    python evaluate.py --model toy runs/NAME    before, after, and the change
    python evaluate.py --model samples.jsonl    what sample.py wrote
    python evaluate.py --model Qwen2.5-Math-1.5B --data math500

Each estimate is unbiased (Chen et al. 2021). The interval asks: would it hold
for other problems like these (and other seeds)? All models are sampled alike and
compared problem by problem. Beside the figure stand its numbers (.csv), answers to
read (.html) and, in a folder, the samples: the same command goes on where it was
stopped.

Shapes: S seeds, M problems, n samples of each, K evaluated ks.
"""

from pathlib import Path

from lib import cli

SHARED = ("data", "n", "temperature", "max_new_tokens", "dtype", "load_in_4bit", "limit")
SETTINGS = {
    "model": cli.Setting("models as in train.py, or .jsonl files of sample.py", kind=list),
    "k": cli.Setting("ks to report, such as 1,8,64 (default: powers of two)", kind=str),
    **{name: cli.SETTINGS[name] for name in (*SHARED, "sampler", "seed")},
    "out": cli.Setting("figure to write", Path("runs/evaluate.png"), kind=Path),
}
if __name__ == "__main__":
    cli.refuse_early(lambda: cli.parse(__doc__, SETTINGS))

import argparse
import csv
import math
import re
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle
from statistics import fmean
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rspo
import sample
from lib import page, policy, run, tasks
from lib.tasks import Problem

SHARES = ("pass@", "cut off")  # metrics that lie between 0 and 1
# in every figure, told apart in grey, too: colour, marker, dashes
LOOKS = {"before": ("#555555", "s", "--"), "k = 1": ("#0072b2", "o", "-"),
         "k = 8": ("#d55e00", "^", "-."), "k = 2": ("#009e73", "v", ":"),
         "k = 4": ("#e69f00", "x", "--"), "k = 16": ("#cc79a7", "D", "-"),
         "group max": ("#000000", "P", "--")}


@dataclass(frozen=True)
class Curve:
    name: str  # what was evaluated
    metric: str  # "pass" or "max"
    ks: tuple[int, ...]
    values: Tensor  # (M, K) or (S, M, K): estimate of each problem at each k
    problems: tuple[str, ...]  # the M problem ids
    more: dict[str, Tensor] = field(default_factory=dict)  # columns, (M,) or (S,)
    failures: int = 0  # answers that the grader lost: they count as wrong
    rows: tuple = ()  # the answers themselves: see page.rows_of


class Answer(NamedTuple):
    text: str
    finished: bool


class Samples(NamedTuple):
    problems: list[Problem]  # [M]
    groups: list[list[Answer]]  # [M][n]
    settings: dict  # how they were drawn


# -------- numbers

def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n."""
    return tuple(2**i for i in range(n.bit_length()))


def check_ks(ks: tuple[int, ...], n: int, name: str) -> None:
    for k in ks:
        if not 1 <= k <= n:
            cli.fail(f"k is {k}, but {name} has n = {n}: pass@k needs 1 <= k <= n")


def make_curve(name: str, problems: list[Problem], rewards: list[list[float]],
               ks: tuple[int, ...] | None = None) -> Curve:
    """Curve of rewards [M][n] at ks (default: powers of two up to n)."""
    n = len(rewards[0])
    ks = ks or powers_of_two(n)
    check_ks(ks, n, name)
    graded = any(p.graded for p in problems)
    estimate = rspo.max_at_k if graded else rspo.pass_at_k
    values = torch.stack([estimate(rewards, k) for k in ks], -1)  # (M, K)
    return Curve(name, "max" if graded else "pass", ks, values, tuple(p.id for p in problems))


def interval(values: Tensor, comparisons: int = 1) -> tuple[Tensor, Tensor]:
    """(S, M, K) or (M, K) -> mean, half width of its 95 % interval, (K,); NaN if M = 1.

    Var(mean) = Var(seed means) / S + Var(problem means) / M: rather too wide than
    too narrow. Student's quantile at the degrees of freedom of Welch-Satterthwaite.
    Of several comparisons all intervals hold at once with 95 % (Bonferroni).
    """
    values = values if values.ndim == 3 else values[None]
    S, M, _ = values.shape
    problems = values.mean(0).var(0) / M  # (K,)
    seeds = values.mean(1).var(0) / S if S > 1 else torch.zeros_like(problems)  # (K,)
    total = problems + seeds
    freedom = total**2 / (problems**2 / max(M - 1, 1) + seeds**2 / max(S - 1, 1))  # (K,)
    quantile = [student(f, 0.05 / comparisons) for f in freedom.nan_to_num(1).tolist()]  # (K,)
    return values.mean((0, 1)), torch.tensor(quantile) * total.sqrt()


@cache
def student(freedom: float, outside: float = 0.05) -> float:
    """t such that |x| > t has the chance `outside` for an x of Student's distribution.

    The density of a, with x = sqrt(freedom) tan(a), is cos(a)^(freedom - 1) over its sum.
    """
    freedom = max(1.0, min(freedom, 1000.0))
    angles = torch.linspace(0, math.pi / 2, 20001).double()
    mass = angles.cos().clamp(min=0).pow(freedom - 1).cumsum(0)
    place = torch.searchsorted(mass, (1 - outside) * mass[-1])
    return freedom**0.5 * angles[place].tan().item()


def level(metric: str, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S, M, K) or (M, K) -> mean and both ends of its 95 % interval, (K,) each.

    Near 0 and 1 Student's interval is far too narrow: if all of 30 problems are
    solved, its width is 0. So that of a share counts two more problems, one that is
    never solved and one that always is, and ends at 0 and 1.
    """
    if not metric.startswith(SHARES):
        mean, half = interval(values)
        return mean, mean - half, mean + half
    never = torch.zeros_like(values[..., :1, :])
    middle, half = interval(torch.cat([values, never, never + 1], -2))
    low, high = (middle - half).clamp(min=0), (middle + half).clamp(max=1)
    return values.flatten(0, -2).mean(0), low, high


def difference(after: Curve, before: Curve, comparisons: int = 1):
    """Shared ks, mean of after - before, half width; None if nothing is shared."""
    ks = tuple(k for k in after.ks if k in before.ks)
    known = set(before.problems)
    shared = [problem for problem in after.problems if problem in known]
    if not ks or not shared or after.metric != before.metric:
        return None

    def pick(curve: Curve) -> Tensor:
        row_of = {problem: i for i, problem in enumerate(curve.problems)}
        rows = curve.values[..., [row_of[problem] for problem in shared], :]
        return rows[..., [curve.ks.index(k) for k in ks]]
    return ks, *interval(pick(after) - pick(before), comparisons)


# -------- tables and figures

def summary(curves: list[Curve], comparisons: int = 1) -> list[dict]:
    """The numbers of table and .csv: a row per curve, or change, and metric."""
    rows, first = [], curves[0]
    for curve in curves:
        own = {f"{curve.metric}@{k}": curve.values[..., [i]] for i, k in enumerate(curve.ks)}
        own |= {name: values[:, None] for name, values in curve.more.items()}
        found = [("", metric, *level(metric, values)) for metric, values in own.items()]
        if curve is not first and (change := difference(curve, first, comparisons)):
            found += [(first.name, f"{curve.metric}@{k}", mean, mean - half, mean + half)
                      for k, mean, half in zip(*change)]
        shared = len({*curve.problems} & {*first.problems})
        for minus, metric, *ends in found:
            numbers = dict(zip(("mean", "low_95", "high_95"), map(float, ends)))
            rows.append({
                "model": curve.name, "minus": minus, "metric": metric, **numbers,
                "problems": shared if minus else len(curve.problems),
                "grader_failures": curve.failures + first.failures * bool(minus)})
    return rows


def table(curves: list[Curve], title: str = "", comparisons: int = 1) -> str:
    """At most 100 columns: a line per curve, its change against the first below."""
    rows, lines, found = summary(curves, comparisons), [], {}
    for row in rows:  # its label, under "", and its cells by metric
        model, minus = row["model"], row["minus"]
        change = f"  minus {shorten(minus)} ({row['problems']} problems)"
        label = change if minus else shorten(model)
        cells = found.setdefault((model, minus), {"": label})
        cells[row["metric"]] = cell(row)
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    width = max(len(shorten(title)), *(len(cells[""]) for cells in found.values()))
    wide = 2 + max(len(cell(row)) for row in rows)
    size = max(1, (100 - width) // wide)
    for part in (metrics[i:i + size] for i in range(0, len(metrics), size)):
        heads = {"": shorten(title), **{name: f"{name} " for name in part}}
        lines += [""] * bool(lines)
        for cells in (heads, *found.values()):
            if cells.keys() & {*part}:
                texts = (f"{cells.get(name, '- '):>{wide}}" for name in part)
                lines.append(f"{cells['']:{width}}" + "".join(texts))
    counts = ", ".join(dict.fromkeys(str(len(curve.problems)) for curve in curves))
    lines.append(f"95 % intervals (their wider side) over {counts} problems")
    if any(row["minus"] for row in rows):
        lines[-1] += "; * = a change whose interval excludes 0"
    if comparisons > 1:
        lines.append(f"with 95 %, all {comparisons} intervals of changes hold at once")
    return "\n".join(map(str.rstrip, lines))


def shorten(text: str) -> str:
    return text if len(text) <= 34 else f"...{text[-31:]}"


def cell(row: dict) -> str:
    """.479+-.049; a change has a sign, and a star where its interval excludes 0."""
    mean, sign = row["mean"], "+" if row["minus"] else ""
    half = max(row["high_95"] - mean, mean - row["low_95"])
    star = "*" if sign and (row["low_95"] > 0 or row["high_95"] < 0) else " "
    digits = 3 if abs(mean) < 10 else 1
    return re.sub(r"(?<!\d)0\.", ".", f"{mean:{sign}.{digits}f}+-{half:.{digits}f}{star}")


def looks_of(names: list[str]) -> list[dict]:
    """How each curve is drawn: as its method is everywhere, else as is left."""
    looks = {}
    for name in names:
        k = re.search(r"(?:k = |Max@)(\d+)", name)
        wanted = "group max" if "group" in name else f"k = {k[1]}" if k else name
        if wanted in LOOKS.keys() - looks.values():
            looks[name] = wanted
    left = cycle([look for look in LOOKS if look not in looks.values()] or LOOKS)
    drawn = [LOOKS[looks.get(name) or next(left)] for name in names]
    keys = "color", "marker", "linestyle"
    return [dict(zip(keys, look), markersize=4) for look in drawn]


def draw_curves(axes, curves: list[Curve]) -> None:
    """All curves with their 95 % bands, k on a log axis."""
    for curve, look in zip(curves, looks_of([curve.name for curve in curves])):
        mean, low, high = level(f"{curve.metric}@", curve.values)
        axes.plot(curve.ks, mean, label=curve.name, **look)
        axes.fill_between(curve.ks, low, high, color=look["color"], alpha=0.15)
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


def best_of_k(rows: list[dict]) -> tuple[str, str]:
    """The column pass@k or max@k; its name, by its k if all rows have the same."""
    column = next(name for name in rows[0] if name.endswith("@k"))
    ks = {row["k"] for row in rows}
    return column, column[:-1] + (ks.pop() if len(ks) == 1 else "k")


def plot_history(rows: list[dict], path: Path) -> None:
    """Six columns of metrics.jsonl over the steps of a run."""
    best, label = best_of_k(rows)
    columns = ["reward", best, "entropy"]
    columns += ["zero_weight_prompts", "completion_tokens", "grad_norm"]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, column in zip(figure.subplots(2, 3, sharex=True).flat, columns):
        values = [row[column] for row in rows]
        axes.plot(steps, values, color="#0072b2", alpha=0.3, label="each step")
        axes.plot(steps, running_mean(values), color="#0072b2", label="mean of ten")
        axes.set(title=label if column == best else column, xlabel="step")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def running_mean(values, size: int = 10) -> list[float]:
    return [fmean(values[max(0, i - size):i]) for i in range(1, len(values) + 1)]


# -------- the script

def read_samples(path: Path) -> Samples:
    """A samples file, with problems and gold answers as the data holds them now."""
    settings, problems, groups, mended = None, [], [], 0
    for number, row in cli.read_rows(path):
        where = f"{path}, line {number}"
        try:
            head = {name: row[name] for name in sample.HEAD}
            group = [Answer(each["text"], bool(each["finished"])) for each in row["answers"]]
            if None in (head[name] for name in SHARED if name != "limit"):
                raise TypeError("a setting is null")
            if not settings:
                settings, data = head, str(head["data"])
                problems = tasks.load_problems(data, head["limit"])
                if head["data_digest"] != tasks.digest_of(problems):
                    cli.fail(f"{where}: {data} asks something else now: sample it again")
        except (KeyError, TypeError) as error:
            cli.fail(f"{where}: not a row of sample.py ({type(error).__name__}: {error})")
        for name, value in settings.items():
            if head[name] != value:
                cli.fail(f"{where}: {name} is {head[name]!r}, but {value!r} in the first line")
        problem = problems[len(groups)] if len(groups) < len(problems) else None
        if not problem or row.get("id") != problem.id:
            cli.fail(f"{where}: the id {row.get('id')!r} is not the next one of {data}")
        if len(group) != head["n"] or not all(isinstance(each.text, str) for each in group):
            cli.fail(f"{where}: not n = {head['n']} texts")
        mended += row.get("answer") != problem.answer
        groups.append(group)
    if not groups:
        cli.fail(f"samples file {path} holds no samples")
    if mended:
        print(f"{path}: {mended} gold answers have changed in {data} since: graded as now")
    return Samples(problems[:len(groups)], groups, settings)


def settle(args) -> tuple[dict, dict]:
    """Settings of each --model, and the samples of those that are files.

    In SHARED all are alike: as the flags say, else as files and runs were sampled;
    the other models follow. UserError before anything is sampled.
    """
    args.dtype = args.dtype and policy.pick_dtype(args.dtype)
    try:
        args.k = args.k and tuple(sorted({int(k) for k in args.k.split(",")}))
    except ValueError:
        cli.fail(f"--k is {args.k!r}, but must be a number or a list (1,4,16)")
    entries, files = {}, {}
    for source in args.model:
        entries[source] = argparse.Namespace(**{**vars(args), "model": source})
        if source.endswith(".jsonl"):
            files[source] = read_samples(Path(source))
            vars(entries[source]).update(files[source].settings)
        else:
            sample.settle(entries[source])
    own = [each for each in entries if each in files or run.flags_of(each)] or [*entries]
    for name in SHARED:
        first, value = "the command line", getattr(args, name)
        if value is None:
            first, value = own[0], getattr(entries[own[0]], name)
        for source, entry in entries.items():
            differs = getattr(entry, name)
            if source in own and differs != value:
                cli.fail("what is compared must be sampled alike, but "
                         f"{name} is {value!r} in {first} and {differs!r} in {source}")
            setattr(entry, name, value)
    check_ks(args.k or (1,), entries[own[0]].n, own[0])
    return entries, files


def names_of(sources: list[str]) -> dict[str, str]:
    """What tables and legends call them: what they are, where that differs."""
    names = [describe(source) for source in sources]
    return {source: name if names.count(name) == 1 else source
            for source, name in zip(sources, names)}


def describe(source: str) -> str:
    """"RSPO k = 8, step 40 of 400" of a run or checkpoint, else its name."""
    flags = run.flags_of(source)
    adapter = flags and run.resolve_model(source)[1]
    step = adapter and re.fullmatch(r"step_0*(\d+)", adapter.name)
    if not step:
        return Path(source).name
    method = flags["objective"]
    method = {"passk": "RSPO", "maxk": "RSPO max@k"}.get(method, method)
    return f"{method} k = {flags['k']}, step {step[1]} of {flags['steps']}"


def sample_model(args) -> Samples:
    """Samples of a model, in a file beside the figure."""
    problems = tasks.load_problems(args.data, args.limit)
    stem = re.sub(r"[^\w.]", "-", f"{Path(args.model).name}-{Path(args.data).name}")
    folder, head = args.out.with_suffix(""), sample.head_of(args, problems)
    path = folder / f"{stem}-{cli.digest(head)[:8]}.jsonl"
    if not path.exists() and any(folder.glob(f"{stem}-????????.jsonl")):
        print(f"{args.model} on {args.data} is sampled again: weights, settings or data changed")
    sample.sample_file(args, path, problems, head)
    return read_samples(path)


def curve_of(samples: Samples, name: str, ks: tuple | None) -> Curve:
    """Curve of samples, graded now."""
    problems, groups, _ = samples
    rewards, failures = tasks.grade_all(problems, groups)
    if failures:
        print(f"{failures} answers of {name} were not graded: they earn 0")
    cut = [fmean(not each.finished for each in group) for group in groups]  # (M,)
    return replace(make_curve(name, problems, rewards, ks),
                   more={"cut off": torch.tensor(cut).double()}, failures=failures,
                   rows=tuple(page.rows_of(problems, groups, rewards)))


def main(argv=None) -> None:
    args = cli.parse(__doc__, SETTINGS, argv)
    args.model = list(dict.fromkeys(args.model or ["toy"]))
    args.out = args.out or SETTINGS["out"].default
    entries, files = settle(args)
    data = entries[args.model[0]].data
    curves = [curve_of(files.get(source) or sample_model(entries[source]), name, args.k)
              for source, name in names_of(args.model).items()]
    print(table(curves, data))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, args.out, data)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        rows = summary(curves)
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    k = run.flags_of(args.model[-1]).get("k", cli.SETTINGS["k"].default)
    sides = [(curve.name, curve.rows) for curve in curves]
    page.write(args.out.with_suffix(".html"), data, k, sides)
    print(f"figure: {args.out}; beside it numbers (.csv) and answers to read (.html)")


if __name__ == "__main__":
    cli.run_script(main)
