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
EXPERIMENTS = {
    "sanity": {"policy gradient": {"k": 1, "steps": 40, "objective": "reward"}, "RSPO Pass@1": {"k": 1, "steps": 40},
               "RSPO Max@1": {"k": 1, "steps": 40, "objective": "maxk"}, "group max k = 1": {"k": 1, "steps": 40, "objective": "groupmax"}},
    "alignment": RSPO | GRADED,
    "hitchhiking": RSPO | GROUPMAX,
    "entropy": RSPO,
    "noise": {f"{label}, {percent}% flipped": {"k": k} if percent == 0 else {"k": k, "objective": f"{objective}-flip{percent}"}
              for label, k, objective in (("RSPO k = 4", 4, "passk"), ("RSPO k = 1", 1, "passk")) for percent in (0, *NOISE)}
             | {f"group max k = 4, {percent}% flipped": {"k": 4, "objective": "groupmax" + f"-flip{percent}" * (percent > 0)}
                for percent in (0, *NOISE)},
    "samples": {"n = 16": {"k": 4},
                **{f"n = {n}, equal steps": {"k": 4, "n": n} for n in (4, 8, 32)},
                **{f"n = {n}, equal samples": {"k": 4, "n": n, "prompts": 512 // n} for n in (4, 8, 32)}},
    "estimators": {"RSPO": {"k": 4}, "RSPO, leave-one-out": {"k": 4, "baseline": "loo"}, "group maximum": {"k": 4, "objective": "groupmax"},
                   "plug-in": {"k": 4, "objective": "plugin"}, "GRPO advantage": {"k": 4, "objective": "grpo"}},
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
        """Name of a cell: its flags and seed."""
        text = "_".join(f"{name}-{value}" for name, value in sorted((setting | {"seed": seed}).items()))
        return text.replace(":", "to").replace(",", "+")

    def argv(self, setting: dict, seed: int) -> list[str]:
        own = [text for name, value in (setting | {"seed": seed}).items() for text in (f"--{name}", str(value))]
        return [*self.flags, *own, "--run", str(self.folder / "cells" / self.cell(setting, seed))]

    def finished(self) -> dict[str, dict]:
        """Cell -> its last line in cells.jsonl."""
        path = self.folder / "cells.jsonl"
        rows = map(json.loads, tasks.read_lines(path)[:-1] if path.exists() else [])
        return {row["cell"]: row for row in rows}


def open_grid(args: argparse.Namespace, flags: list[str]) -> Grid:
    """The grid in --out, new or to go on with. Raises UserError if it was made with other settings."""
    for name in ("--k", "--objective", "--baseline", "--seed", "--run", "--resume"):
        if any(flag.split("=")[0] == name for flag in flags):
            raise UserError(f"{name} is what the experiments vary; leave it out (--seeds is the number of seeds, --out the folder)")
    scale = QUICK if args.quick else FULL
    folder = args.out or Path("runs/ablate-quick" if args.quick else "runs/ablate")
    toy = sample.is_toy(train.make_parser().parse_known_args(flags)[0].model or "toy")
    flags = (*(scale["flags"] if toy or args.quick else ()), *flags)
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, but must be at least 1")
    settled = vars(train.parse_flags([*flags, "--k", "1", "--run", str(folder / "cells" / "none")]))
    settled = {name: value for name, value in settled.items() if name not in ("k", "run", "resume", "seed", "objective", "baseline")}
    low = SEEN_PROBLEMS + 2 if toy else 2
    if settled["limit"] is not None and settled["limit"] < low:
        raise UserError(f"--limit is {settled['limit']}, but must be at least {low}: an interval needs two held-out problems"
                        + f", and the first {SEEN_PROBLEMS} helped to choose the toy's settings" * toy)
    grid_file = folder / "grid.json"
    if grid_file.exists():
        known = json.loads(grid_file.read_text())
        for name in settled.keys() | known.keys():
            if settled.get(name) != known.get(name):
                raise UserError(f"the grid in {folder} was made with --{name.replace('_', '-')} {known.get(name)}, not {settled.get(name)}: "
                                "give another --out")
    else:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        unfinished = grid_file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(settled, indent=1) + "\n")
        unfinished.replace(grid_file)
    seeds = range(scale["first_seed"], scale["first_seed"] + (args.seeds or scale["seeds"]))
    return Grid(folder, flags, tuple(seeds), toy)


def run_cell(argv: list[str], run: Path, log: Path) -> None:
    """One cell, in a process of its own: start it, or go on with what an interrupted one has left."""
    with log.open("w") as file:
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
    lines.write_text("".join(json.dumps(row) + "\n" for row in grid.finished().values()), encoding="utf-8")     # without half a line
    finished = {name for name, row in grid.finished().items() if row["failed"] is None}
    waiting = [name for name in cells if name not in finished]
    workers = (os.cpu_count() or 1) if grid.toy else 1              # a toy cell takes one core, a real model the machine
    if grid.toy:
        os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(["train"])                       # imported once, not once a cell
    running: dict[int, tuple] = {}                                  # sentinel -> process, name, start

    def leave(number, frame):
        sys.exit(128 + number)

    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="cells", unit="cell", smoothing=0.1, disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = waiting.pop(0)
                    path = grid.folder / "cells" / name
                    process = context.Process(target=run_cell, args=(cells[name], path, path.with_suffix(".log")))
                    process.start()
                    running[process.sentinel] = process, name, time.time()
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process, name, start = running.pop(sentinel)
                    process.join()
                    row = {"cell": name, "seconds": round(time.time() - start, 1), "failed": failure(grid.folder / "cells" / name, process.exitcode)}
                    with lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    if row["failed"]:
                        tqdm.write(f"failed: {name}: {row['failed']}")
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
    lines = [line for line in run.with_suffix(".log").read_text(errors="replace").splitlines() if line.strip()]
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
    rows = grid.finished()
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
    """(S, M, K) -> mean and half width of its 95 % interval over seeds and problems, (K,) each; with S = 1 over problems only."""
    seeds, problems, _ = values.shape
    of_problems = values.mean(0).var(0) / problems                                              # (K,)
    of_seeds = values.mean(1).var(0) / seeds if seeds > 1 else torch.zeros_like(of_problems)    # (K,)
    total = of_problems + of_seeds                                                              # (K,)
    freedom = total**2 / (of_problems**2 / (problems - 1) + of_seeds**2 / max(seeds - 1, 1))    # (K,)  Welch and Satterthwaite
    student = [STUDENT[min(int(f), len(STUDENT)) - 1] if f >= 1 else STUDENT[0] for f in freedom.nan_to_num(1.0).tolist()]
    return values.mean((0, 1)), torch.tensor(student) * total.sqrt()


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over S seeds; NaN for one."""
    mean, half = torch.tensor(values, dtype=torch.float64), float("nan")
    if len(values) > 1:
        half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * mean.std().item() / len(values) ** 0.5
    return mean.mean().item(), half


def level(result: Result) -> tuple[Tensor, Tensor]:
    return interval(torch.stack(list(result.values.values())))


def paired(a: Result, b: Result) -> tuple[Tensor, Tensor]:
    """a - b on the seeds they share: mean and half width, (K,) each."""
    return interval(torch.stack([a.values[seed] - b.values[seed] for seed in a.values if seed in b.values]))


def late(result: Result, column: str) -> dict[int, float]:
    """seed -> mean of a column of metrics.jsonl over the last quarter of training."""
    last = {seed: rows[-max(1, len(rows) // 4):] for seed, rows in result.metrics.items()}
    return {seed: sum(row[column] for row in rows) / len(rows) for seed, rows in last.items()}


def curve(results: dict[str, Result], label: str, column: str, window: int = 10) -> Tensor:
    """(steps,) mean over seeds of a column of metrics.jsonl, each the mean of the last `window` steps."""
    values = torch.tensor([[row[column] for row in rows] for rows in results[label].metrics.values()], dtype=torch.float64).mean(0)
    return torch.stack([values[max(0, i - window + 1):i + 1].mean() for i in range(len(values))])


def pm(mean, half, sign: bool = False) -> str:
    """One cell of a table; a difference (sign) whose interval excludes 0 has a star."""
    mean, half = float(mean), float(half)
    return f"{mean:{'+' if sign else ''}.3f} +- {half:.3f}" + ("*" if sign and abs(mean) > half else "")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def levels_table(results: dict[str, Result], metric: str = "pass") -> str:
    """A row a setting, a column a k; the best of each column in bold."""
    ks = next(iter(results.values())).ks
    means = torch.stack([level(result)[0] for result in results.values()])                      # (settings, K)
    rows = [[label, *(f"**{pm(m, h)}**" if m == best else pm(m, h) for m, h, best in zip(*level(result), means.max(0).values))]
            for label, result in results.items()]
    return markdown(["", *(f"{metric}@{k}" for k in ks)], rows)


def differences_table(results: dict[str, Result], reference: str, metric: str = "pass") -> str:
    rows = [[f"{label} - {reference}", *(pm(m, h, True) for m, h in zip(*paired(result, results[reference])))]
            for label, result in results.items() if label != reference]
    return markdown(["paired difference", *(f"{metric}@{k}" for k in results[reference].ks)], rows)


def verdict(results: dict[str, Result], a: str, b: str, k: int, metric: str = "pass") -> str:
    """One sentence on setting a against b at k: which is better, or that the data do not separate them."""
    if a not in results or b not in results:
        return f"- {a} against {b}: not to be said, {b if a in results else a} failed."
    if k not in results[a].ks:
        return f"- {a} against {b}: {metric}@{k} needs more evaluation samples (--eval-n)."
    mean, half = (float(x[results[a].ks.index(k)]) for x in paired(results[a], results[b]))
    if not abs(mean) > half:
        return f"- {a} against {b}: {metric}@{k} {pm(mean, half, True)}; the data do not separate them."
    return f"- {a} against {b}: {metric}@{k} is {'higher' if mean > 0 else 'lower'}, {pm(mean, half, True).rstrip('*')}."


class figure:
    """`with figure(path, columns, title) as axes:` draws a row of panels and saves them."""

    def __init__(self, path: Path, columns: int, rows: int = 1):
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        self.path, self.plt = path, plt
        self.figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.2 * rows), layout="constrained", squeeze=False)
        self.axes = list(axes.flat)

    def __enter__(self):
        return self.axes

    def __exit__(self, error, *_):
        if error is None:
            self.figure.savefig(self.path, dpi=130)
        self.plt.close(self.figure)


# one look a line, told apart in grey too: colour, marker, dashes
LOOKS = [{"color": colour, "marker": marker, "linestyle": dashes} for colour, marker, dashes in (
    ("#555555", "s", "--"), ("#0072b2", "o", "-"), ("#d55e00", "^", "-."), ("#009e73", "v", ":"), ("#cc79a7", "D", "-"), ("#e69f00", "x", "--"))]


def draw_levels(axis, results: dict[str, Result], title: str, metric: str = "pass", minus: str | None = None) -> None:
    """metric@k over k of each setting with its 95 % interval, or its paired difference to the setting `minus`."""
    for i, (look, (label, result)) in enumerate(zip(LOOKS, results.items())):
        mean, half = paired(result, results[minus]) if minus else level(result)
        aside = 2 ** (0.06 * (i - (len(results) - 1) / 2))                                      # so that intervals do not hide each other
        axis.errorbar([k * aside for k in result.ks], mean, half, label=label, capsize=2, markersize=4, **look)
    ks = next(iter(results.values())).ks
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, list(map(str, ks)))
    axis.set(title=title, xlabel="k evaluated at", ylabel=f"{metric}@k" + (f" minus that of {minus}" if minus else ", held-out problems"))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def draw_training(axis, results: dict[str, Result], column: str, label: str) -> None:
    """A column of metrics.jsonl over the steps, mean over seeds and the last 10 steps."""
    for look, name in zip(LOOKS, results):
        values = curve(results, name, column)
        axis.plot(range(1, len(values) + 1), values, label=name, markevery=max(1, len(values) // 8), markersize=4, **look)
    axis.set(xlabel="step", ylabel=label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


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

    for label, result in results.items():
        gaps = [(adapter(label, seed)[name] - tensor).abs().max().item()
                for seed in result.values.keys() & results[reference].values.keys() for name, tensor in adapter(reference, seed).items()]
        same = all([row["reward"] for row in result.metrics[seed]] == [row["reward"] for row in results[reference].metrics[seed]]
                   for seed in result.metrics.keys() & results[reference].metrics.keys())
        rows.append([label, f"{max(gaps):g}", "identical" if same else "different"])
    with figure(path, 1) as (axis,):
        draw_training(axis, results, "reward", "mean reward of the training samples")
        axis.set_title("k = 1: four objectives, one line")
    equal = all(row[1:] == ["0", "identical"] for row in rows)
    size = sum(tensor.numel() for tensor in adapter(reference, min(results[reference].values)).values())
    return (markdown(["", "largest difference of a parameter", "rewards of every step"], rows) + "\n\n"
            + (f"At k = 1 all of these are the policy gradient, whose weights are written without rspo.py here: after 40 steps and for each of "
               f"{len(grid.seeds)} seeds all {size} adapter parameters are equal bit for bit." if equal else
               "At k = 1 all of these should be the policy gradient, but they differ: see the table."))


PARTIAL = bandit.Bandit(bandit.HIDDEN_TYPES.chance, torch.cat([torch.eye(4), torch.full((4, 1), 0.45), torch.zeros(4, 3)], -1).double())


def alignment(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """Train for k, evaluate at every k: is the k trained for the best at itself?"""
    exact = {"pass": bandit.alignment(EVAL_KS, bandit.HIDDEN_TYPES), "max": bandit.alignment(EVAL_KS, PARTIAL)}
    families = {"pass": {label: r for label, r in results.items() if label in RSPO}, "max": {label: r for label, r in results.items() if label in GRADED}}
    families = {metric: family for metric, family in families.items() if family}
    parts = ["Exact bandit, trained by the exact gradient (a sure action worth .45 in the Max@k world):"]
    for metric, matrix in exact.items():
        best = matrix.max(0).values
        parts.append(markdown([f"trained for ({metric}@k)", *map(str, EVAL_KS)], [
            [str(k), *(f"**{v:.3f}**" if v == b else f"{v:.3f}" for v, b in zip(row, best))] for k, row in zip(EVAL_KS, matrix)]))
        ties = (best - matrix.diagonal()) < 5e-4
        parts.append(f"{metric}@k: the diagonal is the best of its column, to 3 digits, for {int(ties.sum())} of {len(EVAL_KS)} columns.")
    with figure(path, len(families), rows=2) as axes:
        for axis, (metric, matrix) in zip(axes, list(exact.items())[:len(families)]):
            draw_matrix(axis, matrix, [f"k = {k}" for k in EVAL_KS], [f"{metric}@{k}" for k in EVAL_KS], f"{metric.title()}@k, exact bandit")
        for axis, (metric, family) in zip(axes[len(families):], families.items()):
            means, halves = (torch.stack(x) for x in zip(*map(level, family.values())))
            ks = next(iter(family.values())).ks
            draw_matrix(axis, means, [label.split()[-1].replace("Max@", "") for label in family], [f"{metric}@{k}" for k in ks],
                        f"{metric.title()}@k, language model", halves)
    for metric, family in families.items():
        parts += [f"Language model, {metric}@k:", levels_table(family, metric), best_of_columns(family, metric)]
    return "\n\n".join(parts)


def best_of_columns(family: dict[str, Result], metric: str) -> str:
    """For each k the best setting, and which others the paired differences do not separate from it."""
    lines = []
    for column, k in enumerate(next(iter(family.values())).ks):
        best = max(family, key=lambda label: level(family[label])[0][column])
        close = [label for label in family if label != best and abs(paired(family[best], family[label])[0][column]) <= paired(family[best], family[label])[1][column]]
        lines.append(f"- {metric}@{k}: best is {best}" + (f"; not separated from it: {', '.join(close)}." if close else ", separated from all others."))
    return "\n".join(lines)


def hitchhiking(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """The paper's baseline gives every member of a group of k the group's best reward: unbiased, and noisy."""
    noise = gradient_noise(grid, {**{label: (rspo.pass_at_k_weights, k) for label, k in zip(RSPO, KS)},
                                  **{label: (rspo.group_max_weights, k) for label, k in zip(GROUPMAX, KS[1:])}})
    rows, lines = [], []
    for k, ours, theirs in zip(KS[1:], list(RSPO)[1:], GROUPMAX):
        ratio, half = variance_ratio(noise[theirs], noise[ours])
        if ours not in results or theirs not in results:
            rows.append([str(k), *["failed"] * 4, f"{ratio:.1f} +- {half:.1f}", ""])
            continue
        column = results[ours].ks.index(k)
        mean, width = paired(results[theirs], results[ours])
        rows.append([str(k), pm(level(results[ours])[0][column], level(results[ours])[1][column]),
                     pm(level(results[theirs])[0][column], level(results[theirs])[1][column]), pm(mean[column], width[column], True),
                     pm(mean[0], width[0], True), f"{ratio:.1f} +- {half:.1f}", f"{signal_to_noise(noise[ours], 32):.2f} / {signal_to_noise(noise[theirs], 32):.2f}",
                     " / ".join(f"{over_seeds(list(late(results[label], 'entropy').values()))[0]:.2f}" for label in (ours, theirs))])
        lines.append(verdict(results, theirs, ours, k))
    with figure(path, 3) as (left, middle, right):
        for look, name, family in zip(LOOKS[1:], ("RSPO", "group max"), (list(RSPO)[1:], list(GROUPMAX))):
            points = [(k, *(x[results[label].ks.index(k)] for x in level(results[label]))) for k, label in zip(KS[1:], family) if label in results]
            left.errorbar(*zip(*points), label=name, capsize=3, **look)
        left.set(title="Outcome at the k trained for", xlabel="k", ylabel="pass@k, held-out problems", xticks=KS[1:])
        left.grid(alpha=0.3)
        left.legend(fontsize=8)
        draw_training(middle, {label: r for label, r in results.items() if label in ("RSPO k = 2", "RSPO k = 8", *list(GROUPMAX)[::2])}, "entropy", "entropy (nats an answer)")
        ratios = [variance_ratio(noise[theirs], noise[ours]) for ours, theirs in zip(list(RSPO)[1:], GROUPMAX)]
        right.errorbar(KS[1:], [r for r, _ in ratios], [h for _, h in ratios], capsize=3, **LOOKS[2])
        right.set(title="Gradient noise at the initial policy", xlabel="k", ylabel="variance of the gradient, group max / RSPO", xticks=KS[1:])
        right.grid(alpha=0.3)
    return (markdown(["k", "RSPO, pass@k", "group max, pass@k", "difference at its own k", "difference at pass@1", "variance ratio at the start",
                      "signal-to-noise of a 32-prompt step, RSPO / group max", "entropy at the end, RSPO / group max"], rows)
            + "\n\n" + "\n".join(lines) + "\n\nThe group max's gradient is unbiased (exact in `python bandit.py`), so both have the same signal: the variance ratio "
            "is how many times more prompts it needs for the same signal-to-noise. Its entropy may stay high because it learns less; that is no virtue.\n\n"
            + levels_table(results))


def entropy(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """Entropy of an answer and distinct right answers over training, by k."""
    rows, lines = [], []
    for label, result in results.items():
        own = {column: late(result, column) for column in ("entropy", "distinct_correct", "reward")}
        rows.append([label, *(pm(*over_seeds(list(values.values()))) for values in own.values())])
    for column, name in (("entropy", "entropy"), ("distinct_correct", "distinct right answers")):
        for label in list(results)[1:]:
            a, b = late(results[label], column), late(results[next(iter(results))], column)
            mean, half = over_seeds([a[seed] - b[seed] for seed in a if seed in b])
            how = "not separated" if not abs(mean) > half else "higher" if mean > 0 else "lower"
            lines.append(f"- {name}, {label} against {next(iter(results))}: {pm(mean, half, True).rstrip('*')} ({how}; paired over seeds).")
    with figure(path, 3) as (left, middle, right):
        draw_training(left, results, "entropy", "entropy (nats an answer)")
        draw_training(middle, results, "distinct_correct", "distinct right answers of a prompt's n samples")
        draw_training(right, results, "reward", "mean reward of the training samples")
    return (markdown(["last quarter of training", "entropy (nats an answer)", "distinct right answers of a prompt's n samples", "mean reward"], rows)
            + "\n\n" + "\n".join(lines) + "\n\nEntropy by itself is no virtue: a policy that learns nothing keeps all of it (see hitchhiking). "
            "Distinct right answers say whether what is kept is of use.")


def noise(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """A share of the binary training rewards is flipped; evaluation stays clean."""
    families = ("RSPO k = 4", "RSPO k = 1", "group max k = 4")
    lines = [verdict(results, f"RSPO k = 4, {p}% flipped", f"{other}, {p}% flipped", 4) for p in (0, *NOISE) for other in families[1:]]
    lines += [verdict(results, f"{family}, 20% flipped", f"{family}, 0% flipped", 4) for family in families]
    with figure(path, 2) as axes:
        for axis, k in zip(axes, (1, 4)):
            for look, family in zip(LOOKS, families):
                points = [(p, *(x[results[label].ks.index(k)] for x in level(results[label])))
                          for p in (0, *NOISE) if (label := f"{family}, {p}% flipped") in results]
                axis.errorbar(*zip(*points), label=family, capsize=3, **look)
            axis.set(xlabel="flipped training rewards (%)", ylabel=f"pass@{k}, held-out problems", xticks=(0, *NOISE), title=f"Noisy rewards, pass@{k}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    return levels_table(results) + "\n\n" + "\n".join(lines)


def samples(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """n samples a prompt at k = 4: equal steps (32 prompts) and equal samples (512 a step), and n below 2k."""
    warnings.simplefilter("ignore", UserWarning)                     # that n < 2k is what is shown here
    counts = {n: sorted({round(float(w), 2) for c in range(1, n + 1)
                         for w in rspo.pass_at_k_weights(torch.tensor([1.0] * c + [0.0] * (n - c)), 4)[:1]}, reverse=True) for n in (4, 8, 16, 32)}
    weights = markdown(["n", "weights a right answer can get at k = 4 (1, 2, ... right ones)"], [
        [str(n), " ".join(f"{w:g}" for w in levels[:7]) + (" ..." if len(levels) > 7 else "")] for n, levels in counts.items()])
    lines = [verdict(results, label, "n = 16", 4) for label in results if label != "n = 16"]
    idle = [f"- {label}: {over_seeds(list(late(result, 'zero_weight_prompts').values()))[0]:.0%} of the prompts without signal at the end." for label, result in results.items()]
    with figure(path, 1) as (axis,):
        for look, kind in zip(LOOKS[1:], ("equal steps", "equal samples")):
            points = [(n, *(x[results[label].ks.index(4)] for x in level(results[label]))) for n in (4, 8, 16, 32)
                      if (label := "n = 16" if n == 16 else f"n = {n}, {kind}") in results]
            axis.errorbar(*zip(*points), label=kind + (": 32 prompts a step" if kind == "equal steps" else ": 512 answers a step"), capsize=3, **look)
        axis.set_xscale("log", base=2)
        axis.set_xticks((4, 8, 16, 32), ("4 = k", "8 = 2k", "16", "32"))
        axis.set(title="Samples a prompt, trained for k = 4", xlabel="n", ylabel="pass@4, held-out problems")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return "\n\n".join((levels_table(results), "\n".join(lines + idle), weights,
                        "At n = k a right answer counts only if it is the only one; from n = 2k on the weight falls in several levels as right answers become common."))


def estimators(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """RSPO beside leave-one-out, the group max, the plug-in weight and GRPO's normalised advantage, at k = 4: bias, variance, outcome."""
    rates, k = (.02, .05, .1, .2, .3, .5, .7, .9), 4
    exact = bandit.compare_estimators((k,), rates, 16)                                          # label -> (1, rates, 3)
    noise_of = gradient_noise(grid, {label: (fn, k) for label, fn in bandit.ESTIMATORS.items()})
    rows = []
    for label, table in exact.items():
        bias = table[0, :, 0] / table[0, :, 2]
        ratio, half = variance_ratio(noise_of[label], noise_of["RSPO"])
        unbiased = (bias - 1).abs().max() < 1e-6
        rows.append([label, "none" if unbiased else f"{bias.min():.2f} to {bias.max():.2f} times the gradient",
                     f"{ratio:.2f} +- {half:.2f}" if unbiased else "-", f"{signal_to_noise(noise_of[label], 32):.2f}",
                     *(("failed",) * 3 if label not in results else (pm(*(x[results[label].ks.index(k)] for x in level(results[label]))) for k in (1, 4, 16) if k in results[label].ks))])
    with figure(path, 2) as (left, right):
        for look, (label, table) in zip(LOOKS, exact.items()):
            left.plot(rates, table[0, :, 0] / table[0, :, 2], label=label, markersize=4, **look)
        left.set(title=f"Bias (exact, bandit, k = {k}, n = 16)", xlabel="success rate of the prompt", ylabel="mean of the estimate / true gradient", yscale="log")
        left.grid(alpha=0.3)
        left.legend(fontsize=8)
        draw_levels(right, results, "Outcome, trained for k = 4", minus="RSPO")
    lines = [verdict(results, label, "RSPO", k) for label in results if label != "RSPO" for k in (1, 4, 16)]
    return (markdown(["", "bias at success rates .02 to .9 (exact)", "variance / RSPO's (language model at the start)", "signal-to-noise of a 32-prompt step", "pass@1", "pass@4", "pass@16"], rows)
            + "\n\n" + "\n".join(lines) + "\n\nGRPO's advantage has another scale, which Adam takes away, and another objective, which it does not: it does not know k. "
            "Its and the plug-in's signal-to-noise is that of a gradient that points elsewhere.\n\n" + differences_table(results, "RSPO"))


def whole_curve(grid: Grid, results: dict[str, Result], path: Path) -> str:
    """A mixture of ks and a schedule against single ks: is a setting never beaten, at any k?"""
    lines = []
    for label, result in results.items():
        beaten = []
        for other in results:
            if other != label:
                mean, half = paired(results[other], result)
                beaten += [f"pass@{k} by {other}" for k, m, h in zip(result.ks, mean, half) if m > h]
        lines.append(f"- {label}: " + (f"beaten, with an interval that excludes 0, at {'; '.join(beaten)}." if beaten else "not beaten anywhere, as far as these data separate."))
    with figure(path, 2) as (left, right):
        draw_levels(left, results, "The whole curve")
        reference = "RSPO k = 4" if "RSPO k = 4" in results else next(iter(results))
        draw_levels(right, results, f"Paired difference to {reference}", minus=reference)
    return "\n\n".join((levels_table(results), "\n".join(lines), differences_table(results, reference)))


REPORTS = {"sanity": sanity, "alignment": alignment, "hitchhiking": hitchhiking, "entropy": entropy, "noise": noise, "samples": samples,
           "estimators": estimators, "curve": whole_curve}


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
    groups = list(sample.sample_problems(sample.HFSampler(model, tokenizer), prompt_ids, 16, args.temperature, args.max_new_tokens, 0, "sampling for the gradient's noise"))
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
                gradient = torch.cat([g.flatten().float().cpu() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])    # (D,)
                sums[label] += gradient
                norms[label][row] = gradient.double().square().sum()
    return {label: (sums[label] / len(groups), norms[label]) for label in weightings}


def signal_to_noise(noise: tuple[Tensor, Tensor], prompts: int) -> float:
    """Squared length of the true gradient over the variance (trace of the covariance) of a step of that many prompts' estimate."""
    mean, norms = noise[0].double(), noise[1]
    variance = (norms.sum() - len(norms) * mean.square().sum()) / (len(norms) - 1)              # of one prompt's gradient
    return ((mean.square().sum() - variance / len(norms)) / variance * prompts).item()


def variance_ratio(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean squared norm of a prompt's gradient under a over that under b, and half its 95 % interval over prompts (delta method).

    For two unbiased estimators whose noise dwarfs their signal this is the ratio of their variances.
    """
    ratio = a[1].mean() / b[1].mean()
    return ratio.item(), (1.96 * (a[1] - ratio * b[1]).std() / len(a[1]) ** 0.5 / b[1].mean()).item()


# ---------------------------------------------------------------- the script

def report(name: str, grid: Grid, command: str) -> None:
    """Print an experiment's text and write it and the figure to the grid's folder."""
    read = {label: read_result(grid, setting) for label, setting in settings_of(name, grid.toy).items()}
    results = {label: result for label, result in read.items() if result.values}
    failed = [f"- {label}: failed, {reason}" for label, result in read.items() for reason in result.failed]
    first = next(iter(results.values()), None)
    text = [f"## {name}", REPORTS[name].__doc__, *(["\n".join(failed)] if failed else [])]
    if first:
        problems = next(iter(first.values.values())).shape[0]
        text += [REPORTS[name](grid, results, grid.folder / f"{name}.png"),
                 f"{len(grid.seeds)} seeds, {problems} held-out problems, 95 % intervals over both; * = the interval excludes 0. `{command}`"
                 + (" (one seed: the intervals are over problems only)" if len(grid.seeds) == 1 else "")]
    else:
        text.append("Every cell failed: there is nothing to report.")
    text = "\n\n".join(text)
    (grid.folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nfigure: {grid.folder / name}.png")


def main() -> None:
    parser = sample.make_parser(__doc__)
    parser.usage = "%(prog)s NAME [flags]      any flag of train.py may follow"
    parser.add_argument("name", type=str, help=f"experiment: {', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--quick", action="store_true", help="two seeds and 30 steps: under three minutes, wide intervals")
    parser.add_argument("--seeds", type=int, help="seeds of each setting (default 5, with --quick 2)")
    parser.add_argument("--out", type=Path, help="folder of the grid (default runs/ablate, with --quick runs/ablate-quick)")
    args, flags = parser.parse_known_args()
    if args.name not in (*EXPERIMENTS, "all"):
        raise UserError(f"experiment {args.name!r} is unknown{tasks.nearest(args.name, EXPERIMENTS)}; give one of {', '.join(EXPERIMENTS)}, all")
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    grid = open_grid(args, flags)
    command = "python ablate.py " + " ".join(sys.argv[1:])
    run_cells(grid, [setting for name in names for setting in settings_of(name, grid.toy).values()])
    for name in names:
        report(name, grid, command)


if __name__ == "__main__":
    sample.run_script(main)
