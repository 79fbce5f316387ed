"""Fill in these eight functions, from the top. `make exercises` says how far you are.

They build RSPO from nothing: how good are n answers, who earned it, and how does a model learn
from that. No function needs more than ten lines. A later one may call an earlier one.

Shapes: n answers to one prompt, as a list of n rewards. 0/1 rewards: 1 is right, 0 is wrong, and
c of the n are right. k of the answers are a team, and only the best of a team counts.
A weight says by how much the log-probability of its answer should rise. At k = 1 it is the
reward itself, the ordinary policy gradient, so try every function with k = 1 first.

The first five fit into an hour; six to eight are a second one. The solutions are in solutions.py:
look there only after your own is right.
"""

from itertools import combinations
from math import comb

import torch


def pass_at_k(rewards: list, k: int) -> float:
    """1. The chance that a team of k has a right answer, estimated without bias.

    rewards: n numbers, 0 or 1; 1 <= k <= n. Returns one number, a chance from 0 to 1: the share
    of all teams of k different answers that hold at least one right answer.

    [1, 0, 0, 0] with k = 2: there are 6 teams of two. 3 of them hold the right answer: 3/6.

    >>> pass_at_k([1, 0, 0, 0], 1)
    0.25
    >>> pass_at_k([1, 0, 0, 0], 2)
    0.5

    Hint: count the teams without a right answer. `comb(n, k)` is the number of all teams.
    Read: walkthrough.ipynb, "Pass@k, and how to measure it".
    """
    raise NotImplementedError


def group_max_weights(rewards: list, k: int) -> list:
    """2. The direct way to train for the best of k: everyone in a team earns its best reward.

    rewards: n numbers of any size; n is a multiple of k. The first k answers are one group, the
    next k the next, and so on. Returns n weights, in units of reward: k times the best reward of
    the answer's own group.

    [1, 0, 0, 0] with k = 2: the groups are [1, 0] and [0, 0], their best are 1 and 0.

    >>> group_max_weights([1, 0, 0, 0], 1)
    [1, 0, 0, 0]
    >>> group_max_weights([1, 0, 0, 0], 2)
    [2, 2, 0, 0]

    The second answer is wrong and is paid like the right one beside it: it hitchhikes.
    Hint: answer i is in the group that starts at i - i % k.
    Read: walkthrough.ipynb, "Hitchhiking".
    """
    raise NotImplementedError


def hitchhiking_share(rewards: list, weights: list) -> float:
    """3. How much of the credit goes to wrong answers?

    rewards: n numbers, 0 or 1. weights: n numbers, none below 0. Returns one number, a share from
    0 to 1: the sum of the wrong answers' weights, divided by the sum of all. If all weights are
    0, nobody hitchhikes: 0.

    A group of four with one right answer gets the weights [4, 4, 4, 4] from exercise 2. Of 16,
    the wrong ones get 12.

    >>> hitchhiking_share([1, 0, 0, 0], [1, 0, 0, 0])
    0.0
    >>> hitchhiking_share([1, 0, 0, 0], [4, 4, 4, 4])
    0.75

    On average that is no error: in other groups these answers find no right one beside them. But
    it is noise, and the next exercise does without it: its share is 0.
    Hint: `zip(rewards, weights)` gives both of an answer.
    Read: walkthrough.ipynb, "Hitchhiking".
    """
    raise NotImplementedError


def weights_by_counting(rewards: list, k: int) -> list:
    """4. The weight of RSPO for pass@k, by listing the teams.

    rewards: n numbers, 0 or 1; 1 <= k <= n. Returns n weights, in units of reward:

        W_i = k * (share of the teams of k - 1 rivals that are all wrong) * R_i

    The rivals of answer i are the other n - 1 answers. If all k - 1 are wrong, answer i is what
    made its team right. A wrong answer earns nothing.

    [1, 0, 0, 0, 1] with k = 2: a right answer has 4 rivals and so 4 teams of one. 3 of them are
    wrong: W = 2 * 3/4.

    >>> weights_by_counting([1, 0, 0, 0, 1], 1)
    [1.0, 0.0, 0.0, 0.0, 1.0]
    >>> weights_by_counting([1, 0, 0, 0, 1], 2)
    [1.5, 0.0, 0.0, 0.0, 1.5]

    Hint: `combinations(others, k - 1)` lists the teams. For k = 1 it lists one, the empty one.
    Read: walkthrough.ipynb, "The weight".
    """
    raise NotImplementedError


def pass_at_k_weights(rewards: list, k: int) -> list:
    """5. The same weight in closed form: count the teams, do not list them.

    rewards: n numbers, 0 or 1; 1 <= k <= n. Returns n weights, in units of reward, equal to those
    of exercise 4. Now n = 24 with k = 12 must take no time: each answer has 1,352,078 teams.

    [1, 0, 0, 0, 1] with k = 3: a right answer has 4 rivals and so C(4, 2) = 6 teams of two. 3
    rivals are wrong, and C(3, 2) = 3 teams are all wrong: W = 3 * 3/6.

    >>> pass_at_k_weights([1, 0, 0, 0, 1], 1)
    [1.0, 0.0, 0.0, 0.0, 1.0]
    >>> pass_at_k_weights([1, 0, 0, 0, 1], 3)
    [1.5, 0.0, 0.0, 0.0, 1.5]

    Hint: how many rivals has a right answer, and how many of them are wrong?
    Read: equation (1) at the top of rspo.py.
    """
    raise NotImplementedError


def max_at_k_weights(rewards: list, k: int) -> list:
    """6. The weight of RSPO for graded rewards: what an answer adds to the best of its rivals.

    rewards: n numbers of any size, negative ones and ties too; 1 <= k <= n. Returns n weights, in
    units of reward. S runs over the teams of k - 1 rivals of answer i:

        W_i = k * mean over S of max(R_i - max(S), 0)
        W_i = R_i for k = 1: there is no rival

    [0.0, 0.5, 1.0] with k = 2: the last is ahead of its rivals by 1.0 and 0.5, on average 0.75.
    The second is ahead of the first by 0.5, and of the last by nothing, on average 0.25.

    >>> max_at_k_weights([0.0, 0.5, 1.0], 1)
    [0.0, 0.5, 1.0]
    >>> max_at_k_weights([0.0, 0.5, 1.0], 2)
    [0.0, 0.5, 1.5]
    >>> max_at_k_weights([1.0, 0.5, 1.0], 2)
    [0.5, 0.0, 0.5]

    In the last line the two best are tied: each is ahead of the second only.
    Hint: list the teams as in exercise 4. On 0/1 rewards both are the same.
    Read: equation (2) at the top of rspo.py. Its max_at_k_weights lists nothing, but sorts once.
    """
    raise NotImplementedError


def leave_one_out_weights(rewards: list, k: int) -> list:
    """7. The weights minus a baseline: has an answer done better than the others do?

    rewards: n numbers of any size; 1 <= k < n. Returns n numbers, in units of reward: W_i - b_i.
    W_i is the weight of exercise 6. b_i is the mean weight that the other n - 1 answers have if
    answer i was never written: then they are rivals only of one another.

    [1, 0, 0] with k = 2: W = [2, 0, 0]. Without the first, [0, 0] have the weights 0, 0, and the
    baseline is 0. Without a wrong one, [1, 0] have 2, 0, and the baseline is 1.

    >>> leave_one_out_weights([1, 0, 0], 1)
    [1.0, -0.5, -0.5]
    >>> leave_one_out_weights([1, 0, 0], 2)
    [2.0, -1.0, -1.0]

    A baseline does no harm as long as it does not depend on the answer it is subtracted from.
    Hint: `rewards[:i] + rewards[i + 1:]` is what is left without answer i.
    Read: walkthrough.ipynb, "Unbiased? See for yourself".
    """
    raise NotImplementedError


def policy_gradient_loss(logprobs, tokens, weights, end: int):
    """8. The loss whose gradient is the method, for a batch of answers of different lengths.

    logprobs: float tensor (B, A), the log-probability of each token, in nats. tokens: whole
    numbers (B, A). weights: float tensor (B,). end: the number of the end token.
    Returns a tensor without dimensions, in units of reward times nats:

        loss = -(1 / B) * sum over answers i of W_i * log pi(answer i)

    log pi(answer i) is the sum over its tokens. The model chose to stop, so the first end token
    belongs to the answer. What follows it is padding and does not. Padding can be any token, even
    the end token again. An answer without an end token was cut off: all its tokens count.

    Two answers, and 0 is the end token. The first answer is cut off: log pi = -1 - 1 - 1 = -3. The
    second is the token 6 and its end, then comes padding: log pi = -2 - 1 = -3. With the weights
    1 and 2 the loss is -(1 * -3 + 2 * -3) / 2 = 4.5.

    >>> logprobs = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -1.0, -5.0]])
    >>> tokens = torch.tensor([[7, 8, 7], [6, 0, 0]])
    >>> policy_gradient_loss(logprobs, tokens, weights=torch.tensor([1.0, 2.0]), end=0)
    tensor(4.5000)

    Hint: make a mask (B, A) of 1 for the tokens that count and 0 for the others. What is
    `(tokens == end).long().cumsum(1)` at the first end token, and what is it after that?
    Read: rspo.policy_gradient_loss, and `loss` in minimal.py.
    """
    raise NotImplementedError
