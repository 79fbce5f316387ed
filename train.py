"""Train a language model for the best of its k answers, with RSPO. One GPU, or the CPU for the toy.

    python train.py                                        the embedded toy model on Countdown, about two minutes on 2 cores
    python train.py --model Qwen2.5-Math-1.5B --k 4        the real thing
    python train.py --resume runs/x                        go on where a run stopped

A step is: batch -> generate -> grade -> weigh -> update -> sync -> log. One on-policy update a step: no PPO clipping, no
ratio between updates (with vLLM one capped ratio of learner to sampler, --importance-cap), no KL term, no value model.
What is left out on purpose: multi-GPU, full fine-tuning, async sampling.

A run directory holds config.json (every setting), metrics.jsonl (a row a step), evals.jsonl (rewards of every
evaluation), samples.jsonl (a few answers to read), step_000100/ (adapter, optimizer, state, SHA256SUMS) and figures.
"""

import argparse
import importlib.metadata
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import policy
import rspo
import sample
import tasks
from tasks import UserError

MEAN_GAP_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}          # nats a token, sampler against learner (LOG.md)
OBJECTIVES = {"passk": rspo.pass_at_k_weights, "maxk": rspo.max_at_k_weights, "groupmax": rspo.group_max_weights}


# ---------------------------------------------------------------- the loop

def train(args: argparse.Namespace, run: Path, model, tokenizer, problems, prompts, held_out, eval_prompts) -> None:
    """Train model on problems as args say, in run directory `run`, from its newest whole checkpoint where there is one."""
    optimizer = policy.make_optimizer(model, args.lr, args.adam_8bit)
    start, skipped = 0, 0                                   # steps done; steps without a single non-zero weight
    if checkpoint := policy.newest_checkpoint(run):
        state = policy.load_checkpoint(checkpoint, model, optimizer)
        start, skipped = state["step"], state["skipped"]
    sampler = prepare(args, model, tokenizer, max(map(len, prompts)), max(map(len, prompts + eval_prompts)), version=start)
    log, stop, budget = RunLog(run, start, args.tensorboard), StopRequest(), args.micro_batch_tokens
    save = lambda step: policy.save_checkpoint(run, step, model, optimizer, {"skipped": skipped}, args.keep)

    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="training", disable=None):
        batch, groups = batch_at(len(problems), step, args.prompts, args.seed), []                          # [P]
        try:
            if step == 0 or args.eval_every and step % args.eval_every == 0:
                evaluate_policy(args, log, step, sampler, held_out, eval_prompts, stop)
                if stop.requested:
                    leave(save(step), stop)
            clock = Clock()
            ks = ks_at(args.k, step, args.steps)
            groups = sampler.generate([prompts[i] for i in batch], args.n, args.temperature, args.max_new_tokens,
                                      seed_at(args.seed, step, args.prompts * args.n))                      # [P][n]
            clock.lap("sample")
            failures_before = tasks.graders().failures
            rewards = torch.tensor(tasks.grade_all([problems[i] for i in batch], responses(groups)))        # (P, n)
            failures = tasks.graders().failures - failures_before
            clock.lap("grade")
            sampler.sleep()
            if step < start + 3 or step % 10 == 0:
                check_agreement(args, model, [group[0] for group in groups[:8]])
            weights = weigh(rewards, ks, args.objective, args.baseline)                                     # (P, n)
            stats, budget = learn(args, model, optimizer, [r for group in groups for r in group], weights, budget)
        except (UserError, policy.BadNumbers, torch.OutOfMemoryError) as error:
            log.failure(step + 1, error, [problems[i] for i in batch], groups)
            give_up(run, step, error, save)
        clock.lap("learn")
        sync(sampler, model, version=step + 1)
        clock.lap("sync")
        skipped += stats["learned_tokens"] == 0
        log.step(metrics_row(step + 1, ks, groups, rewards, weights, stats, clock, problems[0].task, skipped, failures), args.steps)
        if step + 1 == args.steps or (step + 1) % args.save_every == 0:
            save(step + 1)
        if stop.requested:
            leave(save(step + 1), stop)
    evaluate_policy(args, log, args.steps, sampler, held_out, eval_prompts, stop)
    if stop.requested:
        leave(run / f"step_{args.steps:06d}", stop)
    log.report(held_out)


def prepare(args: argparse.Namespace, model, tokenizer, train_prompt: int, any_prompt: int, version: int):
    """The sampler, at policy `version`. On a GPU the worst batch is learned first. train_prompt, any_prompt: tokens of the longest one to train on, or to evaluate too."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sampler = make_sampler(args, model, tokenizer, any_prompt + args.max_new_tokens)
    sampler.sleep()
    if model.device.type == "cuda":                         # elsewhere memory gives no error that could be caught
        policy.rehearse(model, train_prompt, args.max_new_tokens, args.prompts * args.n, args.micro_batch_tokens)
    sync(sampler, model, version)
    return sampler


def learn(args: argparse.Namespace, model, optimizer, rollouts, weights: torch.Tensor, budget: int) -> tuple[dict, int]:
    """One update with weights (P, n). Returns its statistics and the micro-batch tokens it took, halved once if memory ran out."""
    half = max(1, args.micro_batch_tokens // 2)
    for tokens in dict.fromkeys((budget, half)):
        try:
            return policy.update(model, optimizer, rollouts, weights.flatten(), num_samples=weights.numel(), temperature=args.temperature,
                                 micro_batch_tokens=tokens, max_grad_norm=args.max_grad_norm, importance_cap=args.importance_cap), tokens
        except torch.OutOfMemoryError as error:             # in the backward pass: no parameter has changed, and the gradient is made anew
            reason = str(error).splitlines()[0]
        optimizer.zero_grad(set_to_none=True)
        if tokens != half:
            tqdm.write(f"out of memory while learning {tokens} tokens at once: from now on --micro-batch-tokens is {half}, with the same gradient")
    raise UserError(f"the memory does not suffice to learn {half} tokens at once, half of --micro-batch-tokens ({reason}); set a smaller "
                    "micro_batch_tokens, or gradient_checkpointing to true, in the run's config.json")


def leave(checkpoint: Path, stop: "StopRequest") -> None:
    print(f"\nstopped; {checkpoint} is whole, go on with: python train.py --resume {checkpoint.parent}")
    sys.exit(128 + stop.requested)


def give_up(run: Path, step: int, error: Exception, save) -> None:
    """Step `step` + 1 failed: save the policy before it, unless that policy is what is broken, and say how to go on."""
    if isinstance(error, policy.BrokenPolicy):
        newest = policy.newest_checkpoint(run)
        advice = "start again with a lower --lr" + (f", from --model {newest} if that was still sound" if newest else "")
    elif isinstance(error, policy.BadNumbers):
        advice = f"the policy before it is saved: start from it with --model {save(step)} and a lower --lr"
    else:
        save(step)
        advice = f"the policy before it is saved: go on with --resume {run}"
    raise UserError(f"step {step + 1} was not applied: {error}; {advice}") from error


def make_sampler(args: argparse.Namespace, model, tokenizer, context: int):
    if args.sampler == "hf":
        return sample.HFSampler(model, tokenizer)
    rank = max(config.r for config in model.peft_config.values())
    base = str(policy.dequantised_copy(model, tokenizer)) if args.load_in_4bit else policy.resolve_model(args.model)[0]
    return sample.VLLMSampler(base, tokenizer, sample.stop_ids(model.generation_config, tokenizer), lora_rank=rank, context=context,
                              dtype=policy.pick_dtype(args.dtype), gpu_memory=args.gpu_memory, sleeps=args.vllm_sleep)


def sync(sampler, model, version: int) -> None:
    """Give the sampler the adapter as it is now, through files in RAM where it does not share the model."""
    if sampler.adapter_root is not None:
        folder = sampler.adapter_root / f"version-{version}"
        model.save_pretrained(folder)
        sampler.sync(folder, version)


def check_agreement(args: argparse.Namespace, model, rollouts: list) -> None:
    """Raise UserError if the sampler's log-probabilities are not the learner's, beyond what the number format explains."""
    mean, largest = policy.agreement(model, rollouts, args.temperature)
    allowed = MEAN_GAP_ALLOWED[policy.pick_dtype(args.dtype)]
    if not mean <= allowed:
        raise UserError(f"sampler and learner disagree by {mean:.2g} nats a token on average (at most {largest:.2g}), but "
                        f"{allowed:g} is the most that {policy.pick_dtype(args.dtype)} explains; likely causes: an adapter that did not "
                        "reach the sampler, stale cache blocks, another temperature, top-k or top-p in the sampler, another base model")


def evaluate_policy(args: argparse.Namespace, log: "RunLog", step: int, sampler, held_out, prompts, stop: "StopRequest") -> None:
    """Sample --eval-n answers to each held-out problem and log their rewards, once for each step. Dropped if a stop is requested."""
    if step in log.evaluated:
        return
    groups = []
    for group in sample.sample_problems(sampler, prompts, args.eval_n, args.temperature, args.max_new_tokens,
                                        seed=args.seed + 10**15, label=f"evaluating at step {step}"):
        groups.append(group)
        if stop.requested:
            return
    log.evaluation(step, held_out, groups, tasks.grade_all(held_out, responses(groups)))


def responses(groups) -> list[list[tuple[str, bool]]]:
    """What a grader sees of rollouts [P][n]: text, and whether the model finished."""
    return [[(rollout.text, rollout.finished) for rollout in group] for group in groups]


def seed_at(seed: int, step: int, samples: int) -> int:
    """Seed of a step's sampling: a block of `samples` seeds of its own, so that no two samples of a run share one."""
    return seed * 10**10 + step * samples


def weigh(rewards: torch.Tensor, ks: tuple[int, ...], objective: str, baseline: str) -> torch.Tensor:
    """(P, n) weights of (P, n) rewards: the mean over ks of each objective's weights."""
    if not torch.isfinite(rewards).all():
        index = (~torch.isfinite(rewards)).flatten().nonzero()[0].item()
        raise policy.BadNumbers(f"a reward is {rewards.flatten()[index].item()}", index)
    weight_fn = rspo.leave_one_out_weights if baseline == "loo" else OBJECTIVES[objective]
    return torch.stack([weight_fn(rewards, k) for k in ks]).mean(0)                         # (P, n)


def batch_at(num_problems: int, step: int, size: int, seed: int) -> list[int]:
    """Problem indices of a step: walks through a fresh shuffle of all problems each epoch. A pure function of its arguments."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, num_problems)
        if not indices or offset == 0:
            order = random.Random(f"{seed}/{epoch}").sample(range(num_problems), num_problems)
        indices.append(order[offset])
    return indices


def ks_at(spec: str, step: int, steps: int) -> tuple[int, ...]:
    """The ks of a step: "4" is one, "1,4,16" a mixture, "8:1" anneals 8, 7, ..., 1 with an equal share of the run each."""
    if ":" in spec:
        first, last = map(int, spec.split(":"))
        values = range(first, last - 1, -1) if first >= last else range(first, last + 1)
        return (values[step * len(values) // steps],)
    return tuple(map(int, spec.split(",")))


# ---------------------------------------------------------------- what a step reports

def metrics_row(step, ks, groups, rewards, weights, stats, clock, task, skipped, failures) -> dict:
    """One row of metrics.jsonl. Every column is defined in the README."""
    rollouts = [r for group in groups for r in group]
    tokens = sum(len(r.completion_ids) for r in rollouts)
    metric = "max" if task == "countdown-graded" else "pass"
    best = torch.stack([rspo.max_at_k(rewards, k).mean() for k in ks]).mean().item()
    return {
        "step": step, "k": ",".join(map(str, ks)), "reward": rewards.mean().item(),
        f"{metric}@1": rspo.max_at_k(rewards, 1).mean().item(), f"{metric}@k": best,
        "distinct_correct": distinct_correct(groups, rewards),
        "zero_weight_prompts": (weights == 0).all(-1).double().mean().item(), "skipped_steps": skipped,
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "completion_tokens": tokens / len(rollouts),
        "entropy": -sum(sum(r.logprobs) for r in rollouts) / len(rollouts),
        "grad_norm": stats["grad_norm"],
        "logprob_gap_mean": stats["logprob_gap_mean"], "logprob_gap_max": stats["logprob_gap_max"],
        "grader_failures": failures,
        "sample_tokens_per_s": tokens / clock.laps["sample"],
        "learn_tokens_per_s": stats["learned_tokens"] / clock.laps["learn"],
        "seconds": sum(clock.laps.values()), **{f"{part}_seconds": value for part, value in clock.laps.items()},
        "peak_memory_gb": peak_memory_gb(),
    }


def distinct_correct(groups, rewards: torch.Tensor) -> float:
    """Mean over prompts of how many different texts of reward 1 are among a prompt's n answers; rewards (P, n)."""
    return sum(len({r.text for r, value in zip(group, values) if value == 1}) for group, values in zip(groups, rewards.tolist())) / len(groups)


def tripwires(row: dict, usual_norm: float | None = None) -> dict[str, str]:
    """Name -> sentence of every alarm a metrics row sets off: what it means, what to change. usual_norm: of the gradient, lately."""
    alarms = {}
    if row["truncated"] > 0.5:
        alarms["truncated"] = f"{row['truncated']:.0%} of the answers are cut off and earn 0: raise --max-new-tokens"
    if row["reward"] > 0.95:
        alarms["solved"] = (f"the mean reward is {row['reward']:.3f}: nearly every answer is right, and nothing is left to learn here; stop, or "
                            "take harder --data")
    elif row["zero_weight_prompts"] > 0.95:
        alarms["zero"] = (f"{row['zero_weight_prompts']:.0%} of the prompts have no signal (all wrong, or nearly all right): take "
                          "easier or harder --data, a larger --n, or graded rewards")
    if (row["logprob_gap_mean"] or 0) > 0.05:
        alarms["gap"] = (f"sampler and learner disagree by {row['logprob_gap_mean']:.3f} nats a token on average: training is "
                         "off-policy; use --dtype float32, or check the adapter sync")
    if row["entropy"] < 0.05:
        alarms["entropy"] = (f"entropy is {row['entropy']:.3f} nats an answer: the policy has collapsed to one answer a prompt; "
                             "lower --lr or raise --k")
    if usual_norm and row["grad_norm"] > 20 * usual_norm:
        alarms["norm"] = (f"the gradient norm is {row['grad_norm']:.3g}, usually it was {usual_norm:.3g}: if that goes on, lower --lr or "
                          "--max-grad-norm")
    return alarms


def peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024                      # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Clock:
    """Seconds of each part of a step."""

    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.laps[part], self._last = now - self._last, now


class StopRequest:
    """Ctrl-C or SIGTERM: finish the step, save, leave. A second one leaves at once."""

    def __init__(self):
        self.requested = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame) -> None:
        self.requested = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping as soon as nothing is lost by it (once more: at once)\n")      # print may be at work just now


def open_board(run: Path, step: int):
    """TensorBoard's writer in the run directory, going on after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install tensorboard") from None
    return SummaryWriter(run / "tensorboard", purge_step=step + 1)


class RunLog:
    """The files of a run directory that grow, cut back to what a resumed run has really done."""

    def __init__(self, run: Path, step: int, tensorboard: bool = False):
        """step: of the checkpoint that training goes on from; rows after it will be made again."""
        self.run, self.alarmed, self.norms = run, set(), deque(maxlen=50)
        self._cut("metrics.jsonl", lambda row: row["step"] <= step)
        self.evaluated = {row["step"] for row in self._cut("evals.jsonl", lambda row: row["step"] <= step)}
        self._cut("samples.jsonl", lambda row: row["step"] in self.evaluated)
        self.board = open_board(run, step) if tensorboard else None

    def _cut(self, name: str, keep) -> list[dict]:
        path = self.run / name
        lines = tasks.read_lines(path)[:-1] if path.exists() else []        # behind the last newline: nothing, or half a line
        try:
            lines = [line for line in lines if keep(tasks.parse_row(line))]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): repair or remove the bad lines and go on") from error
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        unfinished.replace(path)
        return [json.loads(line) for line in lines]

    def _read(self, name: str) -> list[dict]:
        return [json.loads(line) for line in tasks.read_lines(self.run / name)[:-1]]

    def _append(self, name: str, row: dict) -> None:
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def step(self, row: dict, steps: int) -> None:
        self._append("metrics.jsonl", row)
        if self.board:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()
        usual_norm = statistics.median(self.norms) if len(self.norms) >= 10 else None
        self.norms.extend([row["grad_norm"]] if row["grad_norm"] else [])
        for name, sentence in tripwires(row, usual_norm).items():
            if name not in self.alarmed:
                tqdm.write(f"step {row['step']}: {sentence}")
                self.alarmed.add(name)
        if row["step"] % max(1, steps // 10) == 0 or row["step"] == 1:
            best = next(key for key in row if key.endswith("@k"))
            gap = "-" if row["logprob_gap_max"] is None else f"{row['logprob_gap_mean']:.1e} (max {row['logprob_gap_max']:.1e})"
            tqdm.write(f"step {row['step']:>5d}/{steps}  reward {row['reward']:.3f}  {best} {row[best]:.3f} (k = {row['k']})  "
                       f"zero-weight prompts {row['zero_weight_prompts']:.0%}  cut off {row['truncated']:.0%}  "
                       f"tokens {row['completion_tokens']:.1f}  entropy {row['entropy']:.2f}  grad norm {row['grad_norm']:.2f}  "
                       f"log-prob gap {gap}  {row['seconds']:.2f} s (sample {row['sample_seconds'] / row['seconds']:.0%}, "
                       f"grade {row['grade_seconds'] / row['seconds']:.0%}, learn {row['learn_seconds'] / row['seconds']:.0%}, "
                       f"sync {row['sync_seconds'] / row['seconds']:.0%})")

    def evaluation(self, step: int, problems, groups, rewards) -> None:
        spread = slice(None, None, -(-len(problems) // 8))                     # eight problems at most, from all over the data
        for problem, group, values in list(zip(problems, groups, rewards))[spread]:
            self._append("samples.jsonl", {
                "step": step, "id": problem.id, "task": problem.task, "problem": problem.question, "answer": problem.answer,
                "answers": [{"text": r.text, "finished": r.finished, "tokens": len(r.completion_ids), "reward": value}
                            for r, value in list(zip(group, values))[:4]]})
        self._append("evals.jsonl", {"step": step, "ids": [p.id for p in problems], "rewards": rewards})    # last: it counts
        self.evaluated.add(step)

    def failure(self, step: int, error: Exception, problems, groups) -> None:
        """Write down why a step was not applied and, where one sample [P][n] is to blame, which."""
        row = {"step": step, "error": str(error)}
        if getattr(error, "index", None) is not None:
            p, i = divmod(error.index, len(groups[0]))
            row |= {**vars(problems[p]), **vars(groups[p][i])}
        self._append("failures.jsonl", row)

    def report(self, problems) -> None:
        """Table and figures of the run, before against after, and a few answers to read."""
        evals = self._read("evals.jsonl")
        last = evals[-1]["step"]
        ks = tuple(k for k in evaluate.powers_of_two(len(evals[0]["rewards"][0])) if k <= 32)
        curves = [evaluate.make_curve(name, problems, row["rewards"], ks)
                  for name, row in (("before", evals[0]), (f"after {last} steps", evals[-1]))]
        print("\nheld-out problems, answers sampled at the training temperature\n" + evaluate.table(curves))
        flags = policy.read_run(self.run)["flags"]
        title = f"{Path(flags['model']).name} on {flags['eval_data']}, --objective {flags['objective']} --k {flags['k']}"
        evaluate.plot(curves, self.run / "curves.png", title)
        evaluate.plot_history(self._read("metrics.jsonl"), self.run / "history.png")
        print("\na few answers after training (reward)")
        for row in self._read("samples.jsonl"):
            if row["step"] == last:
                answers = "   ".join(f"{a['text'][-200:]} ({a['reward']:g})" for a in row["answers"])
                print(f"  {row['problem'][:200]}  ->  {answers}")
        print(f"\nfigures: {self.run}/curves.png and {self.run}/history.png; evaluate it with: python evaluate.py --model {self.run}")


# ---------------------------------------------------------------- flags

TOY_DEFAULTS = {"data": "countdown", "n": 16, "prompts": 32, "steps": 400, "max_new_tokens": 12, "lr": 1e-3, "lora_rank": 8,
                "micro_batch_tokens": 16384, "eval_n": 64, "limit": 200, "save_every": 50, "gradient_checkpointing": False}
DEFAULTS = {"data": "math", "n": 16, "prompts": 32, "steps": 200, "max_new_tokens": 2048, "lr": 2e-5, "lora_rank": 16,
            "micro_batch_tokens": 16384, "eval_n": 16, "limit": None, "save_every": 20, "gradient_checkpointing": True}
ALWAYS = {"objective": "passk", "baseline": "none", "k": "4", "temperature": 1.0, "sampler": "auto", "dtype": "auto", "seed": 0,
          "lora_alpha": 32, "max_grad_norm": 1.0, "gpu_memory": 0.45, "eval_every": 0, "eval_data": None, "model": "toy",
          "adam_8bit": False, "vllm_sleep": False, "keep": 0, "tensorboard": False}


def make_parser() -> argparse.ArgumentParser:
    """All flags default to None here: what was not given follows from the model's task (`parse_flags`)."""
    parser = sample.make_parser(__doc__)
    parser.add_argument("--model", type=str, help="toy, hub id, short name (Qwen2.5-Math-1.5B), local folder or run directory (default toy)")
    method = parser.add_argument_group("method")
    method.add_argument("--k", type=str, help="train for the best of k answers: 4, a list 1,4,16 (mean of the objectives), or a schedule "
                        "8:1 (annealed over the run) (default 4; 1 = the ordinary policy gradient)")
    method.add_argument("--objective", type=str, help="passk (0/1 rewards), maxk (any rewards) or groupmax, the paper's baseline (default passk)")
    method.add_argument("--baseline", type=str, choices=("none", "loo"), help="loo: subtract the leave-one-out baseline (default none)")
    learning = parser.add_argument_group("learning")
    learning.add_argument("--prompts", type=int, help="problems a step (default 32)")
    learning.add_argument("--steps", type=int, help="updates (toy 400, else 200)")
    learning.add_argument("--lr", type=float, help="AdamW learning rate of the adapter (toy 1e-3, else 2e-5)")
    learning.add_argument("--lora-rank", type=int, help="rank of the adapter (toy 8, else 16)")
    learning.add_argument("--lora-alpha", type=int, help="scale of the adapter is alpha / rank (default 32)")
    learning.add_argument("--max-grad-norm", type=float, help="clip the gradient's norm (default 1; inf = off)")
    learning.add_argument("--micro-batch-tokens", type=int, help="tokens in one forward and backward; changes memory, not the "
                          "gradient (default 16384)")
    learning.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None,
                          help="compute activations twice instead of keeping them: a fraction of the memory (toy off, else on)")
    learning.add_argument("--adam-8bit", action="store_true", default=None, help="8-bit AdamW (bitsandbytes) (default off)")
    learning.add_argument("--importance-cap", type=float, help="cap of the token-level ratio learner / sampler (default: 2 with vllm, "
                          "0 = off = exactly on-policy with hf)")
    sample.add_flags(parser)
    parser.add_argument("--gpu-memory", type=float, help="share of the GPU's memory for vLLM; the rest is the learner's (default 0.45)")
    parser.add_argument("--vllm-sleep", action="store_true", default=None,
                        help="vLLM gives its share of the GPU back while the learner works; costs a moment each step (default off)")
    run = parser.add_argument_group("run")
    run.add_argument("--run", type=Path, help="run directory (default runs/<model>-<objective>-k<k>-<time>)")
    run.add_argument("--resume", type=Path, help="run directory to go on with; takes every setting from it")
    run.add_argument("--eval-data", type=str, help="held-out data (default: math500 for math, gsm8k-test for gsm8k, else the data's :test)")
    run.add_argument("--eval-every", type=int, help="steps between evaluations (default 0 = before and after only)")
    run.add_argument("--eval-n", type=int, help="answers a problem in evaluations (toy 64, else 16)")
    run.add_argument("--save-every", type=int, help="steps between checkpoints (toy 50, else 20)")
    run.add_argument("--keep", type=int, help="checkpoints to keep, the newest ones (default 0 = all)")
    run.add_argument("--tensorboard", action="store_true", default=None, help="also write the run's columns for TensorBoard (default off)")
    return parser


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags with everything settled, or a UserError that says which numbers cannot go together."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        if flag.split("=")[0] in ("--top-p", "--top-k", "--min-p"):
            raise UserError(f"{flag} is not for training: RSPO's gradient is right only for the distribution that is sampled, which "
                            "is the full softmax at --temperature")
        if flag.startswith("-"):
            raise UserError(f"flag {flag} is unknown{tasks.nearest(flag, parser._option_string_actions)}; see --help")
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no flag; see --help")
    if args.resume:
        extra = [name for name, value in vars(args).items() if value is not None and name != "resume"]
        if extra:
            raise UserError(f"--resume takes every setting from {args.resume}/config.json; leave out --{extra[0].replace('_', '-')}")
        return args
    args.model = args.model or "toy"
    if args.model != "toy" and Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())        # so that the run can be used from anywhere
    sample.fill_in(args, {**ALWAYS, **(TOY_DEFAULTS if sample.is_toy(args.model) else DEFAULTS), **of_adapter(args)})
    args.sampler = sample.pick_sampler(args.sampler)
    if args.importance_cap is None:
        args.importance_cap = 2.0 if args.sampler == "vllm" else 0.0
    check_flags(args)
    if args.run is None:
        name = f"{Path(args.model).name}-{args.objective}-k{args.k}-{datetime.now():%Y%m%d-%H%M%S}"
        args.run = Path("runs") / name.replace(":", "to").replace(",", "_")
    if ".." in args.run.parts:
        raise UserError(f"--run is {args.run}, but must not hold '..': give the folder by its own name")
    if args.run.exists():
        raise UserError(f"run directory {args.run} exists already: go on with --resume {args.run}, or give another --run")
    return args


def of_adapter(args: argparse.Namespace) -> dict:
    """What an adapter that --model names has settled already. UserError if a flag says otherwise."""
    adapter = policy.resolve_model(args.model)[1]
    if adapter is None:
        return {"load_in_4bit": False}
    config = policy.read_adapter(adapter)
    settled = {"lora_rank": config["r"], "lora_alpha": config["lora_alpha"],
               "load_in_4bit": sample.sampling_defaults(str(adapter))["load_in_4bit"]}
    for name, value in settled.items():
        if getattr(args, name) not in (None, value):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but the adapter of {args.model} has {value}: leave it out")
    return settled


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for settings that cannot work, with the numbers."""
    if args.objective not in OBJECTIVES:
        raise UserError(f"--objective {args.objective!r} is unknown{tasks.nearest(args.objective, OBJECTIVES)}; give one of "
                        f"{', '.join(OBJECTIVES)}")
    for name in ("prompts", "steps", "lora_rank", "lora_alpha", "micro_batch_tokens", "eval_n", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    if not 0 < args.lr < float("inf"):
        raise UserError(f"--lr is {args.lr}, but must be above 0 and finite")
    if not args.max_grad_norm > 0:
        raise UserError(f"--max-grad-norm is {args.max_grad_norm}, but must be above 0")
    if not 0 < args.gpu_memory < 1:
        raise UserError(f"--gpu-memory is {args.gpu_memory}, but must be a share between 0 and 1")
    if args.vllm_sleep and (args.sampler != "vllm" or not torch.cuda.is_available()):
        raise UserError("--vllm-sleep is for --sampler vllm on a CUDA GPU; leave it out")
    if args.importance_cap and not args.importance_cap >= 1:
        raise UserError(f"--importance-cap is {args.importance_cap}, but must be 0 (off) or at least 1")
    if args.eval_every < 0:
        raise UserError(f"--eval-every is {args.eval_every}, but must be 0 (off) or more")
    if args.keep < 0:
        raise UserError(f"--keep is {args.keep}, but must be 0 (all) or more")
    try:
        ks = {k for step in range(args.steps) for k in ks_at(args.k, step, args.steps)}
    except ValueError:
        raise UserError(f"--k is {args.k!r}, but must be a number (4), a list (1,4,16) or a schedule (8:1)") from None
    for k in sorted(ks):
        if not 1 <= k <= args.n:
            raise UserError(f"--k is {args.k}, but every k must lie in 1..n, and --n is {args.n}")
        if args.objective == "groupmax" and args.n % k:
            raise UserError(f"--objective groupmax needs n divisible by k, but --n is {args.n} and k is {k}")
        if args.baseline == "loo" and k > args.n - 1:
            raise UserError(f"--baseline loo needs k <= n - 1, but --n is {args.n} and k is {k}")
    if args.objective == "groupmax" and args.baseline == "loo":
        raise UserError("--baseline loo is for passk and maxk; groupmax is the paper's plain baseline: leave --baseline out")


def write_config(run: Path, args: argparse.Namespace) -> None:
    """Make the run directory with its config.json: both or neither."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    used = ["torch", "transformers", "peft", *(["vllm"] if args.sampler == "vllm" else []),
            *(["bitsandbytes"] if args.load_in_4bit or args.adam_8bit else [])]
    installed_as = importlib.metadata.packages_distributions()              # vLLM is one module of several distributions
    versions = {name: importlib.metadata.version(installed_as[name][0]) for name in used}
    flags = {name: value for name, value in vars(args).items() if name not in ("run", "resume")}
    config = {"flags": flags, "versions": versions, "git_commit": commit or None}
    try:
        unfinished = run.with_name(f".{run.name}.{os.getpid()}")
        unfinished.mkdir(parents=True, exist_ok=True)
        (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        unfinished.rename(run)
    except OSError as error:
        raise UserError(f"run directory {run} cannot be made: {error.strerror}; give another --run") from error


@contextmanager
def claimed(run: Path):
    """Keep other processes out of a run directory, and say in one sentence what its disk refuses."""
    try:
        with tasks.locked(run / "config.json", f"run directory {run} is in use by another train.py: wait for it, or give another --run"):
            yield
    except OSError as error:
        raise UserError(f"run {run} stopped: {error}; its newest whole checkpoint is {policy.newest_checkpoint(run)}: make room, or make it "
                        f"writable, and go on with --resume {run}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    run, resumed = args.resume or args.run, args.resume is not None
    if resumed:
        if policy.read_run(run) is None:
            raise UserError(f"--resume {run}: no run directory there (no config.json of train.py)")
        names = {action.dest for action in make_parser()._actions} - {"help", "run", "resume"}
        args = argparse.Namespace(**policy.run_flags(run, names))
        with claimed(run):              # refused before anything is loaded
            checkpoint = policy.newest_checkpoint(run)
        if checkpoint is None and policy.checkpoints(run):
            raise UserError(f"no checkpoint of {run} is whole; to begin it anew, give another --run or remove its step_... folders")
        print(f"going on with {run} from {checkpoint.name if checkpoint else 'its start'}; it has {args.steps} steps")
    if sample.is_toy(args.model):
        torch.set_num_threads(1)        # the toy is too small to share: more threads would mostly wait for each other
    model, tokenizer = policy.load_model(args.model, args.dtype, trainable_adapter=True, load_in_4bit=args.load_in_4bit)
    sample.stop_ids(model.generation_config, tokenizer)     # refused where there is none
    problems, held_out, args.data, args.eval_data = tasks.train_and_eval(args.data, args.eval_data, args.limit)
    if problems[0].task == "math":
        unknown = tasks.unparsable(p.answer for p in problems + held_out)
        if unknown:
            print(f"{len(unknown)} gold answers are understood by no parser and compared as strings only, such as {unknown[0][:80]!r}")
    if args.objective == "passk" and problems[0].task == "countdown-graded":
        raise UserError(f"--objective passk needs 0/1 rewards, but {args.data} grades in [0, 1]: use --objective maxk")
    if not policy.trainable(model):
        model = policy.add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    prompts, eval_prompts = (sample.encode_prompts(each, tokenizer, sample.context_length(model.config), args.max_new_tokens)
                             for each in (problems, held_out))
    if not resumed:
        write_config(run, args)
    with claimed(run):
        train(args, run, model, tokenizer, problems, prompts, held_out, eval_prompts)


if __name__ == "__main__":
    sample.run_script(main)
