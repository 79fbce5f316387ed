"""Where does a step's time go? Both samplers on the same prompts, then whole training steps with each.

    .venv-vllm/bin/python benchmarks/step.py                                       the toy
    .venv-vllm/bin/python benchmarks/step.py --model runs/smollm2 --data runs/sums.jsonl --prompts 8    after benchmarks/smollm2.py

Sampling is taken in turn, A B A B, and its medians compared. The parts of a step are those that train.py logs, medians
without the first step. Where vLLM is not installed, the transformers sampler alone is measured. Writes --out as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import tasks
import train

PARTS = ("sample", "grade", "learn", "sync")


def samplers_of(flags: list[str]) -> list[str]:
    try:
        sample.pick_sampler("vllm")
    except tasks.UserError:
        return ["hf"]
    return ["hf", "vllm"]


def sampling(flags: list[str], names: list[str], rounds: int = 3) -> dict:
    """Completion tokens a second of each sampler, median over rounds; the first call of each is a warm-up."""
    worlds = {}
    for name in names:
        args = train.parse_flags([*flags, "--sampler", name])
        problems = tasks.load_problems(args.data, args.prompts)
        worlds[name] = args, *sample.open_sampler(args, problems)
        worlds[name][1].generate(worlds[name][2][:2], 2, 1.0, args.max_new_tokens, 0)
    speeds = {name: [] for name in names}
    for i in range(rounds):
        for name, (args, sampler, prompts) in worlds.items():
            begin = time.perf_counter()
            groups = sampler.generate(prompts, args.n, args.temperature, args.max_new_tokens, seed=(i + 1) * 10**6)
            tokens = sum(len(rollout.completion_ids) for group in groups for rollout in group)
            speeds[name].append(tokens / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in speeds.items()}


def steps(flags: list[str], name: str, count: int) -> dict:
    """Median seconds of each part of a step, by train.py's own log."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train.main([*flags, "--sampler", name, "--steps", str(count), "--limit", "2", "--eval-n", "4", "--save-every", "1000", "--run", str(run)])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    return {part: statistics.median(row[f"{part}_seconds"] for row in rows) for part in PARTS} | {"peak_memory_gb": rows[-1]["peak_memory_gb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/step.json"))
    args, flags = parser.parse_known_args()             # every other flag is train.py's
    names = samplers_of(flags)
    rows = {name: steps(flags, name, args.steps) for name in names}
    speeds = sampling(flags, names)
    print("\nsampler   tokens/s   seconds a step = sample + grade + learn + sync    sync's share   peak GiB")
    for name, row in rows.items():
        total = sum(row[part] for part in PARTS)
        print(f"{name:<7s} {speeds[name]:10.0f} {total:14.3f}   " + "".join(f"{row[part]:9.3f}" for part in PARTS)
              + f"{row['sync'] / total:14.1%} {row['peak_memory_gb']:10.2f}")
    if len(names) == 2:
        print(f"vllm / hf, tokens/s side by side: {speeds['vllm'] / speeds['hf']:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"flags": flags, "steps": rows, "tokens_per_s": speeds}, indent=1) + "\n")


if __name__ == "__main__":
    sample.run_script(main)
