"""Make the embedded toy model: a 0.2 M-parameter Qwen2 that plays Countdown, a little.

    python toy/pretrain.py        rewrites toy/*.json and toy/model.safetensors in half a minute

Countdown: four numbers and a target, `2357=22:`. The answer uses each number once, with + - *:
`3*5+7-2`. The model is trained on random right answers to the training problems only
(`countdown:train`; the held-out problems are a tenth, split off by hash). It is stopped early on
purpose: it writes valid expressions that hit the target about one time in eight, so that
reinforcement learning has something to do.

Shapes: B answers per step, T tokens of the longest.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lib import tasks

VOCABULARY = ["<pad>", "<eos>", *"0123456789", *"+-*=:"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="<eos>", model_max_length=32)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=350, help="optimizer steps (default 350)")
    add("--batch", type=int, default=256, help="answers per step (default 256)")
    add("--lr", type=float, default=4e-3, help="highest learning rate (default 4e-3)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=HERE, help="folder to write (default: toy/)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    solutions = tasks.countdown_solutions()
    problems = tasks.load_problems("countdown:train")
    games = [p.answer.split("=") for p in problems]
    answers = [solutions[numbers, int(target)] for numbers, target in games]

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    # warmed up over a tenth of the steps, then decayed
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps,
                                                   pct_start=0.1)
    start = time.time()
    for step in range(1, args.steps + 1):
        chosen = [rng.randrange(len(problems)) for _ in range(args.batch)]
        texts = [problems[i].question + rng.choice(answers[i]) + tokenizer.eos_token
                 for i in chosen]
        ids = tokenizer(texts, padding=True, return_tensors="pt")
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)  # (B, T)
        for row, i in enumerate(chosen):
            labels[row, :len(problems[i].question)] = -100  # learn the answer only
        loss = model(**ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.time() - start
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}; measure it with: python evaluate.py --model {args.out}")


if __name__ == "__main__":
    main()
