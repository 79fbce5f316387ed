"""The weights of rspo.py inside verl and TRL, for those who outgrow one machine. No method code here: only calls into rspo.

    verl_rspo.py    advantage estimators for verl
    verl_data.py    problems and rewards of tasks.py in verl's form
    trl_rspo.py     a GRPOTrainer for TRL
    docs/scaling.md the commands
"""

from torch import Tensor

import rspo

OBJECTIVES = {"passk": rspo.pass_at_k_weights, "maxk": rspo.max_at_k_weights, "groupmax": rspo.group_max_weights}
BASELINES = ("none", "loo")


def weigh(rewards: Tensor, k: int, objective: str, baseline: str) -> Tensor:
    """(P, n) weights of (P, n) rewards, as train.py's --objective and --baseline name them. ValueError where they do not fit."""
    check_method(objective, baseline)
    if baseline == "none":
        return OBJECTIVES[objective](rewards, k)
    if objective == "passk":
        rspo.pass_at_k(rewards, k)                      # refuses rewards that are not 0 or 1
    return rspo.leave_one_out_weights(rewards, k)


def check_method(objective: str, baseline: str) -> None:
    """Raise ValueError unless objective and baseline exist and go together."""
    if objective not in OBJECTIVES:
        raise ValueError(f"the objective is {objective!r}, but must be one of {', '.join(OBJECTIVES)}")
    if baseline not in BASELINES:
        raise ValueError(f"the baseline is {baseline!r}, but must be one of {', '.join(BASELINES)}")
    if objective == "groupmax" and baseline == "loo":
        raise ValueError("the baseline is 'loo', but groupmax is the paper's plain baseline: take 'none'")
