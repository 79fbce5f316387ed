"""How far can a player of the toy get who never looks at the number? Exact, by bandit.py.

    python benchmarks/blind.py            pass@k of the best bets for each k
    python benchmarks/blind.py --graded   max@k, with the rewards of divisor-graded
    python benchmarks/blind.py --limit 400   judged on the held-out numbers of ablate.py

Such a player draws divisors from one distribution, whatever the number is: each number
is a hidden type of the bandit, each divisor an action. The bets are chosen on numbers
of divisor:train (by gradient ascent on the exact Max@k) and judged on divisor:test.

Shapes: M numbers, A divisors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import bandit
from lib import cli, tasks

KS = (1, 2, 4, 8, 16)
ACTIONS = [d for d in range(3, 200, 2) if d % 5]
STEPS, LR = 400, 0.1


def world(data: str, limit: int, graded: bool) -> bandit.Bandit:
    """Numbers as hidden types, equally likely, and divisors as actions."""
    numbers = [p.answer for p in tasks.load_problems(data, limit)]
    rewards = [[tasks.grade_divisor(str(d), number, graded) for d in ACTIONS] for number in numbers]
    chance = torch.full((len(numbers),), 1 / len(numbers), dtype=torch.float64)  # (M,)
    return bandit.Bandit(chance, torch.tensor(rewards).double())  # (M, A)


def best_bets(graded: bool = False, numbers: int = 1000, limit: int = 1000) -> dict[int, tuple]:
    """k -> (the chance of each action (A,), exact Max@j on held-out numbers for j in KS)."""
    chosen = world("divisor:train", numbers, graded)
    judged = world("divisor:test", limit, graded)
    found = {}
    for k in KS:
        logits = bandit.train(chosen, k, torch.zeros(len(ACTIONS)).double(), steps=STEPS, lr=LR)
        found[k] = logits.softmax(-1), [bandit.objective(judged, logits, j).item() for j in KS]
    return found


def main() -> None:
    settings = {"graded": cli.Setting("rewards of divisor-graded", False),
                "limit": cli.Setting("held-out numbers", 1000)}
    args = cli.parse(__doc__, settings)
    cli.settle(args, settings, False, {})
    metric = "max" if args.graded else "pass"
    print("bets for |" + "".join(f"  {metric}@{k:<4d}" for k in KS) + "   how often it says what")
    for k, (chances, levels) in best_bets(args.graded, limit=args.limit).items():
        most = chances.argsort(descending=True)[:6].tolist()
        bets = "  ".join(f"{ACTIONS[i]}: {chances[i]:.0%}" for i in most if chances[i] > .005)
        print(f"  k = {k:<2d} |" + "".join(f"{level:8.3f} " for level in levels) + f"  {bets}")


if __name__ == "__main__":
    cli.run_script(main)
