"""pass@k and max@k curves with 95 % intervals, of models, runs or samples files, in one table and one figure.

    python evaluate.py                                     the toy model on held-out Countdown problems
    python evaluate.py --model toy runs/x                  before and after, and the difference problem by problem
    python evaluate.py --model samples.jsonl               what sample.py wrote, graded anew
    python evaluate.py --model Qwen2.5-Math-1.5B --data aime2024 --n 64

Each estimate is unbiased (Chen et al. 2021), from n samples a problem. The interval is over problems: it answers
"would it hold for other problems like these?", mean +- 1.96 standard errors over the M problems. Samples of one
problem are not independent evidence, so they are never counted as if they were. Two models on the same problems
are compared problem by problem, which removes the spread between easy and hard problems.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rspo
import sample
import tasks
from tasks import Problem, UserError


@dataclass(frozen=True)
class Curve:
    name: str                   # what was evaluated
    metric: str                 # "pass" or "max"
    ks: tuple[int, ...]
    values: Tensor              # (M, K) estimate of each problem at each k
    problems: tuple[str, ...]   # the M problem ids


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n."""
    return tuple(2**i for i in range(n.bit_length()))


def make_curve(name: str, problems: list[Problem], rewards: list[list[float]], ks: tuple[int, ...] | None = None) -> Curve:
    """Curve of rewards [M][n] at ks (default: powers of two up to n). Raises UserError where some k > n."""
    counts = {len(group) for group in rewards}
    n = min(counts)
    ks = ks or powers_of_two(n)
    if not 1 <= min(ks) <= max(ks) <= n:
        raise UserError(f"k is {min(ks) if min(ks) < 1 else max(ks)}, but {name} has n = {n} samples a problem, and pass@k has an unbiased "
                        "estimate for 1 <= k <= n only")
    metric = "max" if any(p.task == "countdown-graded" for p in problems) else "pass"
    estimate = rspo.max_at_k if metric == "max" else rspo.pass_at_k
    groups = [torch.tensor(group, dtype=torch.float64) for group in rewards]                   # M x (n,)
    if len(counts) == 1:
        values = torch.stack([estimate(torch.stack(groups), k) for k in ks], -1)               # (M, K)
    else:
        values = torch.stack([torch.stack([estimate(group, k) for k in ks]) for group in groups])
    return Curve(name, metric, ks, values, tuple(p.id for p in problems))


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> mean and half width of its 95 % interval over the M problems, both (K,); NaN width for M = 1."""
    spread = values.std(0) if len(values) > 1 else torch.full_like(values[0], float("nan"))    # (K,)
    return values.mean(0), 1.96 * spread / len(values) ** 0.5                                  # (K,), (K,)


def difference(after: Curve, before: Curve) -> tuple[tuple[int, ...], Tensor, Tensor] | None:
    """Shared ks, mean of after - before problem by problem, half width; None if they share no problems or no k."""
    ks = tuple(k for k in after.ks if k in before.ks)
    rows = {problem: i for i, problem in enumerate(before.problems)}
    shared = [(i, rows[problem]) for i, problem in enumerate(after.problems) if problem in rows]
    if not ks or not shared or after.metric != before.metric:
        return None
    a, b = (torch.tensor(rows) for rows in zip(*shared))
    pick = lambda curve, rows: curve.values[rows][:, [curve.ks.index(k) for k in ks]]          # (M', K')
    return ks, *interval(pick(after, a) - pick(before, b))


def table(curves: list[Curve]) -> str:
    """Aligned text: a row a curve, then each curve minus the first, problem by problem; * = interval excludes 0."""
    ks = tuple(sorted({k for curve in curves for k in curve.ks}))
    labels = [curve.name for curve in curves] + [f"{curve.name} - {curves[0].name}" for curve in curves[1:]]
    width = max(map(len, labels)) + 1
    metric = curves[0].metric
    lines = [" " * width + "".join(f"{f'{metric}@{k}':>18s}" for k in ks)]

    def row(label: str, row_ks, mean, half, sign: str = "", star: bool = False) -> str:
        cells = dict(zip(row_ks, (f"{m:{sign}.3f} +- {h:.3f}" + ("*" if star and abs(m) > h else " ") * star
                                  for m, h in zip(mean.tolist(), half.tolist()))))
        return f"{label:<{width}s}" + "".join(f"{cells.get(k, '-'):>18s}" for k in ks)

    for curve in curves:
        lines.append(row(curve.name, curve.ks, *interval(curve.values)))
    for curve in curves[1:]:
        change = difference(curve, curves[0])
        if change:
            lines.append(row(f"{curve.name} - {curves[0].name}", *change, sign="+", star=True))
    count = ", ".join(sorted({str(len(curve.problems)) for curve in curves}))
    lines.append(f"95 % intervals over {count} problems" + ("; * = the interval of the paired difference excludes 0" if len(curves) > 1 else ""))
    return "\n".join(lines)


def plot(curves: list[Curve], path: Path, title: str) -> None:
    """All curves with their 95 % bands in one figure, k on a log axis."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = ("s--", "o-", "^-.", "v:", "D-", "x--")
    colours = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    for i, curve in enumerate(curves):
        mean, half = interval(curve.values)
        colour = colours[i % len(colours)]
        axes.plot(curve.ks, mean, styles[i % len(styles)], color=colour, label=curve.name)
        axes.fill_between(curve.ks, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    ks = sorted({k for curve in curves for k in curve.ks})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k (answers sampled, the best one counts)", ylabel=f"{curves[0].metric}@k on held-out problems", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_history(rows: list[dict], path: Path) -> None:
    """Six panels over the steps of a run, from its metrics.jsonl: thin = each step, thick = mean of the last 10."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = next(key for key in rows[0] if key.endswith("@k"))
    panels = (("reward", "mean reward"), (best, f"{best} at the training k"), ("entropy", "entropy (nats an answer)"),
              ("zero_weight_prompts", "share of prompts without signal"), ("completion_tokens", "answer length (tokens)"),
              ("grad_norm", "gradient norm, before clipping"))
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), sharex=True, layout="constrained")
    for axis, (column, title) in zip(axes.flat, panels):
        values = torch.tensor([row[column] for row in rows], dtype=torch.float64)               # (S,)
        smooth = [values[max(0, i - 9):i + 1].mean().item() for i in range(len(values))]
        axis.plot(steps, values, color="#0072b2", alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth, color="#0072b2", linewidth=2)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------- samples files

def read_samples(path: Path) -> tuple[list[Problem], list[list[tuple[str, bool]]]]:
    """Problems and (text, finished) answers [M][n] of a file of sample.py. Raises UserError with file and line."""
    problems, groups = [], []
    lines = tasks.read_lines(path)
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            row = json.loads(line)
            problems.append(Problem(row["id"], row["problem"], row["answer"], row["task"]))
            groups.append([(str(answer["text"]), bool(answer["finished"])) for answer in row["answers"]])
            if not groups[-1]:
                raise ValueError("no answers")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a row of sample.py ({type(error).__name__}: {error})") from error
    if not problems:
        raise UserError(f"samples file {path} holds no problems")
    return problems, groups


def evaluate(args: argparse.Namespace, source: str) -> Curve:
    """Curve of one --model entry: a samples file is read, anything else is sampled."""
    name = Path(source).name
    if source.endswith(".jsonl"):
        problems, groups = read_samples(Path(source))
    else:
        args = argparse.Namespace(**{**vars(args), "model": source})
        sample.fill_in(args, sample.sampling_defaults(source))
        check_ks(args.k, args.n)
        rows = list(sample.sample_to_lines(args))
        problems = [Problem(row["id"], row["problem"], row["answer"], row["task"]) for row in rows]
        groups = [[(answer["text"], answer["finished"]) for answer in row["answers"]] for row in rows]
    return make_curve(name, problems, tasks.grade_all(problems, groups), args.k)


def check_ks(ks: tuple[int, ...] | None, n: int) -> None:
    if ks and not 1 <= min(ks) <= max(ks) <= n:
        raise UserError(f"--k is {','.join(map(str, ks))}, but every k must lie in 1..n = {n}: pass@k has no unbiased "
                        "estimate for k > n; raise --n")


def parse_ks(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(k) for k in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a list such as 1,4,16") from None


def make_parser() -> argparse.ArgumentParser:
    parser = sample.make_parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["toy"], help="what to evaluate, one or more: toy, hub id, short name, "
                        "local folder, run directory or a .jsonl of sample.py (default toy)")
    parser.add_argument("--k", type=parse_ks, help="ks to report, e.g. 1,8,64 (default: powers of two up to n)")
    sample.add_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate.png"), help="figure (default runs/evaluate.png)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    curves = [evaluate(args, source) for source in args.model]
    print(table(curves))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, args.out, args.data or "")
    print(f"figure: {args.out}")


if __name__ == "__main__":
    sample.run_script(main)
