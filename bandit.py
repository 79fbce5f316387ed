"""The exact world: a bandit so small that every expectation is a finite sum.

A prompt hides one of a few problem types, the policy is a softmax over a few
actions, and all n samples of a prompt share its type. Max@k and its gradient are
known in closed form, and mean and variance of any gradient estimator follow from
listing all A^n outcomes: no Monte Carlo.

    python bandit.py      a figure and three tables in ten seconds

Hills: k = 1 stays on the hill where it began, k > 1 finds the higher one.
Alignment: training for k is best at k. Bias: RSPO has none, unlike the plug-in,
centred weights, GRPO's advantage. Noise: the group maximum drowns in it.

Shapes: T hidden types, A actions, n samples per prompt, O = A^n outcomes.
"""

import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

try:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor
except ImportError as missing:
    raise SystemExit(f"bandit.py needs {missing.name}: `make demo` sets up .venv with it")

import rspo

tensor = partial(torch.tensor, dtype=torch.float64)


class Bandit(NamedTuple):
    chance: Tensor  # (T,)    of each hidden problem type
    reward: Tensor  # (T, A)  of each action when that type is hidden


# Four types, eight actions: action t solves type t, four solve nothing.
HIDDEN_TYPES = Bandit(tensor([.4, .3, .2, .1]), torch.eye(4, 8).double())
RIGHT_OR_WRONG = Bandit(tensor([1.]), tensor([[1., 0.]]))
# RS-GRPO's hundred arms (2509.24261); the policy starts on the lower hill.
HIGH, LOW = (torch.exp(-tensor(range(-top, 100 - top)) ** 2 / 50) for top in (40, 75))
HILLS = Bandit(tensor([1.]), (.1 + .9 * HIGH + .5 * LOW)[None])
START = (LOW + .1).log()  # (100,)  logits
COLORS = {1: "#0072b2", 2: "#009e73", 4: "#e69f00", 8: "#d55e00"}
ESTIMATORS = {
    "RSPO": rspo.pass_at_k_weights,
    "RSPO, leave-one-out": rspo.leave_one_out_weights,
    "group maximum": rspo.group_max_weights,
    "plug-in": rspo.plug_in_weights,
    "centred": rspo.centred_weights,
    "GRPO advantage": rspo.grpo_weights,
}
UNBIASED = list(ESTIMATORS)[:3]


def objective(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """Exact Max@k of softmax(logits), logits (A,) -> (); for 0/1 it is Pass@k.

    F_a is the chance of a reward no better than the a-th lowest, r_(a); k samples
    all stay there with F_a^k. So E[max] = r_(A) - sum_{a<A} (r_(a+1) - r_(a)) F_a^k.
    """
    ascending, order = bandit.reward.sort(dim=-1)  # (T, A)
    below = logits.softmax(-1)[order].cumsum(-1)  # (T, A)  F_a
    missed = (ascending.diff(dim=-1) * below[:, :-1] ** k).sum(-1)  # (T,)
    return bandit.chance @ (ascending[:, -1] - missed)  # ()


def gradient(bandit: Bandit, logits: Tensor, k: int) -> Tensor:
    """Exact gradient of Max@k in the logits (A,) -> (A,), by autograd."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(objective(bandit, logits, k), logits)[0]


def all_outcomes(num_actions: int, n: int) -> Tensor:
    """(O, n): every sequence of n actions, O = num_actions^n."""
    return torch.cartesian_prod(*[torch.arange(num_actions)] * n).view(-1, n)


def moments(bandit: Bandit, logits: Tensor, weight_fn, n: int) -> tuple[Tensor, Tensor]:
    """Exact mean (A,) and total variance () of (1/n) sum_i W_i grad log pi(y_i)."""
    policy = logits.softmax(-1)  # (A,)
    outcomes = all_outcomes(policy.numel(), n)  # (O, n)
    chance = bandit.chance[:, None] * policy[outcomes].prod(-1)  # (T, O)
    weights = weight_fn(bandit.reward[:, outcomes])  # (T, O, n)
    pushed = policy.new_zeros(*chance.shape, len(policy))  # (T, O, A)
    pushed = pushed.scatter_add(-1, outcomes.expand_as(weights), weights)
    values = (pushed - weights.sum(-1, keepdim=True) * policy) / n  # (T, O, A)
    mean = (chance[..., None] * values).sum((0, 1))  # (A,)
    return mean, (chance * ((values - mean) ** 2).sum(-1)).sum()


# -------- hills and tables

def train(bandit: Bandit, k: int, logits: Tensor, optimizer=torch.optim.Adam,
          steps: int = 1500, lr: float = 0.2) -> Tensor:
    """Logits (A,) after ascent on the exact Max@k."""
    logits = logits.clone().requires_grad_()
    ascent = optimizer([logits], lr=lr, maximize=True)
    for _ in range(steps):
        logits.grad = gradient(bandit, logits, k)
        ascent.step()
    return logits.detach()


def climb(k: int) -> Tensor:
    """Policy (100,) after RS-GRPO's 25,000 updates of .1, without their noise."""
    return train(HILLS, k, START, torch.optim.SGD, steps=1250, lr=2.).softmax(-1)


@cache
def trained_for(k: int) -> Tensor:
    """Logits (A,) after exact training on the hidden types, from equal chances."""
    return train(HIDDEN_TYPES, k, torch.zeros(8).double())


def alignment(ks: tuple[int, ...]) -> Tensor:
    """(K, K): row = k trained for, column = k evaluated at, both exact."""
    return tensor([[objective(HIDDEN_TYPES, x, k) for k in ks] for x in map(trained_for, ks)])


def compare_estimators(ks: tuple, rates: tuple, n: int) -> dict[str, Tensor]:
    """Of each estimator (K, rates, 3): mean, variance and truth of the gradient.

    Mean and truth are the right action's, at the success rates w.
    """
    rewards = RIGHT_OR_WRONG.reward[:, all_outcomes(2, n)]  # (1, O, n)
    tables = {}
    for name, weight_fn in ESTIMATORS.items():
        rows = []
        for k in ks:
            weights = weight_fn(rewards, k)  # (1, O, n)  for every w
            for w in rates:
                logits = tensor([w, 1 - w]).log()
                mean, variance = moments(RIGHT_OR_WRONG, logits, lambda _: weights, n)
                truth = gradient(RIGHT_OR_WRONG, logits, k)
                rows.append(torch.stack([mean[0], variance, truth[0]]))
        tables[name] = torch.stack(rows).view(len(ks), len(rates), 3)
    return tables


def draw_hills(path: Path | None = None) -> Figure:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    land, mass = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    land.fill_between(range(100), HILLS.reward[0], color="#dddddd")
    land.set(title="Two hills: where training for k ends", ylabel="reward")
    mass.plot(START.softmax(-1), color="#555555", lw=4, alpha=.4, label="untrained")
    for (k, color), style in zip(COLORS.items(), ("-", "--", "-.", ":")):
        policy = climb(k)  # (100,)
        label = f"k = {k}: mean reward {policy @ HILLS.reward[0]:.2f}"
        mass.plot(policy, style, color=color, label=label)
    mass.set(xlabel="arm", ylabel="probability", yscale="log", ylim=(1e-4, 1.5))
    mass.legend(loc="upper left")
    if path:
        figure.savefig(path, dpi=150)
    return figure


def show(title: str, head: str, columns: tuple, rows: dict, form: str = "{}") -> None:
    """A table: rows is {name: cells}, and form says how a cell is written."""
    print(f"\n{title}")
    for name, cells in {head: columns, **rows}.items():
        texts = [f"{cell if cells is columns else form.format(cell):>9}" for cell in cells]
        print(f"  {name:<20} |" + "".join(texts))


def show_alignment(ks: tuple[int, ...], title: str) -> None:
    matrix = alignment(ks)
    stars = [[f"{x:.3f}{'*' if best else ' '}" for x, best in zip(*row)]
             for row in zip(matrix, matrix == matrix.amax(0))]
    show(f"{title}; * = best of column", "train k", ks, dict(zip(ks, stars)))


def main() -> None:
    ks, noise_ks, n = (1, 2, 4, 8, 16), (1, 2, 4, 8), 16
    rates = (.02, .05, .1, .2, .3, .5, .7, .9)
    torch.set_num_threads(1)  # all tensors are small
    Path("runs").mkdir(exist_ok=True)
    draw_hills(Path("runs/hills.png"))

    show_alignment(ks, "1. Alignment: Pass@k after exact training for k")
    tables = compare_estimators(noise_ks, rates, n)
    bias = {name: table[-1, :, 0] / table[-1, :, 2] for name, table in tables.items()}
    show(f"2. Bias: mean of the estimate / true gradient of Pass@{noise_ks[-1]}, n = {n}",
         "success rate w", rates, bias, "{:.3g}")

    noise = {name: tables[name][..., 1].mean(1) / tables["RSPO"][..., 1].mean(1)
             for name in UNBIASED}
    show("3. Noise: variance / RSPO's, mean over w (two actions overlap more than texts)",
         "k", noise_ks, noise, "{:.2f}")
    print("\nfigure: runs/hills.png")


if __name__ == "__main__":
    main() if not sys.argv[1:] else print(__doc__)
