"""Experiments on the paper's claims: grids of train.py runs, and one report.

    python ablate.py                      list the experiments
    python ablate.py alignment --quick    one, for the class: a minute
    python ablate.py all                  all on the toy, five seeds
    python ablate.py alignment --model Qwen2.5-Math-1.5B

A setting is one curve, a cell one run of train.py at one setting and seed. Flags of
train.py may follow. The same command goes on where it was stopped. Claims are paired
differences: same seeds, same problems. What was chosen was chosen on divisor:select;
reported is divisor:test.

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

RSPO = {f"k = {k}": {"k": k} for k in (1, 2, 4, 8, 16)}
BEST8 = {"k = 8": {"k": 8}}
MAX8 = {"group max k = 8": {"k": 8, "objective": "groupmax"}}
LOO8 = {"leave-one-out": {"k": 8, "objective": "loo"}}
# name: (question, the setting that all others are held against, setting: flags)
EXPERIMENTS = {
    "sanity": ("At k = 1 every objective is the ordinary policy gradient.", "k = 1", {
        "k = 1": {"k": 1},
        **{name: {"k": 1, "objective": name} for name in ("reward", "maxk", "groupmax")}}),
    "alignment": ("Is the k trained for the best at itself?", "k = 1", RSPO),
    "graded": ("The same with graded rewards and Max@k.", "Max@1", {
        f"Max@{k}": {"k": k, "objective": "maxk", "data": "divisor-graded"}
        for k in (1, 2, 4, 8)}),
    "hitchhiking": ("The group maximum rewards a whole group for its best.", "k = 8", {
        **BEST8, **MAX8,
        **{f"{label}, {steps} steps": {**flags, "steps": steps} for steps in (60, 250)
           for label, flags in (BEST8 | MAX8).items()}}),
    **{f"hitchhiking-{k}": (f"Group maximum and RSPO at k = {k}.", f"k = {k}", {
        f"k = {k}": {"k": k}, f"group max k = {k}": {"k": k, "objective": "groupmax"}})
       for k in (2, 4)},
    "entropy": ("Does a larger k keep more different answers?", "k = 1", RSPO),
    "noise": ("A share of the training rewards is flipped.", "k = 8", {
        f"{label}{f', {flip:.0%} flipped' if flip else ''}": {**flags, "flip": flip}
        for label, flags in (BEST8 | LOO8 | MAX8 | {"k = 1": {"k": 1}}).items()
        for flip in (0, 0.1, 0.2)}),
    "samples": ("n answers per prompt, at equal steps and equal samples.", "k = 8", {
        **BEST8, **{f"n = {n}, equal steps": {"k": 8, "n": n} for n in (8, 16, 64)},
        **{f"n = {n}, equal samples": {"k": 8, "n": n, "prompts": 512 // n}
           for n in (8, 16, 64)}}),
    "estimators": ("Other weights at k = 8.", "k = 8", {
        **BEST8, **MAX8, **LOO8, "GRPO": {"k": 1, "objective": "grpo"},
        "plug-in": {"k": 8, "objective": "plugin"},
        "PKPO, centred": {"k": 8, "objective": "centred"}}),
    "curve": ("A mixture, a schedule and the harmonic sum of ks.", "k = 8", {
        **BEST8, "k = 1": {"k": 1}, "mixture 1,2,4,8,16": {"k": "1,2,4,8,16"},
        "schedule 8:1": {"k": "8:1"}, "harmonic": {"k": "harmonic"}}),
}


def settle(argv: list[str]):
    """Experiments (name -> settings), folder, whether it is the toy, seeds, common flags."""
    name, rest = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else ("", argv)
    if name not in (*EXPERIMENTS, "all", ""):
        cli.fail(f"experiment {name!r} is unknown{cli.nearest(name, EXPERIMENTS)}; "
                 "python ablate.py lists all")
    args = cli.parse(__doc__, {**SETTINGS, **cli.SETTINGS}, rest)
    given = {name: getattr(args, name) for name in cli.SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    for varied in ("k", "objective", "flip", "seed", "run", "resume"):
        if varied in given:
            cli.fail(f"{cli.flag(varied)} is what the experiments vary: leave it out")
    chosen = {each: EXPERIMENTS[each][2] for each in EXPERIMENTS if name in (each, "all")}
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
import multiprocessing.connection
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import evaluate
import rspo
from evaluate import Curve
from lib.run import read_config

# ---------------------------------------------------------------- cells

def cell(setting: dict, seed: int, flags: dict, out: Path) -> tuple[list[str], Path]:
    """Words for train.py, and the run directory: experiments share it."""
    own = {name: value for name, value in setting.items() if value and value != "passk"}
    own["seed"], words = seed, []
    for name, value in {**flags, **own}.items():
        no = isinstance(value, bool) and not value
        words += [cli.flag(f"no_{name}" if no else name)]
        words += [] if isinstance(value, bool) else [str(value)]
    name = "_".join(f"{name}-{value}" for name, value in own.items())
    name = name.replace(":", "to").replace(",", "+")
    return words, out / "cells" / f"{name}-{cli.digest(words)[:6]}"


def run_cells(cells: dict[Path, list[str]], workers: int) -> dict[Path, str]:
    """Run cells, each in a process of its own. -> why some failed, the others went on."""
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


def result(folder: Path) -> tuple[dict, list[dict], dict] | None:
    """Its last evaluation (with the rewards before training), rows of metrics.jsonl, config.

    None: it is not done.
    """
    read = lambda name: [row for _, row in cli.read_rows(folder / name, appended=True)]
    if not (folder / "evals.jsonl").exists():
        return None
    evals, config = read("evals.jsonl"), read_config(folder)
    if not evals or evals[-1]["step"] != config["flags"]["steps"]:
        return None
    return {**evals[-1], "before": evals[0]["rewards"]}, read("metrics.jsonl"), config


# ---------------------------------------------------------------- the report

def curve_of(label: str, results: list[tuple], when: str = "rewards") -> Curve:
    """The estimates of a setting after training, with the LATE columns, over S seeds."""
    rewards = torch.tensor([evaluation[when] for evaluation, *_ in results]).double()
    ks = tuple(k for k in EVAL_KS if k <= rewards.shape[-1])  # rewards: (S, M, n)
    values = torch.stack([rspo.max_at_k(rewards, k) for k in ks], -1)  # (S, M, K)
    metric = next(name for name in results[0][1][0] if name.endswith("@k"))[:-2]
    late = {}
    for column, name in LATE.items():
        last = [[row[column] for row in rows[-max(1, len(rows) // 4):]] for _, rows, _ in results]
        late[name] = torch.tensor(last).double().mean(-1)  # (S,)
    return Curve(label, metric, ks, values, tuple(results[0][0]["ids"]), late)


def check_alike(results: dict[str, dict[int, tuple]]) -> None:
    """UserError where cells differ in the problems of their evaluation or in their code."""
    every = [each for of in results.values() for each in of.values()]
    for what, values in (("problems", [evaluation["ids"] for evaluation, *_ in every]),
                         ("versions of the code", [config["git_commit"] for *_, config in every])):
        if any(value != values[0] for value in values):
            cli.fail(f"some cells were made with different {what}: delete the older ones, or "
                     "give another --out")


def verdict(label: str, reference: str, ks, mean, half) -> str:
    """One sentence: at which k is a setting better or worse, and where do the data not say?"""
    found: dict[str, list[str]] = {}
    for k, m, h in zip(ks, mean, half):
        word = "not separated" if not abs(m) > h else "better" if m > 0 else "worse"
        found.setdefault(word, []).append(f"@{k}")
    said = "; ".join(f"{word} at {', '.join(at)}" for word, at in found.items())
    return f"- {label} against {reference}: {said}."


def diagonal(before: Curve, curves: list[Curve]) -> list[str]:
    """Of an alignment: at each k, the setting trained for it minus every other one."""
    lines, count = [], len(curves) ** 2
    for own in curves:
        k, changes = int(re.findall(r"\d+", own.name)[0]), []
        for other in (before, *curves):
            if other is not own:
                ks, mean, half = evaluate.difference(own, other, count)
                numbers = mean[ks.index(k)].item(), half[ks.index(k)].item()
                changes.append("{}: {:+.3f}+-{:.3f}".format(other.name, *numbers))
        lines.append(f"- @{k}: {own.name} minus {', minus '.join(changes)}")
    return [f"The diagonal (all {count} intervals hold at once with 95 %):", "\n".join(lines)]


def report(name: str, results: dict[str, dict[int, tuple]], failed: list[str], out: Path) -> str:
    """Levels, paired differences and verdicts of an experiment; a figure."""
    question, reference, _ = EXPERIMENTS[name]
    results = {label: each for label, each in results.items() if each}
    seeds = set.intersection(*map(set, results.values())) if results else set()
    parts = [f"## {name}", question, *failed]
    if not seeds:
        return "\n\n".join([*parts, "No seed is done for every setting: nothing to report."])
    check_alike(results)
    order = sorted(results, key=lambda label: label != reference)
    curves = [curve_of(label, [results[label][seed] for seed in sorted(seeds)])
              for label in order]
    draw(name, curves, results, out / f"{name}.png")
    count = (len(curves) - 1) * len(curves[0].ks)
    verdicts = [verdict(curve.name, order[0], *evaluate.difference(curve, curves[0], count))
                for curve in curves[1:]]
    more = []
    if name in ("alignment", "graded"):
        first = [results[order[0]][seed] for seed in sorted(seeds)]
        more = diagonal(curve_of("before", first, "before"), curves)
    each = [f"{curve.name:28s} " + " ".join(f"{mean:.3f}" for mean in each_seed(curve, 8))
            for curve in curves]
    return "\n\n".join([
        *parts, f"```\n{evaluate.table(curves, name, count)}\n```", "\n".join(verdicts),
        *more,
        f"Each seed by itself, {curves[0].metric}@8:", "\n".join(["```", *each, "```"]),
        f"{len(seeds)} seed(s); {', '.join(LATE.values())}: the last quarter of training. "
        f"`python ablate.py {' '.join(sys.argv[1:])}`"])


def each_seed(curve: Curve, k: int) -> list[float]:
    """Mean estimate of each seed at k, or at the largest one below."""
    at = sum(each <= k for each in curve.ks) - 1
    return curve.values[..., at].mean(-1).tolist()  # (S,)


def draw(name: str, curves: list[Curve], results: dict, path: Path) -> None:
    """The curves, where they are few, and each seed; of `entropy`, its course over training."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(curves) <= 5:
        evaluate.draw_curves(left, curves)
    else:
        draw_seeds(left, curves, 1)
    if name == "entropy":
        looks = evaluate.looks_of([curve.name for curve in curves])
        for curve, look in zip(curves, looks):
            rows = [[row["entropy"] for row in rows] for _, rows, _ in results[curve.name].values()]
            mean = evaluate.running_mean(torch.tensor(rows).mean(0).tolist())
            right.plot(mean, label=curve.name, **{**look, "marker": None})
        right.set(title="entropy while training (nats per answer)", xlabel="step")
    else:
        draw_seeds(right, curves, 8)
    figure.savefig(path, dpi=130)


def draw_seeds(axes, curves: list[Curve], k: int) -> None:
    """A row per setting, a marker per seed."""
    for i, curve in enumerate(curves):
        [look], seeds = evaluate.looks_of([curve.name]), each_seed(curve, k)
        axes.plot(seeds, [-i] * len(seeds), **{**look, "linestyle": "none"})
    axes.set(title=f"each seed by itself: {curves[0].metric}@{k}")
    axes.set_yticks([-i for i in range(len(curves))], [curve.name for curve in curves])
    axes.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    chosen, out, toy, seeds, flags = settle(sys.argv[1:] if argv is None else argv)
    if not chosen:
        for name, (question, _, settings) in EXPERIMENTS.items():
            print(f"{name:13s} {len(settings):2d} settings   {question}")
        return
    cells = {(name, label, seed): cell(setting, seed, flags, out)
             for name, settings in chosen.items() for label, setting in settings.items()
             for seed in seeds}
    (out / "cells").mkdir(parents=True, exist_ok=True)
    waiting = {folder: argv for argv, folder in cells.values() if not result(folder)}
    os.environ["OMP_NUM_THREADS"] = "1"
    reasons = run_cells(waiting, (os.cpu_count() or 1) if toy else 1)
    for name, settings in chosen.items():
        results: dict[str, dict] = {label: {} for label in settings}
        failed = []
        for (of, label, seed), (_, folder) in cells.items():
            if of == name and (found := result(folder)):
                results[label][seed] = found
            elif of == name:
                failed.append(f"- {label}, seed {seed}: failed, {reasons.get(folder)}")
        text = report(name, results, failed, out)
        (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}")


if __name__ == "__main__":
    cli.run_script(main)
