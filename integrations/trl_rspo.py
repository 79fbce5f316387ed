"""RSPO's weights in TRL's GRPOTrainer (tested with 1.16): RSPOTrainer(..., k=8, objective="passk") is a GRPOTrainer with other advantages.

    accelerate launch --num_processes 8 integrations/trl_rspo.py --model Qwen/Qwen2.5-Math-7B --data math --k 8 \\
        --output_dir runs/trl --num_generations 16 --loss_type luspo --scale_rewards none ...       (all of it: docs/scaling.md)

TRL offers no hook for advantages, so one method is overridden: it lets TRL sample, grade and compute what it does, and
puts the weights of the very same rewards in the place of its advantages. Weights handed to TRL as rewards would be
biased: TRL subtracts the group's mean. Settings that would bias the gradient in other ways are refused before training.

Shapes: B samples of this process, G = P * n samples of all processes, in order of processes, the n of a prompt in a row.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from trl import GRPOConfig, GRPOTrainer, TrlParser
except ImportError as error:
    raise ImportError(f"integrations/trl_rspo.py needs TRL, which cannot be imported ({error}): pip install trl==1.16.0 in an "
                      "environment of its own (make test-integrations makes one)") from error

import rspo
from integrations import check_method, weigh

FULL = "samples must come from the whole softmax at the temperature, or the gradient is another distribution's"
SUMS = "an answer's log-probability is the sum over its tokens: other losses divide by lengths, which favours short right answers"
KEEPS = "it drops samples or tokens whose weights were computed with them"
RAW = "dividing by a standard deviation turns RSPO at any k back into GRPO"
# setting of GRPOConfig: (values that are right, the first of them to be taken; why). With luspo the gradient is ours; with
# dr_grpo it is ours divided by max_completion_length, which Adam does not see, but max_grad_norm does.
NEEDED = {
    "loss_type": (("luspo", "dr_grpo"), SUMS),
    "importance_sampling_level": (("token",), SUMS),
    "scale_rewards": (("none",), RAW),
    "multi_objective_aggregation": (("sum_then_normalize",), RAW),
    "top_k": ((0,), FULL), "top_p": ((1.0,), FULL), "min_p": ((None, 0.0), FULL), "repetition_penalty": ((1.0,), FULL),
    "generation_kwargs": ((None, {}), FULL), "vllm_structured_outputs_regex": ((None,), FULL),
    "mask_truncated_completions": ((False,), KEEPS),
    "off_policy_mask_threshold": ((None,), KEEPS),
    "top_entropy_quantile": ((1.0,), KEEPS),
    "num_iterations": ((1,), "a second update on the same samples is clipped, and no longer on-policy"),
}


def check_settings(args: GRPOConfig, k: int) -> None:
    """Raise ValueError, in a sentence with the value to take, for settings that would bias the gradient."""
    for name, (right, why) in NEEDED.items():
        value = getattr(args, name)
        if value not in right:
            raise ValueError(f"{name} is {value!r}, but must be {right[0]!r}: {why}")
    if args.use_vllm and args.vllm_importance_sampling_correction and args.vllm_importance_sampling_mode != "token_truncate":
        raise ValueError(f"vllm_importance_sampling_mode is {args.vllm_importance_sampling_mode!r}, but must be 'token_truncate': a cut by whole "
                         "answers drops the long rare ones, which the best of k lives on")
    if args.gradient_accumulation_steps % args.steps_per_generation:
        raise ValueError(f"steps_per_generation is {args.steps_per_generation}, but must divide gradient_accumulation_steps "
                         f"({args.gradient_accumulation_steps}): later updates on the same samples are clipped, and no longer on-policy")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= args.num_generations:
        raise ValueError(f"k is {k!r}, but must be a whole number with 1 <= k <= num_generations = {args.num_generations}")


class RSPOTrainer(GRPOTrainer):
    """GRPOTrainer that trains for the best of k answers.

    k: 1 to args.num_generations; objective: "passk" (rewards 0 or 1), "maxk" (any) or "groupmax"; baseline: "none" or "loo".
    The rest is GRPOTrainer's. Logs pass@k (or max@k) of the training rewards. Raises ValueError for what `check_settings` refuses.
    """

    def __init__(self, model, reward_funcs, args: GRPOConfig, *rest, k: int, objective: str = "passk", baseline: str = "none", **others):
        check_method(objective, baseline)
        check_settings(args, k)
        self.k, self.objective, self.baseline = k, objective, baseline
        super().__init__(model, reward_funcs, args, *rest, **others)
        active = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
        if active:
            raise ValueError(f"{active[0]} has dropout {self.model.get_submodule(active[0]).p}, but must have 0: what is sampled is what is "
                             "learned; set lora_dropout to 0 or disable_dropout to True")

    def _calculate_rewards(self, *args, **kwargs):
        self.step_rewards = super()._calculate_rewards(*args, **kwargs)                    # (G, reward functions), all processes'
        return self.step_rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        weights = self.weights_of(self.step_rewards)                                       # (G,)
        begin, count = self.accelerator.process_index * len(inputs), len(inputs)
        output["advantages"] = weights[begin:begin + count].to(output["advantages"])       # (B,)
        self._logs["advantages"].extend(weights.tolist())                                  # behind TRL's own, which fall out
        return output

    def weights_of(self, rewards_per_function: torch.Tensor) -> torch.Tensor:
        """RSPO weights (G,) of rewards (G, reward functions), nan where a function gave none. ValueError for a sample without any."""
        if rewards_per_function.isnan().all(1).any():
            raise ValueError("every reward function returned None for one sample, but RSPO needs a reward of each: return 0.0 for it")
        rewards = (rewards_per_function * self.reward_weights.to(rewards_per_function)).nansum(1)             # (G,)
        groups = rewards.unflatten(0, (-1, self.num_generations))                          # (P, n)
        name = f"{'pass' if self.objective == 'passk' else 'max'}@{self.k}"
        self._metrics["train"][name].append(rspo.max_at_k(groups, self.k).mean().item())
        return weigh(groups, self.k, self.objective, self.baseline).flatten()              # (G,)


# ---------------------------------------------------------------- as a script: the problems and grader of tasks.py

@dataclass
class Task:
    model: str = field(metadata={"help": "hub id or folder of the base model"})
    k: int = field(metadata={"help": "train for the best of k answers"})
    data: str = field(default="math", metadata={"help": "data set of tasks.py (train.py --data)"})
    objective: str = field(default="passk", metadata={"help": "passk, maxk or groupmax"})
    baseline: str = field(default="none", metadata={"help": "none or loo"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapter is alpha / rank"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the frozen base model"})


def main() -> None:
    import datasets
    from peft import LoraConfig

    import policy
    import sample
    import tasks

    task, args = TrlParser((Task, GRPOConfig)).parse_args_and_config()
    model, tokenizer = policy.load_model(task.model, task.dtype)
    stops = model.generation_config.eos_token_id = sample.stop_ids(model.generation_config, tokenizer)
    problems = tasks.train_and_eval(task.data, None, None)[0]
    rows = [{"prompt": tasks.render(problem, tokenizer), "problem": i} for i, problem in enumerate(problems)]

    def correct(completions, completion_ids, problem, **unused):
        answers = [[(text, bool(ids) and ids[-1] in stops)] for text, ids in zip(completions, completion_ids)]
        return [grade for [grade] in tasks.grade_all([problems[i] for i in problem], answers)]

    adapter = LoraConfig(r=task.lora_rank, lora_alpha=task.lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = RSPOTrainer(model, correct, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                          peft_config=adapter, k=task.k, objective=task.objective, baseline=task.baseline)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        sys.exit(f"trl_rspo.py: {problem}")
