"""Where does a step's time go? Training steps with each sampler, by train.py's own log.

    .venv-vllm/bin/python benchmarks/step.py         the toy
    .venv-vllm/bin/python benchmarks/step.py --model runs/smollm2 --data runs/divisors.jsonl \\
        --prompts 8                                  after benchmarks/smollm2.py

Each run is a process of its own (a peak never goes down, and vLLM keeps its share of a GPU). The
samplers take turns, A B A B, and the medians are over all their steps but each run's first.
Without vLLM the plain sampler alone is measured. --cpu-time takes seconds of the processor, which
other jobs disturb less. Writes --out as JSON.
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
# column of the table: column of metrics.jsonl. What is done before sampling is the sync alone, for
# the evaluation is behind the first step and the last.
PARTS = {"sample": "sample_seconds", "grade": "grade_seconds", "learn": "learn_seconds",
         "sync": "evaluate_seconds"}
QUICK = ["--limit", "2", "--eval-n", "4", "--save-every", "1000"]
CPU_CLOCK = (f"import sys, time; sys.path[0] = {str(ROOT)!r}; import train; "
             "time.perf_counter = time.process_time; train.cli.run_script(train.main)")


def steps(flags: list[str], sampler: str, count: int, cpu_time: bool) -> list[dict]:
    """Rows of metrics.jsonl of a run of that many steps behind a first one."""
    with tempfile.TemporaryDirectory() as folder:
        program = ["-c", CPU_CLOCK] if cpu_time else [str(ROOT / "train.py")]
        command = [sys.executable, *program, *flags, "--sampler", sampler, "--steps",
                   str(count + 1), *QUICK, "--run", f"{folder}/run"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            sys.exit(f"step.py: {sampler}: {last}")
        settings = json.loads(Path(folder, "run/config.json").read_text())["flags"]
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines][1:]
    for row in rows:
        tokens = row["completion_tokens"] * settings["prompts"] * settings["n"]
        row["tokens_per_s"] = tokens / row["sample_seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor")
    parser.add_argument("--out", type=Path, default=Path("runs/step.json"))
    args, flags = parser.parse_known_args()             # every other flag is train.py's
    rows = {name: [] for name in (("hf", "vllm") if importlib.util.find_spec("vllm") else ("hf",))}
    for _ in range(args.rounds):
        for name in rows:
            rows[name] += steps(flags, name, args.steps, args.cpu_time)
    table = {}
    print("sampler   tokens/s   seconds per step =   sample    grade    learn     sync   peak GiB")
    for name, own in rows.items():
        median = lambda column: statistics.median(row[column] for row in own)
        parts = {part: median(column) for part, column in PARTS.items()}
        speed, peak = median("tokens_per_s"), max(row["peak_memory_gb"] for row in own)
        table[name] = {"tokens_per_s": speed, "seconds": parts, "peak_memory_gb": peak}
        print(f"{name:<7s} {speed:10.0f} {sum(parts.values()):20.3f}  "
              + "".join(f"{value:9.3f}" for value in parts.values()) + f"{peak:11.2f}")
    if len(rows) == 2:
        ratio = table["vllm"]["tokens_per_s"] / table["hf"]["tokens_per_s"]
        print(f"vllm / hf, tokens/s side by side: {ratio:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"flags": flags, "samplers": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
