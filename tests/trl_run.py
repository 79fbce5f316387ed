"""Not a test: a few real steps of integrations/trl_rspo.py on the toy, with all of it recorded.

    python tests/trl_run.py FOLDER JSON     or behind `accelerate launch`: test_trl.py runs both

Every sample, reward, advantage and parameter goes to FOLDER.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import TrainerCallback

from integrations.trl_rspo import GRPOConfig, RSPOTrainer
from lib import policy, run, tasks

torch.set_num_threads(1)
KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


class Recorder(RSPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        kept = {name: output[name].clone() for name in KEPT}
        kept["rewards"] = self.step_rewards.clone()
        kept["problem"] = torch.tensor([row["problem"] for row in inputs])
        step, rank = self.state.global_step, self.accelerator.process_index
        save_file(kept, self.folder / f"samples-{step}-{rank}.safetensors")
        return output


class Snapshot(TrainerCallback):
    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, args, state, control, model, **unused):
        if state.is_world_process_zero:
            adapter = get_peft_model_state_dict(model)
            save_file({name: value.clone() for name, value in adapter.items()},
                      self.folder / f"adapter-{state.global_step}.safetensors")

    on_train_begin = on_step_end = save


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    problems = tasks.load_problems(settings["data"])
    model, tokenizer = policy.load_model(str(run.TOY), dtype="float32", device="cpu")

    def reward(completions, completion_ids, problem, **unused):
        answers = [[SimpleNamespace(text=text, finished=ids[-1] == tokenizer.eos_token_id)]
                   for text, ids in zip(completions, completion_ids)]
        rewards, _ = tasks.grade_all([problems[i] for i in problem], answers)
        return [value for [value] in rewards]

    args = GRPOConfig(
        output_dir=str(folder), num_generations=settings["n"],
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=settings["accumulate"], max_steps=settings["steps"],
        max_completion_length=12, learning_rate=1e-3, lr_scheduler_type="constant",
        adam_beta2=0.95, max_grad_norm=0.1, loss_type="luspo", scale_rewards="none", seed=0,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True)
    rows = [{"prompt": p.question, "problem": i} for i, p in enumerate(problems)]
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    trainer = Recorder(
        model, reward, args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Snapshot(folder)], k=settings["k"],
        objective=settings["objective"], peft_config=lora)
    trainer.folder = folder
    trainer.train()
    trainer.save_model(str(folder / "final"))
    if trainer.accelerator.is_main_process:
        log = {"processes": trainer.accelerator.num_processes, "rows": trainer.state.log_history,
               "advantages": list(trainer._logs["advantages"])}
        (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # All is written. gloo's thread may want Python while Python ends: it aborts or waits for ever.
    os._exit(0)
