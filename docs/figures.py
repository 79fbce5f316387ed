"""The figures of the lesson, each drawn from the project's own functions.

    python docs/figures.py        writes weight.png, credit.png and steps.png beside this file

A function returns its figure, so walkthrough.ipynb shows the same ones. None switches the backend:
a notebook keeps its own.

Shapes: P prompts, n answers each, C counts of right ones; K values of k, A actions, S seeds.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bandit
import rspo
from evaluate import LOOKS

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"


def new(columns: int = 1, size: tuple = (7, 4)) -> tuple:
    """An empty figure, and its axes from left to right."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, *figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def bets(ks: tuple = (1, 4, 16)) -> Figure:
    """What exact training for each k learns to play against the four hidden types."""
    figure, *axes = new(len(ks), (9, 2.8))
    for axis, k in zip(axes, ks):
        policy = bandit.trained_for(k).softmax(-1)  # (A,)
        axis.bar(range(1, 9), policy, color=LOOKS[f"k = {k}"][0])
        axis.set(title=f"trained for k = {k}", xlabel="action", xticks=range(1, 9), ylim=(0, 1.05))
    axes[0].set_ylabel("chance to be played")
    return figure


def learn_from_samples(estimator: str, k: int, seeds: int = 8, lr: float = 0.3,
                       steps: int = 300, prompts: int = 4, n: int = 16) -> torch.Tensor:
    """(steps / 10 + 1, S): exact Pass@k on the hidden types while S seeds learn, each alone.

    bandit.py draws no samples: here the noise is what is to be seen.
    """
    random = torch.Generator().manual_seed(0)
    draw = lambda chance, *shape: torch.multinomial(
        chance, shape[-1], replacement=True, generator=random)
    logits, found = torch.zeros(seeds, 8).double(), []  # (S, A)
    for step in range(steps + 1):
        if step % 10 == 0:
            chances = [bandit.objective(bandit.HIDDEN_TYPES, x, k) for x in logits]
            found.append(bandit.tensor(chances))  # (S,)
        policy = logits.softmax(-1)  # (S, A)
        hidden = draw(bandit.HIDDEN_TYPES.chance.expand(seeds, -1), prompts)  # (S, P)
        actions = draw(policy, prompts * n).view(seeds, prompts, n)  # (S, P, n)
        rewards = bandit.HIDDEN_TYPES.reward[hidden].gather(-1, actions)  # (S, P, n)
        weights = bandit.ESTIMATORS[estimator](rewards, k).flatten(1)  # (S, P n)
        pushed = torch.zeros_like(logits).scatter_add(-1, actions.flatten(1), weights)
        logits += lr * (pushed - weights.sum(-1, keepdim=True) * policy) / (prompts * n)
    return torch.stack(found)


def hitchhiking(k: int = 8, **settings) -> Figure:
    """Exact Pass@k while each of eight seeds learns: the group maximum's weights and RSPO's."""
    figure, *axes = new(2, (9, 3.4))
    for axis, name in zip(axes, ("group maximum", "RSPO")):
        found = learn_from_samples(name, k, **settings)  # (T, S)
        steps = range(0, 10 * len(found), 10)
        axis.plot(steps, found, color=ORANGE if name == "group maximum" else BLUE, lw=1, alpha=0.7)
        axis.plot(steps, found.mean(1), color="black", lw=2, ls="--", label="mean of the seeds")
        axis.set(title=f"{name}: {found.shape[1]} seeds", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"chance that one of {k} is right")
    axes[0].legend(loc="lower right")
    return figure


def weight_by_success_rate(ks=(1, 2, 4, 8), n: int = 64) -> Figure:
    """Weight of a right answer over the prompt's success rate w.

    A line is k (1 - w)^(k-1), a marker is the weight of rspo.py at w = c / n.
    """
    figure, axis = new()
    rates = torch.linspace(0, 1, 200)
    right = torch.arange(1, n + 1, 4)  # (C,)
    groups = (torch.arange(n) < right[:, None]).double()  # (C, n)
    for k in ks:
        colour, marker, dashes = LOOKS[f"k = {k}"]
        weights = rspo.pass_at_k_weights(groups, k)[:, 0]  # (C,)
        axis.plot(rates, k * (1 - rates) ** (k - 1), dashes, color=colour, label=f"k = {k}")
        axis.plot(right / n, weights, marker, color=colour, markersize=4)
    axis.set(title=f"A right answer counts where right answers are rare (markers: n = {n})",
             xlabel="success rate w of the prompt", ylabel="weight of a right answer")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def who_gets_the_credit(rewards=(0, 1, 0, 0), k: int = 4) -> Figure:
    """Weights of one group of k: the group maximum's and RSPO's.

    k wrong answers more stand behind the group, so that n = 2k.
    """
    figure, *axes = new(2)
    group = torch.tensor(rewards, dtype=torch.float64)  # (k,)
    everyone = torch.cat([group, torch.zeros(k)])  # (2k,)
    methods = {"Group maximum: three hitchhikers": rspo.group_max_weights(everyone, k)[:k],
               "RSPO: who earned it": rspo.pass_at_k_weights(everyone, k)[:k]}
    names = [f"answer {i + 1}\n{'right' if reward else 'wrong'}"
             for i, reward in enumerate(rewards)]
    colours = [BLUE if reward else ORANGE for reward in rewards]
    hatches = ["" if reward else "//" for reward in rewards]
    for axis, (title, weights) in zip(axes, methods.items()):
        bars = axis.bar(names, weights, color=colours, hatch=hatches, edgecolor="white")
        axis.bar_label(bars, [f"{weight:g}" for weight in weights])
        axis.set(title=title, ylabel="weight in the gradient", ylim=(0, 1.2 * k))
    return figure


def sort_diff_cumsum(rewards=(0.1, 0.5, 0.2, 1.0), k: int = 2) -> Figure:
    """How the Max@k weight adds up over the sorted rewards.

    Each step between neighbours counts times the chance to be above all rivals.
    """
    figure, axis = new()
    ascending = torch.tensor(sorted(rewards), dtype=torch.float64)  # (n,)
    weights = rspo.max_at_k_weights(ascending, k)  # (n,)
    zero = torch.zeros(1, dtype=torch.float64)
    steps = ascending.diff(prepend=zero)  # (n,)  r_(j+1) - r_(j)
    gains = weights.diff(prepend=zero)  # (n,)  k * step * s_j
    chances = gains / (k * steps)  # (n,)  s_j
    for i, reward in enumerate(ascending.tolist()):
        axis.bar(i, reward, color=GREY, alpha=0.25, width=0.8)
        axis.bar(i, steps[i], bottom=reward - steps[i].item(), color=BLUE, width=0.8)
        note = {"xy": (i, reward), "textcoords": "offset points", "ha": "center"}
        axis.annotate(f"+{k} * {steps[i]:.1f} * {chances[i]:.2f}", xytext=(0, 18), fontsize=9,
                      **note)
        axis.annotate(f"W = {weights[i]:.2f}", xytext=(0, 5), weight="bold", **note)
    axis.set(title=f"Max@{k}: sort, take the steps (blue), weigh each by the chance that all\n"
                   "rivals lie below it, add up from the left",
             xlabel="answers, sorted by reward", ylabel="reward", xticks=range(len(rewards)),
             xticklabels=[f"r = {reward:g}" for reward in ascending.tolist()],
             ylim=(0, 1.25 * max(rewards)))
    return figure


def main() -> None:
    folder = Path(__file__).resolve().parent
    drawings = {"weight": weight_by_success_rate, "credit": who_gets_the_credit,
                "steps": sort_diff_cumsum}
    for name, draw in drawings.items():
        draw().savefig(folder / f"{name}.png", dpi=130)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
