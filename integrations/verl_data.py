"""The problems and the grader of lib/tasks.py in verl's form. Runs in verl's environment.

    python integrations/verl_data.py math Qwen/Qwen2.5-Math-7B runs/verl
        writes train.parquet and test.parquet
    python integrations/verl_data.py --base Qwen/Qwen2.5-Math-7B runs/merged/lora_adapter
        completes an adapter that verl merged

and to verl: reward.custom_reward_function.path=integrations/verl_data.py
Needs pandas and transformers, which come with verl, and math-verify.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import tasks
from lib.cli import UserError


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info=None,
                  **unused) -> float:
    """verl's custom reward function: 1.0 if the last box of an answer is right, else 0.0.

    verl does not tell it whether the answer was cut off: a box before the cut still counts,
    unlike in train.py.
    """
    return tasks.grade(solution_str, ground_truth)


def write_parquet(data: str, model: str, out: Path) -> None:
    """Training and held-out problems of a data set as train.parquet and test.parquet.

    The prompt is the user's turn that tasks.render writes with this model's chat template.
    Raises UserError for data that is not mathematics.
    """
    import pandas
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template:
        raise UserError(f"model {model} has no chat template, which verl needs; take an "
                        "instruction-tuned model")
    nothing = [{"role": "user", "content": ""}]
    asked = "\\boxed" in tokenizer.apply_chat_template(nothing, tokenize=False)
    ending = "" if asked else f"\n{tasks.INSTRUCTION}"
    out.mkdir(parents=True, exist_ok=True)
    for name, problems in zip(("train", "test"), tasks.train_and_eval(data, None, None)):
        if any(p.task != "math" or p.prompt is not None for p in problems):
            raise UserError(f"data set {data!r} is not mathematics in plain questions, which is "
                            "all that is written for verl")
        rows = [{"data_source": data,
                 "prompt": [{"role": "user", "content": p.question + ending}],
                 "reward_model": {"style": "rule", "ground_truth": p.answer},
                 "extra_info": {"id": p.id}} for p in problems]
        pandas.DataFrame(rows).to_parquet(out / f"{name}.parquet")
        print(f"wrote {len(rows)} problems to {out / name}.parquet")


def name_base(model: str, adapter: Path) -> None:
    """Write the base model into adapter_config.json.

    verl's merger leaves it out, and evaluate.py looks for it there.
    """
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{adapter} is no adapter folder: it has no adapter_config.json")
    config = {**json.loads(path.read_text()), "base_model_name_or_path": model}
    path.write_text(json.dumps(config, indent=1) + "\n")
    print(f"{adapter} is now an adapter of {model}")


def main(words: list[str]) -> None:
    if len(words) != 3:
        raise UserError("usage: python integrations/verl_data.py DATA MODEL FOLDER, such as: math "
                        "Qwen/Qwen2.5-Math-7B runs/verl, or: --base MODEL ADAPTER")
    if words[0] == "--base":
        name_base(words[1], Path(words[2]))
    else:
        write_parquet(words[0], words[1], Path(words[2]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"verl_data.py: {error}")
