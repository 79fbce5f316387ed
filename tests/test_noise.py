"""Proof of benchmarks/noise.py: its gradients by plain autograd, its intervals by simulation."""

import pytest
import torch

import rspo
import train
from benchmarks import noise
from lib import policy


def test_the_inner_products_are_those_of_plain_autograd(tmp_path):
    args = train.settle(["--run", str(tmp_path / "run")])
    model, groups, rewards = noise.draw(args, 5)
    weights = rspo.pass_at_k_weights(rewards, 2)
    found = noise.gram_of(model, groups, weights, 1.0)
    gradients = []
    for group, row in zip(groups, weights.tolist()):
        loss = 0.0
        for rollout, weight in zip(group, row):
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logp = logp.gather(-1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1:]
            loss = loss - weight / len(group) * logp.sum()
        parts = torch.autograd.grad(loss, policy.trainable(model).values())
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    gradients = torch.stack(gradients)
    # products of nearly orthogonal gradients are small beside the terms that they are sums of
    atol = 1e-6 * found.diag().max().item()
    torch.testing.assert_close(found, gradients @ gradients.T, rtol=1e-4, atol=atol)
    signal, variance = noise.moments(found)
    mean = gradients.mean(0)
    trace = (gradients - mean).square().sum() / 4
    torch.testing.assert_close(variance[-1], trace, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(signal[-1], mean.square().sum() - trace / 5, rtol=1e-3, atol=1e-7)
    for i in range(5):
        rest = torch.tensor([j for j in range(5) if j != i])
        again = noise.moments(found[rest][:, rest])
        torch.testing.assert_close(torch.stack([signal[i], variance[i]]),
                                   torch.stack([a[-1] for a in again]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("signal", [0.0, 0.02, 0.2])
def test_the_intervals_cover_the_truth(signal):
    torch.manual_seed(0)
    D, P, covered, ratios, trials = 50, 64, 0, 0, 1000
    size = torch.linspace(.2, 2, D)
    for _ in range(trials):
        scale = torch.rand(P, 1) + .5  # some prompts are noisier
        base = torch.randn(P, D) * size
        a = signal + scale * base
        b = signal + scale * 2 * (0.8 * base + 0.6 * torch.randn(P, D) * size)
        (s, v), (_, w) = noise.moments((a @ a.T).double()), noise.moments((b @ b.T).double())
        second = (1 + 1 / 12) * size.square().sum()
        truth = D * signal**2 / second.item()
        mean, half = noise.interval(s / v)
        covered += abs(mean - truth) <= half
        mean, half = noise.interval(w / v)
        ratios += abs(mean - 4) <= half
    assert covered / trials > .93 and ratios / trials > .93
