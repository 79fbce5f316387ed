"""Does a long run leak? Memory, descriptors, processes and speed of train.py over thousands of steps (Linux).

    python benchmarks/soak.py                          2,000 short steps of the toy
    python benchmarks/soak.py --steps 200 --sampler vllm
    python benchmarks/soak.py --steps 300 --prompts 32 any other flag is train.py's

Starts train.py, looks at its process every second through /proc, and compares what comes after the first fifth with the end.
Ends with exit code 1 if resident memory grew by 2 % or more, or if a descriptor, a process or an adapter in /dev/shm is left behind.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--prompts 4 --n 8 --k 2 --limit 8 --eval-n 4 --save-every 100 --keep 2".split()


def look(pid: int) -> dict | None:
    """Resident MB, open descriptors and children of a process; None once it has ended."""
    try:
        memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {"memory": memory, "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "children": len(children)}
    except (OSError, IndexError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    args, flags = parser.parse_known_args()             # every other flag is train.py's
    adapters = lambda: set(Path("/dev/shm").glob("rspo-adapters-*"))
    with tempfile.TemporaryDirectory() as folder:
        run, before, rows = Path(folder) / "run", adapters(), []
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *SHORT, "--steps", str(args.steps), *flags, "--run", run],
                                   stdout=subprocess.DEVNULL)
        while process.poll() is None:
            log = run / "metrics.jsonl"
            found, step = look(process.pid), log.read_bytes().count(b"\n") if log.exists() else 0
            if found and 0 < step < args.steps:         # neither the start nor the figures at the end
                rows.append({"step": step, **found})
            time.sleep(1)
        if process.returncode:
            sys.exit(process.returncode)
        seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        left = adapters() - before
    rows = [row for row in rows if row["step"] >= args.steps / 5]
    tenth = max(1, len(rows) // 10)
    early, late = rows[:tenth], rows[-tenth:]
    middle = lambda rows, name: statistics.median(row[name] for row in rows)
    growth = middle(late, "memory") / middle(early, "memory") - 1
    speed = [statistics.median(seconds[i * args.steps // 5:(i + 1) * args.steps // 5]) for i in range(5)]
    print(f"{args.steps} steps: resident {middle(early, 'memory'):.0f} -> {middle(late, 'memory'):.0f} MB ({growth:+.2%} after the first fifth, "
          f"highest {max(row['memory'] for row in rows):.0f}), descriptors {middle(early, 'descriptors'):.0f} -> {middle(late, 'descriptors'):.0f}, "
          f"children {middle(early, 'children'):.0f} -> {middle(late, 'children'):.0f}, adapters left in /dev/shm {len(left)}, "
          f"seconds a step by fifths {' '.join(f'{value:.3f}' for value in speed)}")
    same = all(middle(late, name) <= middle(early, name) for name in ("descriptors", "children"))
    sys.exit(0 if growth < 0.02 and same and not left else 1)


if __name__ == "__main__":
    main()
