"""Proves, with the real verl: integrations/verl_rspo.py gives verl the weights of rspo.py, and verl's loss their gradient.

Registry, both ways of loading, `compute_advantage` on DataProto batches with shuffled uids (also through the v1 trainer's
function), k and baseline from a configuration that verl's own Hydra files composed, the documented command included.
Skipped where verl is missing (`make test-integrations`).
"""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT

pytest.importorskip("verl", reason="verl is not installed here; make test-integrations has an environment with it")

from hydra import compose, initialize_config_module
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, compute_policy_loss_vanilla, get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.config import FSDPActorConfig, OptimizerConfig

import rspo
import tasks
from integrations import verl_data, verl_rspo

PROMPTS, N, TOKENS = 5, 8, 6


def composed(*overrides: str):
    """verl's own ppo_trainer.yaml with command-line overrides; Hydra refuses keys that verl does not know."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


def algorithm(*overrides: str):
    return composed("algorithm.adv_estimator=rspo_passk", *overrides).algorithm


def batch(binary: bool, seed: int = 0, n: int = N) -> tuple[DataProto, torch.Tensor, np.ndarray]:
    """A shuffled batch as verl makes it, rewards (P, n) and where in the batch each of them stands (P, n)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(PROMPTS, n, generator=generator)
    rewards = (rewards < torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])[:, None]).float() if binary else rewards - 0.3
    order = torch.randperm(PROMPTS * n, generator=generator)
    place = order.argsort().reshape(PROMPTS, n)                           # sample i of prompt p is row place[p, i]
    lengths = torch.randint(1, TOKENS + 1, (PROMPTS * n,), generator=generator)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    token_rewards = torch.zeros(PROMPTS * n, TOKENS)
    token_rewards[torch.arange(PROMPTS * n), lengths - 1] = rewards.flatten()[order]
    uids = np.array([f"{hash((seed, p)) & 0xffff:04x}-{p}" for p in range(PROMPTS)], dtype=object)
    data = DataProto.from_dict(tensors={"token_level_rewards": token_rewards, "response_mask": mask},
                               non_tensors={"uid": uids[np.repeat(np.arange(PROMPTS), n)[order.numpy()]]})
    return data, rewards, place.numpy()


def of_samples(data: DataProto, place) -> torch.Tensor:
    """(P, n) the one value that a sample has on all its tokens; checks that it is one, and 0 behind the end."""
    advantages, mask = data.batch["advantages"], data.batch["response_mask"]
    assert torch.equal(advantages, data.batch["returns"]) and advantages.shape == (len(data), TOKENS)
    assert torch.equal(advantages, advantages[:, :1] * mask)
    return advantages[:, 0][torch.from_numpy(place)]


# ---------------------------------------------------------------- registration and loading

def test_the_three_estimators_are_registered():
    assert {"rspo_passk", "rspo_maxk", "rspo_groupmax"} <= set(ADV_ESTIMATOR_REGISTRY)
    assert get_adv_estimator_fn("rspo_maxk") is ADV_ESTIMATOR_REGISTRY["rspo_maxk"]


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd="/", capture_output=True, text=True, env={**env, **environment})


def test_verls_environment_variable_loads_it():
    code = "import verl; from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as r; print(sorted(n for n in r if n.startswith('rspo')))"
    loaded = fresh(code, PYTHONPATH=str(ROOT), VERL_USE_EXTERNAL_MODULES="integrations.verl_rspo")
    assert loaded.stdout.strip().endswith("['rspo_groupmax', 'rspo_maxk', 'rspo_passk']"), loaded.stderr[-2000:]
    assert fresh(code, PYTHONPATH=str(ROOT)).stdout.strip().endswith("[]")


def test_without_verl_the_import_says_what_is_missing():
    code = "import sys; sys.modules['verl'] = None; import integrations.verl_rspo"
    failed = fresh(code, PYTHONPATH=str(ROOT))
    assert failed.returncode == 1 and "integrations/verl_rspo.py needs verl, which cannot be imported" in failed.stderr.splitlines()[-1]


# ---------------------------------------------------------------- the numbers

@pytest.mark.parametrize("objective, baseline, k", [
    ("passk", "none", 1), ("passk", "none", 4), ("passk", "none", 8), ("passk", "loo", 1), ("passk", "loo", 4),
    ("maxk", "none", 1), ("maxk", "none", 3), ("maxk", "loo", 7)])
def test_advantages_equal_rspo_whatever_the_order(objective, baseline, k):
    config = algorithm(f"+algorithm.rspo_k={k}", f"+algorithm.rspo_baseline={baseline}")
    total = 0.0
    for seed in range(8):
        data, rewards, place = batch(objective == "passk", seed)
        result = of_samples(compute_advantage(data, f"rspo_{objective}", num_repeat=N, config=config), place)
        exact = {"passk": rspo.pass_at_k_weights, "maxk": rspo.max_at_k_weights}[objective] if baseline == "none" else rspo.leave_one_out_weights
        assert torch.allclose(result, exact(rewards, k).float(), atol=1e-6)
        total += result.abs().sum().item()
    assert total > 1


def test_the_v1_trainer_passes_through_the_same_function():
    data, rewards, place = batch(True)
    keys = [f"{uid}_{i}_0" for i, uid in enumerate(data.non_tensor_batch["uid"])]
    result = compute_advantage_for_multi_trajectories(data, keys, "rspo_passk", config=algorithm("+algorithm.rspo_k=4"))
    assert torch.allclose(of_samples(result, place), rspo.pass_at_k_weights(rewards, 4).float(), atol=1e-6)


def test_the_group_maximum_takes_random_groups():
    """Each right sample and one partner, the luck of the draw, get k; over many draws every other sample is the partner as often."""
    data, _, place = batch(True, n=4)
    rewards = torch.zeros(PROMPTS, 4)
    rewards[:, 1] = 1
    data.batch["token_level_rewards"] = torch.zeros(PROMPTS * 4, TOKENS)
    data.batch["token_level_rewards"][torch.from_numpy(place), 0] = rewards
    config, draws = algorithm("+algorithm.rspo_k=2"), []
    torch.manual_seed(0)
    for _ in range(120):
        weights = of_samples(compute_advantage(data, "rspo_groupmax", config=config), place)
        assert ((weights == 2).sum(1) == 2).all() and (weights[:, 1] == 2).all() and weights.sum() == 2 * 2 * PROMPTS
        draws.append(weights)
    share = torch.stack(draws).mean((0, 1)) / 2                           # (4,)  of 600 draws; standard error .019
    assert share[1] == 1 and torch.allclose(share[[0, 2, 3]], torch.tensor(1 / 3), atol=0.08)


def test_a_seed_repeats_the_groups_and_weights_are_rspos():
    config = algorithm("+algorithm.rspo_k=2")
    data, rewards, place = batch(False)
    torch.manual_seed(3)
    first = of_samples(compute_advantage(data, "rspo_groupmax", config=config), place)
    torch.manual_seed(3)
    assert torch.equal(first, of_samples(compute_advantage(data, "rspo_groupmax", config=config), place))
    for row, weights in zip(rewards, first):                              # values come in pairs, each twice its better reward
        assert all((weights == weight).sum() == 2 and weight == 2 * row[weights == weight].max() for weight in weights)


def test_verls_loss_on_these_advantages_has_our_gradient():
    """seq-mean-token-sum, on-policy: the gradient by each token's log-probability is that of rspo.policy_gradient_loss."""
    data, rewards, place = batch(True)
    compute_advantage(data, "rspo_passk", config=algorithm("+algorithm.rspo_k=4"))
    mask = data.batch["response_mask"]
    actor = FSDPActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=N, optim=OptimizerConfig(lr=1e-3))
    logprobs = torch.randn(len(data), TOKENS, requires_grad=True)
    old = logprobs.detach().clone()
    loss, _ = compute_policy_loss_vanilla(old, logprobs, data.batch["advantages"], mask, "seq-mean-token-sum", actor)
    loss.backward()
    mine = old.clone().requires_grad_()
    weights = torch.empty(len(data), dtype=torch.float64)
    weights[torch.from_numpy(place)] = rspo.pass_at_k_weights(rewards, 4)
    rows = mask.bool().nonzero()[:, 0]
    rspo.policy_gradient_loss(mine[mask.bool()], weights.float()[rows], len(data)).backward()
    assert torch.allclose(logprobs.grad, mine.grad, atol=1e-7) and mine.grad.abs().sum() > 0


def test_a_plain_algorithm_config_works_too():
    config = AlgoConfig(adv_estimator="rspo_passk")
    config.rspo_k = 4
    data, rewards, place = batch(True)
    assert torch.allclose(of_samples(compute_advantage(data, "rspo_passk", config=config), place),
                          rspo.pass_at_k_weights(rewards, 4).float(), atol=1e-6)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("overrides, sentence", [
    ([], "algorithm.rspo_k is not set"),
    (["+algorithm.rspo_k=9"], "k is 9, but must be a whole number with 1 <= k <= n = 8"),
    (["+algorithm.rspo_k=0"], "k is 0, but must be a whole number"),
    (["+algorithm.rspo_k=2.5"], "k is 2.5, but must be a whole number"),
    (["+algorithm.rspo_k=8", "+algorithm.rspo_baseline=loo"], "leave-one-out needs k <= n - 1"),
    (["+algorithm.rspo_k=4", "+algorithm.rspo_baseline=mean"], "the baseline is 'mean', but must be one of none, loo"),
    (["+algorithm.rspo_k=4", "algorithm.use_kl_in_reward=True"], "algorithm.use_kl_in_reward is True"),
    (["+algorithm.rspo_k=4", "algorithm.rollout_correction.rollout_rs=seq_mean_k1"], "rollout_rs is 'seq_mean_k1'")])
def test_bad_settings_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compute_advantage(batch(True)[0], "rspo_passk", config=algorithm(*overrides))


def test_bad_groups_and_rewards_are_refused():
    config = algorithm("+algorithm.rspo_k=2")
    data, _, place = batch(True)
    ragged = data.select_idxs([i for i in range(len(data)) if i != place[2, 3]])
    lost = data.non_tensor_batch["uid"][place[2, 3]]
    with pytest.raises(ValueError, match=f"prompt {lost} has 7 samples and others have 8"):
        compute_advantage(ragged, "rspo_passk", config=config)
    with pytest.raises(ValueError, match="Pass@k needs 0 or 1"):
        compute_advantage(batch(False)[0], "rspo_passk", config=config)
    with pytest.raises(ValueError, match="Pass@k needs 0 or 1"):
        compute_advantage(batch(False)[0], "rspo_passk", config=algorithm("+algorithm.rspo_k=2", "+algorithm.rspo_baseline=loo"))
    with pytest.raises(ValueError, match="n is 8, but the group maximum needs n divisible by k = 3"):
        compute_advantage(data, "rspo_groupmax", config=algorithm("+algorithm.rspo_k=3"))
    with pytest.raises(ValueError, match="the baseline is 'loo', but groupmax"):
        compute_advantage(data, "rspo_groupmax", config=algorithm("+algorithm.rspo_k=2", "+algorithm.rspo_baseline=loo"))
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match="the batch has no uid"):
        compute_advantage(data, "rspo_passk", config=config)


# ---------------------------------------------------------------- the documented command, data and rewards

def documented_overrides() -> list[str]:
    text = (ROOT / "docs/scaling.md").read_text()
    command = re.search(r"python -m verl\.trainer\.main_ppo((?:.*\\\n)*.*)", text)[1].replace("\\\n", " ")
    return shlex.split(command)


def test_the_documented_command_is_known_to_verl_and_on_policy():
    """Every key exists, and the settings that the gradient depends on say what the text says."""
    config = composed(*documented_overrides())
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.algorithm.adv_estimator == "rspo_passk" and 1 <= config.algorithm.rspo_k <= rollout.n
    assert actor.loss_agg_mode == "seq-mean-token-sum" and actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1, -1)
    assert not actor.use_kl_loss and not config.algorithm.use_kl_in_reward and actor.entropy_coeff == 0
    assert config.algorithm.rollout_correction.rollout_is == "token" and config.algorithm.rollout_correction.rollout_rs is None
    assert (ROOT / config.reward.custom_reward_function.path).is_file()
    data, rewards, place = batch(True, n=rollout.n)
    result = of_samples(compute_advantage(data, config.algorithm.adv_estimator, config=config.algorithm), place)
    assert torch.allclose(result, rspo.pass_at_k_weights(rewards, config.algorithm.rspo_k).float(), atol=1e-6)


def test_verl_loads_the_reward_function():
    from verl.trainer.ppo.reward import get_custom_reward_fn
    config = composed(f"reward.custom_reward_function.path={ROOT / 'integrations/verl_data.py'}")
    score = get_custom_reward_fn(config)
    graded = [score(data_source="math", solution_str=text, ground_truth="1/2", extra_info={}) for text in ("so \\boxed{0.5}", "\\boxed{2}", "0.5")]
    assert graded == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("system", ["", "Put it within \\boxed{}."])
def test_problems_are_written_as_train_renders_them(tmp_path, system):
    import pandas
    from transformers import AutoTokenizer
    rows = [{"id": f"q{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    tokenizer.chat_template = ("{{ '" + system.replace("\\", "\\\\") + "' }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    tokenizer.save_pretrained(tmp_path / "model")
    verl_data.write_parquet(str(tmp_path / "sums.jsonl"), str(tmp_path / "model"), tmp_path / "out")
    problems = {p.id: p for p in tasks.load_problems(str(tmp_path / "sums.jsonl"))}
    written = [row for name in ("train", "test") for row in pandas.read_parquet(tmp_path / f"out/{name}.parquet").to_dict("records")]
    assert {row["extra_info"]["id"] for row in written} == set(problems) and len(written) == 40
    for row in written:
        problem = problems[row["extra_info"]["id"]]
        text = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True)
        assert text == tasks.render(problem, tokenizer) and row["reward_model"]["ground_truth"] == problem.answer


def test_a_merged_adapter_comes_back_to_evaluate(tmp_path):
    """verl's own merger on a state dict named as its checkpoints name it; completed, it is what --model takes."""
    from types import SimpleNamespace

    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    import policy
    from sample import Rollout
    model = policy.add_lora(policy.load_model("toy", "float32", "cpu")[0], 4, 8, seed=0)
    torch.manual_seed(1)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    made = [Rollout((3, 4, 5), (6, 7, 1), (0.0,) * 3, "", True)]
    with torch.no_grad():
        trained = policy.token_logprobs(model, made, 1.0)[0]
        with model.disable_adapter():
            untrained = policy.token_logprobs(model, made, 1.0)[0]
    (tmp_path / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    merger = object.__new__(FSDPModelMerger)
    merger.config = SimpleNamespace(local_dir=str(tmp_path), target_dir=str(tmp_path))
    merger.save_lora_adapter({name: value.clone() for name, value in model.state_dict().items()})
    with pytest.raises(tasks.UserError, match="is no adapter folder"):
        verl_data.name_base(str(policy.TOY), tmp_path)
    verl_data.name_base(str(policy.TOY), tmp_path / "lora_adapter")
    back = policy.load_model(str(tmp_path / "lora_adapter"), "float32", "cpu")[0]
    with torch.no_grad():
        assert torch.allclose(policy.token_logprobs(back, made, 1.0)[0], trained, atol=1e-6)
    assert not torch.allclose(trained, untrained, atol=1e-3)
