"""Where does a step's time go? Training steps with each sampler, by train.py's own log.

    .venv-vllm/bin/python benchmarks/step.py                                       the toy
    .venv-vllm/bin/python benchmarks/step.py --model runs/smollm2 --data runs/sums.jsonl --prompts 8    after benchmarks/smollm2.py

Each run is a process of its own (a peak never goes down, and vLLM keeps its share of a GPU); the samplers take turns, A B A B, and
the medians are over all their steps but each run's first. Without vLLM the transformers sampler alone is measured. Writes --out as JSON.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sample", "grade", "learn", "sync")


def steps(flags: list[str], sampler: str, count: int) -> list[dict]:
    """Rows of metrics.jsonl of a run of that many steps behind a first one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--sampler", sampler, "--steps", str(count + 1), "--limit", "2", "--eval-n", "4",
                   "--save-every", "1000", "--run", f"{folder}/run"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"step.py: {sampler}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/step.json"))
    args, flags = parser.parse_known_args()             # every other flag is train.py's
    rows = {name: [] for name in (("hf", "vllm") if importlib.util.find_spec("vllm") else ("hf",))}
    for _ in range(args.rounds):
        for name in rows:
            rows[name] += steps(flags, name, args.steps)
    table = {}
    print("sampler   tokens/s   seconds a step = sample + grade + learn + sync    sync's share   peak GiB")
    for name, own in rows.items():
        row = {column: statistics.median(each[column] for each in own) for column in ("sample_tokens_per_s", *(f"{part}_seconds" for part in PARTS))}
        table[name] = row = row | {"peak_memory_gb": max(each["peak_memory_gb"] for each in own)}
        total = sum(row[f"{part}_seconds"] for part in PARTS)
        print(f"{name:<7s} {row['sample_tokens_per_s']:10.0f} {total:14.3f}   " + "".join(f"{row[f'{part}_seconds']:9.3f}" for part in PARTS)
              + f"{row['sync_seconds'] / total:14.1%} {row['peak_memory_gb']:10.2f}")
    if len(rows) == 2:
        print(f"vllm / hf, tokens/s side by side: {table['vllm']['sample_tokens_per_s'] / table['hf']['sample_tokens_per_s']:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"flags": flags, "samplers": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
