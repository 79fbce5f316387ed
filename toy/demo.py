"""What k does, in a minute: the toy, trained for one try and for the best of eight.

    python toy/demo.py        what `make demo` runs; it leaves runs/demo/

Two runs of train.py side by side, which differ in --k alone. Then, on numbers that
nothing was trained on or chosen by: pass@k of both, and what they answer.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", message="IProgress")  # in a notebook; our bar needs no widget

from matplotlib.figure import Figure
from tqdm import tqdm

import evaluate
import sample
from lib import cli, policy, run, tasks
from lib.cli import UserError

KS = (1, 8)
FOLDER = ROOT / "runs/demo"
FLAGS = ("--limit", "1000")  # of so few as 100 numbers, 3 may divide by far too many
DIVISORS = ("3", "7", "9", "11", "13", "17", "19", "21", "23", "29", "31")  # others: together
SHOWN = (1, 8, 16)


def train(folder: Path, ks=KS, flags=FLAGS) -> dict[int, Path]:
    """Train the toy once for each k, side by side. -> run directory of each."""
    runs, processes = {k: folder / f"k-{k}" for k in ks}, []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for k, path in runs.items():
        command = [sys.executable, "train.py", "--k", str(k), *flags, "--run", path.resolve()]
        with path.with_suffix(".log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log,
                                              env={**os.environ, "OMP_NUM_THREADS": "1"}))
    label = "training for " + " and ".join(f"k = {k}" for k in ks)
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
    with tqdm(total=len(ks) * cli.SETTINGS["steps"].toy, desc=label, file=sys.stdout, ncols=80,
              mininterval=1, bar_format=form) as bar:
        bar.set_postfix_str("testing the untrained toy")
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            rewards = [column(path, "reward") for path in runs.values()]
            if all(rewards):
                late = [f"{evaluate.running_mean(each)[-1]:.2f}" for each in rewards]
                bar.set_postfix_str("reward " + " and ".join(late), refresh=False)
            bar.update(sum(map(len, rewards)) - bar.n)
    for process, path in zip(processes, runs.values()):
        if process.returncode:
            said = path.with_suffix(".log").read_text().strip().split("\n")
            raise UserError(f"training in {path} failed: {said[-1]}")
    return runs


def column(path: Path, name: str) -> list[float]:
    """A column of metrics.jsonl, as far as the run has come."""
    rows = path / "metrics.jsonl"
    return [row[name] for _, row in cli.read_rows(rows, appended=True)]


def curves(runs: dict[int, Path], ks=(1, 2, 4, 8, 16, 32)) -> list[evaluate.Curve]:
    """pass@k before training and after training for each k, as train.py evaluated it."""
    problems = {p.id: p for p in tasks.load_problems("divisor:test")}
    rows = {f"k = {k}": cli.read_rows(path / "evals.jsonl") for k, path in runs.items()}
    ends = {"before": [*rows.values()][0][0]} | {name: each[-1] for name, each in rows.items()}
    return [evaluate.make_curve(name, [problems[i] for i in row["ids"]], row["rewards"], ks)
            for name, (_, row) in ends.items()]


def texts_of(runs: dict[int, Path], problems: list[tasks.Problem]) -> dict[str, list[list[str]]]:
    """Eight answers [P][8] to each problem, before and after training for each k."""
    return {"before": answers("toy", problems)} | {
        f"k = {k}": answers(str(path), problems) for k, path in runs.items()}


def answers(model: str, problems: list[tasks.Problem], n: int = 8) -> list[list[str]]:
    """Texts [P][n] of a model's answers."""
    model, tokenizer = policy.load_model(*run.resolve_model(model), device="cpu")
    problems = tasks.encode(problems, tokenizer, model.config, 6)
    sampler = sample.HFSampler(model, tokenizer, sample.stop_ids(model, tokenizer), 1.0, 6)
    groups = sampler.generate([p.prompt_ids for p in problems], n, seed=1)
    return [[rollout.text for rollout in group] for group in groups]


def draw(curves: list, texts: dict[str, list[list[str]]], path: Path | None = None) -> Figure:
    """Left: pass@k. Right: what is answered, in per cent of all answers."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    evaluate.draw_curves(left, curves)
    left.set_title("chance that one of k answers is right")
    labels = [*DIVISORS, "other"]
    for i, (look, name) in enumerate(zip(evaluate.looks_of([*texts]), texts)):
        groups = texts[name]
        said = Counter(text if text in DIVISORS else "other" for group in groups for text in group)
        shares = [100 * said[label] / said.total() for label in labels]
        places = [place + 0.27 * (i - 1) for place in range(len(labels))]
        right.bar(places, shares, 0.27, label=name, color=look["color"],
                  hatch=("", "///", "...")[i], edgecolor="white", linewidth=0)
    right.set(title="what the model answers, in % of its answers", xlabel="answer")
    right.set_xticks(range(len(labels)), labels)
    right.legend(fontsize=8)
    if path:
        figure.savefig(path, dpi=150)
    return figure


def draw_history(runs: dict[int, Path]) -> Figure:
    """Entropy and mean reward over the steps, means of ten steps."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    columns = {"entropy": "entropy (nats per answer)", "reward": "mean reward"}
    for axis, (name, label) in zip(figure.subplots(1, 2), columns.items()):
        names = [f"k = {k}" for k in runs]
        for path, title, look in zip(runs.values(), names, evaluate.looks_of(names)):
            means = evaluate.running_mean(column(path, name))
            axis.plot(means, look["linestyle"], color=look["color"], label=title)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def groups_to_read(problems: list, texts: dict[str, list[list[str]]]) -> str:
    """Eight answers of each model to three numbers, one that only the last model finds."""
    right = lambda name, i: [bool(tasks.grade_divisor(text, problems[i].answer))
                             for text in texts[name][i]]
    hits = {name: [sum(right(name, i)) for i in range(len(problems))] for name in texts}
    _, one, best = texts
    wanted = (lambda i: not hits[one][i] and hits[best][i] >= 2,
              lambda i: hits[one][i] and hits[best][i],
              lambda i: not hits[one][i] and hits[best][i] == 1)
    lines, used = [], set()
    for fits in wanted:
        i = next((i for i in range(len(problems)) if fits(i) and i not in used), 0)
        used.add(i)
        for name in texts:
            said = [f"[{text}]" if hit else f" {text} "
                    for text, hit in zip(texts[name][i], right(name, i))]
            number = problems[i].answer if name == "before" else ""
            lines.append(f"{number:7s}{name:7s}" + "".join(f"{word[:8]:>8s}" for word in said))
    return "\n".join(lines)


def main() -> None:
    cli.parse(__doc__, {})
    runs = train(FOLDER, KS, FLAGS)
    found = curves(runs, SHOWN)
    _, one, best = found
    at = dict(zip(SHOWN, zip(*(curve.values.mean(0).tolist() for curve in found))))
    problems = tasks.load_problems("divisor:test", 200)
    texts = texts_of(runs, problems)
    draw(curves(runs), texts, FOLDER / "demo.png")

    sentence = ("\nWith 8 tries the toy finds a divisor of this share of numbers: before {:.2f},"
                "\ntrained for one try (ordinary RL) {:.2f}, trained for the best of 8 {:.2f}.\n")
    print(re.sub(r"0(\.\d\d)", r"\1", sentence.format(*at[8])))
    print(evaluate.table(found).replace("; *", "\n*"))  # to 80 columns
    ks, mean, half = evaluate.difference(best, one)
    changes = [f"{mean[ks.index(k)]:+.2f} +- {half[ks.index(k)]:.2f} at pass@{k}" for k in KS]
    print(f"k = 8 minus k = 1: {', '.join(changes)}\n\neight answers to a number, hits in []")
    print(groups_to_read(problems, texts))
    print(f"figure: {os.path.relpath(FOLDER)}/demo.png; the runs are beside it")


if __name__ == "__main__":
    cli.run_script(main)
