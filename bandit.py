"""The exact world: a bandit small enough that every expectation is a finite sum.

A prompt hides one of a few problem types (the model cannot tell which), the policy is a softmax
over a few actions, and all n samples of a prompt share its hidden type. So Max@k and its gradient
are known in closed form, and the mean and variance of any gradient estimator follow from listing
all A^n outcomes: no Monte Carlo, no noise. It is the ground truth of the classroom and the tests.

    python bandit.py              three tables and runs/bandit.png, seven seconds on a laptop

What they show: training for k is best at k (alignment); RSPO is unbiased, the plug-in and GRPO's
normalised advantage are not (bias); the group maximum is unbiased too, but drowns in noise.

Shapes: T hidden types, A actions, n samples per prompt, O = A^n outcomes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rspo


@dataclass(frozen=True)
class Bandit:
    chance: Tensor  # (T,)    chance of each hidden problem type
    reward: Tensor  # (T, A)  reward of each action when that type is hidden


# Four problem types, eight actions; action t solves type t, the other four solve nothing.
HIDDEN_TYPES = Bandit(torch.tensor([.4, .3, .2, .1], dtype=torch.float64), torch.eye(4, 8).double())
# One type, two actions, right and wrong: 2^16 outcomes, so n = 16 can be listed.
RIGHT_OR_WRONG = Bandit(torch.ones(1).double(), torch.tensor([[1., 0.]]).double())
ESTIMATORS = {
    "RSPO": rspo.pass_at_k_weights,
    "RSPO, leave-one-out": rspo.leave_one_out_weights,
    "group maximum": rspo.group_max_weights,
    "plug-in": rspo.plug_in_weights,
    "GRPO advantage": rspo.grpo_weights,
}
UNBIASED = list(ESTIMATORS)[:3]


def objective(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """Exact Max@k of softmax(logits), logits (A,) -> scalar; on 0/1 rewards it is Pass@k.

    With F_a the chance of a reward no better than the a-th lowest r_(a), k samples all stay there
    with chance F_a^k: E[max] = r_(A) - sum_{a<A} (r_(a+1) - r_(a)) F_a^k. For 0/1: 1 - (1 - w)^k.
    """
    ascending, order = bandit.reward.sort(dim=-1)  # (T, A)
    below = logits.softmax(-1)[order].cumsum(-1)  # (T, A)  F_a
    missed = (ascending.diff(dim=-1) * below[:, :-1] ** k).sum(-1)  # (T,)
    return bandit.chance @ (ascending[:, -1] - missed)  # ()


def gradient(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """Exact gradient of Max@k in the logits (A,) -> (A,), by automatic differentiation."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(objective(bandit, logits, k), logits)[0]


def all_outcomes(num_actions: int, n: int) -> Tensor:
    """(O, n): every sequence of n actions, O = num_actions^n."""
    return torch.cartesian_prod(*[torch.arange(num_actions)] * n).view(-1, n)


def estimates(bandit: Bandit, logits: Tensor, weight_fn, n: int) -> tuple[Tensor, Tensor]:
    """Every value that (1/n) sum_i W_i grad log pi(y_i) can take, and its chance.

    weight_fn maps rewards (O, n) to weights (O, n). -> estimates (T, O, A), chances (T, O).
    """
    policy = logits.softmax(-1)  # (A,)
    outcomes = all_outcomes(policy.numel(), n)  # (O, n)
    chance = bandit.chance[:, None] * policy[outcomes].prod(-1)  # (T, O)
    values = []
    for reward in bandit.reward:  # (A,)
        weights = weight_fn(reward[outcomes])  # (O, n)
        pushed = policy.new_zeros(len(outcomes), policy.numel())  # (O, A)
        pushed = pushed.scatter_add(-1, outcomes, weights)  # (O, A)
        values.append((pushed - weights.sum(-1, keepdim=True) * policy) / n)
    return torch.stack(values), chance


def moments(bandit: Bandit, logits: Tensor, weight_fn, n: int) -> tuple[Tensor, Tensor]:
    """Exact mean (A,) and total variance (a scalar) of a gradient estimator."""
    values, chance = estimates(bandit, logits, weight_fn, n)  # (T, O, A), (T, O)
    mean = (chance[..., None] * values).sum((0, 1))  # (A,)
    return mean, (chance * ((values - mean) ** 2).sum(-1)).sum()


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


def compare_estimators(ks: tuple, rates: tuple, n: int) -> dict[str, Tensor]:
    """For each estimator (len(ks), len(rates), 3): mean, variance and truth of the gradient.

    Mean and truth of the right action's logit, variance in total, at success rate w in `rates`,
    over all 2^n outcomes.
    """
    rewards = RIGHT_OR_WRONG.reward[0][all_outcomes(2, n)]  # (O, n)
    tables = {}
    for name, weight_fn in ESTIMATORS.items():
        rows = []
        for k in ks:
            weights = weight_fn(rewards, k)  # (O, n)  the same for every w
            for w in rates:
                logits = torch.tensor([w, 1 - w], dtype=torch.float64).log()
                mean, variance = moments(RIGHT_OR_WRONG, logits, lambda _: weights, n)
                truth = gradient(RIGHT_OR_WRONG, logits, k)
                rows.append(torch.stack([mean[0], variance, truth[0]]))
        tables[name] = torch.stack(rows).view(len(ks), len(rates), 3)
    return tables


def bias(table: Tensor) -> Tensor:
    """Mean of the estimate / true gradient at the largest k: (rates,) of one estimator's table."""
    return table[-1, :, 0] / table[-1, :, 2]


def noise(tables: dict[str, Tensor], name: str) -> Tensor:
    """Variance of an estimator relative to RSPO's, mean over the rates: (len(ks),)."""
    return tables[name][..., 1].mean(1) / tables["RSPO"][..., 1].mean(1)


def draw(matrix: Tensor, ks: tuple, tables: dict, noise_ks: tuple, rates: tuple, path: Path):
    """The three tables as one figure."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    gap = matrix - matrix.max(0).values  # (K, K)
    left.imshow(gap, cmap="Greys_r", aspect="auto")
    for row in range(len(ks)):
        for column in range(len(ks)):
            weight = "bold" if gap[row, column] == 0 else "normal"
            left.text(column, row, f"{matrix[row, column]:.3f}", ha="center", va="center",
                      weight=weight, color="white" if gap[row, column] < -.3 else "black")
    left.set(title="Exact training: best at the k trained for", xlabel="evaluated at k",
             ylabel="trained for k")
    left.set_xticks(range(len(ks)), ks)
    left.set_yticks(range(len(ks)), ks)
    styles = dict(zip(tables, ("o-", "s--", "^:", "v-.", "x-")))
    for name in tables:
        middle.plot(rates, bias(tables[name]), styles[name], label=name)
    middle.set(title=f"Bias: mean of the estimate / true gradient, k = {noise_ks[-1]}",
               xlabel="success rate w of the prompt", ylabel="1 = unbiased", yscale="log")
    for name in UNBIASED:
        right.plot(noise_ks, noise(tables, name), styles[name], label=name)
    right.set(title="Noise: gradient variance relative to RSPO's", xlabel="k", yscale="log",
              xticks=noise_ks)
    for axis in (middle, right):
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    ks, noise_ks, n = (1, 2, 4, 8, 16), (1, 2, 4, 8), 16
    rates = (.02, .05, .1, .2, .3, .5, .7, .9)

    matrix = alignment(ks)
    print("1. Alignment: Pass@k (columns) after exact training for k (rows); * = best of column")
    print("  train k |" + "".join(f"  pass@{k:<3d}" for k in ks))
    for k, row in zip(ks, matrix):
        cells = [f"{x:9.3f}{'*' if x == best else ' '}" for x, best in zip(row, matrix.amax(0))]
        print(f"  {k:7d} |" + "".join(cells))

    tables = compare_estimators(noise_ks, rates, n)
    print(f"\n2. Bias: mean of the estimate / true gradient of Pass@{noise_ks[-1]}, n = {n}")
    print("  success rate w      |" + "".join(f"{w:9.2g}" for w in rates))
    for name in tables:
        print(f"  {name:19s} |" + "".join(f"{ratio:9.3g}" for ratio in bias(tables[name])))

    print("\n3. Noise: variance of the estimate relative to RSPO's, mean over the same w\n"
          "   (with two actions all answers overlap; in a language model they overlap less)")
    print("  k                   |" + "".join(f"{k:8d}" for k in noise_ks))
    for name in UNBIASED:
        print(f"  {name:19s} |" + "".join(f"{ratio:8.2f}" for ratio in noise(tables, name)))

    path = Path("runs/bandit.png")
    draw(matrix, ks, tables, noise_ks, rates, path)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main()
