"""Proof that the estimators of rspo.py point where they should, with no Monte Carlo anywhere.

In bandit.py's exact world every expectation is a finite sum. The tests list those sums a second time with
itertools and autograd, and from them show: the closed-form objective and gradient are right; RSPO, its
leave-one-out form and the group maximum are unbiased to 1e-10 (0/1, graded and negative rewards, hidden
problem types); the plug-in, GRPO's advantage and centred weights are not; what the group maximum costs is
variance; training for k is best at k.
"""

from itertools import product
from math import comb, prod

import pytest
import torch

import bandit
import rspo
from bandit import Bandit

tensor = lambda values: torch.tensor(values, dtype=torch.float64)
LOGITS = tensor([0.3, -0.8, 0.5])
GRADED = Bandit(tensor([.5, .3, .2]), tensor([[.7, -1.5, 2.], [-.2, -.2, -3.], [1., 0., 1.]]))  # ties, negatives
BINARY = Bandit(tensor([.6, .3, .1]), tensor([[1., 0., 0.], [0., 1., 1.], [0., 0., 0.]]))  # one unsolvable
WORLDS = pytest.mark.parametrize("world", [GRADED, BINARY], ids=["graded", "binary"])
pytestmark = pytest.mark.filterwarnings("ignore:n = .* < 2k")


def close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def outcomes(world, n):
    """(hidden type, the n actions, their chance): every way a prompt's samples can turn out."""
    policy = LOGITS.softmax(-1).tolist()
    for t, actions in product(range(len(world.chance)), product(range(len(policy)), repeat=n)):
        yield t, list(actions), world.chance[t].item() * prod(policy[a] for a in actions)


def enumerate_moments(world, weight_fn, n):
    """Mean and total variance of (1/n) sum_i W_i grad log pi(y_i), one outcome at a time."""
    score = torch.autograd.functional.jacobian(lambda x: x.log_softmax(-1), LOGITS)  # row a: action a
    mean, square = torch.zeros(3).double(), 0
    for t, actions, chance in outcomes(world, n):
        estimate = weight_fn(world.reward[t, actions]) @ score[actions] / n
        mean, square = mean + chance * estimate, square + chance * estimate @ estimate
    return mean, square - mean @ mean


# ---------------------------------------------------------------- the closed forms

@WORLDS
@pytest.mark.parametrize("k", range(1, 6))
def test_objective_and_both_gradients_equal_enumeration(world, k):
    expected = sum(chance * world.reward[t, actions].max() for t, actions, chance in outcomes(world, k))
    close(bandit.objective(world, LOGITS, k), expected)
    close(bandit.policy_gradient(world, LOGITS, k), bandit.gradient(world, LOGITS, k))
    step = 1e-5 * torch.eye(3).double()  # finite differences
    slope = [bandit.objective(world, LOGITS + d, k) - bandit.objective(world, LOGITS - d, k) for d in step]
    close(bandit.gradient(world, LOGITS, k), torch.stack(slope) / 2e-5, 1e-8)


def test_objective_of_right_or_wrong_is_pass_at_k():
    for k in (1, 3, 16):
        close(bandit.objective(bandit.RIGHT_OR_WRONG, tensor([.2, .8]).log(), k), tensor(1 - .8 ** k))


# ---------------------------------------------------------------- who is unbiased

FNS = {rspo.max_at_k_weights: (1, 2, 3, 4), rspo.leave_one_out_weights: (1, 2, 3), rspo.group_max_weights: (1, 2, 4)}
CASES = [(world, fn, k) for world in (GRADED, BINARY) for fn, ks in FNS.items() for k in ks]
CASES += [(BINARY, rspo.pass_at_k_weights, k) for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("world, fn, k", CASES)
def test_exactly_unbiased(world, fn, k):
    weight_fn, truth = lambda r: fn(r, k), bandit.gradient(world, LOGITS, k)
    mean, variance = enumerate_moments(world, weight_fn, n=4)
    close(mean, truth)
    close(bandit.moments(world, LOGITS, weight_fn, n=4)[0], mean)
    close(bandit.moments(world, LOGITS, weight_fn, n=4)[1], variance)
    if fn is not rspo.group_max_weights or 6 % k == 0:
        close(bandit.moments(world, LOGITS, weight_fn, n=6)[0], truth)


@WORLDS
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_centring_the_weights_estimates_a_mixture_of_k_and_k_minus_1(world, k):
    def centred(r):
        weights = rspo.max_at_k_weights(r, k)
        return weights - weights.mean(-1, keepdim=True)
    at_k = bandit.gradient(world, LOGITS, k)
    below = bandit.gradient(world, LOGITS, k - 1) if k > 1 else torch.zeros(3).double()  # the best of none
    mean = enumerate_moments(world, centred, n=4)[0]
    close(mean, (1 - k / 4) * at_k + k / 4 * below)
    assert (mean - at_k).norm() > .04 * at_k.norm()


def test_the_plug_in_and_grpo_are_biased_and_no_learning_rate_repairs_it():
    tables = bandit.compare_estimators(ks=(2, 4), rates=(.0625, .25, .5, .75), n=8)
    ratio = {name: table[..., 0] / table[..., 2] for name, table in tables.items()}  # (k, w): 1 = unbiased
    for name in ("RSPO", "RSPO, leave-one-out", "group maximum"):
        close(ratio[name], torch.ones(2, 4).double())
    close(ratio["plug-in"][0], torch.full((4,), 7 / 8).double())  # k = 2: (n - 1) / n
    assert (ratio["plug-in"][1] < .9).any() and ratio["plug-in"][1].max() > 1.5 * ratio["plug-in"][1].min()
    assert ((ratio["GRPO advantage"] - 1).abs().amax(1) > 1).all()
    assert (ratio["GRPO advantage"].amax(1) > 2 * ratio["GRPO advantage"].amin(1)).all()  # depends on w


@WORLDS
def test_k_1_is_the_vanilla_policy_gradient(world):
    policy = LOGITS.softmax(-1)
    reward = world.chance @ world.reward
    vanilla = policy * (reward - policy @ reward)  # E_y[R grad log pi(y)]
    close(bandit.gradient(world, LOGITS, 1), vanilla)
    close(bandit.moments(world, LOGITS, lambda r: r, n=4)[0], vanilla)
    for reward in world.reward.float():  # each outcome, bit for bit
        r = reward[bandit.all_outcomes(3, 4)]
        assert torch.equal(rspo.max_at_k_weights(r, 1), r.double())
        assert torch.equal(rspo.group_max_weights(r, 1), r.double())


# ---------------------------------------------------------------- what it costs, and what it buys

def closed_form_variances(w, k, n):
    """Total variances of RSPO and of the group maximum on RIGHT_OR_WRONG, from binomials alone.

    Along the right action's logit, RSPO's estimate is c W_c (1 - w) / n with c ~ Bin(n, w); the group maximum's is
    k/n times a sum over n/k independent groups of (c - k w) 1[c > 0] with c ~ Bin(k, w). Two logits: twice that.
    """
    def variance(value, m):
        chance = [comb(m, c) * w ** c * (1 - w) ** (m - c) for c in range(m + 1)]
        mean = sum(p * value(c) for c, p in enumerate(chance))
        return 2 * sum(p * (value(c) - mean) ** 2 for c, p in enumerate(chance))
    ours = variance(lambda c: c * k * comb(n - c, k - 1) / comb(n - 1, k - 1) * (1 - w) / n, n)
    return ours, (k / n) ** 2 * (n // k) * variance(lambda c: (c - k * w) * (c > 0), k)


@pytest.mark.parametrize("w", [.0625, .25, .5, .75])
def test_the_group_maximum_pays_in_variance_and_more_with_k(w):
    tables = bandit.compare_estimators(ks=(1, 2, 4), rates=(w,), n=8)
    ours, group = tables["RSPO"][:, 0, 1], tables["group maximum"][:, 0, 1]
    expected = tensor([closed_form_variances(w, k, 8) for k in (1, 2, 4)])
    close(torch.stack([ours, group], -1), expected)
    ratio = group / ours
    close(ratio[0], tensor(1.))  # k = 1: the same estimator
    assert 1 < ratio[1] < ratio[2]


def best_pass_at_k(k):
    """max over policies of sum_t p_t (1 - (1 - pi_t)^k): there p_t (1 - pi_t)^(k-1) is one level, or pi_t = 0."""
    low, high = 0., 1.
    for _ in range(60):  # bisect the level
        level = (low + high) / 2
        solved = (1 - (level / bandit.HIDDEN_TYPES.chance) ** (1 / (k - 1))).clamp(min=0)
        low, high = (level, high) if solved.sum() > 1 else (low, level)
    return (bandit.HIDDEN_TYPES.chance * (1 - (1 - solved) ** k)).sum()


def test_training_for_k_is_best_at_k():
    ks = (1, 2, 4, 8, 16)
    matrix = bandit.alignment(ks)  # trained for, evaluated at
    assert matrix.argmax(0).tolist() == [0, 1, 2, 3, 4]
    runner_up = (matrix - torch.eye(5)).amax(0)
    assert (matrix.diag() - runner_up > 1e-3).all()  # no near ties
    best = [bandit.HIDDEN_TYPES.chance.max()] + [best_pass_at_k(k) for k in ks[1:]]
    close(matrix.diag(), torch.stack(best), 1e-4)
