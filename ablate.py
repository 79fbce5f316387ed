"""The paper's experiments as grids of train.py runs; each answers with a table, a figure and sentences the numbers support.

    python ablate.py alignment --quick      one experiment for the class: under three minutes, wide intervals
    python ablate.py all                    every experiment on the toy, five seeds, within the hour on 2 cores
    python ablate.py alignment --model Qwen2.5-Math-1.5B --seeds 2 --steps 100      any other flag is train.py's

A setting is one curve of an experiment, a cell is one run of train.py at one setting with one seed. Experiments share
cells, and a grid remembers them: stopped or killed, the same command goes on. In the folder --out are cells.jsonl (a line
a finished cell), cells/ (their run directories and logs) and NAME.md and NAME.png, one of each for an experiment.

Every claim is a paired difference: same seeds, same held-out problems. Seeds and problems are both random, so
Var(mean) = Var(seed means) / S + Var(problem means) / M, a little too wide rather than too narrow; 95 % intervals with
Student's quantile. On the toy, the held-out problems that helped to choose its settings are left out.

Shapes: S seeds, M held-out problems, K evaluated ks.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import bandit
import evaluate
import policy
import rspo
import sample
import tasks
import train
from tasks import UserError

KS = (1, 2, 4, 8)                       # trained for
EVAL_KS = (1, 2, 4, 8, 16)              # evaluated at
SEEN_PROBLEMS = 200                     # held-out problems that helped to choose the toy's settings (LOG.md)
FULL = {"seeds": 5, "first_seed": 31, "flags": ["--steps", "150", "--limit", "600", "--eval-n", "32"]}
QUICK = {"seeds": 2, "first_seed": 21, "flags": ["--steps", "30", "--limit", "300", "--eval-n", "16"]}
STUDENT = (12.71, 4.31, 3.19, 2.78, 2.58, 2.45, 2.37, 2.31, 2.27, 2.23)     # 97.5 % quantile at 1, 2, ... degrees of freedom


# ---------------------------------------------------------------- weights to hold beside RSPO's

def reward_weights(rewards: Tensor, k: int) -> Tensor:
    """W = R, (P, n) -> (P, n): the ordinary policy gradient, written without rspo.py. k is ignored."""
    return rewards


def flipped(weight_fn, share: float):
    """weight_fn on 0/1 rewards of which `share` are flipped. Which ones is a pure function of the rewards, so a resumed
    run flips the same; the log keeps showing the true rewards."""
    def weights(rewards: Tensor, k: int) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(rewards.numpy().tobytes()))
        flip = torch.rand(rewards.shape, generator=draw) < share                        # (P, n)
        return weight_fn(torch.where(flip, 1 - rewards, rewards), k)                    # (P, n)
    return weights


NOISE = (5, 10, 20)                     # percent of the training rewards
train.OBJECTIVES |= {"reward": reward_weights, "plugin": bandit.plug_in_weights, "grpo": bandit.grpo_weights,
                     **{f"{name}-flip{percent}": flipped(train.OBJECTIVES[name], percent / 100)
                        for name in ("passk", "groupmax") for percent in NOISE}}


# ---------------------------------------------------------------- the experiments: label -> flags of train.py

RSPO = {f"RSPO k = {k}": {"k": k} for k in KS}
GRADED = {f"RSPO Max@{k}": {"k": k, "objective": "maxk", "data": "countdown-graded"} for k in KS}       # toy only
GROUPMAX = {f"group max k = {k}": {"k": k, "objective": "groupmax"} for k in KS[1:]}
NOISY = {"RSPO k = 4": (4, "passk"), "RSPO k = 1": (1, "passk"), "group max k = 4": (4, "groupmax")}
EXPERIMENTS = {
    "sanity": {label: {"k": 1, "steps": 40, "objective": objective} for label, objective in (
        ("policy gradient", "reward"), ("RSPO Pass@1", "passk"), ("RSPO Max@1", "maxk"), ("group max k = 1", "groupmax"))},
    "alignment": RSPO | GRADED,
    "hitchhiking": RSPO | GROUPMAX,
    "entropy": RSPO,
    "noise": {f"{label}, {percent}% flipped": {"k": k, "objective": objective + f"-flip{percent}" * (percent > 0)}
              for label, (k, objective) in NOISY.items() for percent in (0, *NOISE)},
    "samples": {"n = 16": {"k": 4},
                **{f"n = {n}, equal steps": {"k": 4, "n": n} for n in (4, 8, 32)},
                **{f"n = {n}, equal samples": {"k": 4, "n": n, "prompts": 512 // n} for n in (4, 8, 32)}},
    "estimators": {"RSPO": {"k": 4}, "RSPO, leave-one-out": {"k": 4, "baseline": "loo"},
                   "group maximum": {"k": 4, "objective": "groupmax"}, "plug-in": {"k": 4, "objective": "plugin"},
                   "GRPO advantage": {"k": 4, "objective": "grpo"}},
    "curve": RSPO | {"RSPO k = 1,2,4,8,16": {"k": "1,2,4,8,16"}, "RSPO k = 8:1": {"k": "8:1"}},
}


def settings_of(name: str, toy: bool) -> dict[str, dict]:
    return {label: flags for label, flags in EXPERIMENTS[name].items() if toy or "data" not in flags}


# ---------------------------------------------------------------- the grid

@dataclass(frozen=True)
class Grid:
    folder: Path
    flags: tuple[str, ...]              # of train.py, shared by all cells
    seeds: tuple[int, ...]
    toy: bool

    def cell(self, setting: dict, seed: int) -> str:
        """Name of a cell: its flags and seed. The same for all experiments that share it."""
        flags = {name: value for name, value in setting.items() if value != "passk"} | {"seed": seed}
        return "_".join(f"{name}-{value}" for name, value in sorted(flags.items())).replace(":", "to").replace(",", "+")

    def argv(self, setting: dict, seed: int) -> list[str]:
        """Flags of train.py for a cell."""
        own = [text for name, value in (setting | {"seed": seed}).items() for text in (f"--{name}", str(value))]
        return [*self.flags, *own, "--run", str(self.folder / "cells" / self.cell(setting, seed))]

    def last_rows(self) -> dict[str, dict]:
        """Cell -> its last line in cells.jsonl."""
        path = self.folder / "cells.jsonl"
        rows = map(json.loads, tasks.read_lines(path)[:-1] if path.exists() else [])
        return {row["cell"]: row for row in rows}


def open_grid(args: argparse.Namespace, flags: list[str]) -> Grid:
    """The grid in --out, new or to go on with. Raises UserError if it was made with other settings."""
    for name in ("--k", "--objective", "--baseline", "--seed", "--run", "--resume"):
        if any(flag.split("=")[0] == name for flag in flags):
            raise UserError(f"{name} is what the experiments vary; leave it out (--seeds is their number, --out the folder)")
    scale = QUICK if args.quick else FULL
    folder = args.out or Path("runs/ablate-quick" if args.quick else "runs/ablate")
    toy = sample.is_toy(train.make_parser().parse_known_args(flags)[0].model or "toy")
    flags = (*(scale["flags"] if toy or args.quick else ()), *flags)
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, but must be at least 1")
    settled = vars(train.parse_flags([*flags, "--k", "1", "--run", str(folder / "cells" / "none")]))
    varied = ("k", "run", "resume", "seed", "objective", "baseline")
    settled = {name: value for name, value in settled.items() if name not in varied}
    low = SEEN_PROBLEMS + 2 if toy else 2
    if settled["limit"] is not None and settled["limit"] < low:
        raise UserError(f"--limit is {settled['limit']}, but must be at least {low}: an interval needs two held-out problems"
                        + f", and the first {SEEN_PROBLEMS} helped to choose the toy's settings" * toy)
    grid_file = folder / "grid.json"
    if grid_file.exists():
        known = json.loads(grid_file.read_text())
        for name in settled.keys() & known.keys():
            if settled[name] != known[name]:
                raise UserError(f"the grid in {folder} was made with --{name.replace('_', '-')} {known[name]}, "
                                f"not {settled[name]}: give another --out")
    else:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        unfinished = grid_file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(settled, indent=1) + "\n")
        unfinished.replace(grid_file)
    seeds = range(scale["first_seed"], scale["first_seed"] + (args.seeds or scale["seeds"]))
    return Grid(folder, flags, tuple(seeds), toy)


def log_of(run: Path) -> Path:
    return run.parent / f"{run.name}.log"


def run_cell(argv: list[str], run: Path) -> None:
    """One cell, in a process of its own: start it, or go on with what an interrupted one has left."""
    with log_of(run).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process().sentinel

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    if run.exists() and not (run / "config.json").exists():
        shutil.rmtree(run)
    sample.run_script(lambda: train.main(["--resume", str(run)] if run.exists() else argv))


def run_cells(grid: Grid, settings: list[dict]) -> None:
    """Run the missing cells of settings x seeds, each in its own process; a cell that fails is noted, the others go on."""
    cells = {grid.cell(setting, seed): grid.argv(setting, seed) for seed in grid.seeds for setting in settings}
    lines = grid.folder / "cells.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in grid.last_rows().values()))      # without half a line
    finished = {name for name, row in grid.last_rows().items() if row["failed"] is None}
    waiting = [name for name in cells if name not in finished]
    workers = (os.cpu_count() or 1) if grid.toy else 1              # a toy cell takes one core, a real model the machine
    if grid.toy:
        os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])                       # imported once, not once a cell
    running: dict[int, tuple] = {}                                  # sentinel -> process, name, start

    def leave(number, frame):
        sys.exit(128 + number)

    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="cells", unit="cell", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = waiting.pop(0)
                    path = grid.folder / "cells" / name
                    process = context.Process(target=run_cell, args=(cells[name], path))
                    process.start()
                    running[process.sentinel] = process, name, time.time()
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process, name, start = running.pop(sentinel)
                    process.join()
                    failed = failure(grid.folder / "cells" / name, process.exitcode)
                    row = {"cell": name, "seconds": round(time.time() - start, 1), "failed": failed}
                    with lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    if failed:
                        tqdm.write(f"failed: {name}: {failed}")
                    bar.update()
    finally:
        for process, *_ in running.values():
            process.terminate()                                     # train.py saves a checkpoint and leaves
        for process, *_ in running.values():
            process.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def failure(run: Path, exitcode: int) -> str | None:
    """Why a cell ended with this exit code: None for 0, else the last line of its log or the signal that ended it."""
    if exitcode == 0:
        return None
    lines = [line for line in log_of(run).read_text(errors="replace").splitlines() if line.strip()]
    return f"ended by signal {-exitcode}" if exitcode < 0 else lines[-1] if lines else f"exit code {exitcode}"


# ---------------------------------------------------------------- results and their intervals

@dataclass(frozen=True)
class Result:
    values: dict[int, Tensor]           # seed -> (M, K) estimate of each held-out problem at each k, after training
    metrics: dict[int, list[dict]]      # seed -> rows of metrics.jsonl
    ks: tuple[int, ...]
    failed: tuple[str, ...] = ()        # reasons


def read_result(grid: Grid, setting: dict) -> Result:
    values, metrics, failed, ks = {}, {}, [], ()
    rows = grid.last_rows()
    for seed in grid.seeds:
        name = grid.cell(setting, seed)
        run = grid.folder / "cells" / name
        if rows[name]["failed"]:
            failed.append(f"seed {seed}: {rows[name]['failed']}")
            continue
        read = lambda file: [json.loads(line) for line in tasks.read_lines(run / file)[:-1]]
        rewards = torch.tensor(read("evals.jsonl")[-1]["rewards"], dtype=torch.float64)         # (M, n)
        rewards = rewards[SEEN_PROBLEMS if grid.toy else 0:]
        ks = tuple(k for k in EVAL_KS if k <= rewards.shape[1])
        values[seed] = torch.stack([rspo.max_at_k(rewards, k) for k in ks], -1)                 # (M, K)
        metrics[seed] = read("metrics.jsonl")
    return Result(values, metrics, ks, tuple(failed))


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """(S, M, K) -> mean and half width of its 95 % interval over seeds and problems, (K,) each; for S = 1 over problems."""
    seeds, problems, _ = values.shape
    of_problems = values.mean(0).var(0) / problems                                              # (K,)
    of_seeds = values.mean(1).var(0) / seeds if seeds > 1 else torch.zeros_like(of_problems)    # (K,)
    total = of_problems + of_seeds                                                              # (K,)
    freedom = total**2 / (of_problems**2 / (problems - 1) + of_seeds**2 / max(seeds - 1, 1))    # (K,)  Welch-Satterthwaite
    student = [STUDENT[min(int(f), len(STUDENT)) - 1] if f >= 1 else STUDENT[0] for f in freedom.nan_to_num(1.0).tolist()]
    return values.mean((0, 1)), torch.tensor(student) * total.sqrt()


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over S seeds; NaN for one."""
    spread, half = torch.tensor(values, dtype=torch.float64), float("nan")             # (S,)
    if len(values) > 1:
        half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * spread.std().item() / len(values) ** 0.5
    return spread.mean().item(), half


def level(result: Result) -> tuple[Tensor, Tensor]:
    """metric@k of a setting: mean and half width, (K,) each."""
    return interval(torch.stack(list(result.values.values())))


def paired(a: Result, b: Result) -> tuple[Tensor, Tensor]:
    """a - b on the seeds they share: mean and half width, (K,) each."""
    return interval(torch.stack([a.values[seed] - b.values[seed] for seed in a.values if seed in b.values]))


def at(k: int, a: Result, b: Result | None = None) -> tuple[float, float]:
    """Mean and half width of a, or of a - b, at one k; NaN where the evaluation has too few samples for it."""
    if k not in a.ks:
        return float("nan"), float("nan")
    mean, half = paired(a, b) if b else level(a)
    return mean[a.ks.index(k)].item(), half[a.ks.index(k)].item()


def late(result: Result, column: str) -> dict[int, float]:
    """seed -> mean of a column of metrics.jsonl over the last quarter of training."""
    last = {seed: rows[-max(1, len(rows) // 4):] for seed, rows in result.metrics.items()}
    return {seed: sum(row[column] for row in rows) / len(rows) for seed, rows in last.items()}


# ---------------------------------------------------------------- tables and sentences

def pm(mean: float, half: float, sign: bool = False) -> str:
    """One cell of a table; a difference (sign) whose interval excludes 0 has a star; one seed has no interval over seeds."""
    mean, half = float(mean), float(half)
    if half != half:
        return f"{mean:{'+' if sign else ''}.3f} (no interval)"
    return f"{mean:{'+' if sign else ''}.3f} +- {half:.3f}" + ("*" if sign and abs(mean) > half else "")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def levels_table(results: dict[str, Result], metric: str = "pass") -> str:
    """A row a setting, a column a k; the best of each column in bold."""
    ks = next(iter(results.values())).ks
    best = torch.stack([level(result)[0] for result in results.values()]).max(0).values         # (K,)
    rows = []
    for label, result in results.items():
        cells = [(pm(mean, half), mean == top) for mean, half, top in zip(*level(result), best)]
        rows.append([label, *(f"**{cell}**" if bold else cell for cell, bold in cells)])
    return markdown(["", *(f"{metric}@{k}" for k in ks)], rows)


def differences_table(results: dict[str, Result], reference: str, metric: str = "pass") -> str:
    rows = [[f"{label} - {reference}", *(pm(mean, half, True) for mean, half in zip(*paired(result, results[reference])))]
            for label, result in results.items() if label != reference]
    return markdown(["paired difference", *(f"{metric}@{k}" for k in results[reference].ks)], rows)


def verdict(results: dict[str, Result], a: str, b: str, k: int, metric: str = "pass") -> str:
    """One sentence on setting a against b at k: which is better, or that the data do not separate them."""
    if a not in results or b not in results:
        return f"{a} against {b}: not to be said, {b if a in results else a} failed."
    if k not in results[a].ks:
        return f"{a} against {b}: {metric}@{k} needs more evaluation samples (--eval-n)."
    mean, half = at(k, results[a], results[b])
    if not abs(mean) > half:
        return f"{a} against {b}: {metric}@{k} {pm(mean, half, True)}; the data do not separate them."
    return f"{a} against {b}: {metric}@{k} is {'higher' if mean > 0 else 'lower'}, {mean:+.3f} +- {half:.3f}."


# ---------------------------------------------------------------- figures

class figure:
    """`with figure(path, columns) as axes:` draws panels and saves them."""

    def __init__(self, path: Path, columns: int, rows: int = 1):
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        size = 5.2 * columns, 4.2 * rows
        self.path, self.plt = path, plt
        self.figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        self.axes = list(axes.flat)

    def __enter__(self):
        return self.axes

    def __exit__(self, error, *_):
        if error is None:
            self.figure.savefig(self.path, dpi=130)
        self.plt.close(self.figure)


# one look a line, told apart in grey too: colour, marker, dashes
LOOKS = [{"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4} for colour, marker, dashes in (
    ("#555555", "s", "--"), ("#0072b2", "o", "-"), ("#d55e00", "^", "-."),
    ("#009e73", "v", ":"), ("#cc79a7", "D", "-"), ("#e69f00", "x", "--"))]


def label_axis(axis, title: str, xlabel: str, ylabel: str, **more) -> None:
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **more)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def draw_levels(axis, results: dict[str, Result], title: str, minus: str | None = None) -> None:
    """pass@k over k of each setting with its 95 % interval, or its paired difference to the setting `minus`."""
    for i, (look, (label, result)) in enumerate(zip(LOOKS, results.items())):
        mean, half = paired(result, results[minus]) if minus else level(result)
        aside = 2 ** (0.06 * (i - (len(results) - 1) / 2))              # so that intervals do not hide each other
        axis.errorbar([k * aside for k in result.ks], mean, half, label=label, capsize=2, **look)
    ks = next(iter(results.values())).ks
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, list(map(str, ks)))
    label_axis(axis, title, "k evaluated at", f"pass@k minus that of {minus}" if minus else "pass@k, held-out problems")


def draw_points(axis, look: dict, label: str, xs, results: dict[str, Result], labels: list[str], ks) -> None:
    """pass@ks[i] of the setting labels[i] at xs[i], with its 95 % interval; settings that failed are left out."""
    points = [(x, *at(k, results[name])) for x, name, k in zip(xs, labels, ks) if name in results]
    if points:
        axis.errorbar(*zip(*points), label=label, capsize=3, **look)


def draw_training(axis, results: dict[str, Result], column: str, title: str, ylabel: str) -> None:
    """A column of metrics.jsonl over the steps: mean over seeds and the last 10 steps."""
    for look, (label, result) in zip(LOOKS, results.items()):
        rows = [[row[column] for row in metrics] for metrics in result.metrics.values()]
        values = torch.tensor(rows, dtype=torch.float64).mean(0)                                # (steps,)
        smooth = [values[max(0, i - 9):i + 1].mean().item() for i in range(len(values))]
        axis.plot(range(1, len(values) + 1), smooth, label=label, markevery=max(1, len(values) // 8), **look)
    label_axis(axis, title, "step", ylabel)


def draw_matrix(axis, matrix: Tensor, rows: list[str], columns: list[str], title: str, half: Tensor | None = None) -> None:
    """Heat map of (R, C) values; the best of each column bold and framed, shade = distance from it."""
    distance = matrix.max(0).values - matrix                                                    # (R, C)
    axis.imshow(-distance, cmap="Greys_r", aspect="auto", vmin=-1.6 * float(distance.max().clamp(min=1e-9)))
    for row in range(len(rows)):
        for column in range(len(columns)):
            best = distance[row, column] == 0
            text = f"{matrix[row, column]:.3f}" + ("" if half is None else f"\n+-{half[row, column]:.3f}")
            axis.text(column, row, text, ha="center", va="center", fontsize=8, weight="bold" if best else "normal",
                      bbox={"facecolor": "white", "edgecolor": "black" if best else "white", "pad": 2})
    axis.set(title=title, xlabel="evaluated at", ylabel="trained for", xticks=range(len(columns)), xticklabels=columns,
             yticks=range(len(rows)), yticklabels=rows)


# ---------------------------------------------------------------- one function an experiment: its text, its figure

def sanity(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """k = 1 is the policy gradient: identical parameters, identical curves."""
    reference, rows = "policy gradient", []
    if reference not in results:
        return "The reference run failed: nothing to compare with."

    def adapter(label: str, seed: int) -> dict[str, Tensor]:
        run = grid.folder / "cells" / grid.cell(EXPERIMENTS["sanity"][label], seed)
        return load_file(policy.newest_checkpoint(run) / "adapter_model.safetensors")

    rewards = lambda label, seed: [row["reward"] for row in results[label].metrics[seed]]
    for label, result in results.items():
        seeds = result.values.keys() & results[reference].values.keys()
        gap = max((adapter(label, seed)[name] - tensor).abs().max().item()
                  for seed in seeds for name, tensor in adapter(reference, seed).items())
        same = all(rewards(label, seed) == rewards(reference, seed) for seed in seeds)
        rows.append([label, f"{gap:g}", "identical" if same else "different"])
    with figure(path, 1) as (axis,):
        draw_training(axis, results, "reward", "k = 1: four objectives, one line", "mean reward of the training samples")
    table = markdown(["", "largest difference of a parameter", "rewards of every step"], rows)
    if any(row[1:] != ["0", "identical"] for row in rows):
        return f"{table}\n\nAt k = 1 all of these should be the policy gradient, but they differ."
    size = sum(tensor.numel() for tensor in adapter(reference, min(results[reference].values)).values())
    return (f"{table}\n\nAt k = 1 all of these are the policy gradient, whose weights are written without rspo.py here: "
            f"after 40 steps, for each of {len(grid.seeds)} seed(s), all {size} adapter parameters are equal bit for bit.")


# a sure action worth .45 beside the risky ones
PARTIAL = bandit.Bandit(bandit.HIDDEN_TYPES.chance,
                        torch.cat([torch.eye(4), torch.full((4, 1), 0.45), torch.zeros(4, 3)], -1).double())


def alignment(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """Train for k, evaluate at every k: is the k trained for the best at itself?"""
    exact = {"pass": bandit.alignment(EVAL_KS, bandit.HIDDEN_TYPES), "max": bandit.alignment(EVAL_KS, PARTIAL)}
    families = {"pass": {label: results[label] for label in RSPO if label in results},
                "max": {label: results[label] for label in GRADED if label in results}}
    families = {metric: family for metric, family in families.items() if family}
    parts = ["Exact bandit, trained by the exact gradient (Max@k: with a sure action worth .45 beside the risky ones):"]
    for metric, matrix in exact.items():
        best = matrix.max(0).values                                                             # (K,)
        rows = [[str(k), *(f"**{value:.3f}**" if value == top else f"{value:.3f}" for value, top in zip(row, best))]
                for k, row in zip(EVAL_KS, matrix)]
        hits = int(((best - matrix.diagonal()) < 5e-4).sum())
        parts += [markdown([f"trained for ({metric}@k)", *map(str, EVAL_KS)], rows),
                  f"{metric}@k: the k trained for is the best of its column, to 3 digits, in {hits} of {len(EVAL_KS)}."]
    with figure(path, len(families), rows=2) as axes:
        for above, below, (metric, family) in zip(axes, axes[len(families):], families.items()):
            name, columns = f"{metric.title()}@k", [f"{metric}@{k}" for k in EVAL_KS]
            draw_matrix(above, exact[metric], [f"k = {k}" for k in EVAL_KS], columns, f"{name}, exact bandit")
            means, halves = (torch.stack(x) for x in zip(*map(level, family.values())))         # (R, K)
            draw_matrix(below, means, list(family), columns[:means.shape[1]], f"{name}, language model", halves)
    for metric, family in families.items():
        parts += [f"Language model, {metric}@k:", levels_table(family, metric), bullets(best_of_columns(family, metric))]
    return "\n\n".join(parts)


def best_of_columns(family: dict[str, Result], metric: str) -> list[str]:
    """For each k the best setting, and which others the paired differences do not separate from it."""
    lines = []
    for k in next(iter(family.values())).ks:
        best = max(family, key=lambda label: at(k, family[label])[0])
        gaps = {label: at(k, family[best], family[label]) for label in family if label != best}
        close = [label for label, (mean, half) in gaps.items() if not mean > half]
        lines.append(f"{metric}@{k}: best is {best}"
                     + (f"; not separated from it: {', '.join(close)}." if close else ", separated from all others."))
    return lines


def hitchhiking(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """The paper's baseline gives every member of a group of k the group's best reward: unbiased, and noisy."""
    pairs = list(zip(KS[1:], list(RSPO)[1:], GROUPMAX))                                         # k, ours, theirs
    noise_of = gradient_noise(grid, {label: (weight_fn, k) for k, ours, theirs in pairs for label, weight_fn in (
        (ours, rspo.pass_at_k_weights), (theirs, rspo.group_max_weights))})
    ratios = [variance_ratio(noise_of[theirs], noise_of[ours]) for _, ours, theirs in pairs]
    rows = []
    for (k, ours, theirs), (ratio, half) in zip(pairs, ratios):
        signals = " / ".join(f"{signal_to_noise(noise_of[label], 32):.2f}" for label in (ours, theirs))
        row = [str(k), f"{ratio:.1f} +- {half:.1f}", signals]
        if ours in results and theirs in results:
            a, b = results[ours], results[theirs]
            ends = " / ".join(f"{over_seeds(list(late(result, 'entropy').values()))[0]:.2f}" for result in (a, b))
            row += [pm(*at(k, a)), pm(*at(k, b)), pm(*at(k, b, a), True), pm(*at(1, b, a), True), ends]
        rows.append(row + ["failed"] * (8 - len(row)))
    with figure(path, 3) as (left, middle, right):
        draw_points(left, LOOKS[1], "RSPO", KS[1:], results, [ours for _, ours, _ in pairs], KS[1:])
        draw_points(left, LOOKS[2], "group max", KS[1:], results, [theirs for *_, theirs in pairs], KS[1:])
        label_axis(left, "Outcome at the k trained for", "k", "pass@k, held-out problems", xticks=KS[1:])
        shown = ("RSPO k = 2", "RSPO k = 8", "group max k = 2", "group max k = 8")
        draw_training(middle, {label: results[label] for label in shown if label in results}, "entropy",
                      "Entropy over training", "entropy (nats an answer)")
        right.errorbar(KS[1:], *zip(*ratios), capsize=3, **LOOKS[2])
        label_axis(right, "Gradient noise at the initial policy", "k", "variance of the gradient, group max / RSPO",
                   xticks=KS[1:])
    header = ["k", "variance of the gradient at the start, group max / RSPO",
              "signal-to-noise of a 32-prompt step, RSPO / group max", "RSPO, pass@k", "group max, pass@k",
              "group max - RSPO at pass@k", "group max - RSPO at pass@1", "entropy at the end, RSPO / group max"]
    return "\n\n".join([
        markdown(header, rows), bullets([verdict(results, theirs, ours, k) for k, ours, theirs in pairs]),
        "The group max's gradient is unbiased (exact in `python bandit.py`), so both have the same signal: the ratio of the "
        "variances is how many times more prompts it needs for the same signal-to-noise. Where its entropy stays high it has "
        "learned less; that is no virtue.", levels_table(results)])


def entropy(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """Entropy of an answer and distinct right answers over training, by k."""
    columns = {"entropy": "entropy (nats an answer)", "distinct_correct": "distinct right answers of a prompt's n samples",
               "reward": "mean reward"}
    rows = [[label, *(pm(*over_seeds(list(late(result, column).values()))) for column in columns)]
            for label, result in results.items()]
    first, *others = results
    lines = []
    for column in ("entropy", "distinct_correct"):
        for label in others:
            a, b = late(results[label], column), late(results[first], column)
            mean, half = over_seeds([a[seed] - b[seed] for seed in a if seed in b])
            how = "not separated" if not abs(mean) > half else "higher" if mean > 0 else "lower"
            lines.append(f"{column.replace('_correct', ' right answers')}, {label} against {first}: "
                         f"{pm(mean, half, True)} ({how}; paired over seeds).")
    with figure(path, 3) as axes:
        for axis, (column, name) in zip(axes, columns.items()):
            draw_training(axis, results, column, name[0].upper() + name[1:].split(" (")[0], name)
    return "\n\n".join([
        markdown(["last quarter of training", *columns.values()], rows), bullets(lines),
        "Entropy by itself is no virtue: a policy that learns nothing keeps all of it (see hitchhiking). Distinct right answers "
        "say whether what is kept is of use."])


def noise(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """A share of the binary training rewards is flipped; evaluation stays clean."""
    labels = {family: [f"{family}, {percent}% flipped" for percent in (0, *NOISE)] for family in NOISY}
    ours, *others = labels
    lines = [verdict(results, a, b, 4) for other in others for a, b in zip(labels[ours], labels[other])]
    lines += [verdict(results, noisy, labels[family][0], 4) for family in labels for noisy in labels[family][1:]]
    with figure(path, 2) as axes:
        for axis, k in zip(axes, (1, 4)):
            for look, family in zip(LOOKS, labels):
                draw_points(axis, look, family, (0, *NOISE), results, labels[family], [k] * (1 + len(NOISE)))
            label_axis(axis, f"Noisy rewards, pass@{k}", "flipped training rewards (%)", f"pass@{k}, held-out problems",
                       xticks=(0, *NOISE))
    return f"{levels_table(results)}\n\n{bullets(lines)}"


def samples(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """n samples a prompt at k = 4: equal steps (32 prompts) and equal samples (512 a step), and n below 2k."""
    counts, rows = (4, 8, 16, 32), []
    warnings.simplefilter("ignore", UserWarning)                        # that n < 2k is what is shown here
    for n in counts:
        groups = (torch.arange(n) < torch.arange(1, n + 1)[:, None]).double()                   # (n, n): c = 1, ..., n right
        weights = [f"{weight:.2f}" for weight in rspo.pass_at_k_weights(groups, 4)[:, 0].tolist()]
        rows.append([str(n), " ".join(weights[:8]) + " ..." * (n > 8)])
    lines = [verdict(results, label, "n = 16", 4) for label in results if label != "n = 16"]
    for label, result in results.items():
        idle = pm(*over_seeds(list(late(result, "zero_weight_prompts").values())))
        lines.append(f"{label}: a share of {idle} of the prompts gives no signal in the last quarter of training.")
    with figure(path, 1) as (axis,):
        for look, kind, size in zip(LOOKS[1:], ("equal steps", "equal samples"), ("32 prompts", "512 answers")):
            labels = ["n = 16" if n == 16 else f"n = {n}, {kind}" for n in counts]
            draw_points(axis, look, f"{kind}: {size} a step", counts, results, labels, [4] * 4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, ("4 = k", "8 = 2k", "16", "32"))
        label_axis(axis, "Samples a prompt, trained for k = 4", "n", "pass@4, held-out problems")
    header = ["n", "weight of a right answer at k = 4, if 1, 2, ... are right"]
    return "\n\n".join([
        levels_table(results), bullets(lines), markdown(header, rows),
        "At n = k a right answer counts only if it is the only one; from n = 2k on its weight falls in several steps as right "
        "answers become common."])


def estimators(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """RSPO beside leave-one-out, group max, plug-in and GRPO's normalised advantage at k = 4: bias, variance, outcome."""
    k, rates, shown = 4, (.02, .05, .1, .2, .3, .5, .7, .9), (1, 4, 16)
    exact = {label: table[0] for label, table in bandit.compare_estimators((k,), rates, 16).items()}    # (rates, 3) each
    noise_of = gradient_noise(grid, {label: (weight_fn, k) for label, weight_fn in bandit.ESTIMATORS.items()})
    rows = []
    for label, table in exact.items():
        bias = table[:, 0] / table[:, 2]                                                        # (rates,)
        unbiased = (bias - 1).abs().max() < 1e-6
        ratio, half = variance_ratio(noise_of[label], noise_of["RSPO"])
        outcome = [pm(*at(k, results[label])) if label in results else "failed" for k in shown]
        rows.append([label, "none" if unbiased else f"{bias.min():.2f} to {bias.max():.2f} times the gradient",
                     f"{ratio:.2f} +- {half:.2f}" if unbiased else "-", *outcome])
    with figure(path, 2) as (left, right):
        for look, (label, table) in zip(LOOKS, exact.items()):
            left.plot(rates, table[:, 0] / table[:, 2], label=label, **look)
        label_axis(left, f"Bias (exact, bandit, k = {k}, n = 16)", "success rate of the prompt",
                   "mean of the estimate / true gradient", yscale="log")
        if "RSPO" in results:
            draw_levels(right, results, f"Outcome, trained for k = {k}", minus="RSPO")
    header = ["", "bias at success rates .02 to .9 (exact)", "variance of the gradient at the start / RSPO's",
              *(f"pass@{k}" for k in shown)]
    lines = [verdict(results, label, "RSPO", k) for label in exact if label != "RSPO" for k in shown]
    return "\n\n".join([
        markdown(header, rows), bullets(lines),
        "Two of them estimate another gradient, so their variance says nothing. GRPO's advantage also has another scale, which "
        "Adam takes away, and does not know k."] + [differences_table(results, "RSPO")] * ("RSPO" in results))


def whole_curve(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """A mixture of ks and a schedule against single ks: is a setting never beaten, at any k?"""
    lines = []
    for label, result in results.items():
        beaten = []
        for other in results.keys() - {label}:
            beaten += [(k, other) for k, mean, half in zip(result.ks, *paired(results[other], result)) if mean > half]
        lines.append(f"{label}: " + ("not beaten at any k, as far as these data separate." if not beaten else
                                     f"beaten at {'; '.join(f'pass@{k} by {other}' for k, other in sorted(beaten))}."))
    reference = "RSPO k = 4" if "RSPO k = 4" in results else next(iter(results))
    with figure(path, 2) as (left, right):
        draw_levels(left, results, "The whole curve")
        draw_levels(right, results, f"Paired difference to {reference}", minus=reference)
    return "\n\n".join([levels_table(results), bullets(lines), differences_table(results, reference)])


REPORTS = {"sanity": sanity, "alignment": alignment, "hitchhiking": hitchhiking, "entropy": entropy, "noise": noise,
           "samples": samples, "estimators": estimators, "curve": whole_curve}


# ---------------------------------------------------------------- the gradient's own noise, at the initial policy

def gradient_noise(grid: Grid, weightings: dict[str, tuple], prompts: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """label -> (weight function, k)  to  label -> (mean gradient (D,), squared norm of each prompt's gradient (P,)).

    One set of samples from the initial policy serves all weightings; a prompt's gradient is (1/n) sum_i W_i grad log pi(y_i)
    in the adapter's D parameters.
    """
    args = train.parse_flags([*grid.flags, "--k", "1", "--seed", "20", "--run", str(grid.folder / "cells" / "none")])
    if grid.toy:
        torch.set_num_threads(1)
    model, tokenizer = policy.load_model(args.model, args.dtype)
    model = policy.add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    problems = tasks.train_and_eval(args.data, args.eval_data, 1)[0][:prompts or (256 if grid.toy else 32)]
    prompt_ids = sample.encode_prompts(problems, tokenizer, sample.context_length(model.config), args.max_new_tokens)
    groups = list(sample.sample_problems(sample.HFSampler(model, tokenizer), prompt_ids, 16, args.temperature,
                                         args.max_new_tokens, seed=0, label="sampling for the gradient's noise"))
    rewards = torch.tensor(tasks.grade_all(problems, train.responses(groups)))                  # (P, n)
    weights = {label: fn(rewards, k) for label, (fn, k) in weightings.items()}                  # (P, n) each
    parameters = list(policy.trainable(model).values())
    sums = {label: torch.zeros(sum(p.numel() for p in parameters)) for label in weightings}     # (D,) each
    norms = {label: torch.zeros(len(groups), dtype=torch.float64) for label in weightings}      # (P,) each
    for row, group in enumerate(tqdm(groups, desc="gradient of each prompt", leave=False, disable=None)):
        logprobs, of_sample = policy.token_logprobs(model, group, args.temperature)             # (N,), (N,)
        for label in weightings:
            if weights[label][row].any():
                token_weights = weights[label][row].to(logprobs)[of_sample]                     # (N,)
                loss = rspo.policy_gradient_loss(logprobs, token_weights, len(group))
                gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradient = torch.cat([part.flatten().float().cpu() for part in gradient])       # (D,)
                sums[label] += gradient
                norms[label][row] = gradient.double().square().sum()
    return {label: (sums[label] / len(groups), norms[label]) for label in weightings}


def signal_to_noise(noise: tuple[Tensor, Tensor], prompts: int) -> float:
    """Squared length of the true gradient over the variance (trace of the covariance) of a step of that many prompts."""
    mean, norms = noise[0].double(), noise[1]
    variance = (norms.sum() - len(norms) * mean.square().sum()) / (len(norms) - 1)              # of one prompt's gradient
    return ((mean.square().sum() - variance / len(norms)) / variance * prompts).item()


def variance_ratio(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean squared norm of a prompt's gradient, a's over b's, and half its 95 % interval over prompts (delta method).

    For two unbiased estimators whose noise dwarfs their signal this is the ratio of their variances.
    """
    ratio = a[1].mean() / b[1].mean()
    return ratio.item(), (1.96 * (a[1] - ratio * b[1]).std() / len(a[1]) ** 0.5 / b[1].mean()).item()


# ---------------------------------------------------------------- the script

def report(name: str, grid: Grid, command: str) -> None:
    """Print an experiment's text and write it and the figure to the grid's folder."""
    read = {label: read_result(grid, setting) for label, setting in settings_of(name, grid.toy).items()}
    results = {label: result for label, result in read.items() if result.values}
    failed = [f"{label}: failed, {reason}" for label, result in read.items() for reason in result.failed]
    parts = [f"## {name}", REPORTS[name].__doc__, *([bullets(failed)] if failed else [])]
    if results:
        problems = len(next(iter(next(iter(results.values())).values.values())))
        over = "over problems only, for there is one seed" if len(grid.seeds) == 1 else "over both"
        parts += [REPORTS[name](grid, results, grid.folder / f"{name}.png"),
                  f"{len(grid.seeds)} seed(s), {problems} held-out problems, 95 % intervals {over}; * = the interval of a "
                  f"difference excludes 0. Command: `{command}`"]
    else:
        parts.append("Every cell failed: there is nothing to report.")
    text = "\n\n".join(parts)
    (grid.folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nfigure: {grid.folder / name}.png" if results else f"\n{text}")


def main() -> None:
    parser = sample.make_parser(__doc__)
    parser.usage = "%(prog)s NAME [flags]      any flag of train.py may follow"
    parser.add_argument("name", type=str, help=f"experiment: {', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--quick", action="store_true", help="two seeds and 30 steps: under three minutes, wide intervals")
    parser.add_argument("--seeds", type=int, help="seeds of each setting (default 5, with --quick 2)")
    parser.add_argument("--out", type=Path, help="folder of the grid (default runs/ablate, with --quick runs/ablate-quick)")
    args, flags = parser.parse_known_args()
    if args.name not in (*EXPERIMENTS, "all"):
        raise UserError(f"experiment {args.name!r} is unknown{tasks.nearest(args.name, EXPERIMENTS)}; give one of "
                        f"{', '.join(EXPERIMENTS)}, all")
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    grid = open_grid(args, flags)
    command = "python ablate.py " + " ".join(sys.argv[1:])
    run_cells(grid, [setting for name in names for setting in settings_of(name, grid.toy).values()])
    for name in names:
        report(name, grid, command)


if __name__ == "__main__":
    sample.run_script(main)
