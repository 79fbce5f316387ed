"""Is the memory estimate right? Learning 16 answers of 1,024 tokens: estimated against measured peak.

    python benchmarks/memory.py                 a scaled-down Qwen2.5 (its vocabulary, 8 layers of width 512), on a CPU too
    python benchmarks/memory.py --shape 1.5b    the shape of Qwen2.5-Math-1.5B with random weights, bfloat16; wants a GPU

Each line is a process of its own, since a peak never goes down. On a CPU the peak is the resident memory above what the
process held before it loaded the model; on a GPU it is what torch allocated.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"small": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2),
          "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)}
ROWS, PROMPT, ANSWER = 16, 24, 1000


def measure(shape: str, recompute: bool) -> dict:
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    import policy

    on_gpu = torch.cuda.is_available()
    now = lambda: torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.ones(8, 8, requires_grad=True).sum().backward()                   # what the first backward pass loads
    before = now()
    with torch.device(policy.pick_device()):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape], vocab_size=151936, tie_word_embeddings=True),
                                                 dtype=getattr(torch, policy.pick_dtype("auto")))
    model = policy.add_lora(model.requires_grad_(False), rank=16, alpha=32, seed=0)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = policy.learning_bytes(model, ROWS * (PROMPT + ANSWER))
    policy.rehearse(model, PROMPT, ANSWER, ROWS, micro_batch_tokens=2**20)
    return {"shape": shape, "recompute": recompute, **{part: size / 2**30 for part, size in parts.items()},
            "estimate": sum(parts.values()) / 2**30, "measured": (now() - before) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--out", type=Path, default=Path("runs/memory.json"))
    parser.add_argument("--one", choices=("keep", "recompute"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.shape, args.one == "recompute")))
        return
    rows = []
    print("activations   estimate GiB = weights + activations + workspace  measured   estimate / measured")
    for one in ("keep", "recompute"):
        command = [sys.executable, __file__, "--shape", args.shape, "--one", one]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:             # on a smaller GPU "keep" does not fit: say so and go on
            print(f"{one:<12s} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            continue
        rows.append(row := json.loads(done.stdout.splitlines()[-1]))
        print(f"{one:<12s} {row['estimate']:10.2f}      {row['weights']:6.2f} {row['activations']:10.2f} {row['workspace']:10.2f} "
              f"{row['measured']:14.2f} {row['estimate'] / row['measured']:14.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
