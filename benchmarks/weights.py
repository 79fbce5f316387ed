"""How long do the weights take? One step's, beside a loop over prompts, and the growth with n.

    python benchmarks/weights.py

1,024 prompts x 64 samples at k = 8 (Pass@k: 5 % to 95 % right, Max@k: uniform rewards), each beside
a loop with math.comb that does the same work, in turn, A B A B, medians. Then one row of n rewards
for n = 1e3 to 1e6. The results are compared to 1e-12 first. Writes --out as JSON.
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


def one_step() -> dict[str, float]:
    """Milliseconds of each function and each loop."""
    shares = torch.linspace(0.05, 0.95, P)[:, None]
    binary = (torch.rand(P, N) < shares).double()                          # (P, n)
    graded = torch.rand(P, N, dtype=torch.float64)                         # (P, n)
    rows, graded_rows = binary.tolist(), graded.tolist()
    works = {"pass@k, loop with math.comb": lambda: pass_loop(rows),
             "pass_at_k_weights": lambda: rspo.pass_at_k_weights(binary, K),
             "max@k, loop with math.comb": lambda: max_loop(graded_rows),
             "max_at_k_weights": lambda: rspo.max_at_k_weights(graded, K),
             "leave_one_out_weights": lambda: rspo.leave_one_out_weights(graded, K)}
    loops = list(works.values())
    for loop, ours in (loops[:2], loops[2:4]):
        expected = torch.tensor(loop(), dtype=torch.float64)
        torch.testing.assert_close(ours(), expected, rtol=1e-12, atol=0)
    rounds = [{name: milliseconds(work) for name, work in works.items()} for _ in range(4)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in works}
    print(f"{P} prompts x {N} samples, k = {K}, {torch.get_num_threads()} threads")
    print(f"{'':28s}        ms   loop / this")
    for name, value in medians.items():
        loop = value if "loop" in name else loop    # the one above; leave-one-out: that of max@k
        print(f"{name:28s}{value:10.3f}{loop / value:14.1f}")
    return medians


def growth() -> dict[int, list[float]]:
    """Milliseconds of one row of n rewards."""
    table = {}
    print(f"\none row, k = {K}\n{'n':>9s}{'pass@k ms':>12s}{'max@k ms':>12s}"
          f"{'max@k ns / (n log2 n)':>24s}")
    for n in (10**3, 10**4, 10**5, 10**6):
        binary, graded = (torch.rand(n) < 0.3).double(), torch.rand(n, dtype=torch.float64)
        table[n] = [milliseconds(lambda: rspo.pass_at_k_weights(binary, K)),
                    milliseconds(lambda: rspo.max_at_k_weights(graded, K))]
        share = table[n][1] * 1e6 / (n * math.log2(n))
        print(f"{n:9d}{table[n][0]:12.3f}{table[n][1]:12.3f}{share:24.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/weights.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    found = {"milliseconds": one_step(), "one_row_milliseconds": growth()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
