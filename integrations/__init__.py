"""The weights of rspo.py inside verl and TRL, for those who outgrow one machine.

No method code here, only calls into rspo.

    verl_rspo.py    advantage estimators for verl
    verl_data.py    problems and rewards of lib/tasks.py in verl's form
    trl_rspo.py     a GRPOTrainer for TRL
    docs/scaling.md the commands
"""

# The objectives of rspo.py that are offered: unbiased for the best of k.
# Left out are the biased ones (plugin, grpo), and reward, which is passk or maxk at k = 1.
OBJECTIVES = ("passk", "maxk", "loo", "groupmax")
