"""Experiments on the paper's claims: grids of train.py runs, and one report.

    python ablate.py                      list the experiments
    python ablate.py alignment --quick    one, for the class: a minute
    python ablate.py all                  all on the toy, five seeds
    python ablate.py alignment --model Qwen2.5-Math-1.5B

A setting is one curve, a cell one run of train.py at one setting and seed. Flags of
train.py may follow. The same command goes on where it was stopped. Claims are
paired differences: same seeds, same problems, none of which chose a setting.

Shapes: S seeds, M held-out problems, K evaluated ks.
"""

import sys
from pathlib import Path

from lib import cli

SETTINGS = {"quick": cli.Setting("k = 1 and 8 only, 3 seeds, 40 steps", False),
            "seeds": cli.Setting("number of seeds (default 5, quick 3)", least=1, kind=int),
            "out": cli.Setting("folder", Path("runs/ablate"), kind=Path)}
FULL = range(31, 36), {"steps": 100, "limit": 400, "eval_n": 32}  # seeds, the toy's flags
QUICK = range(21, 24), {**FULL[1], "steps": 40}
EVAL_KS = (1, 2, 4, 8, 16)
# columns of metrics.jsonl: reported is the mean over the last quarter of training
LATE = {"reward": "reward", "entropy": "entropy", "distinct_correct": "distinct",
        "zero_weight_prompts": "no signal"}

ours = lambda *ks: {f"k = {k}": {"k": k} for k in ks}
group_max = lambda k: {f"group max k = {k}": {"k": k, "objective": "groupmax"}}
LOO = {"leave-one-out": {"k": 8, "objective": "loo"}}
# name: (question, setting: flags); all settings are held against the first
EXPERIMENTS = {
    "sanity": ("At k = 1 every objective is the ordinary policy gradient.", ours(1) | {
        name: {"k": 1, "objective": name} for name in ("reward", "maxk", "groupmax")}),
    "alignment": ("Is the k trained for the best at itself?", ours(*EVAL_KS)),
    "graded": ("The same with graded rewards and Max@k.", {
        f"Max@{k}": {"k": k, "objective": "maxk", "data": "divisor-graded"}
        for k in (1, 2, 4, 8)}),
    "hitchhiking": ("The group maximum rewards a whole group for its best.", {
        **ours(8), **group_max(8),
        **{f"{label}, {steps} steps": flags | {"steps": steps} for steps in (60, 250)
           for label, flags in (ours(8) | group_max(8)).items()}}),
    "hitchhiking-2": ("Group maximum and RSPO at k = 2.", ours(2) | group_max(2)),
    "hitchhiking-4": ("Group maximum and RSPO at k = 4.", ours(4) | group_max(4)),
    "noise": ("A share of the training rewards is flipped.", {
        f"{label}{f', {flip:.0%} flipped' if flip else ''}": flags | {"flip": flip}
        for label, flags in (ours(8) | LOO | group_max(8) | ours(1)).items()
        for flip in (0, 0.1, 0.2)}),
    "samples": ("n answers per prompt, at equal steps and equal samples.", {
        **ours(8), **{f"n = {n}, equal steps": {"k": 8, "n": n} for n in (8, 16, 64)},
        **{f"n = {n}, equal samples": {"k": 8, "n": n, "prompts": 512 // n}
           for n in (8, 16, 64)}}),
    "estimators": ("Other weights at k = 8.", ours(8) | group_max(8) | LOO | {
        "GRPO": {"k": 1, "objective": "grpo"}, "plug-in": {"k": 8, "objective": "plugin"},
        "PKPO, centred": {"k": 8, "objective": "centred"}}),
    "curve": ("A mixture, a schedule and the harmonic sum of ks.", ours(8, 1) | {
        "mixture 1,2,4,8,16": {"k": "1,2,4,8,16"}, "schedule 8:1": {"k": "8:1"},
        "harmonic": {"k": "harmonic"}}),
}


def settle(argv: list[str]):
    """Experiments (name -> settings), folder, whether it is the toy, seeds, flags."""
    name, rest = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else ("", argv)
    if name not in (*EXPERIMENTS, "all", ""):
        cli.fail(f"experiment {name!r} is unknown{cli.nearest(name, EXPERIMENTS)}; "
                 "python ablate.py lists all")
    args = cli.parse(__doc__, {**SETTINGS, **cli.SETTINGS}, rest)
    given = {each: value for each, value in vars(args).items()
             if each in cli.SETTINGS and value is not None}
    for varied in ("k", "objective", "flip", "seed", "run", "resume"):
        if varied in given:
            cli.fail(f"{cli.flag(varied)} is what experiments vary: leave it out")
    chosen = {each: EXPERIMENTS[each][1] for each in EXPERIMENTS if name in (each, "all")}
    seeds, scale = QUICK if args.quick else FULL
    if args.quick:
        few = lambda flags: flags["k"] in (1, 8) and "steps" not in flags
        for each, settings in chosen.items():
            kept = {label: flags for label, flags in settings.items() if few(flags)}
            chosen[each] = kept or settings
    seeds = range(seeds[0], seeds[0] + (args.seeds or len(seeds)))
    toy = cli.is_toy(args.model or "toy")
    flags = {**(scale if toy or args.quick else {}), **given}
    return chosen, args.out or SETTINGS["out"].default, toy, seeds, flags


if __name__ == "__main__":
    cli.refuse_early(lambda: settle(sys.argv[1:]))

import multiprocessing
import os
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import evaluate
import rspo
from evaluate import Curve
from lib.run import read_config

# -------- cells

def cell(setting: dict, seed: int, flags: dict, out: Path) -> tuple[Path, list[str]]:
    """The run directory, which experiments share, and the words for train.py."""
    own = {name: value for name, value in setting.items() if value and value != "passk"}
    own["seed"], words = seed, []
    for name, value in {**flags, **own}.items():
        words += [cli.flag(f"no_{name}" if value is False else name)]
        words += [] if isinstance(value, bool) else [str(value)]
    name = "_".join(f"{name}-{value}" for name, value in own.items())
    name = name.replace(":", "to").replace(",", "+")
    return out / "cells" / f"{name}-{cli.digest(words)[:6]}", words


def run_cells(cells: dict[Path, list[str]], workers: int) -> dict[Path, str]:
    """Run each cell in a process of its own. -> why some failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # imported once, not once per cell

    def run(folder: Path) -> str | None:
        process = context.Process(target=work, args=(cells[folder], folder), daemon=True)
        process.start()
        process.join()
        if process.exitcode > 0:
            text = Path(f"{folder}.log").read_text(errors="replace")
            return text.strip().split("\n")[-1]
        return f"ended by signal {-process.exitcode}" if process.exitcode else None

    with ThreadPoolExecutor(workers) as threads:
        done = tqdm(threads.map(run, cells), total=len(cells), desc="cells", disable=None)
        return {folder: why for folder, why in zip(cells, done) if why is not None}


def work(argv: list[str], folder: Path) -> None:
    """In its own process: begin a cell, or go on where it was interrupted."""
    with open(f"{folder}.log", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import train
    begun = ["--resume", str(folder)] if folder.exists() else [*argv, "--run", str(folder)]
    cli.run_script(lambda: train.main(begun))


def result(folder: Path) -> tuple | None:
    """Rows of evals.jsonl and metrics.jsonl, and config.json; None: not done."""
    evals, metrics = ([row for _, row in cli.read_rows(folder / name, appended=True)]
                      for name in ("evals.jsonl", "metrics.jsonl"))
    config = read_config(folder)
    done = config and evals and evals[-1]["step"] == config["flags"]["steps"]
    return (evals, metrics, config) if done else None


# -------- the report

def curve_of(label: str, results: list[tuple], at: int = -1) -> Curve:
    """A setting after training (at = 0: before) and the LATE columns, over S seeds."""
    rewards = torch.tensor([evals[at]["rewards"] for evals, *_ in results]).double()
    ks = tuple(k for k in EVAL_KS if k <= rewards.shape[-1])  # rewards: (S, M, n)
    values = torch.stack([rspo.max_at_k(rewards, k) for k in ks], -1)  # (S, M, K)
    quarters, late = [rows[len(rows) * 3 // 4:] for _, rows, _ in results], {}
    for column, name in LATE.items():
        last = [[row[column] for row in rows] for rows in quarters]
        late[name] = torch.tensor(last).double().mean(-1)  # (S,)
    evals, rows, _ = results[0]
    metric = "max" if "max@k" in rows[0] else "pass"
    return Curve(label, metric, ks, values, tuple(evals[at]["ids"]), late)


def verdict(curve: Curve, first: Curve, count: int) -> str:
    """At which k it is better or worse than the first, and where nobody can say."""
    found = defaultdict(list)
    for k, mean, half in zip(*evaluate.difference(curve, first, count)):
        word = "better" if mean > half else "worse" if -mean > half else "not separated"
        found[word].append(f"@{k}")
    said = "; ".join(f"{word} at {', '.join(at)}" for word, at in found.items())
    return f"- {curve.name} against {first.name}: {said}."


def diagonal(before: Curve, curves: list[Curve], settings: dict) -> str:
    """At each k, the setting trained for it minus every other one."""
    count = len(curves) ** 2
    lines = [f"The diagonal (all {count} intervals hold at once with 95 %):\n"]
    for own in curves:
        k, changes = settings[own.name]["k"], []
        for other in (before, *curves):
            changes += [f"{other.name} {evaluate.cell(row).strip()}"
                        for row in evaluate.summary([other, own], count)
                        if row["minus"] and row["metric"].endswith(f"@{k}")]
        if changes:
            lines.append(f"- @{k}: {own.name} minus {', '.join(changes)}")
    return "\n".join(lines)


def report(name: str, results: dict, failed: list[str], out: Path) -> str:
    """Levels, changes and verdicts of results {setting: [result]}; a figure."""
    question, settings = EXPERIMENTS[name]
    parts = [f"## {name}", question, *failed]
    if (reference := next(iter(settings))) not in results:
        parts.append(f"{reference}, which all are held against, is not done.")
        return "\n\n".join(parts)
    versions = {str((evals[-1]["ids"], config["git_commit"]))
                for each in results.values() for evals, _, config in each}
    if len(versions) > 1:
        cli.fail("some cells have other held-out problems or another version of the "
                 "code: delete the older ones, or give another --out")
    first, *others = curves = [curve_of(*each) for each in results.items()]
    draw(curves, out / f"{name}.png")
    count = len(others) * len(first.ks)
    parts += [f"```\n{evaluate.table(curves, name, count)}\n```",
              "\n".join(verdict(each, first, count) for each in others)]
    if name in ("alignment", "graded"):
        parts.append(diagonal(curve_of("before", results[first.name], 0), curves, settings))
    k = min(8, first.ks[-1])
    each = [f"{curve.name:28s} " + " ".join(f"{mean:.3f}" for mean in each_seed(curve, k))
            for curve in curves]
    parts += [f"Each seed by itself, {first.metric}@{k}:", "\n".join(["```", *each, "```"])]
    parts.append(f"{len(first.values)} seed(s); {', '.join(LATE.values())}: the last quarter "
                 f"of training. `python ablate.py {' '.join(sys.argv[1:])}`")
    return "\n\n".join(filter(None, parts))


def each_seed(curve: Curve, k: int) -> list[float]:
    return curve.values[..., curve.ks.index(k)].mean(-1).tolist()  # (S,)


def draw(curves: list[Curve], path: Path) -> None:
    """The curves, where they are few, else each seed at k = 1; each seed at k = 8."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(curves) <= 5:
        evaluate.draw_curves(left, curves)
    else:
        draw_seeds(left, curves, 1)
    draw_seeds(right, curves, min(8, curves[0].ks[-1]))
    figure.savefig(path, dpi=130)


def draw_seeds(axes, curves: list[Curve], k: int) -> None:
    """A row per setting, a marker per seed."""
    for i, curve in enumerate(curves):
        [look], seeds = evaluate.looks_of([curve.name]), each_seed(curve, k)
        axes.plot(seeds, [-i] * len(seeds), **{**look, "linestyle": "none"})
    axes.set(title=f"each seed by itself: {curves[0].metric}@{k}")
    axes.set_yticks([-i for i in range(len(curves))], [curve.name for curve in curves])
    axes.grid(alpha=0.3)


def main(argv=None) -> None:
    chosen, out, toy, seeds, flags = settle(sys.argv[1:] if argv is None else argv)
    if not chosen:
        for name, (question, settings) in EXPERIMENTS.items():
            print(f"{name:13s} {len(settings):2d} settings   {question}")
        return
    cells = {(name, label): dict(cell(setting, seed, flags, out) for seed in seeds)
             for name in chosen for label, setting in chosen[name].items()}
    (out / "cells").mkdir(parents=True, exist_ok=True)
    waiting = {folder: words for each in cells.values() for folder, words in each.items()
               if not result(folder)}
    os.environ["OMP_NUM_THREADS"] = "1"
    reasons = run_cells(waiting, (os.cpu_count() or 1) if toy else 1)
    for name in chosen:
        results, failed = {}, []
        for label in chosen[name]:
            found = {folder: result(folder) for folder in cells[name, label]}
            failed += [f"- {label} is left out: {folder.name} failed, {reasons.get(folder)}"
                       for folder in found if not found[folder]]
            if all(found.values()):
                results[label] = [*found.values()]
        text = report(name, results, failed, out)
        (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}")


if __name__ == "__main__":
    cli.run_script(main)
