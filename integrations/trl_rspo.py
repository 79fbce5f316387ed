"""RSPO's weights in TRL's GRPOTrainer (tested with 1.16).

    trainer = RSPOTrainer(..., k=8, objective="passk")  # data and rewards of your own

    accelerate launch --num_processes 8 integrations/trl_rspo.py \\
        --model Qwen/Qwen2.5-Math-7B --data math --k 8 --num_generations 16 \\
        --loss_type luspo --scale_rewards none --output_dir runs/trl ...

All of the command is in docs/scaling.md. TRL offers no hook for advantages, so
one method is overridden: TRL samples, grades and computes what it does, and the
weights of the very same rewards take the place of its advantages. (Weights
handed to TRL as rewards would be biased: it subtracts the group's mean.)
Settings that would bias the gradient are refused before training.

Shapes: B samples of this process, G = P n samples of all processes, in order of
processes, the n of a prompt in a row.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from trl import GRPOConfig, GRPOTrainer, TrlParser
except ImportError as error:
    raise ImportError(
        f"integrations/trl_rspo.py needs TRL, which cannot be imported ({error}): "
        "make test-integrations makes an environment with it") from error

import rspo
from integrations import OBJECTIVES

FULL = "samples must come from the whole softmax at the temperature"
SUMS = "other losses divide by lengths, which favours short right answers"
KEEPS = "it drops samples or tokens whose weights were computed with them"
RAW = "dividing by a standard deviation turns RSPO at any k back into GRPO"
ONCE = "a second update on the same samples is clipped and not on-policy"
# setting of GRPOConfig: (values that are right, why). luspo's gradient is ours.
# dr_grpo's is ours divided by max_completion_length: max_grad_norm sees that.
NEEDED = {
    "loss_type": (("luspo", "dr_grpo"), SUMS),
    "importance_sampling_level": (("token",), SUMS),
    "scale_rewards": (("none",), RAW),
    "multi_objective_aggregation": (("sum_then_normalize",), RAW),
    "top_k": ((0,), FULL),
    "top_p": ((1.0,), FULL),
    "min_p": ((None, 0.0), FULL),
    "repetition_penalty": ((1.0,), FULL),
    "generation_kwargs": ((None, {}), FULL),
    "vllm_structured_outputs_regex": ((None,), FULL),
    "mask_truncated_completions": ((False,), KEEPS),
    "off_policy_mask_threshold": ((None,), KEEPS),
    "top_entropy_quantile": ((1.0,), KEEPS),
    "num_iterations": ((1,), ONCE),
}


def check_settings(args: GRPOConfig, k: int, objective: str = "passk") -> None:
    """Raise ValueError, with the value to take, for settings that would bias the gradient."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}, but must be one of {', '.join(OBJECTIVES)}")
    for name, (right, why) in NEEDED.items():
        value = getattr(args, name)
        if value not in right:
            raise ValueError(f"{name} is {value!r}, but must be {right[0]!r}: {why}")
    mode = args.vllm_importance_sampling_mode
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    if corrected and mode != "token_truncate":
        raise ValueError(
            f"vllm_importance_sampling_mode is {mode!r}, but must be 'token_truncate': "
            "a cut by whole answers drops the long rare ones, which matter most")
    steps, each = args.gradient_accumulation_steps, args.steps_per_generation
    if steps % each:
        raise ValueError(
            f"steps_per_generation is {each}, but must divide "
            f"gradient_accumulation_steps ({steps}): {ONCE}")
    # the weights themselves know which k they take
    rspo.OBJECTIVES[objective]([0.0] * args.num_generations, k)


class RSPOTrainer(GRPOTrainer):
    """GRPOTrainer that trains for the best of k answers.

    k: 1 to args.num_generations.
    objective: "passk" (rewards 0 or 1), "maxk" (any), "loo" or "groupmax".
    The rest is GRPOTrainer's. Logs pass@k (or max@k) of the training rewards.
    Raises ValueError for what `check_settings` refuses.
    """

    def __init__(self, model, reward_funcs, args: GRPOConfig, *rest, k: int,
                 objective: str = "passk", **others):
        check_settings(args, k, objective)
        self.k, self.objective = k, objective
        super().__init__(model, reward_funcs, args, *rest, **others)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                raise ValueError(
                    f"{name} has dropout {module.p}, but must have 0: what is sampled "
                    "is learned; set lora_dropout to 0 or disable_dropout to True")

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)      # (G, functions)
        self.step_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        weights = self.weights_of(self.step_rewards)               # (G,)
        begin = self.accelerator.process_index * len(inputs)
        own = weights[begin:begin + len(inputs)]                   # (B,)
        output["advantages"] = own.to(output["advantages"])
        # behind TRL's own, which fall out
        self._logs["advantages"].extend(weights.tolist())
        return output

    def weights_of(self, rewards_per_function: Tensor) -> Tensor:
        """RSPO weights (G,) of rewards (G, functions), NaN where there is none.

        Raises ValueError for a sample without any.
        """
        if rewards_per_function.isnan().all(1).any():
            raise ValueError(
                "every reward function returned None for one sample, but RSPO needs a "
                "reward of each: return 0.0 for it")
        share = self.reward_weights.to(rewards_per_function)       # (functions,)
        rewards = (rewards_per_function * share).nansum(1)         # (G,)
        groups = rewards.unflatten(0, (-1, self.num_generations))  # (P, n)
        weights = rspo.OBJECTIVES[self.objective](groups, self.k)  # (P, n)
        name = f"{'pass' if self.objective == 'passk' else 'max'}@{self.k}"
        best = rspo.max_at_k(groups, self.k).mean().item()
        self._metrics["train"][name].append(best)
        return weights.flatten()                                   # (G,)


# ------------------------------------------------ as a script: lib/tasks.py's data

@dataclass
class Task:
    model: str = field(metadata={"help": "hub id or folder of the base model"})
    k: int = field(metadata={"help": "train for the best of k answers"})
    data: str = field(default="math", metadata={"help": "data set (train.py --data)"})
    objective: str = field(default="passk", metadata={"help": ", ".join(OBJECTIVES)})
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "its scale times the rank"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the base model"})


def main() -> None:
    import datasets
    from peft import LoraConfig

    import sample
    from lib import policy, run, tasks

    task, args = TrlParser((Task, GRPOConfig)).parse_args_and_config()
    check_settings(args, task.k, task.objective)
    base, adapter = run.resolve_model(task.model)
    if adapter:
        raise ValueError(f"--model {task.model} is an adapter, but must be a base model")
    model, tokenizer = policy.load_model(base, dtype=task.dtype)
    stops = sample.stop_ids(model, tokenizer)
    model.generation_config.eos_token_id = stops
    problems = tasks.train_and_eval(task.data, None, None)[0]
    rows = [{"prompt": tasks.render(problem, tokenizer), "problem": i}
            for i, problem in enumerate(problems)]

    def correct(completions, completion_ids, problem, **unused):
        answers = [[SimpleNamespace(text=text, finished=bool(ids) and ids[-1] in stops)]
                   for text, ids in zip(completions, completion_ids)]
        rewards, _ = tasks.grade_all([problems[i] for i in problem], answers)
        return [reward for [reward] in rewards]

    lora = LoraConfig(
        r=task.lora_rank, lora_alpha=task.lora_alpha, lora_dropout=0.0,
        target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = RSPOTrainer(
        model, correct, args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=lora,
        k=task.k, objective=task.objective)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        sys.exit(f"trl_rspo.py: {problem}")
