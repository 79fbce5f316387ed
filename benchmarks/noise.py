"""How noisy is the gradient of a step, with each unbiased objective? At the policy's start.

    python benchmarks/noise.py                                     the toy, two minutes
    python benchmarks/noise.py --count 32 --model runs/smollm2 --data runs/divisors.jsonl \\
        --lora-rank 8 --max-new-tokens 12                          after benchmarks/smollm2.py

--count prompts are drawn at random from the training data, and n answers to
each. A prompt's gradient is g = (1/n) sum_i W_i grad log pi(y_i), in the
adapter's D parameters. Reported for each objective at each k:

    variance    trace of the covariance of g, over that of rspo's own weights:
                so many times more prompts a step needs to be as precise
    signal      squared length of E[g] over the variance of a step of --prompts

with 95 % intervals over prompts (jackknife). The squared length is estimated
without bias, from pairs of different prompts. A negative estimate means that it
cannot be told from 0. All other flags are train.py's; --model may be a run
directory. Writes --out as JSON.

Shapes: P prompts, n answers of each, D parameters.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import rspo
import sample
import train
from lib import cli, policy, run, tasks

KS = (1, 2, 4, 8)


def draw(args, count: int):
    """model, rollouts [P][n] and rewards (P, n) of prompts drawn at random from --data."""
    base, adapter = run.resolve_model(args.model)
    if base == str(run.TOY):
        torch.set_num_threads(1)
    model, tokenizer = policy.load_model(
        base, adapter, args.dtype, load_in_4bit=args.load_in_4bit)
    if not adapter:
        model = policy.add_lora(model, args.lora_rank, args.seed)
    problems = tasks.train_and_eval(args.data, args.eval_data, 1)[0]
    problems = random.Random(args.seed).sample(problems, min(count, len(problems)))
    problems = tasks.encode(problems, tokenizer, model.config, args.max_new_tokens)
    sampler = sample.HFSampler(model, tokenizer, sample.stop_ids(model, tokenizer),
                               args.temperature, args.max_new_tokens)
    blocks = sample.sample_blocks(sampler, problems, args.n, (args.seed, "noise"), "sampling")
    groups = [group for block in blocks for group in block]
    rewards, _ = tasks.grade_all(problems, groups)
    return model, groups, torch.tensor(rewards)


def gram_of(model, groups, weights: Tensor, temperature: float) -> Tensor:
    """(P, P) inner products of the prompts' gradients, of rollouts and weights (P, n)."""
    parameters = list(policy.trainable(model).values())
    size = sum(parameter.numel() for parameter in parameters)      # D
    gradients = torch.zeros(len(groups), size)                     # (P, D)
    for row, group in enumerate(groups):
        if weights[row].any():
            logprobs, of_sample = policy.token_logprobs(           # (N,), (N,)
                model, group, temperature)
            weight = weights[row].to(logprobs)[of_sample]          # (N,)
            loss = rspo.policy_gradient_loss(logprobs, weight, len(group))
            parts = torch.autograd.grad(loss, parameters)
            gradients[row] = torch.cat([part.flatten().float().cpu() for part in parts])
    return (gradients @ gradients.T).double()


def moments(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared length of E[g], and trace of the covariance of g, both without bias.

    (P + 1,) each: with prompt 1, 2, ..., P left out, and of all.
    """
    zero, own, row = gram.new_zeros(1), gram.diag(), gram.sum(1)       # (1,), (P,), (P,)
    total = gram.sum() - torch.cat([2 * row - own, zero])              # (P + 1,)
    trace = own.sum() - torch.cat([own, zero])                         # (P + 1,)
    count = len(gram) - torch.cat([torch.ones_like(own), zero])        # (P + 1,)
    signal = (total - trace) / (count * (count - 1))                   # (P + 1,)
    return signal, trace / count - signal


def interval(values: Tensor) -> tuple[float, float]:
    """(P + 1,) as of `moments` -> estimate, half width of its 95 % interval (jackknife)."""
    left, count = values[:-1], len(values) - 1
    error = ((left - left.mean()).square().sum() * (count - 1) / count).sqrt()
    return values[-1].item(), evaluate.student(count - 1) * error.item()


def measure(model, groups, rewards: Tensor, temperature: float, prompts: int) -> list[dict]:
    """A row per k and objective."""
    n, binary = rewards.shape[1], bool(((rewards == 0) | (rewards == 1)).all())
    own = "passk" if binary else "maxk"
    pairs = [(k, name) for k in KS for name in (own, "loo", "groupmax")
             if 2 * k <= n and not (name == "groupmax" and (n % k or k == 1))]
    rows, reference = [], None
    for k, name in tqdm(pairs, desc="gradients", leave=False, disable=None):
        weights = rspo.OBJECTIVES[name](rewards, k)                # (P, n)
        signal, variance = moments(gram_of(model, groups, weights, temperature))
        reference = variance if name == own else reference
        rows.append({"k": k, "objective": name,
                     "variance_ratio": interval(variance / reference),
                     "signal_to_noise": interval(prompts * signal / variance),
                     "no_signal": (weights == 0).all(-1).double().mean().item()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=256, help="prompts measured (default 256)")
    parser.add_argument("--out", type=Path, default=Path("runs/noise.json"))
    own, flags = parser.parse_known_args()
    args = train.settle(flags)
    if own.count < 3:
        raise cli.UserError(f"--count is {own.count}, but must be at least 3")
    model, groups, rewards = draw(args, own.count)
    if not rewards.any():
        raise cli.UserError("no answer earned a reward, so there is no gradient: take a "
                            "larger --count or --n, or easier --data")
    rows = measure(model, groups, rewards, args.temperature, args.prompts)
    print(f"{args.model} on {args.data}: {len(groups)} prompts x {args.n} answers, mean reward "
          f"{rewards.mean():.3f}\n")
    reference = rows[0]["objective"]
    print(f"{'k':>3s}  {'objective':<10s}{f'variance / {reference}':>22s}"
          f"{f'signal, {args.prompts} prompts':>24s}{'prompts of weight 0':>22s}")
    for row in rows:
        ratio, half = row["variance_ratio"]
        signal, wide = row["signal_to_noise"]
        print(f"{row['k']:>3d}  {row['objective']:<10s}{ratio:>13.2f} +- {half:<5.2f}"
              f"{signal:>15.2f} +- {wide:<5.2f}{row['no_signal']:>22.0%}")
    own.out.parent.mkdir(parents=True, exist_ok=True)
    own.out.write_text(json.dumps({"flags": flags, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
