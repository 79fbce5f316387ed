"""Outside checks: rspo.py and bandit.py against numbers that others published, or quadrature.

1. PKPO's Gaussian (arXiv 2505.15201, section 5.1, figures 1 and 4): where max@k is best and how
   steep it is, by quadrature, and the variance of the estimators, by 100,000 draws.
2. RS-GRPO's hundred arms (arXiv 2509.24261, codes/bandit.py of Jackory/RS-GRPO): the ordinary
   policy gradient stays on the lower hill, a risk-seeking one reaches the higher one.
"""

import pytest
import torch

import bandit
import rspo
from bandit import Bandit

pytestmark = pytest.mark.filterwarnings("ignore:n = .* < 2k")


# ---------------------------------------------------------------- 1. PKPO's Gaussian

SIGMA, CELLS = 0.1, 20_000  # x ~ N(theta, SIGMA); its reward is x^2 on [0, 1], else 0
GRID = (torch.arange(CELLS).double() + 0.5) * 3 / CELLS - 0.5  # (A,)  from -.5 to 2.5
reward = lambda x: torch.where((x >= 0) & (x <= 1), x * x, 0)
WORLD = Bandit(torch.ones(1).double(), reward(GRID)[None])

# k: best theta, max@k there, its slope and its value at theta = 1
# (400 Gauss-Legendre nodes in u, with reward u^2)
PKPO = {1: (.8624, .6613, -3.0692, .4252), 2: (.9017, .8004, -3.1893, .6528),
        4: (.9387, .8924, -1.7772, .8470), 8: (.9690, .9438, -.3544, .9391),
        16: (.9856, .9707, -.0469, .9703)}


def value_and_slope(theta, k):
    """max@k of bandit.py on a fine grid, and its derivative by autograd."""
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    value = bandit.objective(WORLD, -(GRID - theta) ** 2 / (2 * SIGMA ** 2), k)
    return value.item(), torch.autograd.grad(value, theta)[0].item()


@pytest.mark.parametrize("k", PKPO)
def test_the_best_theta_and_the_slope_of_pkpos_gaussian(k):
    best, at_best, slope, at_1 = PKPO[k]
    low, high = 0.5, 1.2
    for _ in range(25):  # the slope changes its sign once
        middle = (low + high) / 2
        low, high = (middle, high) if value_and_slope(middle, k)[1] > 0 else (low, middle)
    assert low == pytest.approx(best, abs=6e-5)
    assert value_and_slope(low, k)[0] == pytest.approx(at_best, abs=6e-5)
    assert value_and_slope(1.0, k) == pytest.approx((at_1, slope), abs=6e-5)


# variance of the gradient's estimate at theta = 1 for k = 4 and n = 4, 8, 12, 16, 32
SIZES = (4, 8, 12, 16, 32)
VARIANCE = {"s_loo-1": (10.01, 2.05, 1.17, .827, .384), "groups": (266.5, 132.1, 88.4, 66.5, 33.0),
            "s": (266.5, 116.3, 76.3, 56.8, 27.9), "s_loo": (None, 13.07, 5.69, 3.44, 1.24)}


def pkpo_weights(rewards, k):
    """PKPO's estimators, times n, in terms of ours."""
    n = rewards.shape[-1]
    found = {"s_loo-1": rspo.max_at_k_weights(rewards, k),
             "groups": rspo.group_max_weights(rewards, k)}
    loo = rspo.leave_one_out_weights(rewards, k) if k < n else 0
    # U of rspo.py: k times the mean maximum of the k-subsets that hold i
    found["s"] = k * rspo.max_at_k(rewards, k)[..., None] + (n - k) / n * loo  # (draws, n)
    if k < n:  # PKPO takes n / (n - 1) times the baseline of `leave_one_out_weights`
        found["s_loo"] = found["s"] - n / (n - 1) * (found["s"] - loo)
    return found


@pytest.mark.parametrize("n", SIZES)
def test_the_variance_of_the_estimators_on_pkpos_gaussian(n):
    draws, truth = 100_000, PKPO[4][2]
    g = torch.Generator().manual_seed(n)
    x = 1 + SIGMA * torch.randn(draws, n, generator=g).double()  # (draws, n)
    score = (x - 1) / SIGMA ** 2  # (draws, n)
    for name, weights in pkpo_weights(reward(x), 4).items():
        published = VARIANCE[name][SIZES.index(n)]
        estimate = (weights * score).mean(-1)  # (draws,)
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / draws ** 0.5
        squares = (estimate - estimate.mean()) ** 2
        error = squares.std() / draws ** 0.5 * 2 ** 0.5  # the published number has its own
        assert abs(squares.mean() - published) < 4 * error + .005, name


# ---------------------------------------------------------------- 2. RS-GRPO's hundred arms

def test_the_exact_climb_ends_where_the_sampled_one_does():
    reward = bandit.HILLS.reward[0]
    for k, mean in {1: .600, 2: .99, 4: .94, 8: .81, 16: .66}.items():
        assert bandit.climb(k) @ reward == pytest.approx(mean, abs=.005)


def test_k_1_stays_on_the_lower_hill_and_k_2_and_4_reach_the_higher_one():
    """25,000 updates by .1 times RSPO's gradient from 16 draws, three policies at once."""
    ks, arms = (1, 2, 4), torch.arange(100).double()
    hill = lambda top: torch.exp(-(arms - top) ** 2 / 50)
    reward = .1 + .9 * hill(40) + .5 * hill(75)  # (100,)
    start = hill(75) + .1  # (100,)
    theta = (start / start.sum() + 1e-8).log()  # (100,)
    theta = (theta - theta.mean()).repeat(3, 1)  # (K, 100)
    g = torch.Generator().manual_seed(0)
    for _ in range(25_000):
        policy = theta.softmax(-1)  # (K, 100)
        drawn = torch.multinomial(policy, 16, replacement=True, generator=g)  # (K, 16)
        rewards = reward[drawn]  # (K, 16)
        weights = torch.stack([rspo.max_at_k_weights(r, k) for r, k in zip(rewards, ks)])
        theta -= .1 * weights.mean(-1, keepdim=True) * policy
        theta.scatter_add_(-1, drawn, .1 / 16 * weights)
    policy = theta.softmax(-1)
    mean, high = policy @ reward, policy[:, 30:51].sum(-1)  # (K,), (K,)
    assert mean[0] == pytest.approx(.600, abs=.003) and high[0] < .01
    assert .97 <= mean[1] <= 1 and high[1] > .97
    assert mean[2] == pytest.approx(.94, abs=.02) and high[2] > .89
    world = [bandit.objective(bandit.HILLS, theta[2], k).item() for k in (1, 2, 4, 8)]
    assert world == pytest.approx([.940, .995, 1, 1], abs=.02)
