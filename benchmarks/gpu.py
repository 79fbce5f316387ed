"""How fast and how large is the learner at the shape of Qwen2.5-Math-1.5B? Random weights, no download.

    python benchmarks/gpu.py                                                        on a CUDA GPU
    python benchmarks/gpu.py --shape small --tokens 128 --batch-tokens 512          anything: a tenth of the shape, on a CPU too

Each row is one setting in a process of its own (a peak never goes down): `policy.update` on answers of random tokens, all with a weight,
--batch-tokens tokens in one micro-batch. "of matmul" is model FLOPs a second over what one large matrix product reaches on the same
device. Model FLOPs: 4 a weight and token (forward, and the gradient of the inputs; frozen weights need none of their own; layers that are
run again count once), and causal attention. The slowest kernels of an update follow each row. Writes --out as JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.memory import SHAPES

VOCABULARY, PROMPT = 151936, 24
SETTINGS = {"recompute": {"recompute": True, "four_bit": False}, "keep": {"recompute": False, "four_bit": False},
            "4-bit, recompute": {"recompute": True, "four_bit": True}}


def make_model(shape: str) -> Path:
    """Folder with a model of that shape and random weights, and some tokenizer."""
    folder = ROOT / "runs" / f"random-{shape}"
    if not (folder / "tokenizer.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, Qwen2Config

        import policy
        torch.manual_seed(0)            # on the CPU: the GPU is the children's
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape], vocab_size=VOCABULARY, tie_word_embeddings=True), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        policy.load_tokenizer("toy").save_pretrained(folder)
    return folder


def matmul_flops(torch, device: str, dtype) -> float:
    """FLOPs a second of large square matrix products, many in a row, after as many to warm up."""
    size, count = (8192, 300) if device == "cuda" else (2048, 5)
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(count):
            product = a @ a
        product[0, 0].item()            # waits for all of them
        taken = time.perf_counter() - begin
    return count * 2 * size**3 / taken


def measure(folder: str, tokens: int, batch_tokens: int, rounds: int, recompute: bool, four_bit: bool) -> dict:
    import torch

    import policy
    import sample
    device = policy.pick_device()
    on_gpu = device == "cuda"
    peak = lambda: torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    matmul = matmul_flops(torch, device, getattr(torch, policy.pick_dtype("auto")))
    before = 0 if on_gpu else peak()
    model, _ = policy.load_model(folder, load_in_4bit=four_bit)
    model = policy.add_lora(model, rank=16, alpha=32, seed=0)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = batch_tokens // tokens
    estimate = sum(policy.learning_bytes(model, rows * tokens).values())
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    rollouts = [sample.Rollout(tuple(row[:PROMPT]), tuple(row[PROMPT:]), (0.0,) * (tokens - PROMPT), "", False) for row in ids]
    optimizer = policy.make_optimizer(model, 1e-6, eight_bit=False)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def update() -> float:
        begin = time.perf_counter()
        policy.update(model, optimizer, rollouts, torch.ones(rows), num_samples=rows, temperature=1.0, micro_batch_tokens=batch_tokens,
                      max_grad_norm=1.0)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds = statistics.median([update() for _ in range(rounds + 1)][1:])
    measured = peak() - before
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    shape = {**vars(model.config)}
    heads = shape["num_key_value_heads"] / shape["num_attention_heads"]
    weights = layers * width * (2 * width + 2 * width * heads + 3 * shape["intermediate_size"])
    flops = rows * (4 * weights * tokens + 4 * VOCABULARY * width * (tokens - PROMPT) + 6 * layers * width * tokens**2)
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        update()
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in profile.key_averages()}
    slowest, total = sorted(spent, key=spent.get, reverse=True)[:6], sum(spent.values()) or 1       # 0: the GPU's profiler is locked
    return {"tokens": tokens, "rows": rows, "seconds": seconds, "tokens_per_s": rows * tokens / seconds, "flops_per_s": flops / seconds,
            "of_matmul": flops / seconds / matmul, "matmul_flops_per_s": matmul, "peak_gb": measured / 2**30, "estimate_gb": estimate / 2**30,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "kernels": {name[:90]: spent[name] / total for name in slowest}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="prompt and answer together (default 1024 4096)")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of one micro-batch (default 16384)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(measure(**args.one)))
        return
    if max(args.tokens) > args.batch_tokens:
        sys.exit(f"gpu.py: --tokens is {max(args.tokens)}, but must be at most --batch-tokens, {args.batch_tokens}")
    folder, table = str(make_model(args.shape)), []
    print("setting            tokens x rows   seconds   tokens/s   TFLOP/s   of matmul   peak GiB   estimate / peak")
    for tokens in args.tokens:
        for name in args.settings:
            work = {"folder": folder, "tokens": tokens, "batch_tokens": args.batch_tokens, "rounds": args.rounds, **SETTINGS[name]}
            done = subprocess.run([sys.executable, __file__, "--one", json.dumps(work)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode:         # on a smaller GPU "keep" does not fit: say so and go on
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{name:<18s} {tokens:>6d}   failed: {last[:150]}", flush=True)
                table.append({"setting": name, "tokens": tokens, "failed": last})
                continue
            row = {"setting": name, **json.loads(done.stdout.splitlines()[-1])}
            table.append(row)
            print(f"{name:<18s} {tokens:>6d} x {row['rows']:<4d} {row['seconds']:9.3f} {row['tokens_per_s']:10.0f} {row['flops_per_s'] / 1e12:9.2f} "
                  f"{row['of_matmul']:11.1%} {row['peak_gb']:10.2f} {row['estimate_gb'] / row['peak_gb']:17.2f}")
            print("                   " + "\n                   ".join(f"{share:6.1%}  {kernel}" for kernel, share in row["kernels"].items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
