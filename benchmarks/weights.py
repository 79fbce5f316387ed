"""How long do the weights take? A step's worth beside a loop over prompts with math.comb, and the growth with n.

    python benchmarks/weights.py

1,024 prompts x 64 samples at k = 8 (Pass@k: 5 % to 95 % right, Max@k: uniform rewards), each beside a loop that does the same work, in
turn, A B A B, medians; then one row of n rewards for n = 1e3 to 1e6. The results are compared to 1e-12 first. Writes --out as JSON.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rspo

P, N, K = 1024, 64, 8


def pass_loop(rewards: list[list[float]]) -> list[list[float]]:
    """Equation (1) of rspo.py, prompt by prompt."""
    weights = []
    for row in rewards:
        right = int(sum(row))
        weight = K * math.comb(N - right, K - 1) / math.comb(N - 1, K - 1)
        weights.append([weight * reward for reward in row])
    return weights


def max_loop(rewards: list[list[float]]) -> list[list[float]]:
    """Equation (2) of rspo.py, prompt by prompt: one sort, one running sum."""
    chances = [math.comb(j, K - 1) / math.comb(N - 1, K - 1) for j in range(N)]
    weights = []
    for row in rewards:
        weight, below, made = 0.0, 0.0, [0.0] * N
        for chance, i in zip(chances, sorted(range(N), key=row.__getitem__)):
            weight, below = weight + (row[i] - below) * chance, row[i]
            made[i] = K * weight
        weights.append(made)
    return weights


def milliseconds(work, seconds: float = 0.5) -> float:
    """Median time of one call, of as many as fit into `seconds`, at least 3."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/weights.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    binary = (torch.rand(P, N) < torch.linspace(0.05, 0.95, P)[:, None]).double()               # (P, n)
    graded = torch.rand(P, N, dtype=torch.float64)                                              # (P, n)
    binary_rows, graded_rows = binary.tolist(), graded.tolist()
    for ours, theirs in ((rspo.pass_at_k_weights(binary, K), pass_loop(binary_rows)), (rspo.max_at_k_weights(graded, K), max_loop(graded_rows))):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-12, atol=0)
    works = {"pass@k, loop with math.comb": lambda: pass_loop(binary_rows), "pass_at_k_weights": lambda: rspo.pass_at_k_weights(binary, K),
             "max@k, loop with math.comb": lambda: max_loop(graded_rows), "max_at_k_weights": lambda: rspo.max_at_k_weights(graded, K),
             "leave_one_out_weights": lambda: rspo.leave_one_out_weights(graded, K)}
    rounds = {name: [] for name in works}
    for _ in range(4):
        for name, work in works.items():
            rounds[name].append(milliseconds(work))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    print(f"{P} prompts x {N} samples, k = {K}, {torch.get_num_threads()} threads\n{'':28s}        ms   loop / this")
    for name, value in medians.items():
        loop = value if "loop" in name else loop                # the one above; leave-one-out beside that of max@k
        print(f"{name:28s}{value:10.3f}{loop / value:14.1f}")

    growth = {}
    print(f"\none row, k = {K}\n{'n':>9s}{'pass@k ms':>12s}{'max@k ms':>12s}{'max@k ns / (n log2 n)':>24s}")
    for n in (10**3, 10**4, 10**5, 10**6):
        binary, graded = (torch.rand(n) < 0.3).double(), torch.rand(n, dtype=torch.float64)
        growth[n] = [milliseconds(lambda: rspo.pass_at_k_weights(binary, K)), milliseconds(lambda: rspo.max_at_k_weights(graded, K))]
        print(f"{n:9d}{growth[n][0]:12.3f}{growth[n][1]:12.3f}{growth[n][1] * 1e6 / (n * math.log2(n)):24.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"milliseconds": medians, "one_row_milliseconds": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
