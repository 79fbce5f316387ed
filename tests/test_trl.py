"""Proves, with the real TRL, that integrations/trl_rspo.py trains by rspo.py's weights alone.

Three steps of GRPOTrainer on the toy are recorded (trl_run.py), on one process and on two. The
rewards are graded again, the advantages held against rspo.py on the rewards of all processes, and
our own learner, from the same adapter on the same samples, must arrive at the same parameters.
Every setting that would bias the gradient is refused. Skipped where TRL is missing (`make
test-integrations`).
"""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from conftest import ROOT

trl = pytest.importorskip("trl", reason="TRL is not installed; make test-integrations has it")

import rspo
from integrations import trl_rspo
from lib import policy, tasks
from lib.run import TOY
from sample import Rollout

ONE = {"n": 8, "rows": 16, "accumulate": 2, "steps": 3, "k": 3, "objective": "passk",
       "data": "divisor"}
# Six rows a process and groups of four: the middle group lies on both processes.
TWO = {"n": 4, "rows": 6, "accumulate": 1, "steps": 3, "k": 2, "objective": "loo",
       "data": "divisor-graded"}
WEIGHTS = {"passk": rspo.pass_at_k_weights, "loo": rspo.leave_one_out_weights}


def run(folder: Path, settings: dict, processes: int) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable]
    if processes == 2:
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu",
                    "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                    "--dynamo_backend", "no", "--main_process_port", port]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/trl_run.py"), str(folder), json.dumps(settings)],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module", params=[(ONE, 1), (TWO, 2)], ids=["one process", "two processes"])
def recorded(request, tmp_path_factory):
    settings, processes = request.param
    return run(tmp_path_factory.mktemp("trl"), settings, processes), settings, processes


@pytest.fixture(scope="module")
def tokenizer():
    return load_toy()[1]


def load_toy():
    return policy.load_model(str(TOY), dtype="float32", device="cpu")


def samples(folder: Path, step: int, processes: int) -> dict:
    """What all processes recorded of a step, one behind the other, as lists of rows.

    Padding differs between processes; rewards are everyone's on each.
    """
    parts = [load_file(folder / f"samples-{step}-{rank}.safetensors") for rank in range(processes)]
    rewards = parts[0]["rewards"]
    assert all(torch.equal(part["rewards"], rewards) for part in parts)
    return {name: [row for part in parts for row in part[name]] for name in parts[0]} | {
        "rewards": rewards}


def rollouts(batch: dict, tokenizer) -> list[Rollout]:
    """They have no log-probabilities of the sampler: TRL does not keep them."""
    columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    made = []
    for prompt, prompt_mask, answer, mask in zip(*(batch[name] for name in columns)):
        ids = answer[mask.bool()].tolist()
        finished = ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[:-1] if finished else ids)
        made.append(Rollout(tuple(prompt[prompt_mask.bool()].tolist()), tuple(ids), (), text,
                            finished))
    return made


def scored(model, made: list[Rollout]) -> list[Rollout]:
    """The rollouts with the log-probabilities that this model gives them."""
    with torch.no_grad():
        logprobs, _ = policy.token_logprobs(model, made, 1.0)  # (N,)
    parts = logprobs.split([len(rollout.completion_ids) for rollout in made])
    return [replace(r, logprobs=tuple(part.tolist())) for r, part in zip(made, parts)]


def expected_weights(rewards: torch.Tensor, settings: dict) -> torch.Tensor:
    """Straight from rspo.py, by another way than the integration's."""
    groups = rewards.double().reshape(-1, settings["n"])
    return WEIGHTS[settings["objective"]](groups, settings["k"]).flatten()


def test_advantages_are_the_weights_of_the_gathered_rewards(recorded, tokenizer):
    folder, settings, processes = recorded
    problems, signal = tasks.load_problems(settings["data"]), 0
    for step in range(settings["steps"]):
        batch = samples(folder, step, processes)
        made = rollouts(batch, tokenizer)
        assert len(made) == settings["rows"] * settings["accumulate"] * processes
        asked = [problems[int(i)] for i in batch["problem"]]
        for problem, rollout in zip(asked, made):
            assert problem.question == tokenizer.decode(rollout.prompt_ids)
        graded, _ = tasks.grade_all(asked, [[rollout] for rollout in made])
        graded = torch.tensor(graded).double()
        assert torch.allclose(batch["rewards"].double(), graded, atol=1e-7)  # TRL's are float32
        groups = torch.stack(batch["problem"]).reshape(-1, settings["n"])
        assert (groups == groups[:, :1]).all()  # one prompt per group
        expected = expected_weights(batch["rewards"].flatten(), settings)
        advantages = torch.stack(batch["advantages"]).double()
        assert torch.allclose(advantages, expected, atol=1e-6)
        signal += bool((expected != 0).any())
    assert signal >= 2


def test_the_training_log_shows_pass_at_k_and_the_weights(recorded):
    folder, settings, processes = recorded
    log = json.loads((folder / "log.json").read_text())
    assert log["processes"] == processes
    name = "pass@3" if settings["objective"] == "passk" else "max@2"
    for step, row in enumerate(log["rows"][:settings["steps"]]):
        rewards = samples(folder, step, processes)["rewards"].reshape(-1, settings["n"])
        best = rspo.max_at_k(rewards, settings["k"]).mean().item()
        assert row[name] == pytest.approx(best, abs=1e-6)
    expected = expected_weights(rewards.flatten(), settings)
    assert log["advantages"] == pytest.approx(expected.tolist(), abs=1e-6)


def make_learner(start: Path) -> policy.Learner:
    model = policy.add_lora(load_toy()[0], 8, seed=0)
    set_peft_model_state_dict(model, load_file(start))
    return policy.Learner(model, 1e-3, 1.0, 16384)


def test_our_learner_arrives_at_the_same_parameters(recorded, tokenizer, monkeypatch):
    """From the same adapter, on the same samples, it is TRL's after each step, to rounding."""
    folder, settings, processes = recorded
    monkeypatch.setattr(policy, "MAX_GRAD_NORM", 0.1)  # as in trl_run.py
    learner = make_learner(folder / "adapter-0.safetensors")
    log = json.loads((folder / "log.json").read_text())["rows"]
    for step in range(settings["steps"]):
        batch = samples(folder, step, processes)
        weights = expected_weights(batch["rewards"].flatten(), settings)
        stats = learner.update(scored(learner.model, rollouts(batch, tokenizer)), weights)
        assert stats["grad_norm"] == pytest.approx(log[step]["grad_norm"], rel=1e-5)
        assert stats["grad_norm"] > 0.1  # clipped, both at the same norm
        gap, moved = distance(learner.model, folder, step)
        print(f"{processes} process(es), step {step + 1}: largest gap of a parameter {gap:.1e}, "
              f"of {moved:.1e} moved")
        assert moved > 5e-4 and gap < 1e-5


def distance(model, folder: Path, step: int) -> tuple[float, float]:
    """Largest gap of a parameter between our model and TRL's, and how far TRL's moved."""
    ours = get_peft_model_state_dict(model)
    before, after = (load_file(folder / f"adapter-{i}.safetensors") for i in (step, step + 1))
    assert ours.keys() == after.keys()
    return (max((ours[name] - after[name]).abs().max().item() for name in after),
            max((before[name] - after[name]).abs().max().item() for name in after))


def test_the_adapter_comes_back_to_evaluate(recorded, tokenizer):
    """What TRL saved is what --model takes: its log-probabilities are the recorded adapter's."""
    folder, settings, processes = recorded
    config = json.loads((folder / "final/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == TOY
    back, _ = policy.load_model(str(TOY), folder / "final", "float32", "cpu")
    made = rollouts(samples(folder, 0, processes), tokenizer)[:4]
    trained = make_learner(folder / f"adapter-{settings['steps']}.safetensors").model
    untrained = make_learner(folder / "adapter-0.safetensors").model
    with torch.no_grad():
        ours, theirs, first = (policy.token_logprobs(model, made, 1.0)[0]
                               for model in (back, trained, untrained))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(ours, first, atol=1e-3)
    done = subprocess.run([sys.executable, "evaluate.py", "--model", str(folder / "final"),
                           "--n", "4", "--limit", "5", "--out", str(folder / "final.png")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "pass@4" in done.stdout + done.stderr, done.stderr[-2000:]


# ---------------------------------------------------------------- what is refused

def config(**settings):
    return trl.GRPOConfig(**{
        "output_dir": "unused", "num_generations": 8, "per_device_train_batch_size": 16,
        "loss_type": "luspo", "scale_rewards": "none", "use_cpu": True, "bf16": False,
        "report_to": "none", **settings})


@pytest.mark.parametrize("settings", [
    {"scale_rewards": "group"}, {"scale_rewards": "batch"}, {"loss_type": "grpo"},
    {"loss_type": "dapo"}, {"loss_type": "bnpo"}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05},
    {"repetition_penalty": 1.1}, {"generation_kwargs": {"top_k": 20}},
    {"mask_truncated_completions": True}, {"off_policy_mask_threshold": 0.5},
    {"top_entropy_quantile": 0.2}, {"num_iterations": 2},
    {"importance_sampling_level": "sequence"},
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"vllm_structured_outputs_regex": "a+"}], ids=str)
def test_settings_that_bias_are_refused_with_the_value_to_take(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}, but must be ")):
        trl_rspo.check_settings(config(**settings), 4)


def test_sequence_masking_is_refused_where_it_acts():
    trl_rspo.check_settings(config(), 4)  # without vLLM it does nothing
    served = lambda mode: config(use_vllm=True, vllm_importance_sampling_mode=mode)
    for mode in ("sequence_mask", "sequence_truncate", "token_mask"):
        with pytest.raises(ValueError, match=f"vllm_importance_sampling_mode is '{mode}', but "
                                             "must be 'token_truncate'"):
            trl_rspo.check_settings(served(mode), 4)
    trl_rspo.check_settings(served("token_truncate"), 4)


def test_every_value_named_as_right_passes():
    for name, (right, _) in trl_rspo.NEEDED.items():
        for value in right:
            trl_rspo.check_settings(config(**{name: value}), 4)
    assert set(trl_rspo.NEEDED) <= {field.name for field in dataclasses.fields(trl.GRPOConfig)}


def test_off_policy_updates_are_refused():
    with pytest.raises(ValueError, match="steps_per_generation is 4, but must divide "
                                         r"gradient_accumulation_steps \(2\)"):
        trl_rspo.check_settings(config(steps_per_generation=4, gradient_accumulation_steps=2), 4)
    trl_rspo.check_settings(config(steps_per_generation=2, gradient_accumulation_steps=4), 4)


@pytest.mark.parametrize("objective, k, sentence", [
    *(("passk", k, f"k is {k!r}, but must be a whole number with 1 <= k <= n = 8")
      for k in (0, 9, 2.0, True)),
    ("loo", 8, "leave-one-out needs k <= n - 1"),
    ("groupmax", 3, "the group maximum needs n divisible by k = 3"),
    *((name, 4, f"objective is '{name}', but must be one of passk, maxk, loo, groupmax")
      for name in ("best", "grpo", "plugin"))])
def test_impossible_objectives_and_ks_are_refused(objective, k, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        trl_rspo.check_settings(config(), k, objective)


def trainer(reward, lora_dropout=0.0, k=4, objective="passk", **settings):
    import datasets
    from peft import LoraConfig
    model, tokenizer = load_toy()
    rows = [{"prompt": problem.question} for problem in tasks.load_problems("divisor")[:8]]
    lora = LoraConfig(r=2, lora_dropout=lora_dropout, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    return trl_rspo.RSPOTrainer(
        model, reward, config(max_completion_length=4, max_steps=1, **settings), k=k,
        objective=objective, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=lora)


def test_what_shows_only_later_is_refused_too(tmp_path):
    right = lambda completions, **unused: [1.0] * len(completions)
    half = lambda completions, **unused: [0.5] * len(completions)
    lost = lambda completions, **unused: [None, *[1.0] * (len(completions) - 1)]
    out = str(tmp_path)
    with pytest.raises(ValueError, match="has dropout 0.1, but must have 0"):
        trainer(right, lora_dropout=0.1, output_dir=out)
    with pytest.raises(ValueError, match="objective is 'best', but must be one of passk, maxk"):
        trainer(right, objective="best")
    with pytest.raises(ValueError, match="every reward function returned None for one sample"):
        trainer(lost, output_dir=out).train()
    with pytest.raises(ValueError, match="Pass@k needs 0 or 1"):
        trainer(half, output_dir=out).train()


def test_several_reward_functions_are_added_by_trls_weights(tmp_path):
    ones = lambda completions, **unused: [1.0] * len(completions)
    none = lambda completions, **unused: [None] * len(completions)
    made = trainer([ones, none], objective="maxk", k=2, reward_weights=[0.5, 2.0],
                   output_dir=str(tmp_path))
    rewards = torch.tensor([[1.0, 0.25], [0.0, float("nan")]] + [[0.0, 0.0]] * 14)
    summed = torch.tensor([[1.0] + [0.0] * 7, [0.0] * 8])
    expected = rspo.max_at_k_weights(summed, 2).flatten()
    assert torch.allclose(made.weights_of(rewards), expected)


# ---------------------------------------------------------------- as a script

def test_the_script_trains_and_refuses_in_one_sentence(tmp_path):
    command = [
        sys.executable, "integrations/trl_rspo.py", "--model", "toy", "--data", "divisor",
        "--dtype", "float32", "--k", "2", "--output_dir", str(tmp_path / "out"),
        "--num_generations", "4", "--per_device_train_batch_size", "8", "--max_steps", "1",
        "--loss_type", "luspo", "--scale_rewards", "none", "--max_completion_length", "12",
        "--bf16", "False", "--use_cpu", "True", "--report_to", "none"]
    start = lambda *flags: subprocess.run([*command, *flags], cwd=ROOT, capture_output=True,
                                          text=True)
    done = start()
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    for flags, sentence in ((["--top_k", "50"], "top_k is 50, but must be 0: "),
                            (["--model", str(tmp_path / "out")], "--model ")):
        refused = start(*flags)
        assert refused.returncode == 1
        assert refused.stderr.strip().splitlines()[-1].startswith(f"trl_rspo.py: {sentence}")


def test_the_documented_command_is_understood():
    """The flags of docs/scaling.md, read by TRL itself, pass our checks."""
    text = (ROOT / "docs/scaling.md").read_text()
    command = re.search(r"integrations/trl_rspo\.py((?:.*\\\n)*.*)",
                        text[text.index("accelerate launch"):])[1]
    words = [*command.replace("\\\n", " ").split(), "--use_cpu", "True", "--bf16", "False"]
    parser = trl_rspo.TrlParser((trl_rspo.Task, trl.GRPOConfig))
    task, args = parser.parse_args_and_config(words)
    trl_rspo.check_settings(args, task.k, task.objective)
    assert task.model == "Qwen/Qwen2.5-Math-7B" and task.k == 8
