"""Proof that the estimators of rspo.py point where they should, with no Monte Carlo anywhere.

In bandit.py's exact world every expectation is a finite sum. The tests list those sums a second
time with itertools and autograd, and show from them:

1. the closed forms of the objective and its gradient are right, by three other derivations;
2. RSPO, its leave-one-out form and the group maximum are unbiased to 1e-10 (0/1, graded and
   negative rewards, hidden problem types); the plug-in, GRPO and centred weights are not, and
   the bias of the centred ones is a formula;
3. what the group maximum costs is variance, and training for k is best at k;
4. the script ends in one sentence where torch is missing.
"""

import subprocess
import sys

from functools import partial
from itertools import product
from math import comb, prod

import pytest
import torch

import bandit
import rspo
from bandit import Bandit
from docs import figures

tensor = partial(torch.tensor, dtype=torch.float64)
LOGITS = tensor([0.3, -0.8, 0.5])
GRADED = Bandit(  # ties and negative rewards
    tensor([.5, .3, .2]), tensor([[.7, -1.5, 2.], [-.2, -.2, -3.], [1., 0., 1.]]))
BINARY = Bandit(  # one type cannot be solved
    tensor([.6, .3, .1]), tensor([[1., 0., 0.], [0., 1., 1.], [0., 0., 0.]]))
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
    score = torch.autograd.functional.jacobian(lambda x: x.log_softmax(-1), LOGITS)  # (A, A)
    mean, square = torch.zeros(3).double(), 0
    for t, actions, chance in outcomes(world, n):
        estimate = weight_fn(world.reward[t, actions]) @ score[actions] / n
        mean, square = mean + chance * estimate, square + chance * estimate @ estimate
    return mean, square - mean @ mean


# ---------------------------------------------------------------- 1. the closed forms

def policy_gradient(world, logits, k):
    """The gradient of Max@k by the policy gradient theorem, equation (2) of rspo.py.

    The weight of an action, k E_M[max(R - M, 0)], is the sum of `rspo.max_at_k_weights` with
    the estimate s_j replaced by what it estimates, F_j^(k-1).
    """
    policy = logits.softmax(-1)  # (A,)
    ascending, order = world.reward.sort(dim=-1)  # (T, A)
    none = torch.zeros_like(ascending[:, :1])  # (T, 1)
    steps = ascending.diff(dim=-1, prepend=none)  # (T, A)  r_(j+1) - r_(j)
    below = torch.cat([none, policy[order].cumsum(-1)[:, :-1]], -1)  # (T, A)  F_j, F_0 = 0
    weights = k * (steps * below ** (k - 1)).cumsum(-1)  # (T, A)  sorted
    weights = torch.empty_like(weights).scatter(-1, order, weights)  # (T, A)
    expected = world.chance @ (weights * policy)  # (A,)  E_y[W 1(y = a)]
    return expected - policy * expected.sum()  # (A,)  grad log pi(a) = e_a - pi


@WORLDS
@pytest.mark.parametrize("k", range(1, 6))
def test_objective_and_gradient_equal_enumeration_theorem_and_differences(world, k):
    value = partial(bandit.objective, world, k=k)
    best = sum(chance * world.reward[t, actions].max()
               for t, actions, chance in outcomes(world, k))
    close(value(LOGITS), best)
    gradient = bandit.gradient(world, LOGITS, k)
    close(gradient, policy_gradient(world, LOGITS, k))
    slope = [value(LOGITS + d) - value(LOGITS - d) for d in 1e-5 * torch.eye(3).double()]
    close(gradient, torch.stack(slope) / 2e-5, 1e-8)


def test_objective_of_right_or_wrong_is_pass_at_k():
    for k in (1, 3, 16):
        found = bandit.objective(bandit.RIGHT_OR_WRONG, tensor([.2, .8]).log(), k)
        close(found, tensor(1 - .8 ** k))


# ---------------------------------------------------------------- 2. who is unbiased

FNS = {rspo.max_at_k_weights: (1, 2, 3, 4), rspo.leave_one_out_weights: (1, 2, 3),
       rspo.group_max_weights: (1, 2, 4)}
CASES = [(world, fn, k) for world in (GRADED, BINARY) for fn, ks in FNS.items() for k in ks]
CASES += [(BINARY, rspo.pass_at_k_weights, k) for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("world, fn, k", CASES)
def test_exactly_unbiased(world, fn, k):
    weight_fn, truth = partial(fn, k=k), bandit.gradient(world, LOGITS, k)
    mean, variance = enumerate_moments(world, weight_fn, n=4)
    close(mean, truth)
    close(bandit.moments(world, LOGITS, weight_fn, n=4)[0], mean)
    close(bandit.moments(world, LOGITS, weight_fn, n=4)[1], variance)
    if fn is not rspo.group_max_weights or 6 % k == 0:
        close(bandit.moments(world, LOGITS, weight_fn, n=6)[0], truth)


@WORLDS
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_centring_the_weights_estimates_a_mixture_of_k_and_k_minus_1(world, k):
    at_k = bandit.gradient(world, LOGITS, k)
    none = torch.zeros(3).double()  # the best of no answer
    below = bandit.gradient(world, LOGITS, k - 1) if k > 1 else none
    mean = enumerate_moments(world, partial(rspo.centred_weights, k=k), n=4)[0]
    close(mean, 4 / 3 * ((1 - k / 4) * at_k + k / 4 * below))
    if k > 1:
        assert (mean - at_k).norm() > .04 * at_k.norm()


def test_the_bias_of_the_centred_weights_on_right_or_wrong(monkeypatch):
    ks, rates, n = (1, 2, 4, 8), (.05, .2, .5), 8
    monkeypatch.setattr(bandit, "ESTIMATORS", {"centred": rspo.centred_weights})
    table = bandit.compare_estimators(ks, rates, n)["centred"]  # (k, w, 3)
    expected = [[n / (n - 1) * (1 - k / n + (k - 1) / (n * (1 - w))) for w in rates] for k in ks]
    close(table[..., 0] / table[..., 2], tensor(expected))
    close(tensor(expected[0]), torch.ones(3).double())  # k = 1: RLOO
    close(tensor(expected[3][2]), tensor(2.))


@pytest.mark.parametrize("world, fn", [
    (BINARY, rspo.pass_at_k_weights), (GRADED, rspo.max_at_k_weights)])
def test_harmonic_is_unbiased_for_its_sum_and_centred_for_the_sum_up_to_n_minus_1(world, fn):
    parts = [bandit.gradient(world, LOGITS, k) / k for k in range(1, 5)]
    weight_fn = partial(fn, k="harmonic")
    close(bandit.moments(world, LOGITS, weight_fn, n=4)[0], sum(parts))
    centred = lambda r: weight_fn(r) - weight_fn(r).mean(-1, keepdim=True)
    close(bandit.moments(world, LOGITS, centred, n=4)[0], sum(parts[:3]))


def test_the_plug_in_and_grpo_are_biased_and_no_learning_rate_repairs_it():
    tables = bandit.compare_estimators(ks=(2, 4), rates=(.0625, .25, .5, .75), n=8)
    ratio = {name: table[..., 0] / table[..., 2] for name, table in tables.items()}  # (k, w)
    assert bandit.UNBIASED == ["RSPO", "RSPO, leave-one-out", "group maximum"]
    for name in bandit.UNBIASED:
        close(ratio[name], torch.ones(2, 4).double())
    plug_in, grpo = ratio["plug-in"], ratio["GRPO advantage"]
    close(plug_in[0], torch.full((4,), 7 / 8).double())  # k = 2: (n - 1) / n
    assert (plug_in[1] < .9).any()
    assert plug_in[1].max() > 1.5 * plug_in[1].min()
    assert ((grpo - 1).abs().amax(1) > 1).all()
    assert (grpo.amax(1) > 2 * grpo.amin(1)).all()  # depends on w


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


# ---------------------------------------------------------------- 3. what it costs, what it buys

def closed_form_variances(w, k, n):
    """Total variances of RSPO and of the group maximum on RIGHT_OR_WRONG, from binomials alone.

    Along the right action's logit, RSPO's estimate is c W_c (1 - w) / n with c ~ Bin(n, w); the
    group maximum's is k/n times a sum over n/k independent groups of (c - k w) 1[c > 0] with
    c ~ Bin(k, w). There are two logits: twice that.
    """
    def variance(value, m):
        chance = [comb(m, c) * w ** c * (1 - w) ** (m - c) for c in range(m + 1)]
        mean = sum(p * value(c) for c, p in enumerate(chance))
        return 2 * sum(p * (value(c) - mean) ** 2 for c, p in enumerate(chance))

    weight = lambda c: k * comb(n - c, k - 1) / comb(n - 1, k - 1)
    ours = variance(lambda c: c * weight(c) * (1 - w) / n, n)
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
    """max over policies pi of sum_t p_t (1 - (1 - pi_t)^k).

    There p_t (1 - pi_t)^(k-1) is the same level for every t, or pi_t = 0.
    """
    chance, low, high = bandit.HIDDEN_TYPES.chance, 0., 1.
    for _ in range(60):  # bisect the level
        level = (low + high) / 2
        solved = (1 - (level / chance) ** (1 / (k - 1))).clamp(min=0)
        low, high = (level, high) if solved.sum() > 1 else (low, level)
    return (chance * (1 - (1 - solved) ** k)).sum()


def test_training_for_k_is_best_at_k():
    ks = (1, 2, 4, 8, 16)
    matrix = bandit.alignment(ks)  # trained for, evaluated at
    assert matrix.argmax(0).tolist() == [0, 1, 2, 3, 4]
    runner_up = (matrix - torch.eye(5)).amax(0)
    assert (matrix.diag() - runner_up > 1e-3).all()  # no near ties
    best = [bandit.HIDDEN_TYPES.chance.max()] + [best_pass_at_k(k) for k in ks[1:]]
    close(matrix.diag(), torch.stack(best), 1e-4)


@pytest.mark.parametrize("estimator", bandit.UNBIASED)
def test_learning_from_samples_follows_the_gradient(estimator):
    found = figures.learn_from_samples(estimator, k=2, seeds=64, lr=1e-3, steps=10, prompts=16)
    assert found.shape == (2, 64)
    start = torch.zeros(8).double()
    close(found[0], bandit.objective(bandit.HIDDEN_TYPES, start, 2).expand(64))
    rises = (found[1] - found[0]) / (10 * 1e-3)  # (S,)
    steepest = bandit.gradient(bandit.HIDDEN_TYPES, start, 2).square().sum()
    error = rises.std() / 8  # of the mean of 64 seeds
    assert (rises.mean() - steepest).abs() < 4 * error and error < 0.1 * steepest


def test_seeds_that_learn_from_group_maxima_scatter_and_rspos_do_not():
    spread = {}
    for name in ("RSPO", "group maximum"):
        last = figures.learn_from_samples(name, k=8)[-1]  # (S,)
        assert len(last.unique()) == 8
        spread[name] = last.std()
    assert spread["group maximum"] > 10 * spread["RSPO"]


# ---------------------------------------------------------------- 4. the script

@pytest.mark.parametrize("package", ["torch", "matplotlib"])
def test_without_a_package_it_ends_in_one_sentence(tmp_path, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    done = subprocess.run([sys.executable, "bandit.py"], cwd=bandit.Path(bandit.__file__).parent,
                          env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"bandit.py needs {package}: `make demo` sets up .venv with it\n"


def test_with_any_word_it_only_says_what_it_is():
    done = subprocess.run([sys.executable, bandit.__file__, "--help"], capture_output=True,
                          text=True)
    assert done.stdout.strip() == bandit.__doc__.strip() and done.stderr == ""
