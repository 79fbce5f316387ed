"""The exercises, solved. What each function does is said in exercises.py.

tests/test_exercises.py shows that they equal rspo.py, where the same is done for whole batches.
"""

from itertools import combinations
from math import comb


def pass_at_k(rewards, k):
    n, c = len(rewards), sum(rewards)
    return 1 - comb(n - c, k) / comb(n, k)


def group_max_weights(rewards, k):
    starts = [i - i % k for i in range(len(rewards))]  # where the group of answer i begins
    return [k * max(rewards[start:start + k]) for start in starts]


def hitchhiking_share(rewards, weights):
    to_wrong = sum(weight for reward, weight in zip(rewards, weights) if reward == 0)
    return to_wrong / sum(weights) if sum(weights) > 0 else 0.0


def weights_by_counting(rewards, k):
    weights = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1:]  # n - 1 rivals
        teams = list(combinations(others, k - 1))
        all_wrong = sum(not any(team) for team in teams)
        weights.append(k * all_wrong / len(teams) * reward)
    return weights


def pass_at_k_weights(rewards, k):
    n, c = len(rewards), sum(rewards)
    all_wrong = comb(n - c, k - 1) / comb(n - 1, k - 1)  # share of the teams of k - 1 rivals
    return [k * all_wrong * reward for reward in rewards]


def max_at_k_weights(rewards, k):
    if k == 1:
        return list(rewards)
    weights = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1:]  # by place: a tied answer stays a rival
        gains = [max(reward - max(team), 0) for team in combinations(others, k - 1)]
        weights.append(k * sum(gains) / len(gains))
    return weights


def leave_one_out_weights(rewards, k):
    advantages = []
    for i, weight in enumerate(max_at_k_weights(rewards, k)):
        others = rewards[:i] + rewards[i + 1:]
        baseline = sum(max_at_k_weights(others, k)) / len(others)
        advantages.append(weight - baseline)
    return advantages


def policy_gradient_loss(logprobs, tokens, weights, end):
    ends = (tokens == end).long()  # (B, A)
    earlier_ends = ends.cumsum(1) - ends  # (B, A)  end tokens before this one
    written = earlier_ends == 0  # (B, A)  True up to the first end token, included
    of_answers = (logprobs * written).sum(1)  # (B,)  log pi(answer)
    return -(weights * of_answers).sum() / len(weights)  # ()
