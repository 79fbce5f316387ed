"""Proof that benchmarks/blind.py finds the best bets of a player who never looks at the number.

1. A world pays for a divisor exactly what the task pays.
2. For one try the best bet is the divisor that divides most numbers, known in closed form.
3. The exact pass@k of what was found equals brute force over the numbers.
"""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import blind

from lib import tasks


@pytest.mark.parametrize("graded", [False, True])
def test_a_world_pays_what_the_task_pays(graded):
    world = blind.world("divisor:test", 20, graded)
    numbers = [int(p.answer) for p in tasks.load_problems("divisor:test", 20)]
    assert world.reward.shape == (20, len(blind.ACTIONS))
    for row, number in zip(world.reward.tolist(), numbers):
        for value, divisor in zip(row, blind.ACTIONS):
            assert (value > 0) == (number % divisor == 0)
            assert graded or value in (0, 1)


def test_the_best_bets_are_those_known_by_hand(monkeypatch):
    monkeypatch.setattr(blind, "KS", (1, 4))
    monkeypatch.setattr(blind, "STEPS", 200)
    numbers = [int(p.answer) for p in tasks.load_problems("divisor:train", 150)]
    judged = [int(p.answer) for p in tasks.load_problems("divisor:test", 150)]
    found = blind.best_bets(numbers=150)
    share = lambda d, among: sum(number % d == 0 for number in among) / len(among)
    best = max(blind.ACTIONS, key=lambda d: share(d, numbers))
    chances, curve = found[1]
    assert chances.argmax() == blind.ACTIONS.index(best) and chances.max() > 0.97
    assert float(curve[0]) == pytest.approx(share(best, judged), abs=0.02)

    chances, curve = found[4]
    divides = torch.tensor([[number % d == 0 for d in blind.ACTIONS] for number in judged])
    missed = 1 - divides.double() @ chances  # (M,)  the chance that one try is wrong
    for k, value in zip(blind.KS, curve):
        assert float(value) == pytest.approx(float((1 - missed**k).mean()), abs=1e-9)
