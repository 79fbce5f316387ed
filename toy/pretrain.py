"""Make the embedded toy model: a Qwen2 of 215,000 parameters that guesses divisors.

    python toy/pretrain.py                           rewrites toy/ in half a minute
    python toy/pretrain.py --seed 1 --out runs/toy1  another base, for experiments

Find a divisor: `19307:` is answered by `43`, or any other d with 1 < d < 19307 that
divides it. The model is shown random right answers to the training numbers only
(`divisor:train`), of any size. So it learns how answers look and how often each
divisor occurs, and not to divide. It is right about one time in twelve.

Shapes: B answers per step, T tokens of the longest, V vocabulary.
"""

import argparse
import math
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

VOCABULARY = ["<pad>", "<eos>", *"0123456789", ":"]
STEPS, BATCH, LR = 250, 192, 4e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="<eos>", model_max_length=32)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    # Behind the last norm a hidden state has a fixed length, and LoRA leaves norm and head
    # alone. Begun at 1 that length lets no token be likelier than .6, whatever LoRA learns.
    torch.nn.init.constant_(model.model.norm.weight, 8.0)
    return model


def divisors(number: int) -> list[str]:
    """All but 1 and the number itself."""
    low = [d for d in range(2, math.isqrt(number) + 1) if number % d == 0]
    return [str(d) for d in sorted({*low, *(number // d for d in low)})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: toy/)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    problems = tasks.load_problems("divisor:train")
    answers = [divisors(int(p.answer)) for p in problems]

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    # warmed up over a tenth of the steps, then decayed
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    start = time.time()
    for step in range(1, STEPS + 1):
        chosen = [rng.randrange(len(problems)) for _ in range(BATCH)]
        texts = [problems[i].question + rng.choice(answers[i]) + "<eos>" for i in chosen]
        ids = tokenizer(texts, padding=True, return_tensors="pt")
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)  # (B, T)
        labels[:, :len(problems[0].question)] = -100  # learn the answer only
        loss = model(**ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.time() - start
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}; measure it with: python evaluate.py --model {args.out}")


if __name__ == "__main__":
    main()
