"""Proves, with the real verl, that integrations/verl_rspo.py gives it the weights of rspo.py.

And that verl's loss makes our gradient of them. Registry, both ways of loading,
`compute_advantage` on DataProto batches with shuffled uids (also through the v1 trainer's
function), k from a configuration that verl's own Hydra files composed, the documented command
included. Skipped where verl is missing (`make test-integrations`).
"""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT

pytest.importorskip("verl", reason="verl is not installed; make test-integrations has it")

from hydra import compose, initialize_config_module
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import (ADV_ESTIMATOR_REGISTRY, compute_policy_loss_vanilla,
                                         get_adv_estimator_fn)
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.config import FSDPActorConfig, OptimizerConfig

import rspo
from integrations import verl_data, verl_rspo
from lib import tasks
from lib.cli import UserError

PROMPTS, N, TOKENS = 5, 8, 6
NAMES = ["rspo_groupmax", "rspo_loo", "rspo_maxk", "rspo_passk"]
# what differs from verl's defaults, so that the gradient is RSPO's
CORRECTION, ACTOR = "algorithm.rollout_correction.", "actor_rollout_ref.actor."
SOUND = ["algorithm.adv_estimator=rspo_passk", CORRECTION + "rollout_is=token",
         ACTOR + "loss_agg_mode=seq-mean-token-sum", ACTOR + "ppo_mini_batch_size=128",
         "data.train_batch_size=128"]


def composed(*overrides: str):
    """verl's own ppo_trainer.yaml with overrides; Hydra refuses keys that verl does not know."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer",
                       overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


def algorithm(*overrides: str):
    return composed(*SOUND, *overrides).algorithm


def batch(binary: bool, seed: int = 0, n: int = N):
    """A shuffled batch as verl makes it, rewards (P, n), and the row of each of them (P, n)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(PROMPTS, n, generator=generator)
    rates = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])[:, None]
    rewards = (rewards < rates).float() if binary else rewards - 0.3
    order = torch.randperm(PROMPTS * n, generator=generator)
    place = order.argsort().reshape(PROMPTS, n)  # sample i of prompt p is row place[p, i]
    lengths = torch.randint(1, TOKENS + 1, (PROMPTS * n,), generator=generator)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    token_rewards = torch.zeros(PROMPTS * n, TOKENS)
    token_rewards[torch.arange(PROMPTS * n), lengths - 1] = rewards.flatten()[order]
    uids = np.array([f"{hash((seed, p)) & 0xffff:04x}-{p}" for p in range(PROMPTS)], dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": token_rewards, "response_mask": mask},
        non_tensors={"uid": uids[np.repeat(np.arange(PROMPTS), n)[order.numpy()]]})
    return data, rewards, place.numpy()


def of_samples(data: DataProto, place) -> torch.Tensor:
    """(P, n) the value that a sample has on all its tokens, once it is sure that it is one."""
    advantages, mask = data.batch["advantages"], data.batch["response_mask"]
    assert torch.equal(advantages, data.batch["returns"])
    assert advantages.shape == (len(data), TOKENS)
    assert torch.equal(advantages, advantages[:, :1] * mask)  # 0 behind the end
    return advantages[:, 0][torch.from_numpy(place)]


# ---------------------------------------------------------------- registration and loading

def test_the_unbiased_objectives_are_registered():
    assert set(NAMES) <= set(ADV_ESTIMATOR_REGISTRY)
    assert get_adv_estimator_fn("rspo_maxk") is ADV_ESTIMATOR_REGISTRY["rspo_maxk"]


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd="/",
                          capture_output=True, text=True, env={**env, **environment})


def test_verls_environment_variable_loads_it():
    code = ("import verl; from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as r; "
            "print(sorted(n for n in r if n.startswith('rspo')))")
    loaded = fresh(code, PYTHONPATH=str(ROOT),
                   VERL_USE_EXTERNAL_MODULES="integrations.verl_rspo")
    assert loaded.stdout.strip().endswith(str(NAMES)), loaded.stderr[-2000:]
    assert fresh(code, PYTHONPATH=str(ROOT)).stdout.strip().endswith("[]")


def test_without_verl_the_import_says_what_is_missing():
    code = "import sys; sys.modules['verl'] = None; import integrations.verl_rspo"
    failed = fresh(code, PYTHONPATH=str(ROOT))
    assert failed.returncode == 1
    assert "verl_rspo.py needs verl, which cannot be imported" in failed.stderr.splitlines()[-1]


# ---------------------------------------------------------------- the numbers

WEIGHTS = {"passk": rspo.pass_at_k_weights, "maxk": rspo.max_at_k_weights,
           "loo": rspo.leave_one_out_weights}


@pytest.mark.parametrize("objective, binary, k", [
    ("passk", True, 1), ("passk", True, 4), ("passk", True, 8), ("loo", True, 1),
    ("loo", True, 4), ("maxk", False, 1), ("maxk", False, 3), ("loo", False, 7)])
def test_advantages_equal_rspo_whatever_the_order(objective, binary, k):
    config, total = algorithm(f"+algorithm.rspo_k={k}"), 0.0
    for seed in range(8):
        data, rewards, place = batch(binary, seed)
        computed = compute_advantage(data, f"rspo_{objective}", num_repeat=N, config=config)
        result = of_samples(computed, place)
        assert torch.allclose(result, WEIGHTS[objective](rewards, k).float(), atol=1e-6)
        total += result.abs().sum().item()
    assert total > 1


def test_the_v1_trainer_passes_through_the_same_function():
    data, rewards, place = batch(True)
    keys = [f"{uid}_{i}_0" for i, uid in enumerate(data.non_tensor_batch["uid"])]
    result = compute_advantage_for_multi_trajectories(
        data, keys, "rspo_passk", config=algorithm("+algorithm.rspo_k=4"))
    expected = rspo.pass_at_k_weights(rewards, 4).float()
    assert torch.allclose(of_samples(result, place), expected, atol=1e-6)


def test_the_group_maximum_takes_random_groups():
    """Each right sample and one partner, the luck of the draw, get k.

    Over many draws every other sample is the partner as often.
    """
    data, _, place = batch(True, n=4)
    rewards = torch.zeros(PROMPTS, 4)
    rewards[:, 1] = 1
    data.batch["token_level_rewards"] = torch.zeros(PROMPTS * 4, TOKENS)
    data.batch["token_level_rewards"][torch.from_numpy(place), 0] = rewards
    config, draws = algorithm("+algorithm.rspo_k=2"), []
    torch.manual_seed(0)
    for _ in range(120):
        weights = of_samples(compute_advantage(data, "rspo_groupmax", config=config), place)
        assert ((weights == 2).sum(1) == 2).all() and weights.sum() == 2 * 2 * PROMPTS
        assert (weights[:, 1] == 2).all()
        draws.append(weights)
    share = torch.stack(draws).mean((0, 1)) / 2  # (4,)  of 600 draws; standard error .019
    assert share[1] == 1
    assert torch.allclose(share[[0, 2, 3]], torch.tensor(1 / 3), atol=0.08)


def test_a_seed_repeats_the_groups_and_weights_are_rspos():
    config = algorithm("+algorithm.rspo_k=2")
    data, rewards, place = batch(False)
    torch.manual_seed(3)
    first = of_samples(compute_advantage(data, "rspo_groupmax", config=config), place)
    torch.manual_seed(3)
    again = of_samples(compute_advantage(data, "rspo_groupmax", config=config), place)
    assert torch.equal(first, again)
    for row, weights in zip(rewards, first):  # in pairs, each twice its better reward
        for weight in weights:
            assert (weights == weight).sum() == 2
            assert weight == 2 * row[weights == weight].max()


def gradients(mode):
    """(B, T) of verl's loss in a mode and of ours, by the log-probabilities; lengths (B,)."""
    data, rewards, place = batch(True)
    compute_advantage(data, "rspo_passk", config=algorithm("+algorithm.rspo_k=4"))
    mask = data.batch["response_mask"]
    actor = FSDPActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=N,
                            optim=OptimizerConfig(lr=1e-3))
    logprobs = torch.randn(len(data), TOKENS, requires_grad=True)
    old = logprobs.detach().clone()
    loss, _ = compute_policy_loss_vanilla(old, logprobs, data.batch["advantages"], mask,
                                          mode, actor)
    loss.backward()
    mine = old.clone().requires_grad_()
    weights = torch.empty(len(data), dtype=torch.float64)
    weights[torch.from_numpy(place)] = rspo.pass_at_k_weights(rewards, 4)
    rows = mask.bool().nonzero()[:, 0]
    rspo.policy_gradient_loss(mine[mask.bool()], weights.float()[rows], len(data)).backward()
    assert mine.grad.abs().sum() > 0
    return logprobs.grad, mine.grad, mask.sum(1)


def test_verls_loss_on_these_advantages_has_our_gradient():
    """seq-mean-token-sum, on-policy: by each token's log-probability, it is our loss's."""
    theirs, ours, _ = gradients("seq-mean-token-sum")
    assert torch.allclose(theirs, ours, atol=1e-7)


def test_what_the_other_modes_do_is_what_the_text_says():
    """On one batch: three rescale the gradient, one turns it towards short answers."""
    _, ours, lengths = gradients("token-mean")
    samples, tokens = len(lengths), lengths.sum()
    for mode, scale in (("token-mean", samples / tokens), ("token-sum", samples),
                        ("seq-mean-token-sum-norm", 1 / TOKENS)):
        assert torch.allclose(gradients(mode)[0], scale * ours, atol=1e-6), mode
    turned = gradients("seq-mean-token-mean")[0]
    assert torch.allclose(turned, ours / lengths[:, None], atol=1e-7)
    assert torch.cosine_similarity(turned.flatten(), ours.flatten(), dim=0) < 0.99


def test_a_plain_algorithm_config_works_too():
    correction = RolloutCorrectionConfig.decoupled_token_is()
    config = AlgoConfig(adv_estimator="rspo_passk", rollout_correction=correction)
    config.rspo_k = 4
    data, rewards, place = batch(True)
    result = of_samples(compute_advantage(data, "rspo_passk", config=config), place)
    assert torch.allclose(result, rspo.pass_at_k_weights(rewards, 4).float(), atol=1e-6)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("objective, overrides, sentence", [
    ("passk", [], "algorithm.rspo_k is not set"),
    ("passk", ["+algorithm.rspo_k=9"],
     "k is 9, but must be a whole number with 1 <= k <= n = 8"),
    ("passk", ["+algorithm.rspo_k=0"], "k is 0, but must be a whole number"),
    ("passk", ["+algorithm.rspo_k=2.5"], "k is 2.5, but must be a whole number"),
    ("loo", ["+algorithm.rspo_k=8"], "leave-one-out needs k <= n - 1"),
    ("passk", ["+algorithm.rspo_k=4", "+algorithm.rspo_baseline=loo"],
     "algorithm.rspo_baseline is 'loo', but must be None: take adv_estimator=rspo_loo"),
    ("passk", ["+algorithm.rspo_k=4", "algorithm.use_kl_in_reward=True"],
     "algorithm.use_kl_in_reward is True"),
    ("passk", ["+algorithm.rspo_k=4", CORRECTION + "rollout_rs=seq_mean_k1"],
     "rollout_rs is 'seq_mean_k1'"),
    *[("passk", ["+algorithm.rspo_k=4", override], sentence) for override, sentence in [
        (CORRECTION + "rollout_is=sequence", "rollout_is is 'sequence', but must be 'token'"),
        (CORRECTION + "rollout_is=null", "rollout_is is None, but must be 'token'"),
        (CORRECTION + "rollout_is_threshold=0.5_2.0",
         "rollout_is_threshold is '0.5_2.0', but must be one number"),
        (CORRECTION + "rollout_is_batch_normalize=True",
         "rollout_is_batch_normalize is True, but must be False"),
        (CORRECTION + "bypass_mode=True", "bypass_mode is True, but must be False"),
        (ACTOR + "loss_agg_mode=token-mean",
         "loss_agg_mode is 'token-mean', but must be 'seq-mean-token-sum'"),
        (ACTOR + "loss_agg_mode=seq-mean-token-mean", "loss_agg_mode is 'seq-mean-token-mean'"),
        (ACTOR + "policy_loss.loss_mode=gspo", "loss_mode is 'gspo', but must be 'vanilla'"),
        (ACTOR + "ppo_epochs=2", "ppo_epochs is 2, but must be 1"),
        (ACTOR + "ppo_mini_batch_size=64",
         "ppo_mini_batch_size is 64, but must be data.train_batch_size (128)"),
        ("actor_rollout_ref.rollout.top_p=0.9", "top_p is 0.9, but must be 1"),
        ("actor_rollout_ref.rollout.top_k=50", "top_k is 50, but must be -1")]],
    *[(objective, [f"+algorithm.rspo_k={k}", "algorithm.filter_groups.enable=True"],
       f"filter_groups is on, but rspo_{objective} at k = {k} learns from the groups")
      for objective, k in [("passk", 1), ("maxk", 1), ("groupmax", 2)]],
    ("groupmax", ["+algorithm.rspo_k=3"],
     "n is 8, but the group maximum needs n divisible by k = 3")])
def test_bad_settings_are_refused(objective, overrides, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        compute_advantage(batch(True)[0], f"rspo_{objective}", config=algorithm(*overrides))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("objective, k", [("passk", 2), ("maxk", 2), ("loo", 1), ("loo", 3)])
def test_groups_may_be_filtered_where_they_have_no_weight(objective, k):
    config = algorithm(f"+algorithm.rspo_k={k}", "algorithm.filter_groups.enable=True")
    data, rewards, place = batch(True)
    result = of_samples(compute_advantage(data, f"rspo_{objective}", config=config), place)
    equal = (rewards == rewards[:, :1]).all(1)
    assert equal.any() and not result[equal].any()


def test_the_settings_are_seen_after_the_configuration_was_sent_to_another_process():
    sent = pickle.loads(pickle.dumps(composed(*SOUND[:2], "+algorithm.rspo_k=4")))
    with pytest.raises(ValueError, match="loss_agg_mode is 'token-mean'"):
        compute_advantage(batch(True)[0], "rspo_passk", config=sent.algorithm)


def test_bad_groups_and_rewards_are_refused():
    config = algorithm("+algorithm.rspo_k=2")
    data, _, place = batch(True)
    ragged = data.select_idxs([i for i in range(len(data)) if i != place[2, 3]])
    lost = data.non_tensor_batch["uid"][place[2, 3]]
    with pytest.raises(ValueError, match=f"prompt {lost} has 7 samples and others have 8"):
        compute_advantage(ragged, "rspo_passk", config=config)
    with pytest.raises(ValueError, match="Pass@k needs 0 or 1"):
        compute_advantage(batch(False)[0], "rspo_passk", config=config)
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match="the batch has no uid"):
        compute_advantage(data, "rspo_passk", config=config)


# ---------------------------------------------------------------- the documented command and data

def documented_overrides() -> list[str]:
    text = (ROOT / "docs/scaling.md").read_text()
    command = re.search(r"python -m verl\.trainer\.main_ppo((?:.*\\\n)*.*)", text)[1]
    return shlex.split(command.replace("\\\n", " "))


def test_the_documented_command_is_known_to_verl_and_on_policy():
    """Every key exists, and what the gradient depends on is set as the text says."""
    config = composed(*documented_overrides())
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    algorithm, correction = config.algorithm, config.algorithm.rollout_correction
    assert algorithm.adv_estimator == "rspo_passk" and 1 <= algorithm.rspo_k <= rollout.n
    assert actor.loss_agg_mode == "seq-mean-token-sum" and actor.ppo_epochs == 1
    assert actor.ppo_mini_batch_size == config.data.train_batch_size
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1, -1)
    assert not actor.use_kl_loss and not algorithm.use_kl_in_reward
    assert actor.entropy_coeff == 0
    assert correction.rollout_is == "token" and correction.rollout_rs is None
    assert (ROOT / config.reward.custom_reward_function.path).is_file()
    data, rewards, place = batch(True, n=rollout.n)
    computed = compute_advantage(data, algorithm.adv_estimator, config=algorithm)
    expected = rspo.pass_at_k_weights(rewards, algorithm.rspo_k).float()
    assert torch.allclose(of_samples(computed, place), expected, atol=1e-6)


def test_verl_loads_the_reward_function():
    from verl.trainer.ppo.reward import get_custom_reward_fn
    path = ROOT / "integrations/verl_data.py"
    score = get_custom_reward_fn(composed(f"reward.custom_reward_function.path={path}"))
    graded = [score(data_source="math", solution_str=text, ground_truth="1/2", extra_info={})
              for text in ("so \\boxed{0.5}", "\\boxed{2}", "0.5")]
    assert graded == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("system", ["", "Put it within \\boxed{}."])
def test_problems_are_written_as_train_renders_them(tmp_path, system):
    import pandas
    from transformers import AutoTokenizer
    rows = [{"id": f"q{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)}
            for i in range(40)]
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    first = system.replace("\\", "\\\\")
    tokenizer.chat_template = (
        "{{ '" + first + "' }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    tokenizer.save_pretrained(tmp_path / "model")
    verl_data.write_parquet(str(sums), str(tmp_path / "model"), tmp_path / "out")
    problems = {p.id: p for p in tasks.load_problems(str(sums))}
    written = []
    for name in ("train", "test"):
        rows = pandas.read_parquet(tmp_path / f"out/{name}.parquet").to_dict("records")
        ids = [row["extra_info"]["id"] for row in rows]
        assert ids == [p.id for p in tasks.load_problems(f"{sums}:{name}")] and ids
        written += rows
    for row in written:
        problem = problems[row["extra_info"]["id"]]
        text = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False,
                                             add_generation_prompt=True)
        assert text == tasks.render(problem, tokenizer)
        assert row["reward_model"]["ground_truth"] == problem.answer


def test_a_merged_adapter_comes_back_to_evaluate(tmp_path):
    """verl's own merger on a state dict as in its checkpoints; completed, --model takes it."""
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    from lib import policy, run
    from sample import Rollout
    toy = str(run.TOY)
    load = lambda adapter=None: policy.load_model(toy, adapter, "float32", "cpu")[0]
    model = policy.add_lora(load(), 4, seed=0)
    torch.manual_seed(1)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    made = [Rollout((3, 4, 5), (6, 7, 1), (0.0,) * 3, "", True)]
    with torch.no_grad():
        trained = policy.token_logprobs(model, made, 1.0)[0]
        with model.disable_adapter():
            untrained = policy.token_logprobs(model, made, 1.0)[0]
    meta = {"r": 4, "lora_alpha": policy.LORA_ALPHA, "task_type": "CAUSAL_LM"}
    (tmp_path / "lora_train_meta.json").write_text(json.dumps(meta))
    merger = object.__new__(FSDPModelMerger)
    merger.config = SimpleNamespace(local_dir=str(tmp_path), target_dir=str(tmp_path))
    merger.save_lora_adapter({name: v.clone() for name, v in model.state_dict().items()})
    with pytest.raises(UserError, match="is no adapter folder"):
        verl_data.name_base(toy, tmp_path)
    verl_data.name_base(toy, tmp_path / "lora_adapter")
    base, adapter = run.resolve_model(str(tmp_path / "lora_adapter"))
    assert base == toy
    with torch.no_grad():
        back = policy.token_logprobs(load(adapter), made, 1.0)[0]
    assert torch.allclose(back, trained, atol=1e-6)
    assert not torch.allclose(trained, untrained, atol=1e-3)
