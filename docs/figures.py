"""The figures of the lesson, each drawn from the project's own functions. Shown in walkthrough.ipynb; as a script, PNGs:

    python docs/figures.py        writes weight.png, credit.png and steps.png beside this file
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rspo

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
LOOKS = (("#555555", "-", "s"), (BLUE, "-", "o"), (ORANGE, "-.", "^"), ("#009e73", ":", "v"))


def weight_by_success_rate(axis, ks=(1, 2, 4, 8), n: int = 64) -> None:
    """Weight of a right answer over the prompt's success rate: a line is k (1 - w)^(k-1), a marker rspo.py's at c/n."""
    rates = torch.linspace(0, 1, 200)
    right = torch.arange(1, n + 1, 4)                                           # (C,)  counts c
    groups = (torch.arange(n) < right[:, None]).double()                        # (C, n)
    for k, (colour, dashes, marker) in zip(ks, LOOKS):
        axis.plot(rates, k * (1 - rates) ** (k - 1), dashes, color=colour, label=f"k = {k}")
        axis.plot(right / n, rspo.pass_at_k_weights(groups, k)[:, 0], marker, color=colour, markersize=4)
    axis.set(title=f"A right answer counts where right answers are rare (markers: n = {n})",
             xlabel="success rate w of the prompt", ylabel="weight of a right answer")
    axis.grid(alpha=0.3)
    axis.legend()


def who_gets_the_credit(axes, rewards=(0, 1, 0, 0), k: int = 4) -> None:
    """Weights of one group of k: the group maximum's and RSPO's (with four wrong answers more, so that n = 2k)."""
    group = torch.tensor(rewards, dtype=torch.float64)                          # (k,)
    everyone = torch.cat([group, torch.zeros(k)])                               # (2k,)
    methods = {"Group maximum: three hitchhikers": rspo.group_max_weights(everyone, k)[:k],
               "RSPO: who earned it": rspo.pass_at_k_weights(everyone, k)[:k]}
    names = [f"answer {i + 1}\n{'right' if reward else 'wrong'}" for i, reward in enumerate(rewards)]
    for axis, (title, weights) in zip(axes, methods.items()):
        bars = axis.bar(names, weights, color=[BLUE if reward else ORANGE for reward in rewards],
                        hatch=["" if reward else "//" for reward in rewards], edgecolor="white")
        axis.bar_label(bars, [f"{weight:g}" for weight in weights])
        axis.set(title=title, ylabel="weight in the gradient", ylim=(0, 1.2 * k))


def sort_diff_cumsum(axis, rewards=(0.1, 0.5, 0.2, 1.0), k: int = 2) -> None:
    """How the Max@k weight adds up: each step between neighbours in the sorted rewards, times the chance to be over all rivals."""
    ascending = torch.tensor(sorted(rewards), dtype=torch.float64)              # (n,)
    weights = rspo.max_at_k_weights(ascending, k)                               # (n,)
    steps = ascending.diff(prepend=torch.zeros(1, dtype=torch.float64))         # (n,)  r_(j+1) - r_(j)
    gains = weights.diff(prepend=torch.zeros(1, dtype=torch.float64))           # (n,)  k * step * s_j
    for i, reward in enumerate(ascending.tolist()):
        axis.bar(i, reward, color=GREY, alpha=0.25, width=0.8)
        axis.bar(i, steps[i], bottom=reward - steps[i].item(), color=BLUE, width=0.8)
        axis.annotate(f"+{k} * {steps[i]:.1f} * {gains[i] / (k * steps[i]):.2f}", (i, reward), xytext=(0, 18),
                      textcoords="offset points", ha="center", fontsize=9)
        axis.annotate(f"W = {weights[i]:.2f}", (i, reward), xytext=(0, 5), textcoords="offset points", ha="center", weight="bold")
    axis.set(title=f"Max@{k}: sort, take the steps (blue), weigh each by the chance that all\nrivals lie below it, add up from the left",
             xlabel="answers, sorted by reward", ylabel="reward", xticks=range(len(rewards)),
             xticklabels=[f"r = {reward:g}" for reward in ascending.tolist()], ylim=(0, 1.25 * max(rewards)))


def main() -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(__file__).resolve().parent
    for name, draw, columns in (("weight", weight_by_success_rate, 1), ("credit", who_gets_the_credit, 2), ("steps", sort_diff_cumsum, 1)):
        figure, axes = plt.subplots(1, columns, figsize=(7, 4), layout="constrained", sharey=True)
        draw(axes)
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
