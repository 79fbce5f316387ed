"""The paper's experiments: grids of train.py runs, and one report for all of them.

    python ablate.py                      list the experiments
    python ablate.py alignment --quick    one, for the class: three minutes
    python ablate.py all                  all, on the toy, five seeds: an hour
    python ablate.py alignment --model Qwen2.5-Math-1.5B --steps 100

A setting is one curve, a cell is one run of train.py at one setting and seed. Any flag of train.py
may follow. A cell's directory is named after its flags, so experiments share cells, and the same
command goes on where it was stopped. Each experiment leaves NAME.md and NAME.png in the folder.

Every claim is a paired difference: same seeds, same held-out problems, 95 % intervals over both.

Shapes: S seeds, M held-out problems, K evaluated ks.
"""

import sys
from pathlib import Path

from lib import cli

SETTINGS = {"quick": cli.Setting("two seeds, 30 steps: wide intervals", False),
            "seeds": cli.Setting("number of seeds (default 5, quick 2)", least=1, kind=int),
            "out": cli.Setting("folder", Path("runs/ablate"), kind=Path)}
FULL = range(31, 36), {"steps": 150, "limit": 600, "eval_n": 32}  # seeds, settings of the toy
QUICK = range(21, 23), {"steps": 30, "limit": 300, "eval_n": 16}
EVAL_KS = (1, 2, 4, 8, 16)
SEEN = 200  # held-out problems that helped to choose the toy's settings: left out (LOG.md)
# metrics.jsonl's columns that are reported, as their mean over the last quarter of training
LATE = {"reward": "reward", "entropy": "entropy", "distinct_correct": "distinct",
        "zero_weight_prompts": "no signal"}

# name: (what is asked, the setting that all others are held against, setting: flags of train.py)
RSPO = {f"RSPO k = {k}": {"k": k} for k in (1, 2, 4, 8)}
EXPERIMENTS = {
    "sanity": ("At k = 1 every objective is the ordinary policy gradient.", "reward", {
        name: {"k": 1, "objective": name} for name in ("reward", "passk", "maxk", "groupmax")}),
    "alignment": ("Is the k trained for the best at itself?", "RSPO k = 1", RSPO),
    "graded": ("The same with graded rewards and Max@k.", "RSPO Max@1", {
        f"RSPO Max@{k}": {"k": k, "objective": "maxk", "data": "countdown-graded"}
        for k in (1, 2, 4, 8)}),
    "hitchhiking": ("The group maximum rewards a whole group of k for its best.", "RSPO k = 4", {
        **RSPO, **{f"group max k = {k}": {"k": k, "objective": "groupmax"} for k in (2, 4, 8)}}),
    "entropy": ("Does a larger k keep more different answers?", "RSPO k = 1", RSPO),
    "noise": ("A share of the training rewards is flipped.", "RSPO k = 4", {
        f"{label}{f', {flip:.0%} flipped' if flip else ''}":
            {"k": k, "objective": objective, "flip": flip}
        for label, k, objective in (("RSPO k = 4", 4, "passk"), ("RSPO k = 1", 1, "passk"),
                                    ("group max k = 4", 4, "groupmax"))
        for flip in (0, 0.05, 0.1, 0.2)}),
    "samples": ("n answers per prompt, at equal steps and at equal samples.", "n = 16", {
        "n = 16": {"k": 4},
        **{f"n = {n}, equal steps": {"k": 4, "n": n} for n in (4, 8, 32)},
        **{f"n = {n}, equal samples": {"k": 4, "n": n, "prompts": 512 // n} for n in (4, 8, 32)}}),
    "estimators": ("Other weights at k = 4.", "passk", {
        name: {"k": 4, "objective": name}
        for name in ("passk", "loo", "groupmax", "plugin", "grpo")}),
    "curve": ("A mixture and a schedule of ks against single ks.", "RSPO k = 4", {
        **RSPO, "mixture 1,2,4,8,16": {"k": "1,2,4,8,16"}, "schedule 8:1": {"k": "8:1"}}),
}


def settle(argv: list[str]):
    """Names of the experiments, folder, whether it is the toy, seeds, and train.py's settings."""
    name, rest = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else ("", argv)
    if name not in (*EXPERIMENTS, "all", ""):
        cli.fail(f"experiment {name!r} is unknown{cli.nearest(name, EXPERIMENTS)}; "
                 "python ablate.py lists all")
    args = cli.parse(__doc__, {**SETTINGS, **cli.SETTINGS}, rest)
    for varied in ("k", "objective", "flip", "seed", "run", "resume"):
        if getattr(args, varied) is not None:
            cli.fail(f"{cli.flag(varied)} is what the experiments vary: leave it out")
    (seeds, scale), toy = QUICK if args.quick else FULL, args.model in (None, "toy")
    given = {name: getattr(args, name) for name in cli.SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    if toy and given.get("limit", scale["limit"]) < SEEN + 2:
        cli.fail(f"--limit is {args.limit}, but must be at least {SEEN + 2}: the first {SEEN} "
                 "held-out problems chose the toy's settings")
    names = list(EXPERIMENTS) if name == "all" else [name] if name else []
    seeds = range(seeds[0], seeds[0] + (args.seeds or len(seeds)))
    flags = {**(scale if toy or args.quick else {}), **given}
    return names, args.out or SETTINGS["out"].default, toy, seeds, flags


if __name__ == "__main__":
    cli.refuse_early(lambda: settle(sys.argv[1:]))

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import evaluate
import rspo
from evaluate import LOOKS, Curve
from lib.run import read_config


# ---------------------------------------------------------------- cells

def cell(setting: dict, seed: int, flags: dict, out: Path) -> tuple[list[str], Path]:
    """Words for train.py, and the run directory: the same for all experiments that share it."""
    own = {name: value for name, value in setting.items() if value and value != "passk"}
    own["seed"], words = seed, []
    for name, value in {**flags, **own}.items():
        no = isinstance(value, bool) and not value
        words += [cli.flag(f"no_{name}" if no else name)]
        words += [] if isinstance(value, bool) else [str(value)]
    name = "_".join(f"{name}-{value}" for name, value in own.items())
    name = name.replace(":", "to").replace(",", "+")
    return words, out / "cells" / f"{name}-{hashlib.sha256(repr(words).encode()).hexdigest()[:6]}"


def run_cells(cells: dict[Path, list[str]], workers: int) -> dict[Path, str]:
    """Run cells, each in a process of its own. -> why some failed; the others went on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # imported once, not once per cell

    def run(folder: Path) -> str | None:
        process = context.Process(target=work, args=(cells[folder], folder), daemon=True)
        process.start()
        process.join()
        if process.exitcode > 0:
            lines = log_of(folder).read_text(errors="replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "no reason given")
        return f"ended by signal {-process.exitcode}" if process.exitcode else None

    with ThreadPoolExecutor(workers) as threads:
        done = tqdm(threads.map(run, cells), total=len(cells), desc="cells", disable=None)
        return {folder: reason for folder, reason in zip(cells, done) if reason}


def work(argv: list[str], folder: Path) -> None:
    """One cell, in its process: begin it, or go on with what an interrupted one has left."""
    with log_of(folder).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process().sentinel

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import train
    begun = ["--resume", str(folder)] if folder.exists() else [*argv, "--run", str(folder)]
    cli.run_script(lambda: train.main(begun))


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def result(folder: Path, seen: int) -> tuple[dict, list[dict]] | None:
    """The evaluation after training and the rows of metrics.jsonl; None: it is not done."""
    read = lambda name: [row for _, row in cli.read_rows(folder / name, appended=True)]
    if not (folder / "evals.jsonl").exists():
        return None
    evals = read("evals.jsonl")
    if not evals or evals[-1]["step"] != read_config(folder)["flags"]["steps"]:
        return None
    return {name: evals[-1][name][seen:] for name in ("ids", "rewards")}, read("metrics.jsonl")


# ---------------------------------------------------------------- the report

def curve_of(label: str, results: list[tuple[dict, list[dict]]], data: str) -> Curve:
    """The estimates of a setting after training, with the LATE columns, over S seeds."""
    rewards = torch.tensor([evaluation["rewards"] for evaluation, _ in results]).double()
    ks = tuple(k for k in EVAL_KS if k <= rewards.shape[-1])  # rewards: (S, M, n)
    values = torch.stack([rspo.max_at_k(rewards, k) for k in ks], -1)  # (S, M, K)
    metric = next(name for name in results[0][1][0] if name.endswith("@k"))[:-2]
    late = {}
    for column, name in LATE.items():
        last = [[row[column] for row in rows[-max(1, len(rows) // 4):]] for _, rows in results]
        late[name] = torch.tensor(last).double().mean(-1)  # (S,)
    return Curve(label, metric, ks, values, tuple(results[0][0]["ids"]), data, late)


def verdict(label: str, reference: str, ks, mean, half) -> str:
    """One sentence: at which k is a setting better or worse, and where do the data not say?"""
    found: dict[str, list[str]] = {}
    for k, m, h in zip(ks, mean, half):
        word = "not separated" if not abs(m) > h else "better" if m > 0 else "worse"
        found.setdefault(word, []).append(f"@{k}")
    said = "; ".join(f"{word} at {', '.join(at)}" for word, at in found.items())
    return f"- {label} against {reference}: {said}."


def report(name: str, results: dict[str, dict[int, tuple]], failed: list[str], out: Path) -> str:
    """Levels, paired differences and verdicts of an experiment, whatever it varies; a figure."""
    question, reference, _ = EXPERIMENTS[name]
    results = {label: each for label, each in results.items() if each}
    seeds = set.intersection(*map(set, results.values())) if results else set()
    parts = [f"## {name}", question, *failed]
    if not seeds:
        return "\n\n".join([*parts, "No seed is done for every setting: nothing to report."])
    order = sorted(results, key=lambda label: label != reference)
    curves = [curve_of(label, [results[label][seed] for seed in sorted(seeds)], name)
              for label in order]
    changes = {curve.name: evaluate.difference(curve, curves[0]) for curve in curves[1:]}
    draw(curves, changes, results, out / f"{name}.png")
    verdicts = [verdict(label, order[0], *change) for label, change in changes.items()]
    return "\n\n".join([
        *parts, f"```\n{evaluate.table(curves)}\n```", "\n".join(verdicts),
        f"{len(seeds)} seed(s); {', '.join(LATE.values())}: the last quarter of training. "
        f"`python ablate.py {' '.join(sys.argv[1:])}`"])


def draw(curves: list[Curve], changes: dict, results: dict, path: Path) -> None:
    """Three panels: the curves, their differences to the reference, entropy over training."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    evaluate.draw_curves(left, curves)
    for i, curve in enumerate(curves):
        look = {"label": curve.name, **LOOKS[i % len(LOOKS)]}
        if curve.name in changes:
            ks, mean, half = changes[curve.name]
            middle.errorbar(ks, mean, half, capsize=2, **look)
        entropy = [[row["entropy"] for row in rows] for _, rows in results[curve.name].values()]
        mean = evaluate.running_mean(torch.tensor(entropy).mean(0).tolist())
        right.plot(mean, **{**look, "marker": None})
    middle.set(title=f"minus {curves[0].name}", xlabel="k", xscale="log")
    middle.set_xticks(curves[0].ks, map(str, curves[0].ks))
    middle.axhline(0, color="grey", linewidth=0.8)
    right.set(title="entropy (nats per answer)", xlabel="step")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    names, out, toy, seeds, flags = settle(sys.argv[1:] if argv is None else argv)
    if not names:
        for name, (question, _, settings) in EXPERIMENTS.items():
            print(f"{name:12s} {len(settings):2d} settings   {question}")
        return
    cells = {(name, label, seed): cell(setting, seed, flags, out) for name in names
             for label, setting in EXPERIMENTS[name][2].items() for seed in seeds}
    seen = SEEN if toy else 0
    (out / "cells").mkdir(parents=True, exist_ok=True)
    waiting = {folder: argv for argv, folder in cells.values() if not result(folder, seen)}
    os.environ["OMP_NUM_THREADS"] = "1"
    reasons = run_cells(waiting, (os.cpu_count() or 1) if toy else 1)
    for name in names:
        results: dict[str, dict] = {label: {} for label in EXPERIMENTS[name][2]}
        failed = []
        for (of, label, seed), (_, folder) in cells.items():
            if of == name and (found := result(folder, seen)):
                results[label][seed] = found
            elif of == name:
                failed.append(f"- {label}, seed {seed}: failed, {reasons.get(folder)}")
        text = report(name, results, failed, out)
        (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}")


if __name__ == "__main__":
    cli.run_script(main)
