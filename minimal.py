"""RSPO on one page: train the embedded toy model for the best of k answers.

    python minimal.py 8        k = 8: a minute on a laptop; compare k = 1

Asked "19307:", the toy should write a divisor of 19307, "43$".

Shapes: P prompts, n answers of each, T tokens so far, A tokens of an answer.
"""

import math
import random
import sys

import torch
from transformers import AutoModelForCausalLM

P, N, A, STEPS, LR = 16, 32, 6, 40, 5e-4
ODD_BELOW_100 = math.prod(range(3, 100, 2))
VOCABULARY = "_$0123456789:"  # a token is a character; "$" ends an answer


def weights(rewards, k):
    """k times the chance that k - 1 of the others are all wrong, if right: (P, n) -> (P, n)."""
    n, right = rewards.shape[1], rewards.sum(-1, keepdim=True).long()  # (P, 1)  c
    missed = [math.comb(n - c, k - 1) / math.comb(n - 1, k - 1) for c in range(n + 1)]
    return k * torch.tensor(missed)[right] * rewards  # (P, n)


@torch.no_grad()
def sample(model, numbers, n):
    """Tokens of n answers to each prompt, prompt included: (P n, T)."""
    prompts = [[VOCABULARY.index(char) for char in f"{number}:"] for number in numbers]
    ids = torch.tensor(prompts).repeat_interleave(n, 0)  # (P n, T)
    for _ in range(A):
        ids = torch.cat([ids, model(ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
    return ids


def grade(numbers, ids):
    """1 where an answer is a divisor, neither 1 nor the number itself: (P, n)."""
    rewards = torch.zeros(len(ids))  # (P n,)
    for i, row in enumerate(ids[:, -A:].tolist()):
        text, *ended = "".join(VOCABULARY[token] for token in row).split("$")
        number = numbers[i * len(numbers) // len(ids)]
        if ended and text.isdigit() and text[0] != "0" and 1 < int(text) < number:
            rewards[i] = number % int(text) == 0
    return rewards.view(len(numbers), -1)


def loss(model, ids, weights):
    """-(1/n) sum_i W_i log pi(y_i), mean over prompts. Its gradient is the method."""
    answers, logits = ids[:, -A:], model(ids).logits[:, -A - 1:-1]  # (P n, A), (P n, A, V)
    logp = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]  # (P n, A)
    ends = (answers == VOCABULARY.index("$")).long()  # (P n, A)
    written = ends.cumsum(-1) - ends == 0  # (P n, A)  up to the first end, included
    return -(weights.flatten() * (logp * written).sum(-1)).mean()


def main(k):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # too small to share
    model = AutoModelForCausalLM.from_pretrained(f"{sys.path[0]}/toy")
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    numbers = [m for m in range(10001, 100000, 2) if m % 5 and math.gcd(m, ODD_BELOW_100) > 1]
    random.Random(0).shuffle(numbers)
    for step in range(STEPS + 1):
        if step in (0, STEPS):  # on numbers that are not trained on
            wrong = N - grade(numbers[-400:], sample(model, numbers[-400:], N)).sum(-1).int()
            best = [1 - sum(math.comb(c, j) / math.comb(N, j) for c in wrong) / 400 for j in (1, 8)]
            print(f"step {step:2d}: pass@1 {best[0]:.3f}, pass@8 {best[1]:.3f}")
        batch = numbers[step * P:(step + 1) * P]
        ids = sample(model, batch, N)
        optimizer.zero_grad()
        loss(model, ids, weights(grade(batch, ids), k)).backward()
        optimizer.step()


if __name__ == "__main__":
    k = sys.argv[1] if sys.argv[1:] else "8"
    main(int(k)) if k in map(str, range(1, N + 1)) else sys.exit(f"k is {k}, but must be 1 to {N}")
