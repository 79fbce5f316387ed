"""Proof that the page of minimal.py is the method: its weights, its rewards, its gradient, and
that it learns.
"""

import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT

import minimal
import rspo
from lib import policy, run, tasks
from sample import make_rollout

STOPS = [1]


@pytest.fixture
def model():
    return policy.load_model(str(run.TOY), device="cpu")[0].requires_grad_(True)


@pytest.mark.parametrize("k", [1, 2, 8, 32])
def test_its_weights_are_those_of_rspo(k):
    rewards = torch.ones(33, 32).tril(-1)  # 0, 1, ..., 32 right answers
    expected = rspo.pass_at_k_weights(rewards, k)
    assert torch.allclose(minimal.weights(rewards, k).double(), expected, rtol=1e-6)


def test_its_vocabulary_and_its_rewards_are_those_of_the_project(model):
    tokenizer = policy.load_model(str(run.TOY))[1]
    assert tokenizer.convert_ids_to_tokens(range(13)) == ["<pad>", "<eos>", *minimal.VOCABULARY[2:]]
    torch.manual_seed(0)
    numbers = [19307, 99999, 30003]
    for ids in (minimal.sample(model, numbers, 64),
                torch.randint(0, 13, (192, 12)), torch.randint(1, 4, (192, 12))):
        rewards = minimal.grade(numbers, ids)
        for i, row in enumerate(ids.tolist()):
            answer = make_rollout(row[:6], row[6:], [0.0] * 6, STOPS, tokenizer.decode)
            expected = tasks.grade_divisor(answer.text, str(numbers[i // 64]))
            assert rewards.flatten()[i] == expected * answer.finished, answer.text


def test_its_first_gradient_is_that_of_the_project(model):
    torch.manual_seed(0)
    problems = tasks.load_problems("divisor:train", 16)
    numbers = [int(problem.answer) for problem in problems]
    ids = minimal.sample(model, numbers, 32)
    rewards = minimal.grade(numbers, ids)
    assert 0 < rewards.mean() < 1
    minimal.loss(model, ids, minimal.weights(rewards, 8)).backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    tokenizer = policy.load_model(str(run.TOY))[1]
    rollouts = [make_rollout(row[:6], row[6:], [0.0] * 6, STOPS, tokenizer.decode)
                for row in ids.tolist()]
    logprobs, rows = policy.token_logprobs(model, rollouts, 1.0)  # (N,), (N,)
    weights = rspo.pass_at_k_weights(rewards, 8).flatten().float()[rows]  # (N,)
    rspo.policy_gradient_loss(logprobs, weights, len(rollouts)).backward()
    for one, parameter in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-5, rtol=1e-5)
        assert one.abs().max() > 1e-4


def test_it_learns_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(minimal, "STEPS", 12)
    monkeypatch.setattr(minimal, "N", 8)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    minimal.main(1)
    before, after = re.findall("pass@1 (.+),", capsys.readouterr().out)
    assert float(after) > 2 * float(before)


@pytest.mark.parametrize("k", ["33", "x"])
def test_a_k_that_cannot_be_is_refused_in_a_sentence(monkeypatch, k):
    monkeypatch.setattr(sys, "argv", ["minimal.py", k])
    with pytest.raises(SystemExit, match=f"^k is {k}, but must be 1 to 32$"):
        runpy.run_path(str(ROOT / "minimal.py"), run_name="__main__")
