"""Proof that the first hour on a GPU is uneventful, as far as a CPU can prove it.

1. What such a machine lacks is said in one sentence that says what to do: room in /dev/shm or
   the temporary folder, a compiler, a driver, room on the card. So is what vLLM cannot do there.
2. The toy stays on the CPU, and so do the tests, but those at the end (make test-gpu).
3. The learner passes no padding mask, so that flash attention can be taken, and loses nothing.
4. In bfloat16 the adapter computes in 16 bits: fewer activations are kept, the gradient is
   float32's, the sampler agrees as before.
5. benchmarks/gpu_check.py runs on a CPU in small, and a part that fails ends no other.
"""

import os
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from conftest import ROOT
from peft.tuners import lora
from safetensors import SafetensorError
from test_policy import COMMON, CONFIGS, flat, gradients, save_model, with_adapter
from test_sample import recording_vllm
from test_train import go, quick  # noqa: F401

import sample
import train
from benchmarks import gpu_check
from lib import cli, policy, run, tasks
from lib.cli import UserError
from sample import HFSampler, Rollout

REAL = ["--model", "Qwen2.5-Math-1.5B", "--k", "4"]
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
GPU = "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-0)"


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM; its LLM is to be set."""
    fake = SimpleNamespace(SamplingParams=dict, TokensPrompt=dict, LLM=None, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(
        LoRARequest=lambda name, number, path: SimpleNamespace(lora_int_id=number, path=path)))
    installed = SimpleNamespace(find_spec=lambda name: fake)
    monkeypatch.setattr(sample, "importlib", SimpleNamespace(util=installed))
    return fake


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def toy_engine(*_, **__):
    model, tokenizer = policy.load_model(str(run.TOY), device="cpu")
    return recording_vllm(model, tokenizer, [])


def sentence(act, *arguments) -> str:
    """What a script says instead of a traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.run_script(lambda: act(*arguments))
    said = str(ended.value)
    assert "\n" not in said
    return said


# ---------------------------------------------------------------- 1. said in one sentence

def test_no_adapter_goes_through_shared_memory(monkeypatch, vllm, tmp_path):
    """Docker's /dev/shm has 64 MB, two adapters of a 1.5B model 148."""
    vllm.LLM, places = toy_engine, []
    save = policy.PeftModel.save_pretrained
    monkeypatch.setattr(policy.PeftModel, "save_pretrained", lambda self, folder, **more: (
        places.append(Path(folder).resolve()) or save(self, folder, **more)))
    go(tmp_path / "run", "--sampler", "vllm", "--lr", 1e-12)  # it never learns
    sample.main(["--model", str(tmp_path / "run"), "--sampler", "vllm", "--n", "2", "--limit", "2",
                 "--out", str(tmp_path / "samples.jsonl")])
    adapters = [place for place in places if place.name.startswith("version-")]
    *trained, sampled = adapters
    assert len(trained) == 4 and all(tmp_path / "run" in place.parents for place in trained)
    assert Path(sample.tempfile.gettempdir()).resolve() in sampled.parents


def test_a_full_temporary_folder_is_said(monkeypatch, vllm, tmp_path):
    vllm.LLM, run_folder = toy_engine, go(tmp_path / "run", "--steps", 1)
    flags = ["--model", str(run_folder), "--sampler", "vllm", "--out", str(tmp_path / "x.jsonl")]
    hint = "make room there or set TMPDIR to another folder"

    def no_room(*_, **__):
        raise FULL
    with monkeypatch.context() as patch:
        patch.setattr(policy.PeftModel, "save_pretrained", no_room)
        assert "No space left on device" in (said := sentence(sample.main, flags)) and hint in said
    with monkeypatch.context() as patch:
        patch.setattr(tf.PreTrainedModel, "save_pretrained", no_room)  # of a 4-bit base's copy
        said = sentence(sample.main, ["--sampler", "vllm", "--load-in-4bit", *flags[4:]])
        assert "No space left on device" in said and hint in said
    monkeypatch.setattr(sample.tempfile, "TemporaryDirectory", lambda **_: (
        _ for _ in ()).throw(FileNotFoundError(2, "No usable temporary directory found in ['/t']")))
    assert "No usable temporary" in (said := sentence(sample.main, flags)) and hint in said


def test_a_full_disk_while_training_with_vllm_is_said_with_the_way_on(
        monkeypatch, vllm, tmp_path):
    vllm.LLM = toy_engine
    save = policy.PeftModel.save_pretrained

    def full(self, folder, **more):
        if Path(folder).name == "version-2":
            raise FULL
        return save(self, folder, **more)
    monkeypatch.setattr(policy.PeftModel, "save_pretrained", full)
    said = sentence(go, tmp_path / "run", "--sampler", "vllm", "--lr", 1e-12)
    assert "No space left on device" in said and "make room" in said and "--resume" in said
    assert "TMPDIR" not in said


GCC = "Failed to find C compiler. Please specify via CC environment variable."
HEADERS = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x/cuda_utils.c"])
OCCUPIED = ("Free memory on device cuda:0 (3.1/23.5 GiB) on startup is less than desired GPU "
            "memory utilization (0.45, 10.6 GiB). Decrease GPU memory utilization\nor reduce")


@pytest.mark.parametrize("error, advice", [
    (RuntimeError(GCC), "install gcc and Python's headers"),
    (RuntimeError(f"backend='inductor' raised:\n{GCC}"), "install gcc and Python's headers"),
    (HEADERS, "install Python's headers"), (ValueError(OCCUPIED), "end what else is on the GPU"),
    (torch.OutOfMemoryError("CUDA out of memory."), "lower --gpu-memory or --max-new-tokens"),
    (OSError(28, "No space left on device"), "make room there or set TMPDIR"),
    (AssertionError(), "(AssertionError); reinstall it"), (ImportError("libcudart"), "reinstall")])
def test_what_keeps_vllm_from_starting_is_said_with_what_to_do(
        vllm, on_cuda, tmp_path, capsys, error, advice):
    def broken(*_, **__):
        raise error
    vllm.LLM = broken
    start = lambda: sample.VLLMSampler("a/model", None, [1], 1.0, 9, dtype="bfloat16", rank=8,
                                       context=32, gpu_memory=0.5, folder=tmp_path)
    said = sentence(start)
    assert "vLLM could not start on a/model" in said and "or take --sampler hf" in said
    assert advice in said
    assert "starting vLLM" in capsys.readouterr().out  # minutes of silence are announced


def test_the_engine_is_started_as_it_must_be_on_a_gpu(vllm, on_cuda, tmp_path):
    taken = []
    vllm.LLM = lambda base, **settings: taken.append(settings)
    sample.VLLMSampler("a/model", None, [1], 1.0, 9, dtype="bfloat16", rank=12, context=32,
                       gpu_memory=0.45, folder=tmp_path)
    assert taken == [dict(
        dtype="bfloat16", seed=0, max_model_len=32, enable_lora=True, max_loras=1,
        max_lora_rank=16, logprobs_mode="processed_logprobs", generation_config="vllm",
        gpu_memory_utilization=0.45)]


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine on which nvidia-smi ends with this code, and torch sees no GPU."""
    def make(code: int):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho '{GPU}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


@pytest.mark.parametrize("script", [train, sample])
def test_a_driver_that_torch_cannot_use_is_refused_and_not_replaced_by_the_cpu(
        driver, monkeypatch, script):
    driver(0)
    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("refused too late"))
    flags = REAL if script is train else REAL[:2]
    said = sentence(script.main, flags)
    assert "driver 580 or newer" in said and torch.__version__ in said
    assert "CUDA_VISIBLE_DEVICES= for the CPU" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert policy.pick_device() == "cpu"


def test_without_a_gpu_and_for_the_toy_no_driver_is_asked_for(driver, tmp_path):
    driver(0)
    go(tmp_path / "run", "--steps", 1)
    sample.main(["--n", "2", "--limit", "2", "--out", str(tmp_path / "x.jsonl")])


def test_a_machine_with_nvidia_smi_but_no_gpu_is_a_cpu(driver):
    driver(9)
    assert policy.pick_device() == "cpu"


def test_float32_with_vllm_on_a_gpu_is_refused_and_auto_takes_the_plain_sampler(
        monkeypatch, vllm, on_cuda):
    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("refused too late"))
    said = sentence(train.main, [*REAL, "--sampler", "vllm", "--dtype", "float32"])
    assert "--dtype float32" in said and "take --sampler hf" in said
    for dtype, sampler in (("float32", "hf"), ("bfloat16", "vllm"), ("auto", "vllm")):
        assert train.settle([*REAL, "--dtype", dtype]).sampler == sampler


def write_problems(path, *lengths) -> Path:
    """Problems whose prompts have so many tokens."""
    rows = [{"problem": str(i), "answer": "1", "prompt": "7" * length}
            for i, length in enumerate(lengths, 10 * ord(path.stem))]
    cli.write_rows(path, rows)
    return path


def test_training_problems_too_long_for_the_model_are_left_out_and_counted(tmp_path, capsys):
    model = save_model("qwen2", tmp_path / "model")  # it reads 48 tokens
    training, held_out = (write_problems(tmp_path / f"{name}.jsonl", *lengths)
                          for name, lengths in (("t", (5, 40, 6, 44, 7)), ("h", (4, 5, 6, 7))))
    flags = ["--model", model, "--max-new-tokens", 9, "--flip", "0.5", "--sampler", "hf"]
    folder = go(tmp_path / "run", *flags, "--data", training, "--eval-data", held_out)
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert said == ["left out 2 training problems: problem t-2: prompt of 40 tokens + "
                    "--max-new-tokens 9 exceed the model's context of 48 tokens"]
    config = run.read_config(folder)
    assert config["flags"]["data"] == str(training)
    whole = [*flags, "--eval-data", training, "--data", held_out]
    assert "problem t-2: prompt of 40 tokens" in sentence(go, tmp_path / "held-out", *whole)
    none = write_problems(tmp_path / "n.jsonl", 41, 42)
    said = sentence(go, tmp_path / "none", *flags, "--data", none, "--eval-data", held_out)
    assert "problem n-1: prompt of 41 tokens" in said


def test_a_card_that_is_full_is_said_with_who_may_be_on_it(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore of it")
    monkeypatch.setattr(tf.PreTrainedModel, "to", full)
    said = sentence(policy.load_model, str(run.TOY))
    assert "no room" in said and "nvidia-smi" in said and "internet" not in said


# ---------------------------------------------------------------- 2. the toy and the tests

def test_the_toy_is_sampled_on_the_cpu_of_a_machine_with_a_gpu(on_cuda, monkeypatch, tmp_path):
    devices, prepare = [], HFSampler.__init__
    monkeypatch.setattr(HFSampler, "__init__", lambda self, model, *more: (
        devices.append((model.device.type, model.dtype)) or prepare(self, model, *more)))
    sample.main(["--n", "2", "--limit", "2", "--out", str(tmp_path / "x.jsonl")])
    assert devices == [("cpu", torch.float32)]


def test_the_tests_do_not_see_a_gpu_and_those_of_a_gpu_say_why_they_skip():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no CUDA GPU: these run with make test-gpu" in done.stdout


# ---------------------------------------------------------------- 3. no padding mask

HYBRID = tf.Qwen3NextConfig(
    **COMMON, layer_types=["linear_attention", "full_attention"], head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, num_experts=0, mlp_only_layers=[0, 1])


def rollouts_of(lengths, vocabulary, seed=0):
    """Answers of random tokens to prompts of four."""
    rng = random.Random(seed)
    ids = [tuple(rng.randrange(2, vocabulary) for _ in range(length)) for length in lengths]
    return [Rollout(row[:4], row[4:], (-3.0,) * (len(row) - 4), "", False) for row in ids]


def learned(model, rollouts):
    """Log-probabilities, and the gradient of a weighted sum of them."""
    model.zero_grad()
    logprobs, _ = policy.token_logprobs(model, rollouts, 0.7)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).mean().backward()
    return logprobs.detach(), flat(gradients(model))


def masked(backbone, rollouts):
    """As `token_logprobs` would call it with a padding mask."""
    lengths = torch.tensor([policy.length(r) for r in rollouts])  # (B,)
    mask = (torch.arange(lengths.max() - 1)[None] < lengths[:, None]).long()  # (B, L - 1)
    original = backbone.forward
    backbone.forward = lambda **given: original(attention_mask=mask, **given)


@pytest.mark.parametrize("kind", ["toy", "qwen2", "mistral", "lfm2", "linear attention"])
def test_a_padding_mask_would_change_nothing(tmp_path, kind):
    """Mistral's window is 5; lfm2's convolutions and linear attention see padding at the end."""
    if kind == "toy":
        model, _ = policy.load_model(str(run.TOY))
    else:
        torch.manual_seed(0)
        config = HYBRID if kind == "linear attention" else CONFIGS[kind]
        model = tf.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    model = with_adapter(model)
    rollouts = rollouts_of((12, 20, 17, 28), 12)
    logprobs, gradient = learned(model, rollouts)
    masked(model.get_base_model().base_model, rollouts)
    with_mask, expected = learned(model, rollouts)
    assert torch.equal(logprobs, with_mask)
    assert (gradient - expected).abs().max() <= 5e-7 * expected.abs().max()


def test_attention_is_asked_for_as_flash_attention_can_do_it(monkeypatch):
    """No mask, causal, and keys and values not repeated for each query head."""
    asked, original = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *given, **named: asked.append(named) or original(*given, **named))
    model = make_qwen(torch.float32, layers=1)
    learned(model, rollouts_of((12, 20, 17), 64))
    [given] = asked
    assert given["attn_mask"] is None and given["is_causal"] and given["enable_gqa"]


# ---------------------------------------------------------------- 4. the adapter in 16 bits

def make_qwen(dtype, layers=4):
    """Qwen2.5's shape in small: the same rounded weights, and an adapter that does something."""
    torch.manual_seed(0)
    config = tf.Qwen2Config(
        vocab_size=64, hidden_size=384, intermediate_size=2240, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True, eos_token_id=1)
    base = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return with_adapter(base.to(dtype).requires_grad_(False), rank=16, std=0.02)


@pytest.fixture
def as_before(monkeypatch):
    """The adapter in float32 beside a base of 16 bits, as PEFT leaves it."""
    own = policy.LoraLinear.forward

    def switch(on):
        monkeypatch.setattr(policy.LoraLinear, "forward", lora.Linear.forward if on else own)
        monkeypatch.setattr(policy, "precision", lambda model: torch.autocast(
            "cpu", torch.bfloat16, model.dtype == torch.bfloat16 and not on))
    return switch


def kept_bytes(model, rollouts) -> int:
    """What a forward pass of the backbone keeps for the gradient, parameters left out."""
    held, own = {}, {p.data_ptr() for p in model.parameters()}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        logprobs, _ = policy.token_logprobs(model, rollouts, 1.0)
    assert logprobs.requires_grad
    return sum(held.values())


def test_fewer_activations_are_kept(as_before):
    model, rollouts, kept = make_qwen(torch.bfloat16, 2), rollouts_of([256] * 4, 64), []
    for before in (True, False):
        as_before(before)
        kept.append(kept_bytes(model, rollouts))
    assert kept[1] <= 0.77 * kept[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_float32s_and_stays_in_float32(recompute):
    rollouts = rollouts_of((60, 90, 40, 75), 64)
    _, exact = learned(make_qwen(torch.float32), rollouts)
    model = make_qwen(torch.bfloat16)
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    logprobs, found = learned(model, rollouts)
    assert logprobs.dtype == found.dtype == torch.float32
    assert {p.dtype for p in policy.trainable(model).values()} == {torch.float32}
    assert torch.cosine_similarity(found.double(), exact.double(), dim=0) >= 0.9999
    kept = make_qwen(torch.bfloat16)
    assert torch.equal(learned(kept, rollouts)[1], found)  # recomputed, to the bit


def test_the_optimizer_stays_in_float32():
    model, weights = make_qwen(torch.bfloat16, layers=1), torch.ones(3)
    rollouts = drawn(model)[:3]
    learner = policy.Learner(model, 1e-3, 1.0, 500)
    assert learner.update(rollouts, weights)["grad_norm"] > 0
    assert {value.dtype for state in learner.optimizer.state.values()
            for value in state.values()} == {torch.float32}


def drawn(model):
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    groups = HFSampler(model, tokenizer, [1], 1.0, 40).generate([(3, 4, 5, 6), (7, 8)], 12, 0)
    return [rollout for group in groups for rollout in group]


def test_the_sampler_agrees_as_it_did(as_before):
    """And reports what the learner finds, both with the adapter in 16 bits."""
    model, gaps = make_qwen(torch.bfloat16), []
    for before in (True, False):
        as_before(before)
        rollouts = drawn(model)
        with torch.no_grad():
            logprobs, _ = policy.token_logprobs(model, rollouts, 1.0)
        gaps.append((logprobs - policy.sampled_logprobs(rollouts)).abs().mean().item())
    assert 0 < gaps[1] < 1.1 * gaps[0] and gaps[1] < 0.02


def test_in_float32_nothing_is_rounded():
    model = make_qwen(torch.float32, layers=1)
    with policy.precision(model):
        assert not torch.is_autocast_enabled("cpu")
        assert model(torch.arange(9)[None]).logits.dtype == torch.float32


# ---------------------------------------------------------------- 5. gpu_check

def test_the_parts_of_gpu_check_run_in_small(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(policy, "token_logprobs", policy.token_logprobs)  # "memory" replaces it
    ours = torch.__version__.split("+")[0]
    assert gpu_check.machine("small")["torch"].startswith(ours)
    for swap in gpu_check.agree("small", "hf", "4-bit")["swaps"]:
        assert swap["logprob_gap_mean"] < 0.01 and swap["adapter_arrived"]
    assert gpu_check.learn("small", 48, "bf16", "kept")["of_matmul"] > 0
    steps = gpu_check.train("small", "hf")["steps"]
    assert len(steps) == 3 and sum(step["learned_tokens"] for step in steps) > 0
    found = gpu_check.memory("small")
    assert found["fits_at"] == found["began_at"] // 4 and found["gradient_off"] < 1e-6


def test_a_part_that_fails_or_lacks_vllm_ends_no_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "make_model", lambda shape: None)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "parts_of", lambda shape: iter(
        [("nonsense", {}), ("agree", {"sampler": "vllm", "bits": "bf16"}), ("machine", {})]))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--small", "--out", str(out)])
    with pytest.raises(SystemExit, match="1 of 3 parts failed"):
        gpu_check.main()
    assert [("failed" in row, "said" in row) for row in json.loads(out.read_text())] == [
        (True, False), (False, True), (False, True)]
    said = capsys.readouterr().out.splitlines()
    assert "KeyError: 'nonsense'" in said[0] and "vLLM is not installed" in said[1]


# ---------------------------------------------------------------- on a GPU (make test-gpu)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: these run with "
                    "make test-gpu")
def test_everything_that_gpu_check_looks_at_in_small(tmp_path):
    out = tmp_path / "gpu.json"
    subprocess.run([sys.executable, "benchmarks/gpu_check.py", "--small", "--out", str(out)],
                   cwd=ROOT, check=True)
