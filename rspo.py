"""RSPO: policy gradients for the best of k answers (arXiv 2508.01174).

Sample n answers y_1..y_n to a prompt, with rewards R_i = R(y_i). By how much
should the log-probability of each rise, if the best of k answers counts? With w
the chance that one answer is right, Pass@k = 1 - (1 - w)^k, and so

    grad Pass@k = E_y[ k (1 - w)^(k-1) R(y) grad log pi(y) ]           (1)
    grad Max@k = E_y[ k E_M[max(R(y) - M, 0)] grad log pi(y) ]         (2)

with M the best of k - 1 others. (It does not depend on y, so E[M] can be subtracted
from E[max(R(y), M)] without bias.) An answer earns what it adds to the best of k:
a right one k on a hard prompt, hardly anything on an easy one; a wrong one never
"hitchhikes". (1 - w)^(k-1) and the distribution of M are estimated without bias by
the mean over all choices of k - 1 of the other n - 1 samples, in closed form.

Gradient convention: (1/n) sum_i W_i grad log pi(y_i), mean over prompts. Never
normalise W: minus their mean and divided by their standard deviation, weights of
0/1 rewards become GRPO's advantage, and k disappears. AdamW and clipping largely
cancel the overall size of the weights, but not the ratios between them.

Shapes: n samples per prompt, c right, "..." any leading dimensions; float64.
"""

import warnings

import torch
from torch import Tensor


# -------- how good are n answers
def pass_at_k(rewards, k: int) -> Tensor:
    """Unbiased chance that one of k answers is right (Chen et al., 2107.03374).

    0/1 rewards (..., n) -> (...). 1 - C(n-c, k) / C(n, k), the share of k-subsets with one.
    """
    rewards = _checked(rewards, k, binary=True)
    n, right = rewards.shape[-1], rewards.sum(-1).long()  # (...)
    return 1 - _subset_chance(n, k, rewards.device)[n - right]


def max_at_k(rewards, k: int) -> Tensor:
    """Unbiased expected best reward of k answers.

    rewards (..., n) -> (...). sum_i r_(i) C(i-1, k-1) / C(n, k), r_(i) ascending.
    """
    rewards = _checked(rewards, k)
    n, ascending = rewards.shape[-1], rewards.sort(dim=-1).values  # (..., n)
    s = _subset_chance(n - 1, k - 1, rewards.device)  # (n,)
    return k / n * (ascending * s).sum(-1)  # (...)  C(n, k) = n/k C(n-1, k-1)


# -------- who earned it: RSPO
def pass_at_k_weights(rewards, k: int | str) -> Tensor:
    """W_i = k * C(n-c, k-1) / C(n-1, k-1) * R_i, from (1); harmonic: n/c * R_i.

    0/1 rewards (..., n) -> (..., n). For a right y_i the ratio is the chance that
    k - 1 others are all wrong: (1 - w)^(k-1), estimated without y_i.

    >>> pass_at_k_weights([1, 0, 0, 1], k=2)  # 2 * C(2,1) / C(3,1) = 4/3
    tensor([1.3333, 0.0000, 0.0000, 1.3333], dtype=torch.float64)
    """
    rewards = _checked(rewards, k, binary=True, harmonic=True)
    gains = _gains(rewards, k)  # (n,)
    wrong = (rewards == 0).sum(-1, keepdim=True)  # (..., 1)  n - c
    return gains[wrong.clamp(max=len(gains) - 1)] * rewards  # (..., n)  0 where c = 0


def max_at_k_weights(rewards, k: int | str) -> Tensor:
    """W_i = k * mean_S max(R_i - max_S R, 0), from (2).

    rewards (..., n) -> (..., n). S runs over the (k-1)-subsets of the others; for
    k = 1, W_i = R_i. Sort the rewards: answer i collects every step up to its own
    reward, times the chance s_j that all k - 1 rivals lie below it (docs/steps.png):

        W_(i) = sum_{j=0}^{i-1} (r_(j+1) - r_(j)) * k s_j,  r_(0) := 0
        s_j = C(j, k-1) / C(n-1, k-1);  harmonic: n / (n - j) for k s_j

    Every term but the first is >= 0: nothing cancels, ties need no rule. On 0/1
    rewards it equals `pass_at_k_weights`.

    >>> max_at_k_weights([0.1, 0.5, 0.2, 1.0], k=2)  # the best: .9, .8, .5 ahead
    tensor([0.0000, 0.4667, 0.0667, 1.4667], dtype=torch.float64)
    """
    rewards = _checked(rewards, k, harmonic=True)
    ascending, order = rewards.sort(dim=-1)  # (..., n)
    zero = torch.zeros_like(ascending[..., :1])  # (..., 1)  r_(0)
    steps = ascending.diff(dim=-1, prepend=zero)  # (..., n)
    gains = _gains(rewards, k)  # (n,)
    weights = (steps * gains).cumsum(-1)  # (..., n)
    return torch.empty_like(weights).scatter(-1, order, weights)  # (..., n)


def leave_one_out_weights(rewards, k: int) -> Tensor:
    """W_i - b_i, with b_i the mean weight of the others among themselves.

    rewards (..., n) -> (..., n); k < n. Unbiased: b_i never sees y_i. With U_i = k
    times the mean maximum of the k-subsets that hold i, and s_j as above,

        W_i - b_i = n / (n - k) * (U_i - mean U)
        U_(i) = const + sum_{j=1}^{i-1} (r_(j+1) - r_(j)) * k s_{j-1}

    RLOO at k = 1. It need not save variance: in bandit.py its variance is .76, 1.00,
    1.10 and 1.15 times that of W at k = 1, 2, 4, 8.
    """
    rewards = _checked(rewards, k)
    n = rewards.shape[-1]
    if k > n - 1:
        raise ValueError(f"k is {k}, but leave-one-out needs k <= n - 1, and n is {n}")
    ascending, order = rewards.sort(dim=-1)  # (..., n)
    steps = ascending.diff(dim=-1, prepend=ascending[..., :1])  # (..., n)
    gains = _gains(rewards, k)  # (n,)
    # roll: k s_{j-1}; what wraps around meets the first step, which is 0
    shared = (steps * gains.roll(1)).cumsum(-1)  # (..., n)  U - U_(1)
    shared = shared - shared.mean(-1, keepdim=True)  # (..., n)  U - mean U
    weights = n / (n - k) * shared  # (..., n)
    return torch.empty_like(weights).scatter(-1, order, weights)  # (..., n)


# -------- what else is done
# The same weights elsewhere, before anyone's division by a standard deviation:
#    PKPO 2505.15201              loo-minus-one = W_k / n, k >= 2
#    Pass@k Training 2508.10751   (1/k - 1/n) times leave-one-out W_k
#    verl's grpo_passk            W_n / n
#    MaxRL 2602.02710, 0/1        n/c = sum of W_k / k over k = 1..n = "harmonic"
#    TailRL 2609.02987, graded    the same sum
# Harmonic weights may be centred: minus their mean they are the sum of the
# leave-one-out W_k / k over k = 1..n-1, which is unbiased. A single W_k may not.
def group_max_weights(rewards, k: int) -> Tensor:
    """The paper's baseline: k times the maximum of each consecutive group of k.

    Unbiased for Max@k, but wrong answers hitchhike: the price is variance.
    """
    rewards = _checked(rewards, k)
    n = rewards.shape[-1]
    if n % k:
        raise ValueError(f"n is {n}, but the group maximum needs n divisible by k = {k}")
    best = rewards.unflatten(-1, (-1, k)).amax(-1)  # (..., n/k)
    return k * best.repeat_interleave(k, dim=-1)  # (..., n)


def plug_in_weights(rewards, k: int) -> Tensor:
    """k (1 - c/n)^(k-1) R of 0/1 rewards. Biased: c counts y_i itself."""
    rewards = _checked(rewards, k, binary=True)
    return k * (1 - rewards.mean(-1, keepdim=True)) ** (k - 1) * rewards


def centred_weights(rewards, k: int) -> Tensor:
    """n/(n-1) (W - mean W), "PKPO" in MaxRL's code. Biased: the mean sees y_i.

    Its mean is n/(n-1) [(1 - k/n) grad Max@k + k/n grad Max@(k-1)]; on 0/1
    rewards n/(n-1) [1 - k/n + (k-1) / (n (1-w))] times grad Pass@k.
    """
    weights = max_at_k_weights(_checked(rewards, k), k)  # (..., n)
    n = weights.shape[-1]
    return n / max(n - 1, 1) * (weights - weights.mean(-1, keepdim=True))


def grpo_weights(rewards, k: int) -> Tensor:
    """(R - mean) / std, GRPO's advantage. It does not know k. Biased."""
    rewards = _checked(rewards, k)
    centred = rewards - rewards.mean(-1, keepdim=True)  # (..., n)
    spread = centred.square().sum(-1, keepdim=True) / max(rewards.shape[-1] - 1, 1)
    return centred / spread.sqrt().clamp(min=1e-6)  # (..., n)


def reward_weights(rewards, k: int) -> Tensor:
    """R, the ordinary policy gradient (REINFORCE). It does not know k."""
    return _checked(rewards, k)


OBJECTIVES = {
    "passk": pass_at_k_weights, "maxk": max_at_k_weights, "loo": leave_one_out_weights,
    "groupmax": group_max_weights, "plugin": plug_in_weights, "centred": centred_weights,
    "grpo": grpo_weights, "reward": reward_weights}


def policy_gradient_loss(logprobs: Tensor, weights: Tensor, num_samples: int) -> Tensor:
    """-(1 / num_samples) * sum_t W_t * log pi(token t).

    logprobs, weights (tokens,) -> (): completion tokens of any part of a step, end
    tokens included. num_samples = P * n of the whole step, so parts add up. An
    answer is not divided by its length: that would favour short right ones.
    """
    return -(weights.detach() * logprobs).sum() / num_samples  # ()


def _subset_chance(m: int, size: int, device) -> Tensor:
    """C(j, size) / C(m, size) for j = 0..m: (m + 1,).

    The chance that `size` of m items are all among the j lowest: a running
    product of (j - size) / j downwards, so that no binomial can overflow.
    """
    j = torch.arange(m, 0, -1, dtype=torch.float64, device=device)  # (m,)
    ratios = ((j - size) / j).clamp(min=0)  # (m,)
    return torch.cat([j.new_ones(1), ratios]).cumprod(0).flip(0)


def _gains(rewards: Tensor, k) -> Tensor:
    """k s_j for j = 0..n-1: (n,). The harmonic sum of s_j over k is n / (n - j)."""
    n = rewards.shape[-1]
    if k == "harmonic":
        return n / torch.arange(n, 0, -1).to(rewards)
    if 1 < k and n < 2 * k:
        warnings.warn(f"n = {n} < 2k = {2 * k}: unbiased, but weights have few "
                      f"levels; n >= {2 * k} is better", stacklevel=3)
    return k * _subset_chance(n - 1, k - 1, rewards.device)


def _checked(rewards, k, binary=False, harmonic=False) -> Tensor:
    """The rewards as float64 (..., n), or ValueError."""
    if not isinstance(rewards, Tensor):
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"rewards is {type(rewards)}, but must be real") from error
    if rewards.is_complex() or 0 in (rewards.ndim, *rewards.shape[-1:]):
        what = f"{rewards.dtype} of shape {tuple(rewards.shape)}"
        raise ValueError(f"rewards is {what}, but must be real (..., n), n >= 1")
    if rewards.device.type == "mps":  # Apple GPUs have no float64
        rewards = rewards.cpu()
    rewards, n = rewards.detach().double(), rewards.shape[-1]
    whole = isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= n
    if not (whole or harmonic and k == "harmonic"):
        raise ValueError(f"k is {k!r}, but must be a whole number with 1 <= k <= n = {n}")
    bad = rewards[~rewards.isfinite()]
    if len(bad):
        raise ValueError(f"rewards hold {bad[0].item()}, but must be finite")
    if binary and len(bad := rewards[(rewards != 0) & (rewards != 1)]):
        raise ValueError(f"rewards hold {bad[0].item()}, but Pass@k needs 0 or 1")
    return rewards
