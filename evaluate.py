"""pass@k and max@k curves with 95 % intervals, of models, runs or samples files, in one table and one figure.

    python evaluate.py                                     the toy model on held-out Countdown problems
    python evaluate.py --model toy runs/x                  before and after, and their paired difference
    python evaluate.py --model samples.jsonl               what sample.py wrote, graded anew
    python evaluate.py --model Qwen2.5-Math-1.5B --data math500,aime2024,amc2023,minerva,olympiadbench

Each estimate is unbiased (Chen et al. 2021), from n samples a problem. The interval is over problems: it answers
"would it hold for other problems like these?", mean +- 1.96 standard errors over the M problems. Samples of one
problem are not independent evidence, so they are never counted as if they were. Two models on the same problems
are compared problem by problem, which removes the spread between easy and hard problems.

Beside the figure runs/evaluate.png stand the numbers, .json and .csv, and in runs/evaluate/ the samples, written as they
come: the same command goes on where it was stopped, and what is complete is not sampled again.
"""

import argparse
import csv
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import policy
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
    data: str = ""              # the data set, where it is known
    answers: dict[str, Tensor] = field(default_factory=dict)    # (M,) each: majority vote, mean tokens, share cut off


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


def describe_answers(groups: list[list[tuple[str, bool]]], tokens: list[list[int]], rewards: list[list[float]]) -> dict[str, Tensor]:
    """What else n answers of M problems say, (M,) each: maj@n, tokens (mean length), cut off (share).

    maj@n is the reward of the most frequent answer: of its boxed string (spaces apart), or of the whole text where there
    is no box; answers that were cut off have no vote; a tie is shared.
    """
    def majority(group, values) -> float:
        votes: dict[str, list[float]] = {}
        for (text, finished), value in zip(group, values):
            if finished:
                votes.setdefault(tasks.vote(text), []).append(value)
        most = max(map(len, votes.values()), default=0)
        winners = [sum(values) / most for values in votes.values() if len(values) == most]
        return sum(winners) / len(winners) if winners else 0.0

    mean = lambda values: sum(values) / len(values)
    return {f"maj@{min(map(len, groups))}": torch.tensor(list(map(majority, groups, rewards)), dtype=torch.float64),
            "tokens": torch.tensor(list(map(mean, tokens)), dtype=torch.float64),
            "cut off": torch.tensor([mean([not finished for _, finished in group]) for group in groups], dtype=torch.float64)}


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> mean and half width of its 95 % interval over the M problems, both (K,); NaN width for M = 1."""
    spread = values.std(0) if len(values) > 1 else torch.full_like(values[0], float("nan"))    # (K,)
    return values.mean(0), 1.96 * spread / len(values) ** 0.5                                  # (K,), (K,)


def difference(after: Curve, before: Curve) -> tuple[tuple[int, ...], Tensor, Tensor] | None:
    """Shared ks, mean of after - before problem by problem, half width; None if they share no problems or no k."""
    ks = tuple(k for k in after.ks if k in before.ks)
    row_of = {problem: i for i, problem in enumerate(before.problems)}
    shared = [(i, row_of[problem]) for i, problem in enumerate(after.problems) if problem in row_of]
    if not ks or not shared or after.metric != before.metric:
        return None
    a, b = map(torch.tensor, zip(*shared))
    pick = lambda curve, rows: curve.values[rows][:, [curve.ks.index(k) for k in ks]]          # (M', K')
    return ks, *interval(pick(after, a) - pick(before, b))


def table(curves: list[Curve]) -> str:
    """Aligned text. For each data set a row a curve, then each curve minus the first, problem by problem."""
    names = list(dict.fromkeys(curve.name for curve in curves))
    labels = [f"{name} - {names[0]}" for name in names] + [curve.data for curve in curves] + ["mean of 99 data sets"] * (len(curves) > len(names))
    width = max(map(len, labels)) + 1
    lines: list[str] = []
    for data in dict.fromkeys(curve.data for curve in curves):
        lines += _block([curve for curve in curves if curve.data == data], data, width)
    for name in names:
        own = [curve for curve in curves if curve.name == name]
        ks = tuple(k for k in own[0].ks if all(k in curve.ks for curve in own))
        if len(own) > 1 and ks:
            means, halves = zip(*(interval(curve.values[:, [curve.ks.index(k) for k in ks]]) for curve in own))
            half = torch.stack(halves).square().sum(0).sqrt() / len(own)                                # (K,)
            lines += ["", _header(f"mean of {len(own)} data sets", "pass", ks, (), width),
                      _row(name, ks, ks, torch.stack(means).mean(0), half, width=width)]
    counts = ", ".join(dict.fromkeys(str(len(curve.problems)) for curve in curves))
    return "\n".join([*lines, f"95 % intervals over {counts} problems" + (
        "; * = the interval of the paired difference excludes 0" if len(names) > 1 else "")])


def _block(curves: list[Curve], data: str, width: int) -> list[str]:
    """Lines of one data set."""
    ks = tuple(sorted({k for curve in curves for k in curve.ks}))
    metric = "/".join(dict.fromkeys(curve.metric for curve in curves))
    lines = [_header(data, metric, ks, tuple(curves[0].answers), width)]
    for curve in curves:
        cells = [f"{mean.item():.3f} +- {half.item():.3f}" if name.startswith("maj") else f"{mean.item():.{0 if name == 'tokens' else 3}f}"
                 for name, values in curve.answers.items() for mean, half in [interval(values[:, None])]]
        lines.append(_row(curve.name, ks, curve.ks, *interval(curve.values), width=width) + "".join(f"{cell:>18s}" for cell in cells))
    for curve in curves[1:]:
        change = difference(curve, curves[0])
        if change:
            lines.append(_row(f"{curve.name} - {curves[0].name}", ks, *change, width=width, change=True))
    return lines


def _header(label: str, metric: str, ks, others, width: int) -> str:
    return f"{label:<{width}s}" + "".join(f"{column:>18s}" for column in [*(f"{metric}@{k}" for k in ks), *others])


def _row(label: str, columns, ks, mean: Tensor, half: Tensor, width: int, change: bool = False) -> str:
    """A cell for each of columns (ks), "-" where this row has none; a change has a sign, and a star if it excludes 0."""
    cells = {}
    for k, m, h in zip(ks, mean.tolist(), half.tolist()):
        cells[k] = f"{m:{'+' if change else ''}.3f} +- {h:.3f}" + ("*" if abs(m) > h else " ") * change
    return f"{label:<{width}s}" + "".join(f"{cells.get(k, '-'):>18s}" for k in columns)


def write_numbers(curves: list[Curve], path: Path) -> None:
    """path.json and path.csv: a row for each data set, model and k, and for what else is known of the answers."""
    rows = []
    for curve in curves:
        columns = [(f"{curve.metric}@{k}", curve.values[:, i]) for i, k in enumerate(curve.ks)] + list(curve.answers.items())
        for metric, values in columns:
            mean, half = interval(values[:, None])
            rows.append({"data": curve.data, "model": curve.name, "metric": metric, "mean": mean.item(),
                         "half_width_95": half.item() if len(values) > 1 else None, "problems": len(values)})
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(curves: list[Curve], path: Path, title: str) -> None:
    """All curves with their 95 % bands in one figure, k on a log axis."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = ("s--", "o-", "^-.", "v:", "D-", "x--")
    several = len({curve.data for curve in curves}) > 1
    colours = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    for i, curve in enumerate(curves):
        mean, half = interval(curve.values)
        colour = colours[i % len(colours)]
        axes.plot(curve.ks, mean, styles[i % len(styles)], color=colour, label=f"{curve.name}, {curve.data}" if several else curve.name)
        axes.fill_between(curve.ks, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    ks = sorted({k for curve in curves for k in curve.ks})
    metric = " or ".join(dict.fromkeys(f"{curve.metric}@k" for curve in curves))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k (answers sampled, the best one counts)", ylabel=f"{metric} on held-out problems", title=title)
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

def read_samples(path: Path) -> tuple[list[Problem], list[list[tuple[str, bool]]], list[list[int]], str]:
    """Problems [M], (text, finished) answers and their tokens [M][n], and data set of a file of sample.py. UserError with file and line."""
    problems, groups, tokens, data = [], [], [], set()
    lines = tasks.read_lines(path)
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            row = tasks.parse_row(line)
            fields = [row[name] for name in ("id", "problem", "answer", "task", "data")]
            if not all(isinstance(value, str) for value in fields):
                raise TypeError("id, problem, answer, task and data must be text")
            problems.append(Problem(*fields[:4]))
            groups.append([(str(answer["text"]), bool(answer["finished"])) for answer in row["answers"]])
            tokens.append([int(answer["tokens"]) for answer in row["answers"]])
            if not 0 <= min(tokens[-1], default=0) <= max(tokens[-1], default=0) < 2**31:
                raise ValueError("tokens must lie in 0..2**31 - 1")
            data.add(row["data"])
            if not groups[-1]:
                raise ValueError("no answers")
            if len(data) > 1:
                raise ValueError(f"data set {row['data']!r}, but the lines before are of another")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path}, line {number}: not a row of sample.py ({type(error).__name__}: {error})") from error
    if not problems:
        raise UserError(f"samples file {path} holds no problems")
    return problems, groups, tokens, data.pop()


def evaluate(args: argparse.Namespace, source: str, name: str) -> list[Curve]:
    """Curves of one --model entry, one a data set: a samples file is read, anything else is sampled into files and then read."""
    if source.endswith(".jsonl"):
        given = [f"--{flag.replace('_', '-')}" for flag in ("n", "temperature", "max_new_tokens", "sampler", "dtype", "load_in_4bit", "limit", "seed")
                 if getattr(args, flag) is not None]
        if given and all(each.endswith(".jsonl") for each in args.model):
            raise UserError(f"{given[0]} does not apply to samples that are drawn already; leave it out")
        curves = [curve_of(Path(source), name, args.k)]
        if args.data and curves[0].data not in args.data.split(","):
            raise UserError(f"{source} holds answers to {curves[0].data!r}, not to --data {args.data}")
        return curves
    args = argparse.Namespace(**{**vars(args), "model": source})
    sample.fill_in(args, sample.sampling_defaults(source))
    check_ks(args.k, args.n)
    folder = args.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {}                                                                   # samples file -> settings, problems
    for data in args.data.split(","):
        settings = sample.settings_of(args, data)
        digest = hashlib.sha256(json.dumps([settings, weights_changed(source)]).encode()).hexdigest()[:8]
        stem = "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in Path(part).name) for part in (source, data))
        jobs[folder / f"{stem}-{digest}.jsonl"] = settings, tasks.load_problems(data, args.limit)
    missing = {path: job for path, job in jobs.items() if sample.rows_done(path, job[0]) < len(job[1])}
    if missing:
        sampler, prompts = sample.open_sampler(args, [problem for _, problems in missing.values() for problem in problems])
        for path, (settings, problems) in missing.items():
            sample.sample_to_file(path, settings, problems, sampler, prompts[:len(problems)])
            prompts = prompts[len(problems):]
    for path in jobs.keys() - missing.keys():
        print(f"{path} is complete already: not sampled again (delete it to do so)")
    return [curve_of(path, name, args.k) for path in jobs]


def weights_changed(source: str) -> int | None:
    """When the weights of a local model last changed, so that old samples are not taken for a new model's."""
    base, adapter = policy.resolve_model(source)
    files = [path for folder in (Path(base), adapter) if folder for path in folder.glob("*.safetensors")]
    return max((path.stat().st_mtime_ns for path in files), default=None)


def curve_of(path: Path, name: str, ks: tuple[int, ...] | None) -> Curve:
    """Curve of a samples file, graded now."""
    problems, groups, tokens, data = read_samples(path)
    rewards = tasks.grade_all(problems, groups)
    curve = make_curve(name, problems, rewards, ks)
    return replace(curve, data=data, answers=describe_answers(groups, tokens, rewards))


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
    parser.add_argument("--model", type=str, nargs="+", default=["toy"], help="what to evaluate, one or more: toy, hub id, short name, "
                        "local folder, run directory or a .jsonl of sample.py (default toy)")
    parser.add_argument("--k", type=parse_ks, help="ks to report, e.g. 1,8,64 (default: powers of two up to n)")
    sample.add_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate.png"),
                        help="figure (default runs/evaluate.png); numbers and samples are written beside it")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    names = [Path(source).name for source in args.model]
    curves = [curve for source, name in zip(args.model, names)
              for curve in evaluate(args, source, name if names.count(name) == 1 else source)]
    order = list(dict.fromkeys(curve.data for curve in curves))
    curves.sort(key=lambda curve: order.index(curve.data))
    print(table(curves))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, args.out, ", ".join(dict.fromkeys(curve.data for curve in curves)))
    write_numbers(curves, args.out)
    print(f"figure: {args.out}; numbers beside it (.json, .csv)")


if __name__ == "__main__":
    sample.run_script(main)
