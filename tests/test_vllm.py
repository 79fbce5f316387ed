"""Proves, with the real vLLM on a CPU: sampler and learner hold the same policy through every adapter swap, each known way of
losing that is caught by the agreement check, and a run with vLLM goes as one with transformers. Run by `make test-vllm`."""

import argparse
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


def move(model, seed: int) -> None:
    """Another policy: fresh random values in every LoRA B."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


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
    curves = [evaluate.evaluate(evaluate.make_parser().parse_args(["--sampler", name, "--limit", "60", "--n", "32"]), str(runs / "hf"))
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
