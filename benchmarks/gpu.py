"""How fast and how large is the learner at the shape of Qwen2.5-Math-1.5B? Random weights.

    python benchmarks/gpu.py                        on a CUDA GPU; nothing is downloaded
    python benchmarks/gpu.py --shape small --tokens 128 --batch-tokens 512      anything: a tenth
                                                    of the shape, on a CPU too

Each row is one setting in a process of its own (a peak never goes down): `Learner.update` on
answers of random tokens, all with a weight, --batch-tokens tokens in one micro-batch. "of matmul"
is model FLOPs per second over what one large matrix product reaches on the same device. Model
FLOPs: 4 per weight and token (forward, and the gradient of the inputs; frozen weights need none of
their own; layers that are run again count once), and causal attention. The slowest kernels of an
update follow each row. Writes --out as JSON.
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

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 2},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2}}
VOCABULARY, PROMPT = 151936, 24
SETTINGS = {"recompute": {"recompute": True, "four_bit": False},
            "keep": {"recompute": False, "four_bit": False},
            "4-bit, recompute": {"recompute": True, "four_bit": True}}


# ---------------------------------------------------------------- one setting

def make_model(shape: str) -> Path:
    """Folder with a model of that shape and random weights, and some tokenizer."""
    folder = ROOT / "runs" / f"random-{shape}"
    if not (folder / "tokenizer.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

        from lib import run
        torch.manual_seed(0)            # on the CPU: the GPU is the children's
        config = Qwen2Config(**SHAPES[shape], vocab_size=VOCABULARY, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(run.TOY).save_pretrained(folder)
    return folder


def matmul_flops(torch, device: str, dtype) -> float:
    """FLOPs per second of large square matrix products, many in a row, after as many to warm up."""
    size, count = (8192, 300) if device == "cuda" else (2048, 5)
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(count):
            product = a @ a
        product[0, 0].item()            # waits for all of them
        taken = time.perf_counter() - begin
    return count * 2 * size**3 / taken


def model_flops(config, rows: int, tokens: int) -> float:
    """Of one update."""
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = config.num_key_value_heads / config.num_attention_heads
    weights = layers * width * (2 * width + 2 * width * heads + 3 * config.intermediate_size)
    head = VOCABULARY * width * (tokens - PROMPT)       # completion positions alone
    return rows * (4 * weights * tokens + 4 * head + 6 * layers * width * tokens**2)


def make_learner(folder: str, batch_tokens: int, recompute: bool, four_bit: bool):
    """A learner whose adapter is not 0, so that its first update ends the look at the base."""
    import torch

    from lib import policy
    model, _ = policy.load_model(folder, load_in_4bit=four_bit)
    model = policy.add_lora(model, rank=16, seed=0)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.02)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.Learner(model, 1e-12, 1.0, batch_tokens)


def slowest_kernels(torch, work, on_gpu: bool) -> dict[str, float]:
    """Their shares of the time of `work`."""
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        work()
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
             for event in profile.key_averages()}
    total = sum(spent.values()) or 1    # 0: the GPU's profiler is locked
    slowest = sorted(spent, key=spent.get, reverse=True)[:6]
    return {name[:70]: spent[name] / total for name in slowest}


def measure(folder: str, tokens: int, batch_tokens: int, rounds: int, recompute: bool,
            four_bit: bool) -> dict:
    import torch

    from benchmarks.against_trl import scored
    from lib import policy
    from sample import Rollout
    device = policy.pick_device()
    on_gpu = device == "cuda"
    peak = lambda: torch.cuda.max_memory_allocated() if on_gpu else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    matmul = matmul_flops(torch, device, getattr(torch, policy.pick_dtype("auto")))
    before = 0 if on_gpu else peak()
    learner = make_learner(folder, batch_tokens, recompute, four_bit)
    rows, random = batch_tokens // tokens, torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=random).tolist()
    rollouts = scored(learner.model, [
        Rollout(tuple(row[:PROMPT]), tuple(row[PROMPT:]), (), "", False) for row in ids])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def update() -> float:
        begin = time.perf_counter()
        learner.update(rollouts, torch.ones(rows))
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds = statistics.median([update() for _ in range(rounds + 1)][1:])
    measured = peak() - before
    if learner.micro_batch_tokens < batch_tokens:
        raise MemoryError(f"out of memory: fits at {learner.micro_batch_tokens} tokens")
    flops = model_flops(learner.model.config, rows, tokens) / seconds
    return {"tokens": tokens, "rows": rows, "seconds": seconds,
            "tokens_per_s": rows * tokens / seconds, "flops_per_s": flops,
            "of_matmul": flops / matmul, "matmul_flops_per_s": matmul,
            "peak_gb": measured / 2**30,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "kernels": slowest_kernels(torch, update, on_gpu)}


# ---------------------------------------------------------------- all of them

def child(work: dict) -> dict:
    """One measurement in a process of its own. What does not fit is said, and is not the end."""
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(work)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line_of(row: dict) -> str:
    head = f"{row['setting']:<18s} {row['tokens']:>6d}"
    if "failed" in row:
        return f"{head}   failed: {row['failed'][:70]}"
    kernels = [f"{'':19s}{share:6.1%}  {name}" for name, share in row["kernels"].items()]
    return "\n".join([
        f"{head} x {row['rows']:<4d}{row['seconds']:9.3f}{row['tokens_per_s']:11.0f}"
        f"{row['flops_per_s'] / 1e12:10.2f}{row['of_matmul']:12.1%}{row['peak_gb']:11.2f}",
        *kernels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096],
                        help="prompt and answer together (default 1024 4096)")
    parser.add_argument("--batch-tokens", type=int, default=16384,
                        help="tokens of one micro-batch (default 16384)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(measure(**args.one)))
        return
    if max(args.tokens) > args.batch_tokens or min(args.tokens) <= PROMPT:
        sys.exit(f"gpu.py: --tokens is {args.tokens}, but must be more than {PROMPT} and at most "
                 f"--batch-tokens, {args.batch_tokens}")
    folder, table = str(make_model(args.shape)), []
    print("setting            tokens x rows  seconds   tokens/s   TFLOP/s   of matmul   peak GiB")
    for tokens in args.tokens:
        for name in args.settings:
            work = {"folder": folder, "tokens": tokens, "batch_tokens": args.batch_tokens,
                    "rounds": args.rounds, **SETTINGS[name]}
            table.append({"setting": name, "tokens": tokens, **child(work)})
            print(line_of(table[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
