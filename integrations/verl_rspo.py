"""RSPO's weights as advantage estimators of verl (tested with 0.9.1).

They are rspo_passk, rspo_maxk, rspo_loo and rspo_groupmax, after rspo.OBJECTIVES:

    export PYTHONPATH=/path/to/this/repository
    export VERL_USE_EXTERNAL_MODULES=integrations.verl_rspo
    python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=rspo_passk +algorithm.rspo_k=8 ...

The whole command is in docs/scaling.md. Settings that would change the gradient
are refused, at the first step: verl shows them to an estimator no earlier.
verl's own grpo_passk is k = n, divided by the group's standard deviation.

Shapes: B samples in any order, n of each of P prompts, T tokens of the longest.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from omegaconf import DictConfig
    from verl.trainer.ppo.core_algos import register_adv_est
except ImportError as error:
    raise ImportError(
        f"integrations/verl_rspo.py needs verl, which cannot be imported ({error}): "
        "make test-integrations makes an environment with it") from error

import rspo
from integrations import OBJECTIVES

TOKEN = "any other ratio, or none, changes the gradient of long answers most"
KEEPS = "what is left out is left out after the weights are known, which biases"
ONCE = "a second update on the same samples is clipped and not on-policy"
FULL = "samples must come from the whole softmax"
# setting of the section `algorithm`: (values that are right, why)
ALGORITHM = {
    "rspo_baseline": ((None,), "take adv_estimator=rspo_loo for the baseline"),
    "use_kl_in_reward": ((False, None), "take actor.use_kl_loss for a KL term"),
    "rollout_correction.rollout_is": (("token",), TOKEN),
    "rollout_correction.rollout_rs": ((None,), KEEPS),
    "rollout_correction.rollout_is_batch_normalize": (
        (False, None), "one factor for a batch depends on all of its answers"),
    "rollout_correction.bypass_mode": (
        (False, None), "its ratio is clipped, and no longer one at the first update"),
}
# the same elsewhere in verl's configuration
ELSEWHERE = {
    "actor_rollout_ref.actor.loss_agg_mode": (
        ("seq-mean-token-sum",), "other modes divide by lengths, or rescale the gradient"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": (
        ("vanilla",), "on-policy it is RSPO's loss, others are not"),
    "actor_rollout_ref.actor.ppo_epochs": ((1,), ONCE),
    "actor_rollout_ref.rollout.top_p": ((1,), FULL),
    "actor_rollout_ref.rollout.top_k": ((-1, 0), FULL),
}


def advantages(objective: str, token_level_rewards: Tensor, response_mask: Tensor,
               index=None, config=None, **unused) -> tuple[Tensor, Tensor]:
    """verl's interface: a sample's weight on each of its tokens, twice.

    token_level_rewards (B, T): a sample's reward is their sum.
    response_mask (B, T). index (B,): uid of each sample's prompt.
    config: verl's section `algorithm`.
    Returns advantages and returns, both (B, T). Raises ValueError for ragged
    groups, n < k and settings that bias the gradient.
    """
    check_settings(config)
    k = config.get("rspo_k")
    if k is None:
        raise ValueError("algorithm.rspo_k is not set: add +algorithm.rspo_k=8, say, "
                         "to train for the best of 8 answers")
    rows = group_rows(index)                                       # (P, n)
    weights_of = rspo.OBJECTIVES[objective]
    if setting(config, "filter_groups.enable"):
        if weights_of(torch.ones(rows.shape[1]), k).any():
            raise ValueError(
                f"algorithm.filter_groups is on, but rspo_{objective} at k = {k} learns "
                "from the groups of equal rewards that it drops: turn it off")
    if objective == "groupmax":
        # verl orders a batch by length, but groups must not depend on that
        order = torch.rand(rows.shape).argsort(1)                  # (P, n)
        rows = rows.gather(1, order)                               # (P, n)
    rewards = token_level_rewards.sum(-1)                          # (B,)
    weights = torch.empty_like(rewards)                            # (B,)
    rows = rows.to(rewards.device)
    weights[rows] = weights_of(rewards[rows], k).to(weights)
    result = weights[:, None] * response_mask                      # (B, T)
    return result, result


def group_rows(index) -> Tensor:
    """(P, n) positions in the batch of each uid's samples, in any order.

    Raises ValueError unless all groups are of one size.
    """
    if index is None:
        raise ValueError("the batch has no uid, which says what belongs to one prompt")
    uids, group, sizes = np.unique(                                # (P,), (B,), (P,)
        np.asarray(index), return_inverse=True, return_counts=True)
    if (sizes != sizes[0]).any():
        usual = np.bincount(sizes).argmax()
        odd = int(np.argmax(sizes != usual))
        raise ValueError(
            f"prompt {uids[odd]} has {sizes[odd]} samples and others have {usual}, but "
            "RSPO needs as many of each: did one fail, or return several outputs?")
    rows = np.argsort(group, kind="stable").reshape(len(uids), -1)
    return torch.from_numpy(rows)


def check_settings(config) -> None:
    """Raise ValueError, with the value to take, for what would bias the gradient.

    Outside of `algorithm` it sees what the tree that holds the section holds:
    everything in verl's own trainers.
    """
    check(config, ALGORITHM, "algorithm.")
    threshold = setting(config, "rollout_correction.rollout_is_threshold")
    if "_" in str(threshold):
        raise ValueError(
            f"algorithm.rollout_correction.rollout_is_threshold is {threshold!r}, but "
            f"must be one number, such as 2.0: {KEEPS}")
    root = config._get_root() if isinstance(config, DictConfig) else None
    if setting(root, "actor_rollout_ref") is None:
        return
    check(root, ELSEWHERE)
    prompts = setting(root, "data.train_batch_size")
    update = setting(root, "actor_rollout_ref.actor.ppo_mini_batch_size")
    if update != prompts:
        raise ValueError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size is {update}, but must be "
            f"data.train_batch_size ({prompts}): {ONCE}")


def check(config, needed: dict, section: str = "") -> None:
    for name, (right, why) in needed.items():
        value = setting(config, name)
        if value not in right:
            raise ValueError(
                f"{section}{name} is {value!r}, but must be {right[0]!r}: {why}")


def setting(config, path: str):
    """The value at a dotted path; None where the path ends before."""
    for name in path.split("."):
        config = None if config is None else config.get(name)
    return config


for _objective in OBJECTIVES:
    register_adv_est(f"rspo_{_objective}")(functools.partial(advantages, _objective))
