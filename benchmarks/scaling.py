"""What is a step made of, and how does it grow? The cost model of docs/scaling.md, held against measured steps.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py          random models of two sizes, CPU, about four minutes
    python benchmarks/scaling.py --gpus 8                   nothing measured: the table of docs/scaling.md for a 7B model

Three speeds are fitted on the first model at the base shape and at an eighth of its rows; every other line is predicted, then
measured. Sampling is `sample.HFSampler` with the end token switched off, learning is `policy.update`, both float32 on a CPU.
The lines are taken in turn, three rounds behind a warm-up; a line's time is its least CPU time, since the machine may be shared.
Writes --out as JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass(frozen=True)
class Step:
    """A step's work. Lengths in tokens; body and head are weights multiplied for a token, in the layers and in the output layer."""
    body: float
    head: float
    prompts: int
    n: int
    prompt: int
    answer: int             # mean
    longest: int
    signal: float = 1.0     # share of samples that are learned: ours leaves weight 0 out, verl and TRL learn all (1.0)
    recompute: bool = False # gradient checkpointing
    rescore: bool = False   # one more forward pass for the learner's log-probabilities (verl, TRL with vLLM)
    gpus: int = 1
    replicas: int = 1       # copies of the model that sample, each on gpus / replicas GPUs


@dataclass(frozen=True)
class Speed:
    learn: float            # FLOP/s that one GPU reaches in learning
    decode: float           # FLOP/s that one GPU reaches in sampling
    memory: float           # bytes/s at which it reads weights
    weight_bytes: int = 2


def seconds(step: Step, speed: Speed) -> dict[str, float]:
    """Seconds of sampling and learning. LoRA: the frozen weights get no gradient, so a token costs 2 forward + 2 backward, not 2 + 4."""
    samples = step.prompts * step.n
    forward = 2 * samples * (step.body * (step.prompt + step.answer) + step.head * step.answer)         # FLOP over all samples
    learn = forward * (2 + step.recompute) * step.signal + forward * step.rescore
    per_replica = step.gpus / step.replicas
    rows = samples / step.replicas
    token = (step.body + step.head) * (speed.weight_bytes / speed.memory + 2 * rows * (step.answer / step.longest) / speed.decode) / per_replica
    read = 2 * step.body * step.prompt * step.prompts / speed.decode / step.gpus
    return {"sample": read + step.longest * token, "learn": learn / speed.learn / step.gpus}


# ---------------------------------------------------------------- measured

class NoTokenizer:
    eos_token_id, pad_token_id, chat_template = 1, 0, None

    def decode(self, ids, skip_special_tokens):
        return ""


def build(width: int, layers: int):
    """A Llama of random weights with a LoRA adapter whose B is not 0, and its (body, head)."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import policy
    torch.manual_seed(0)
    shape = LlamaConfig(hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers, num_attention_heads=width // 64,
                        num_key_value_heads=width // 64, vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).requires_grad_(False)
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and p.ndim == 2)
    return policy.add_lora(model, rank=8, alpha=32, seed=0), body, width * 8192


def measure(model, step: Step) -> dict[str, float]:
    """CPU seconds of one sampling and one update."""
    import torch

    import policy
    import sample
    sampler = sample.HFSampler(model, NoTokenizer())
    sampler.stops, sampler.settings.eos_token_id = [], None
    begin = time.process_time()
    groups = sampler.generate([tuple(range(2, 2 + step.prompt))] * step.prompts, step.n, 1.0, step.longest, seed=0)
    sampled = time.process_time()
    rollouts = [rollout for group in groups for rollout in group]
    weights = torch.zeros(len(rollouts))
    weights[:round(step.signal * len(rollouts))] = 1.0
    policy.update(model, policy.make_optimizer(model, lr=1e-4, eight_bit=False), rollouts, weights, num_samples=len(rollouts), temperature=1.0,
                  micro_batch_tokens=2048, max_grad_norm=1.0)
    return {"sample": sampled - begin, "learn": time.process_time() - sampled}


def fit(base: Step, full: dict, few: Step, little: dict) -> Speed:
    """The three speeds that reproduce `full` seconds of base, and `little` of few, which differs in its rows alone."""
    one = Speed(1.0, 1.0, float("inf"))
    flop = [seconds(step, one)["sample"] for step in (base, few)]
    decode = (flop[0] - flop[1]) / (full["sample"] - little["sample"])
    weights = base.longest * (base.body + base.head) * 4
    return Speed(seconds(base, one)["learn"] / full["learn"], decode, weights / (full["sample"] - flop[0] / decode), weight_bytes=4)


def check(out: Path) -> None:
    small, body, head = build(384, 6)
    base = Step(body, head, prompts=4, n=16, prompt=32, answer=64, longest=64)
    few = replace(base, prompts=1, n=8)
    large, large_body, large_head = build(640, 10)
    lines = [("base (fitted)", small, base), ("an eighth of the rows (fitted in sampling)", small, few), ("prompts x 2", small, replace(base, prompts=8)),
             ("n x 2", small, replace(base, n=32)), ("answers x 2", small, replace(base, answer=128, longest=128)),
             ("prompt x 4", small, replace(base, prompt=128)), ("a quarter has a signal", small, replace(base, signal=0.25)),
             (f"model x {(large_body + large_head) / (body + head):.1f}", large, replace(base, body=large_body, head=large_head))]
    measure(small, few)
    rounds = [[measure(model, step) for _, model, step in lines] for _ in range(3)]
    least = [{part: min(each[i][part] for each in rounds) for part in ("sample", "learn")} for i in range(len(lines))]
    speed = fit(base, least[0], few, least[1])
    print(f"fitted: {speed.learn / 1e9:.0f} GFLOP/s learning, {speed.decode / 1e9:.0f} sampling, {speed.memory / 1e9:.1f} GB/s of weights\n")
    rows = []
    print("step                                          sample: model  measured  ratio    learn: model  measured  ratio")
    for (label, _, step), measured in zip(lines, least):
        model_says = seconds(step, speed)
        ratios = {part: model_says[part] / measured[part] for part in measured}
        rows.append({"step": label, "model": model_says, "measured": measured, "ratio": ratios})
        print(f"{label:<44s} {model_says['sample']:14.2f} {measured['sample']:9.2f} {ratios['sample']:6.2f} {model_says['learn']:15.2f} "
              f"{measured['learn']:9.2f} {ratios['learn']:6.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")


# ---------------------------------------------------------------- computed for the 7B model

QWEN_7B = Step(body=6.53e9, head=152064 * 3584, prompts=128, n=16, prompt=120, answer=700, longest=2048, recompute=True, rescore=True)
H100 = Speed(learn=0.35 * 989e12, decode=0.2 * 989e12, memory=0.6 * 3.35e12)      # shares of the data sheet's figures: assumed, not measured


def table(gpus: int) -> None:
    base = replace(QWEN_7B, gpus=gpus, replicas=gpus)
    print("Qwen2.5-Math-7B, H100                                sample, s   learn, s   sum, s")
    for label, step in (("128 prompts x 16 answers of 700 tokens", base), ("prompts x 2", replace(base, prompts=256)), ("n x 2", replace(base, n=32)),
                        ("answers x 2", replace(base, answer=1400, longest=4096)), ("half the GPUs", replace(base, gpus=gpus // 2, replicas=gpus // 2)),
                        ("half the model", replace(base, body=base.body / 2, head=base.head / 2)),
                        ("weights of 0 left out (25 % kept), as here", replace(base, signal=0.25, rescore=False))):
        parts = seconds(step, H100)
        print(f"{label:<52s} {parts['sample']:9.1f} {parts['learn']:10.1f} {sum(parts.values()):8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, help="print the computed table for a 7B model on that many GPUs instead")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
    args = parser.parse_args()
    if args.gpus is not None and args.gpus < 2:
        sys.exit(f"scaling.py: --gpus is {args.gpus}, but must be at least 2")
    table(args.gpus) if args.gpus else check(args.out)


if __name__ == "__main__":
    main()
