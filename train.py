"""Train a language model for the best of its k answers, with RSPO.

    python train.py                                   the embedded toy model
    python train.py --model Qwen2.5-Math-1.5B --k 4   the real thing, on one GPU
    python train.py --resume runs/NAME                go on where a run stopped

One on-policy update per step: no clipped ratios, no KL term, no value model.

Shapes: P prompts per step, n answers of each, M held-out problems.
"""

from lib import cli

if __name__ == "__main__":
    cli.refuse_early(lambda: cli.parse(__doc__, cli.SETTINGS))

import random
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import rspo
import sample
from lib import page, policy, tasks
from lib.run import RUN_FLAGS, Run, flags_of, read_adapter, read_config, resolve_model


# -------- the loop

def train(args, run: Run, learner, sampler, problems: list, held_out: list) -> None:
    """From `run.step` on: sample, grade, weigh, update."""
    bar = tqdm(total=args.steps, initial=run.step, desc="training", disable=None)
    while run.step < args.steps:
        clock, step = [time.perf_counter()], run.step
        sampler.sync(learner.model, version=step)
        if step == 0 or args.eval_every and step % args.eval_every == 0:
            evaluate_policy(args, run, sampler, held_out)
        clock.append(time.perf_counter())

        # n answers to each of P problems, from the policy as it is now
        batch = [problems[i] for i in batch_at(len(problems), step, args.prompts, args.seed)]
        seed = sample.stream(args.seed, "train", step)
        groups = sampler.generate([p.prompt_ids for p in batch], args.n, seed)
        clock.append(time.perf_counter())

        # which of them are right (as a noisy grader would say, with --flip)
        rewards, failures = grade(step + 1, batch, groups)  # (P, n)
        noisy = flipped(rewards, args.flip, sample.stream(args.seed, "flip", step))  # (P, n)
        clock.append(time.perf_counter())

        # what each adds to the best of k: this line is the method
        ks = ks_at(args.k, step, args.steps)
        weights = torch.stack([rspo.OBJECTIVES[args.objective](noisy, k) for k in ks]).mean(0)

        # one step along the mean over prompts of (1/n) sum_i W_i grad log pi(y_i)
        stats = learner.update([r for group in groups for r in group], weights.flatten())
        run.step += 1
        clock.append(time.perf_counter())

        report_step(args, run, metrics_row(
            run.step, ks, batch, groups, rewards, weights, clock,
            **stats, grader_failures=failures))
        bar.update()
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save(learner)
        run.stop_if_asked()
    sampler.sync(learner.model, version=args.steps)
    evaluate_policy(args, run, sampler, held_out)


def evaluate_policy(args, run: Run, sampler, held_out: list) -> None:
    """Sample and grade --eval-n answers to each held-out problem, once per step."""
    if any(row["step"] == run.step for row in run.read("evals.jsonl")):
        return
    groups, place = [], (args.seed, "evaluate", run.step)
    for block in sample.sample_blocks(sampler, held_out, args.eval_n, place, "evaluating"):
        groups += block
        run.stop_if_asked()
    rewards, failures = grade(run.step, held_out, groups)  # (M, n)
    few = slice(None, None, -(-len(groups) // 8))  # at most eight
    run.write("evals.jsonl", [{
        "step": run.step, "ids": [p.id for p in held_out], "rewards": rewards.tolist(),
        "grader_failures": failures,
        "samples": page.rows_of(held_out[few], groups[few], rewards[few].tolist())}])


def grade(step: int, problems: list, groups) -> tuple[Tensor, int]:
    """Rewards (P, n) of rollouts [P][n], and how many answers the grader lost."""
    rewards, failures = tasks.grade_all(problems, groups)
    if failures:
        tqdm.write(f"step {step}: {failures} answers were not graded: they earn 0")
    rewards = torch.tensor(rewards)  # (P, n)
    for p, i in (~rewards.isfinite()).nonzero().tolist():
        raise policy.BadNumbers(f"a reward is {rewards[p, i].item()}", groups[p][i])
    return rewards, failures


def flipped(rewards: Tensor, share: float, seed: int) -> Tensor:
    """0/1 rewards (P, n), of which a share is flipped at random."""
    randomness = torch.Generator().manual_seed(seed)
    flip = torch.rand(rewards.shape, generator=randomness) < share  # (P, n)
    return torch.where(flip, 1 - rewards, rewards)  # (P, n)


def batch_at(total: int, step: int, size: int, seed: int) -> list[int]:
    """Problems of a step: on through a fresh shuffle per epoch."""
    positions = range(step * size, (step + 1) * size)
    epochs = {position // total for position in positions}
    order = {epoch: random.Random(f"{seed}/{epoch}").sample(range(total), total)
             for epoch in epochs}
    return [order[position // total][position % total] for position in positions]


def ks_at(spec: str, step: int, steps: int) -> tuple:
    """The ks of a step: "4" is one, "1,4,16" a mixture, "8:1" anneals 8, 7, ..., 1."""
    if spec == "harmonic":  # all of them at once, for the weights
        return (spec,)
    if ":" not in spec:
        return tuple(map(int, spec.split(",")))
    first, last = map(int, spec.split(":"))
    sign, count = 1 if first < last else -1, abs(last - first) + 1
    if count > steps:
        raise ValueError("more values than steps")
    return (first + sign * (step * count // steps),)


# -------- what a step reports

PARTS = "evaluate_seconds", "sample_seconds", "grade_seconds", "learn_seconds"


def metrics_row(step, ks, batch, groups, rewards, weights, clock, **stats) -> dict:
    """One row of metrics.jsonl. docs/reference.md defines every column."""
    rollouts = [r for group in groups for r in group]
    mean = lambda values: sum(values) / len(rollouts)
    metric, n = "max" if batch[0].graded else "pass", len(groups[0])
    best = [rspo.max_at_k(rewards, n if k == "harmonic" else k).mean() for k in ks]
    right = {(p, groups[p][i].text) for p, i in (rewards == 1).nonzero().tolist()}
    return {
        "step": step, "k": ",".join(map(str, ks)), "reward": rewards.mean().item(),
        f"{metric}@k": torch.stack(best).mean().item(),
        "distinct_correct": len(right) / len(groups),
        "zero_weight_prompts": (weights == 0).all(-1).double().mean().item(),
        "truncated": mean(not r.finished for r in rollouts),
        "completion_tokens": mean(len(r.completion_ids) for r in rollouts),
        "entropy": -mean(sum(r.logprobs) for r in rollouts), **stats,
        "clipped": float(stats["grad_norm"] > policy.MAX_GRAD_NORM),
        **{part: end - begin for part, begin, end in zip(PARTS, clock, clock[1:])},
        "peak_memory_gb": policy.peak_memory_gb(),
    }


ALARMS = {  # column, where it rings, what to change; the first one counts
    "gap": ("logprob_gap_mean", 0.05, inf, "off-policy: take --sampler hf --dtype float32"),
    "cut off": ("truncated", 0.5, inf, "cut-off answers earn 0: raise --max-new-tokens"),
    "solved": ("reward", 0.95, inf, "nothing is left to learn: take harder --data"),
    "no signal": ("zero_weight_prompts", 0.95, inf, "take other --data or a larger --n"),
    "collapse": ("entropy", -inf, 0.05, "one answer per prompt: lower --lr or raise --k of passk"),
}


def report_step(args, run: Run, row: dict) -> None:
    """Keep a row; ten times per run print the means since the last line."""
    run.write("metrics.jsonl", [row])
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(run.folder / "tensorboard", purge_step=row["step"]) as board:
            for name in row.keys() - {"k"}:
                board.add_scalar(name, row[name] or 0.0, row["step"])
    every = max(1, args.steps // 10)
    if row["step"] != 1 and row["step"] % every:
        return
    rows = run.read("metrics.jsonl")[-every:]
    if row["step"] == every > 1:
        rows = rows[1:]  # the first one has its line already
    mean = {name: sum(each[name] or 0 for each in rows) / len(rows)
            for name in row if name != "k"}
    for name, (column, low, high, sentence) in ALARMS.items():
        if low < mean[column] < high:
            tqdm.write(f"step {row['step']}: {name}: {sentence}")
            break
    best, label = evaluate.best_of_k(rows)
    seconds = sum(mean[part] for part in PARTS)
    tqdm.write(f"step {row['step']:>4d}/{args.steps}  reward {mean['reward']:.3f}  "
               f"{label} {mean[best]:.3f}  entropy {mean['entropy']:.2f}  "
               f"no signal {mean['zero_weight_prompts']:.0%}  {seconds:.2f} s")


def report_run(run: Run, held_out: list, k: str) -> None:
    """Table, figures and a page of answers, before against after."""
    first, *_, last = run.read("evals.jsonl")
    ks = tuple(k for k in evaluate.powers_of_two(len(first["rewards"][0])) if k <= 32)
    sides = {"before": first, f"after {last['step']} steps": last}
    curves = [evaluate.make_curve(name, held_out, row["rewards"], ks)
              for name, row in sides.items()]
    print(f"\n{evaluate.table(curves)}")
    evaluate.plot(curves, run.folder / "curves.png", run.folder.name)
    evaluate.plot_history(run.read("metrics.jsonl"), run.folder / "history.png")
    page.write(run.folder / "samples.html", run.folder.name, k,
               [(name, row["samples"]) for name, row in sides.items()])
    print(f"\nlook at {run.folder}/samples.html and *.png; next:\n"
          f"python evaluate.py --model {run.folder}")


# -------- the script

def settle(argv):
    """All settings of a new run, or of the one to resume."""
    args = cli.parse(__doc__, cli.SETTINGS, argv)
    if args.resume:
        for name in RUN_FLAGS:
            if getattr(args, name) is not None:
                cli.fail(f"--resume brings every setting: leave out {cli.flag(name)}")
        if not (config := read_config(args.resume)):
            cli.fail(f"--resume {args.resume}: no run directory there")
        vars(args).update(config["flags"], run=args.resume)
        return args
    args.model = args.model or "toy"
    base, adapter = resolve_model(args.model)
    if args.model != "toy" and Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())  # the run works from anywhere
    own = {"load_in_4bit": flags_of(args.model).get("load_in_4bit", False)}
    if adapter:
        own["lora_rank"] = read_adapter(adapter).r
        for name, value in own.items():
            if getattr(args, name) not in (None, value):
                cli.fail(f"{cli.flag(name)} is {getattr(args, name)}, but {value} in the "
                         f"adapter of {args.model}")
    cli.settle(args, cli.SETTINGS, cli.is_toy(base), own)
    args.sampler = sample.pick_sampler(args.sampler, args.dtype)
    now = time.strftime("%Y%m%d-%H%M%S")
    name = f"{Path(args.model).name}-{args.objective}-k{args.k}-{now}"
    args.run = args.run or Path("runs") / name.replace(":", "to").replace(",", "_")
    if args.run.exists() or ".." in args.run.parts:
        cli.fail(f"--run is {args.run}, but must be a new folder, without '..' (or --resume it)")
    return args


def check(args, graded: bool) -> None:
    """Refuse a k, n, objective and rewards that cannot go together."""
    if graded and args.flip:
        cli.fail(f"--flip is {args.flip}, but {args.data} has rewards between 0 and 1")
    try:
        ks = {k for step in range(args.steps) for k in ks_at(args.k, step, args.steps)}
    except ValueError:
        cli.fail(f"--k is {args.k!r}, but must be a number (4), a list (1,4,16), harmonic, "
                 f"or a schedule (8:1) of at most --steps = {args.steps} values")
    for k in sorted(ks):
        try:  # the weights themselves know what they can do
            rspo.OBJECTIVES[args.objective]([0.5 * graded] * args.n, k)
        except ValueError as error:
            cli.fail(f"--k {args.k} --objective {args.objective}: {error}")


def config_of(args, data: dict) -> dict:
    """Of config.json: settings, versions, git commit, digests of the data."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                            capture_output=True, text=True).stdout.strip()
    used = {"torch", "transformers", "peft", "vllm"} & sys.modules.keys()
    return {"flags": {name: getattr(args, name) for name in RUN_FLAGS},
            "versions": {name: sys.modules[name].__version__ for name in sorted(used)},
            "git_commit": commit, "data": data}


def main(argv=None) -> None:
    args = settle(argv)
    run = Run(args.run) if args.resume else None  # refused at once if in use
    base, adapter = resolve_model(args.model)
    device = "cpu" if cli.is_toy(base) else None
    if device:
        torch.set_num_threads(1)  # the toy is too small to share
    problems, held_out, args.data, args.eval_data = tasks.train_and_eval(
        args.data, args.eval_data, args.limit)
    check(args, problems[0].graded)
    data = {"training": cli.digest(problems), "held-out": cli.digest(held_out)}
    before = read_config(args.run)["data"] if run else data
    for which, digest in data.items():
        if before[which] != digest:
            cli.fail(f"--resume {args.run}: its {which} problems have changed since it began; "
                     "put them back or start a new run")
    model, tokenizer = policy.load_model(base, adapter, args.dtype, device, args.load_in_4bit)
    if not adapter:
        model = policy.add_lora(model, args.lora_rank, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    problems = tasks.encode(problems, tokenizer, model.config, args.max_new_tokens, False)
    held_out = tasks.encode(held_out, tokenizer, model.config, args.max_new_tokens)
    sampler = sample.make_sampler(args, model, tokenizer, problems + held_out,
                                  args.run / ".adapter", args.gpu_memory)
    run = run or Run(args.run, config_of(args, data))
    learner = policy.Learner(model, args.lr, args.temperature, args.micro_batch_tokens,
                             cap=2.0 if args.sampler == "vllm" else 0.0)
    with run.guarded(learner, problems + held_out):
        train(args, run, learner, sampler, problems, held_out)
    report_run(run, held_out, args.k)


if __name__ == "__main__":
    cli.run_script(main)
