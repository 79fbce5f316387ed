"""RSPO's weights as advantage estimators of verl (tested with 0.9.1).

They are called rspo_passk, rspo_maxk, rspo_loo and rspo_groupmax, after `rspo.OBJECTIVES`:

    export PYTHONPATH=/path/to/this/repository VERL_USE_EXTERNAL_MODULES=integrations.verl_rspo
    python -m verl.trainer.main_ppo algorithm.adv_estimator=rspo_passk +algorithm.rspo_k=8 ...

The whole command, and what else must be set for verl to follow the same gradient, is in
docs/scaling.md. What this file can see and knows to be wrong, it refuses. verl's own `grpo_passk`
is the case k = n, divided by the group's standard deviation.

Shapes: B samples of a batch in any order, n of each of its P prompts, T tokens of the longest.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from verl.trainer.ppo.core_algos import register_adv_est
except ImportError as error:
    raise ImportError(f"integrations/verl_rspo.py needs verl, which cannot be imported ({error}): "
                      "pip install verl==0.9.1 in an environment of its own (make "
                      "test-integrations makes one)") from error

import rspo
from integrations import OBJECTIVES


def advantages(objective: str, token_level_rewards: Tensor, response_mask: Tensor, index=None,
               config=None, **unused) -> tuple[Tensor, Tensor]:
    """verl's interface: a sample's weight on each of its tokens, twice (advantages, returns).

    token_level_rewards (B, T): a sample's reward is their sum; response_mask (B, T); index (B,):
    uid of each sample's prompt; config: verl's `algorithm` section. Raises ValueError for ragged
    groups, n < k and settings that bias the gradient. -> (B, T), (B, T).
    """
    k = checked_k(objective, config)
    rows = group_rows(index)                                               # (P, n)
    if objective == "groupmax":
        # verl orders a batch by length, but groups must not depend on the answers they hold
        rows = torch.gather(rows, 1, torch.rand(rows.shape).argsort(1))    # (P, n)  rows shuffled
    rewards = token_level_rewards.sum(-1)                                  # (B,)
    weights = torch.empty_like(rewards)                                    # (B,)
    rows = rows.to(rewards.device)
    weights[rows] = rspo.OBJECTIVES[objective](rewards[rows], k).to(weights)
    result = weights[:, None] * response_mask                              # (B, T)
    return result, result


def group_rows(index) -> Tensor:
    """(P, n) positions in the batch of each uid's samples, whatever their order.

    Raises ValueError unless all groups are of one size.
    """
    if index is None:
        raise ValueError("the batch has no uid, but RSPO needs one of each sample to know which "
                         "belong to one prompt")
    uids, group, sizes = np.unique(np.asarray(index), return_inverse=True,
                                   return_counts=True)                     # (P,), (B,), (P,)
    if (sizes != sizes[0]).any():
        usual = np.bincount(sizes).argmax()
        odd = int(np.argmax(sizes != usual))
        raise ValueError(f"prompt {uids[odd]} has {sizes[odd]} samples and others have {usual}, "
                         "but RSPO needs as many of each prompt; did rollouts fail, or does one "
                         "rollout return several outputs?")
    return torch.from_numpy(np.argsort(group, kind="stable").reshape(len(uids), -1))


def checked_k(objective: str, config) -> int:
    """k of verl's `algorithm` section. ValueError where it is missing, or a setting would bias."""
    if config is None or config.get("rspo_k") is None:
        raise ValueError(f"algorithm.rspo_k is not set, but rspo_{objective} trains for the best "
                         "of k answers: add +algorithm.rspo_k=8, say")
    if config.get("rspo_baseline") is not None:
        raise ValueError("algorithm.rspo_baseline is no setting: leave it out, and for the "
                         "leave-one-out baseline take algorithm.adv_estimator=rspo_loo")
    if config.get("use_kl_in_reward"):
        raise ValueError("algorithm.use_kl_in_reward is True, but RSPO needs the rewards alone: "
                         "set it to False (a KL term can stand in the loss: "
                         "actor_rollout_ref.actor.use_kl_loss)")
    correction = config.get("rollout_correction")
    rejected = correction.get("rollout_rs") if correction is not None else None
    if rejected is not None:
        raise ValueError(f"algorithm.rollout_correction.rollout_rs is {rejected!r}, but leaving "
                         "samples out after the weights are known biases them: set it to null "
                         "and take rollout_is=token")
    return config.get("rspo_k")


for _objective in OBJECTIVES:
    register_adv_est(f"rspo_{_objective}")(functools.partial(advantages, _objective))
