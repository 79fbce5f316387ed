"""The exact world: a bandit small enough that every expectation is a finite sum.

A prompt hides one of a few problem types (the model cannot tell which), the policy is a softmax over
a few actions, and all n samples of a prompt share its hidden type. So Max@k and its gradient are known
in closed form, and the mean and variance of any gradient estimator follow from listing all A^n
outcomes: no Monte Carlo, no noise. It is the classroom's and the tests' ground truth for `rspo.py`.

    python bandit.py              three tables and runs/bandit.png, about seven seconds on a laptop

What the tables show: training for k is best at k (alignment); RSPO is unbiased while the plug-in and
GRPO's normalised advantage are not (bias); the group maximum is unbiased too, but drowns in noise.

Shapes: T hidden types, A actions, n samples a prompt, O = A^n outcomes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rspo


@dataclass(frozen=True)
class Bandit:
    chance: Tensor    # (T,)    chance of each hidden problem type
    reward: Tensor    # (T, A)  reward of each action when that type is hidden


# One prompt, four problem types, eight actions; action t solves type t, the other four solve nothing.
HIDDEN_TYPES = Bandit(torch.tensor([.4, .3, .2, .1], dtype=torch.float64), torch.eye(4, 8).double())
# One type, two actions, right and wrong: 2^16 outcomes, so n = 16 can be listed.
RIGHT_OR_WRONG = Bandit(torch.ones(1).double(), torch.tensor([[1., 0.]]).double())


def objective(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """Exact Max@k of softmax(logits), logits (A,) -> scalar; on 0/1 rewards it is Pass@k.

    With F_a the chance of a reward no better than the a-th lowest r_(a), k samples all stay there with
    chance F_a^k, so E[max] = r_(A) - sum_{a<A} (r_(a+1) - r_(a)) F_a^k. For 0/1: 1 - (1 - w)^k.
    """
    ascending, order = bandit.reward.sort(dim=-1)                     # (T, A)
    below = logits.softmax(-1)[order].cumsum(-1)                      # (T, A)  F_a
    missed = (ascending.diff(dim=-1) * below[:, :-1] ** k).sum(-1)    # (T,)
    return bandit.chance @ (ascending[:, -1] - missed)                # ()


def gradient(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """Exact gradient of Max@k in the logits (A,) -> (A,), by automatic differentiation."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(objective(bandit, logits, k), logits)[0]


def policy_gradient(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """The same gradient by the policy gradient theorem, equation (2) of `rspo.py`: (A,) -> (A,).

    The weight of an action, k E_M[max(R - M, 0)], is the sort-diff-cumsum of `rspo.max_at_k_weights`
    with the estimate s_j replaced by what it estimates, F_j^(k-1).
    """
    policy = logits.softmax(-1)                                       # (A,)
    ascending, order = bandit.reward.sort(dim=-1)                     # (T, A)
    none = torch.zeros_like(ascending[:, :1])                         # (T, 1)
    steps = ascending.diff(dim=-1, prepend=none)                      # (T, A)  r_(j+1) - r_(j)
    below = torch.cat([none, policy[order].cumsum(-1)[:, :-1]], -1)   # (T, A)  F_j, F_0 = 0
    weights = k * (steps * below ** (k - 1)).cumsum(-1)               # (T, A)  sorted
    weights = torch.empty_like(weights).scatter(-1, order, weights)   # (T, A)
    expected = bandit.chance @ (weights * policy)                     # (A,)  E_y[W 1(y = a)]
    return expected - policy * expected.sum()                         # (A,)  grad log pi(a) = e_a - pi


def all_outcomes(num_actions: int, n: int) -> Tensor:
    """(O, n): every sequence of n actions, O = num_actions^n."""
    return torch.cartesian_prod(*[torch.arange(num_actions)] * n).view(-1, n)


def estimates(bandit: Bandit, logits: Tensor, weight_fn, n: int) -> tuple[Tensor, Tensor]:
    """Every value the gradient estimate (1/n) sum_i W_i grad log pi(y_i) can take, and its chance.

    weight_fn maps rewards (O, n) to weights (O, n). -> estimates (T, O, A), chances (T, O).
    """
    policy = logits.softmax(-1)                                               # (A,)
    outcomes = all_outcomes(policy.numel(), n)                                # (O, n)
    chance = bandit.chance[:, None] * policy[outcomes].prod(-1)               # (T, O)
    per_type = []
    for reward in bandit.reward:                                              # (A,)
        weights = weight_fn(reward[outcomes])                                 # (O, n)
        pushed = policy.new_zeros(len(outcomes), policy.numel()).scatter_add(-1, outcomes, weights)  # (O, A)
        per_type.append((pushed - weights.sum(-1, keepdim=True) * policy) / n)
    return torch.stack(per_type), chance


def moments(bandit: Bandit, logits: Tensor, weight_fn, n: int) -> tuple[Tensor, Tensor]:
    """Exact mean (A,) and total variance (trace of the covariance, a scalar) of a gradient estimator."""
    values, chance = estimates(bandit, logits, weight_fn, n)          # (T, O, A), (T, O)
    mean = (chance[..., None] * values).sum((0, 1))                   # (A,)
    variance = (chance * ((values - mean) ** 2).sum(-1)).sum()        # ()
    return mean, variance


# ---------------------------------------------------------------- estimators to hold beside RSPO

def plug_in_weights(rewards: Tensor, k: int) -> Tensor:
    """k (1 - c/n)^(k-1) R: the success rate is estimated with y_i itself among the samples. Biased."""
    return k * (1 - rewards.mean(-1, keepdim=True)) ** (k - 1) * rewards          # (..., n)


def grpo_weights(rewards: Tensor, k: int) -> Tensor:
    """(R - mean) / std of the group: GRPO's advantage. It does not know k."""
    centred = rewards - rewards.mean(-1, keepdim=True)                            # (..., n)
    return centred / rewards.std(-1, keepdim=True).clamp(min=1e-6)                # (..., n)


ESTIMATORS = {
    "RSPO": rspo.pass_at_k_weights,
    "RSPO, leave-one-out": rspo.leave_one_out_weights,
    "group maximum": rspo.group_max_weights,
    "plug-in": plug_in_weights,
    "GRPO advantage": grpo_weights,
}


# ---------------------------------------------------------------- the three tables

def train(bandit: Bandit, k: int, steps: int = 1500, lr: float = 0.2) -> Tensor:
    """Logits (A,) after gradient ascent (Adam) on the exact Max@k from the uniform policy."""
    logits = torch.zeros(bandit.reward.shape[-1]).double().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr, maximize=True)
    for _ in range(steps):
        logits.grad = gradient(bandit, logits, k)
        optimizer.step()
    return logits.detach()


def alignment(ks: tuple[int, ...], bandit: Bandit = HIDDEN_TYPES) -> Tensor:
    """(len(ks), len(ks)): row = k trained for, column = k evaluated at, both exact."""
    trained = [train(bandit, k) for k in ks]
    return torch.stack([torch.stack([objective(bandit, x, k) for k in ks]) for x in trained])


def compare_estimators(ks: tuple[int, ...], rates: tuple[float, ...], n: int) -> dict[str, Tensor]:
    """For each estimator (len(ks), len(rates), 3): its mean, its variance and the true gradient.

    Mean and truth of the right action's logit, variance in total, at success rate w in `rates`, over all 2^n outcomes.
    """
    rewards = RIGHT_OR_WRONG.reward[0][all_outcomes(2, n)]            # (O, n)
    tables = {}
    for name, weight_fn in ESTIMATORS.items():
        rows = []
        for k in ks:
            weights = weight_fn(rewards, k)                           # (O, n)  the same for every w
            for w in rates:
                logits = torch.tensor([w, 1 - w], dtype=torch.float64).log()
                mean, variance = moments(RIGHT_OR_WRONG, logits, lambda _: weights, n)
                truth = gradient(RIGHT_OR_WRONG, logits, k)
                rows.append(torch.stack([mean[0], variance, truth[0]]))
        tables[name] = torch.stack(rows).view(len(ks), len(rates), 3)
    return tables


def draw(matrix, ks, tables, noise_ks, rates, path: Path) -> None:
    """The three tables as one figure: alignment, bias against w at the largest k, noise against k."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    left.imshow(matrix - matrix.max(0).values, cmap="Greys_r", aspect="auto")
    for row in range(len(ks)):
        for column in range(len(ks)):
            best = matrix[:, column].argmax() == row
            gap = matrix[row, column] - matrix[:, column].max()
            left.text(column, row, f"{matrix[row, column]:.3f}", ha="center", va="center",
                      weight="bold" if best else "normal", color="white" if gap < -.3 else "black")
    left.set(title="Exact training: best at the k trained for", xlabel="evaluated at k",
             ylabel="trained for k", xticks=range(len(ks)), xticklabels=ks, yticks=range(len(ks)), yticklabels=ks)

    styles = dict(zip(tables, ("o-", "s--", "^:", "v-.", "x-")))
    for name, table in tables.items():
        if name != "RSPO, leave-one-out":        # on top of RSPO: both exactly 1
            middle.plot(rates, table[-1, :, 0] / table[-1, :, 2], styles[name], label=name)
    middle.set(title=f"Bias: mean of the estimate / true gradient, k = {noise_ks[-1]}",
               xlabel="success rate w of the prompt", ylabel="ratio (1 = unbiased)", yscale="log")
    middle.legend()
    for name in ("RSPO", "RSPO, leave-one-out", "group maximum"):
        right.plot(noise_ks, tables[name][..., 1].mean(1) / tables["RSPO"][..., 1].mean(1), styles[name], label=name)
    right.set(title="Noise: gradient variance relative to RSPO", xlabel="k", ylabel="variance ratio",
              yscale="log", xticks=noise_ks)
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    ks, noise_ks, n = (1, 2, 4, 8, 16), (1, 2, 4, 8), 16
    rates = (.02, .05, .1, .2, .3, .5, .7, .9)

    matrix = alignment(ks)
    print("1. Alignment: Pass@k (columns) after exact training for k (rows); * = best of the column")
    print("  train k |" + "".join(f"  pass@{k:<3d}" for k in ks))
    for k, row in zip(ks, matrix):
        cells = (f"{value:9.3f}" + ("*" if value == best else " ") for value, best in zip(row, matrix.max(0).values))
        print(f"  {k:7d} |" + "".join(cells))

    tables = compare_estimators(noise_ks, rates, n)
    print(f"\n2. Bias: mean of the gradient estimate / true gradient of Pass@{noise_ks[-1]}, n = {n}; 1 = unbiased")
    print("  success rate w      |" + "".join(f"{w:9.2g}" for w in rates))
    for name, table in tables.items():
        print(f"  {name:19s} |" + "".join(f"{ratio:9.3g}" for ratio in table[-1, :, 0] / table[-1, :, 2]))

    print(f"\n3. Noise: variance of the gradient estimate relative to RSPO's, mean over the same w, n = {n}\n"
          "   (with two actions all answers overlap; in a language model they overlap less, and the ratios differ)")
    print("  k                   |" + "".join(f"{k:8d}" for k in noise_ks))
    for name in ("RSPO", "RSPO, leave-one-out", "group maximum"):
        ratio = tables[name][..., 1].mean(1) / tables["RSPO"][..., 1].mean(1)
        print(f"  {name:19s} |" + "".join(f"{value:8.2f}" for value in ratio))

    path = Path("runs/bandit.png")
    draw(matrix, ks, tables, noise_ks, rates, path)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main()
