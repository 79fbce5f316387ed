"""RSPO: policy gradients for the best of k answers. The whole method.

Source: "RSPO: Risk-Seeking Policy Optimization for Pass@k and Max@k Metrics in
Large Language Models", arXiv 2508.01174.

Sample n answers y_1..y_n to a prompt and grade them, R_i = R(y_i). By how much
should the log-probability of each rise, if the best of k answers counts? With w
the chance that one answer is right, Pass@k = 1 - (1 - w)^k, and so

    grad Pass@k = E_y[ k (1 - w)^(k-1) R(y) grad log pi(y) ]             (1)
    grad Max@k  = E_y[ k E_M[ max(R(y) - M, 0) ] grad log pi(y) ]        (2)

with M the best reward of k - 1 others. M does not depend on y, so E_M[M] was
subtracted from E_M[max(R, M)] as a baseline. An answer earns what it adds to
the best of k: a right one counts k times if the prompt is hard, hardly if it is
easy, and a wrong one never "hitchhikes" on a right one.

(1 - w)^(k-1) and the law of M are unknown. The average over every choice of
k - 1 of the other n - 1 samples estimates them without bias, in closed form.

Gradient convention: (1/n) sum_i W_i grad log pi(y_i), mean over prompts. To
subtract the weights' mean, or divide by their deviation, changes the objective
(on 0/1 rewards both together turn RSPO at any k into GRPO).

Shapes: n samples per prompt, c of them right, "..." any leading dimensions.
Rewards are what torch.as_tensor takes; results are float64. ValueError says
what is wrong with rewards or k.
"""

import warnings

import torch
from torch import Tensor


# ------------------------------------------------ how good are n answers

def pass_at_k(rewards, k: int) -> Tensor:
    """Unbiased Pass@k, the chance that one of k answers is right.

    rewards (..., n) of 0 and 1 -> (...). The share of k-subsets with a right
    answer, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).
    """
    rewards = _checked(rewards, k, binary=True)
    n, right = rewards.shape[-1], rewards.sum(-1).long()  # (...)
    return 1 - _subset_chance(n, k, rewards.device)[n - right]  # (...)


def max_at_k(rewards, k: int) -> Tensor:
    """Unbiased Max@k, the expected best reward of k answers.

    rewards (..., n) -> (...). The mean maximum of the k-subsets, sum_i r_(i)
    C(i-1, k-1) / C(n, k): the i-th lowest is best where the others rank below.
    """
    rewards = _checked(rewards, k)
    n, ascending = rewards.shape[-1], rewards.sort(dim=-1).values  # (..., n)
    s = _subset_chance(n - 1, k - 1, rewards.device)  # (n,)
    return k / n * (ascending * s).sum(-1)  # (...)  C(n, k) = n/k C(n-1, k-1)


# ------------------------------------------------ who earned it: RSPO

def pass_at_k_weights(rewards, k: int) -> Tensor:
    """W_i = k * C(n-c, k-1) / C(n-1, k-1) * R_i, from (1).

    rewards (..., n) of 0 and 1 -> (..., n). For a right y_i the ratio is the
    chance that k - 1 of the n - 1 others are all wrong: it estimates
    (1 - w)^(k-1) without looking at y_i.

    >>> pass_at_k_weights([1, 0, 0, 1], k=2)  # 2 * C(2,1) / C(3,1) = 4/3
    tensor([1.3333, 0.0000, 0.0000, 1.3333], dtype=torch.float64)
    """
    rewards = _checked(rewards, k, binary=True)
    n = rewards.shape[-1]
    _warn_of_few_levels(n, k)
    wrong = n - rewards.sum(-1, keepdim=True).long()  # (..., 1)  n - c
    s = _subset_chance(n - 1, k - 1, rewards.device)  # (n,)
    return k * s[wrong.clamp(max=n - 1)] * rewards  # (..., n)  c = 0: all zero


def max_at_k_weights(rewards, k: int) -> Tensor:
    """W_i = k * mean_S max(R_i - max_S R, 0), from (2).

    rewards (..., n) -> (..., n). S runs over the (k-1)-subsets of the others; at
    k = 1 there are none, and W_i = R_i. Sample i gains each step between sorted
    rewards below its own where S lies wholly below that step:

        W_(i) = k * sum_{j=0}^{i-1} (r_(j+1) - r_(j)) * s_j
        s_j = C(j, k-1) / C(n-1, k-1),  r_(0) := 0

    Every term but the first is >= 0, so nothing cancels, and equal rewards need
    no rule. On 0/1 rewards it equals `pass_at_k_weights`. Cost: one sort.

    >>> max_at_k_weights([0.1, 0.5, 0.2, 1.0], k=2)  # the best: .9, .8, .5 ahead
    tensor([0.0000, 0.4667, 0.0667, 1.4667], dtype=torch.float64)
    """
    rewards = _checked(rewards, k)
    n = rewards.shape[-1]
    _warn_of_few_levels(n, k)
    ascending, order = rewards.sort(dim=-1)  # (..., n)
    zero = torch.zeros_like(ascending[..., :1])  # (..., 1)  r_(0)
    steps = ascending.diff(dim=-1, prepend=zero)  # (..., n)
    s = _subset_chance(n - 1, k - 1, rewards.device)  # (n,)
    return _unsort(k * (steps * s).cumsum(-1), order)  # (..., n)


def leave_one_out_weights(rewards, k: int) -> Tensor:
    """W_i - b_i, with b_i the mean weight of the others among themselves.

    rewards (..., n) -> (..., n); k <= n - 1. Unbiased: b_i never sees y_i. With
    U_i = k times the mean maximum of the k-subsets that hold i, s_j as above,

        W_i - b_i = n / (n - k) * (U_i - mean U)
        U_(i) = const + k * sum_{j=1}^{i-1} (r_(j+1) - r_(j)) * s_{j-1}

    At k = 1 this is RLOO. It need not save variance: bandit.py has .76 of the
    raw weights' at k = 1, but 1.00, 1.10, 1.15 at k = 2, 4, 8.
    """
    rewards = _checked(rewards, k)
    n = rewards.shape[-1]
    if k > n - 1:
        raise ValueError(f"k is {k}, but leave-one-out needs k <= n - 1, and n is {n}")
    _warn_of_few_levels(n, k)
    ascending, order = rewards.sort(dim=-1)  # (..., n)
    steps = ascending.diff(dim=-1, prepend=ascending[..., :1])  # (..., n)
    s = _subset_chance(n - 1, k - 1, rewards.device)  # (n,)
    shared = k * (steps * s.roll(1)).cumsum(-1)  # (..., n)  U - U_(1)
    centred = shared - shared.mean(-1, keepdim=True)  # (..., n)  U - mean U
    return _unsort(n / (n - k) * centred, order)  # (..., n)


# ------------------------------------------------ what else is done: rivals

def group_max_weights(rewards, k: int) -> Tensor:
    """The paper's baseline: k times the best reward of a group of k, for each.

    rewards (..., n) -> (..., n); n divisible by k, groups are consecutive. Also
    unbiased for Max@k, but wrong answers hitchhike: the price is variance.
    """
    rewards = _checked(rewards, k)
    n = rewards.shape[-1]
    if n % k:
        raise ValueError(f"n is {n}, but the group maximum needs n divisible by k = {k}")
    best = rewards.unflatten(-1, (n // k, k)).amax(-1)  # (..., n/k)
    return k * best.repeat_interleave(k, dim=-1)  # (..., n)


def plug_in_weights(rewards, k: int) -> Tensor:
    """k (1 - c/n)^(k-1) R of 0/1 rewards. Biased: c counts y_i itself."""
    rewards = _checked(rewards, k, binary=True)
    return k * (1 - rewards.mean(-1, keepdim=True)) ** (k - 1) * rewards  # (..., n)


def grpo_weights(rewards, k: int) -> Tensor:
    """(R - mean) / std, GRPO's advantage. It does not know k. Biased."""
    rewards = _checked(rewards, k)
    centred = rewards - rewards.mean(-1, keepdim=True)  # (..., n)
    spread = centred.square().sum(-1, keepdim=True) / max(rewards.shape[-1] - 1, 1)
    return centred / spread.sqrt().clamp(min=1e-6)  # (..., n)


def reward_weights(rewards, k: int) -> Tensor:
    """R, the ordinary policy gradient (REINFORCE). It does not know k."""
    return _checked(rewards, k)  # (..., n)


OBJECTIVES = {"passk": pass_at_k_weights, "maxk": max_at_k_weights,
              "loo": leave_one_out_weights, "groupmax": group_max_weights,
              "plugin": plug_in_weights, "grpo": grpo_weights, "reward": reward_weights}


# ------------------------------------------------ the loss

def policy_gradient_loss(logprobs: Tensor, weights: Tensor, num_samples: int) -> Tensor:
    """-(1 / num_samples) * sum_t W_t * log pi(token t): minus its gradient is ours.

    logprobs, weights (tokens,) -> (). Any part of a step's completion tokens, end
    tokens included, in nats, each with its sample's weight. num_samples = P * n
    of the whole step, so parts add up. An answer's log-probability is the sum
    over its tokens: dividing by its length would favour short right answers.
    """
    return -(weights.detach() * logprobs).sum() / num_samples  # ()


# ------------------------------------------------ shared pieces

def _subset_chance(m: int, size: int, device) -> Tensor:
    """C(j, size) / C(m, size) for j = 0..m: (m + 1,).

    The chance that `size` of m items all lie among the j lowest. A running
    product downwards of C(j-1, size) / C(j, size) = (j - size) / j: no binomial
    is formed, nothing can overflow.
    """
    j = torch.arange(m, 0, -1, dtype=torch.float64, device=device)  # (m,)
    ratios = ((j - size) / j).clamp(min=0)  # (m,)
    return torch.cat([j.new_ones(1), ratios]).cumprod(0).flip(0)  # (m + 1,)


def _unsort(values: Tensor, order: Tensor) -> Tensor:
    """Put sorted values (..., n) back where `order` took them from."""
    return torch.empty_like(values).scatter(-1, order, values)  # (..., n)


def _checked(rewards, k, binary: bool = False) -> Tensor:
    """The rewards as float64 (..., n), or a ValueError that says what is wrong."""
    if not isinstance(rewards, Tensor):
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"rewards is a {type(rewards).__name__}, but must be real "
                             "numbers of shape (..., n)") from error
    if rewards.is_complex() or rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards is {rewards.dtype} of shape {tuple(rewards.shape)}, but "
                         "must be real of shape (..., n) with n >= 1")
    if rewards.device.type == "mps":  # Apple GPUs have no float64
        rewards = rewards.cpu()
    rewards, n = rewards.detach().double(), rewards.shape[-1]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise ValueError(f"k is {k!r}, but must be a whole number with 1 <= k <= n = {n}")
    if not rewards.isfinite().all():
        bad = rewards[~rewards.isfinite()][0].item()
        raise ValueError(f"rewards hold {bad}, but must be finite")
    if binary and not torch.equal(rewards * rewards, rewards):  # only 0 and 1
        bad = rewards[(rewards != 0) & (rewards != 1)][0].item()
        raise ValueError(f"rewards hold {bad}, but Pass@k needs 0 or 1 (graded: Max@k)")
    return rewards


def _warn_of_few_levels(n: int, k: int) -> None:
    if 1 < k and n < 2 * k:
        warnings.warn(f"n = {n} < 2k = {2 * k}: unbiased, but the weights take few "
                      f"distinct values; n >= {2 * k} is better", stacklevel=3)
