"""Proof that the learner is exactly on-policy and that a checkpoint is all there is to know about it.

1. Log-probabilities are those of log_softmax(logits / T), row by row, end token included, pad token or not, for
   several architectures; running the head in chunks changes neither them nor their gradient.
2. The gradient of an update is that of the full softmax by autograd, whatever the micro-batch size; rows of weight 0
   may be left out bit for bit; at k = 1 a step is the plain policy gradient bit for bit; bad numbers change nothing.
3. A fresh adapter changes nothing; a checkpoint goes on bit for bit, is plain PEFT, holds no pickle and appears whole.
4. What a user may call a model resolves; what cannot be trained is refused in one sentence.
5. A 4-bit policy is its dequantised copy to the bit, gradient included; 8-bit AdamW resumes to the bit.
6. Recomputed activations and a rehearsal change no gradient and no parameter; too little memory is said in one sentence.
"""

import json
import random
from functools import cache

import pytest
import torch
import transformers as tf
from peft import PeftModel

import policy
import train
from policy import BadNumbers, resolve_model, token_logprobs, trainable
from sample import Rollout
from tasks import UserError
from toy.pretrain import make_tokenizer

COMMON = dict(vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
              max_position_embeddings=48, initializer_range=0.3, bos_token_id=None, eos_token_id=1)
CONFIGS = {
    "qwen2": tf.Qwen2Config(**COMMON, pad_token_id=1),            # the pad token is the end token
    "llama": tf.LlamaConfig(**COMMON, pad_token_id=0), "gpt-neox": tf.GPTNeoXConfig(**COMMON, pad_token_id=0),
    "opt": tf.OPTConfig(**COMMON, pad_token_id=0, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3),
    "gpt2": tf.GPT2Config(vocab_size=23, n_embd=32, n_layer=2, n_head=2, n_positions=48, bos_token_id=None, eos_token_id=1, pad_token_id=0),
    "lfm2": tf.Lfm2Config(**COMMON, pad_token_id=0, layer_types=["conv", "full_attention"]),       # a convolution and no plain cache
    "gemma2": tf.Gemma2Config(**COMMON, pad_token_id=0, head_dim=16, final_logit_softcapping=2.0),
    "granite": tf.GraniteConfig(**COMMON, pad_token_id=0, logits_scaling=8.0),
    "cohere": tf.CohereConfig(**COMMON, pad_token_id=0, logit_scale=0.0625),
}
ARCHITECTURES = ["qwen2", "llama", "gpt-neox", "opt", "gpt2", "lfm2"]


def save_model(kind, folder):
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder)
    tokenizer = make_tokenizer()
    if CONFIGS[kind].pad_token_id == 1:
        tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda kind: save_model(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def learner(folder):
    """A tiny policy whose adapter already does something."""
    def make(kind="qwen2"):
        model = policy.add_lora(policy.load_model(folder(kind))[0], rank=4, alpha=8, seed=0)
        torch.manual_seed(1)
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model
    return make


def make_rollouts(count, seed=0):
    """Prompts and answers of many lengths, with end and pad tokens in odd places."""
    rng = random.Random(seed)
    draw = lambda low, high: tuple(rng.randrange(23) for _ in range(rng.randrange(low, high)))
    return [Rollout(draw(1, 9), completion := draw(0, 12) + (rng.choice((1, 1, 5)),), (-3.0,) * len(completion), "", completion[-1] == 1)
            for _ in range(count)]


def reference(model, rollout, temperature):
    """One row, no padding, the whole softmax."""
    ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]]), len(rollout.prompt_ids)
    logprobs = (model(input_ids=ids).logits[0, start - 1:-1] / temperature).log_softmax(-1)
    return logprobs[range(len(rollout.completion_ids)), list(rollout.completion_ids)]


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model).values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)


def step(model, optimizer, rollouts, weights, budget=60, **more):
    return policy.update(model, optimizer, rollouts, torch.as_tensor(weights), micro_batch_tokens=budget,
                         **{"num_samples": len(rollouts), "temperature": 0.7, "max_grad_norm": float("inf"), **more})


def values(model):
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(77), b[name].nan_to_num(77)) for name in a)


def assert_close(a, b, tolerance):
    scale = max(value.abs().max() for value in b.values())
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max() for name in a) <= tolerance * scale


# ---------------------------------------------------------------- 1. log-probabilities

@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_full_softmax_row_by_row(learner, kind, temperature):
    model, rollouts = learner(kind), make_rollouts(12)
    logprobs, rows = token_logprobs(model, rollouts, temperature)
    expected = [reference(model, rollout, temperature) for rollout in rollouts]
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=2e-5)
    assert rows.tolist() == [i for i, rollout in enumerate(rollouts) for _ in rollout.completion_ids]      # the end token too
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("at_once", [1, 23, 3 * 23, 50 * 23])
def test_a_chunked_head_changes_neither_values_nor_gradients(learner, monkeypatch, at_once):
    model, rollouts, results = learner(), make_rollouts(12), []
    for size in (policy.LOGITS_AT_ONCE, at_once):
        monkeypatch.setattr(policy, "LOGITS_AT_ONCE", size)
        model.zero_grad()
        logprobs, _ = token_logprobs(model, rollouts, 0.7)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        results.append((logprobs.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)
    assert_close(results[1][1], results[0][1], 1e-5)


# ---------------------------------------------------------------- 2. one update

@pytest.mark.parametrize("kind", ["qwen2", "gpt-neox"])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_the_gradient_is_that_of_the_full_softmax_for_every_micro_batch_size(learner, kind, cap):
    model, rollouts = learner(kind), make_rollouts(12)
    weights = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, loss = values(model), 0
    for rollout, weight in zip(rollouts, weights):
        logprobs = reference(model, rollout, 0.7)
        ratio = (logprobs.detach() + 3.0).exp().clamp(max=cap) if cap else 1.0
        loss = loss - (weight * ratio * logprobs).sum() / 48      # 48: this is a part of a step of 48 samples
    loss.backward()
    expected, norm = gradients(model), torch.cat([p.grad.flatten() for p in trainable(model).values()]).norm().item()
    for budget in (1, 40, 90, 10**6):
        model.load_state_dict(before, strict=False)
        stats = step(model, optimizer_of(model), rollouts, weights, budget, num_samples=48, importance_cap=cap)
        assert_close(gradients(model), expected, 1e-5)
        assert stats["grad_norm"] == pytest.approx(norm, rel=1e-5) and stats["learned_tokens"] == sum(len(r.completion_ids) for r in rollouts)


def test_leaving_out_rows_of_weight_0_changes_no_bit(learner):
    model, rollouts = learner(), make_rollouts(10)
    weights = torch.tensor([0, 1.5, 0, 0, -2, 0, 0.25, 0, 0, 3])
    for i in sorted(range(10), key=lambda i: -len(rollouts[i].prompt_ids + rollouts[i].completion_ids)):   # longest first, as `update` goes
        (-(weights[i] * token_logprobs(model, [rollouts[i]], 0.7)[0]).sum() / 10).backward()
    with_zeros = gradients(model)
    stats = step(model, optimizer_of(model), rollouts, weights, budget=1)
    assert same(gradients(model), with_zeros)
    assert stats["learned_tokens"] == sum(len(r.completion_ids) for r, w in zip(rollouts, weights) if w)


@pytest.mark.parametrize("objective", ["passk", "maxk", "groupmax"])
def test_at_k_1_a_step_is_the_plain_policy_gradient_bit_for_bit(learner, objective):
    ours, plain, rollouts = learner(), learner(), make_rollouts(8)
    adam, own_adam = optimizer_of(ours), torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-2, (0.9, 0.95), weight_decay=0.0)
    for rewards in (torch.tensor([[1., 0, 1, 0], [0, 0, 0, 1]]), torch.tensor([[0., 1, 1, 1], [1, 1, 1, 0]])):
        weights = train.weigh(rewards, (1,), objective, "none")
        step(ours, adam, rollouts, weights.flatten(), budget=1)
        own_adam.zero_grad()
        for rollout, reward in sorted(zip(rollouts, rewards.flatten()), key=lambda pair: -len(pair[0].prompt_ids + pair[0].completion_ids)):
            ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]]), len(rollout.prompt_ids)
            qwen = plain.base_model.model
            logits = qwen.lm_head(qwen.model(ids).last_hidden_state[0, start - 1:-1]) / 0.7                 # (T, V)
            logprob = logits[range(len(logits)), ids[0, start:]] - logits.logsumexp(-1)                     # (T,)
            (-reward * logprob.sum() / 8).backward()                                                        # REINFORCE
        own_adam.step()
        assert same(values(ours), values(plain))
    assert not same(values(ours), values(learner()))


def test_the_end_token_is_learned(learner):
    model, only_end = learner(), [Rollout((4, 5), (1,), (-3.0,), "", True)]
    before = token_logprobs(model, only_end, 1.0)[0].item()
    step(model, optimizer_of(model), only_end, [1.0], temperature=1.0)
    assert token_logprobs(model, only_end, 1.0)[0].item() > before + 1e-3


def test_the_gradient_norm_is_clipped_and_reported_unclipped(learner):
    model, rollouts = learner(), make_rollouts(4)
    stats = step(model, optimizer_of(model), rollouts, [100.0] * 4, max_grad_norm=0.5)
    assert stats["grad_norm"] > 1 and torch.cat([g.flatten() for g in gradients(model).values()]).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("poison", ["nan weight", "inf weight", "nan parameter", "nan gradient"])
def test_bad_numbers_change_nothing_at_all(learner, poison):
    model, untouched, rollouts, weights = learner(), learner(), make_rollouts(6), torch.ones(6)
    optimizer, other = optimizer_of(model), optimizer_of(untouched)
    step(model, optimizer, rollouts, weights), step(untouched, other, rollouts, weights)
    parameter = next(iter(trainable(model).values()))
    healthy, bad = parameter.detach().clone(), torch.tensor([1, 1, 1, 1, 1, {"nan weight": float("nan"), "inf weight": float("inf")}.get(poison, 1)])
    hook = parameter.register_hook(lambda g: g * float("nan" if poison == "nan gradient" else 1))
    parameter.data[0, 0] = float("nan") if poison == "nan parameter" else healthy[0, 0]
    before = values(model)
    with pytest.raises(BadNumbers, match="nan|inf"):
        step(model, optimizer, rollouts, bad, budget=1)
    assert same(values(model), before)
    hook.remove()
    parameter.data.copy_(healthy)                                 # and the next good step is as if nothing had been
    step(model, optimizer, rollouts, weights), step(untouched, other, rollouts, weights)
    assert same(values(model), values(untouched))


def test_a_step_without_any_weight_changes_nothing(learner):
    model = learner()
    optimizer, before = optimizer_of(model), values(model)
    stats = step(model, optimizer, make_rollouts(6), [0.0] * 6)
    assert same(values(model), before) and not optimizer.state
    assert stats == {"grad_norm": 0.0, "learned_tokens": 0, "logprob_gap_mean": None, "logprob_gap_max": None}


@pytest.mark.parametrize("budget", [1, 17, 64, 300, 10**6])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = [random.Random(i).randrange(1, 40) for i in range(100)]
    batches = policy.micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    assert len(batches) == 100 if budget == 1 else len(batches) == 1 if budget == 10**6 else len(batches) > 1


# ---------------------------------------------------------------- 3. the adapter and its checkpoints

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_only_it_learns(folder, kind):
    base, model = policy.load_model(folder(kind))[0], policy.add_lora(policy.load_model(folder(kind))[0], rank=4, alpha=8, seed=3)
    ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0))
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable(model).items()) and len(trainable(model)) >= 16
    assert same(values(model), values(policy.add_lora(base, rank=4, alpha=8, seed=3)))


def test_a_checkpoint_goes_on_bit_for_bit(learner, folder, tmp_path):
    model = learner()
    optimizer = optimizer_of(model)
    for i in (1, 2):
        step(model, optimizer, make_rollouts(6, i), torch.ones(6))
    saved = policy.save_checkpoint(tmp_path, 2, model, optimizer, {"skipped": 1})
    fresh = policy.add_lora(policy.load_model(folder("qwen2"))[0], rank=4, alpha=8, seed=9)
    fresh_optimizer = optimizer_of(fresh)
    assert policy.load_checkpoint(saved, fresh, fresh_optimizer) == {"step": 2, "skipped": 1} and same(values(fresh), values(model))
    for i in (3, 4):
        step(model, optimizer, make_rollouts(6, i), torch.ones(6)), step(fresh, fresh_optimizer, make_rollouts(6, i), torch.ones(6))
        assert same(values(fresh), values(model))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_is_plain_peft_and_holds_no_pickle(learner, folder, tmp_path, steps):
    model, ids = learner(), torch.arange(8)[None]
    optimizer = optimizer_of(model)
    for i in range(steps):
        step(model, optimizer, make_rollouts(6, i), torch.ones(6))
    saved = policy.save_checkpoint(tmp_path, steps, model, optimizer, {"skipped": 0})       # step 0: an optimizer without moments
    assert {path.suffix for path in saved.iterdir() if path.name != "SHA256SUMS"} <= {".safetensors", ".json", ".md"}
    base = tf.AutoModelForCausalLM.from_pretrained(folder("qwen2"))
    assert torch.equal(PeftModel.from_pretrained(base, saved)(ids).logits, model(ids).logits)
    assert torch.equal(policy.load_model(str(saved))[0](ids).logits, model(ids).logits)
    loaded, _ = policy.load_model(str(saved), trainable_adapter=True)
    assert policy.load_checkpoint(saved, loaded, optimizer_of(loaded))["step"] == steps and same(values(loaded), values(model))


def test_a_checkpoint_appears_whole_or_not_at_all(learner, tmp_path, monkeypatch):
    model = learner()
    first = policy.save_checkpoint(tmp_path, 3, model, optimizer_of(model), {})
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(policy, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        policy.save_checkpoint(tmp_path, 9, model, optimizer_of(model), {})
    assert policy.newest_checkpoint(tmp_path) == first and {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert policy.save_checkpoint(tmp_path, 9, model, optimizer_of(model), {}) == policy.newest_checkpoint(tmp_path)       # over the rubble
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000009"]
    assert policy.newest_checkpoint(tmp_path / "none") is None


# ---------------------------------------------------------------- 4. names and refusals

@pytest.mark.parametrize("name, base", [
    ("toy", str(policy.TOY)), ("Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"), ("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("someone/some-model", "someone/some-model")])
def test_a_name_resolves_to_its_hub_id(name, base):
    assert resolve_model(name) == (base, None)


def test_a_folder_resolves_to_its_base_and_adapter(learner, folder, tmp_path):
    base, model = folder("qwen2"), learner()
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"model": base}}))
    with pytest.raises(UserError, match="no whole checkpoint"):
        resolve_model(str(tmp_path))
    one, two = (policy.save_checkpoint(tmp_path, i, model, optimizer_of(model), {}) for i in (99, 100))
    assert resolve_model(base) == (base, None) and resolve_model(str(one)) == (base, one) and resolve_model(str(tmp_path)) == (base, two)
    (tmp_path / "again").mkdir()                                  # a run that went on from the run above
    (tmp_path / "again" / "config.json").write_text(json.dumps({"flags": {"model": str(tmp_path)}}))
    third = policy.save_checkpoint(tmp_path / "again", 5, model, optimizer_of(model), {})
    assert resolve_model(str(tmp_path / "again")) == (base, third)


@pytest.mark.parametrize("name, said", [("tojs", "'tojs' is unknown, did you mean 'toy'"), ("Qven2.5", "did you mean 'Qwen'"), ("xyz", "'xyz' is unknown; give 'toy'")])
def test_an_unknown_model_is_refused_with_the_nearest(name, said):
    with pytest.raises(UserError, match=said):
        resolve_model(name)


@pytest.mark.parametrize("spoil", ["no weights", "only a pickle", "no tokenizer", "no config", "config of nothing", "cut off", "other shapes",
                                   "weights missing", "empty"])
def test_a_folder_that_is_no_whole_model_is_refused_in_one_sentence(folder, tmp_path, spoil):
    for path in map(policy.Path, policy.Path(folder("qwen2")).iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = policy.load_file(weights)
    if spoil in ("no weights", "only a pickle", "empty"):
        weights.unlink()
    if spoil == "only a pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    if spoil in ("no tokenizer", "empty"):
        (tmp_path / "tokenizer.json").unlink(), (tmp_path / "tokenizer_config.json").unlink()
    if spoil in ("no config", "empty"):
        config.unlink()
    if spoil == "config of nothing":
        config.write_text("{}")
    if spoil == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    if spoil == "other shapes":
        policy.save_file({name: tensor[..., :4].contiguous() for name, tensor in tensors.items()}, weights, {"format": "pt"})
    if spoil == "weights missing":
        policy.save_file(dict(list(tensors.items())[:5]), weights, {"format": "pt"})
    with pytest.raises(UserError) as refused:
        policy.load_model(str(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_logits_that_are_changed_after_the_head_are_refused(folder, kind):
    with pytest.raises(UserError, match=f"{kind} models change their logits"):
        policy.load_model(folder(kind))


def test_a_model_that_is_not_here_is_refused_with_what_was_tried():
    with pytest.raises(UserError, match="Qwen/Qwen2.5-Math-1.5B") as refused:
        policy.load_model("Qwen2.5-Math-1.5B")
    assert "local folder" in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------- 5. fewer bits

def toy_policy(source="toy", load_in_4bit=False, rank=8):
    model, tokenizer = policy.load_model(str(source), "float32", load_in_4bit=load_in_4bit)
    model = policy.add_lora(model, rank, 32, seed=0)
    torch.manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, tokenizer


def toy_rollouts(count=6):
    rng = random.Random(0)
    answers = [tuple(rng.randrange(2, 17) for _ in range(rng.randrange(2, 8))) + (1,) for _ in range(count)]
    return [Rollout(tuple(rng.randrange(2, 17) for _ in range(8)), answer, (-3.0,) * len(answer), "", True) for answer in answers]


def test_a_4bit_policy_is_its_dequantised_copy_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "HF_HOME", tmp_path)
    model, tokenizer = toy_policy(load_in_4bit=True)
    with torch.no_grad():
        token_logprobs(model, toy_rollouts(), 1.0)              # bitsandbytes may repack weights when it sees an inference
    copy = policy.dequantised_copy(model, tokenizer)
    plain, original = toy_policy(copy)[0], toy_policy()[0]
    for each in (model, plain, original):
        each.load_state_dict({name: value.detach() for name, value in trainable(model).items()}, strict=False)
        token_logprobs(each, toy_rollouts(), 1.0)[0].sum().backward()
    found = [torch.cat([g.flatten() for g in gradients(each).values()]) for each in (model, plain, original)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], rtol=1e-2)
    quantised = [m for m in model.modules() if hasattr(m, "quant_state")]
    assert len(quantised) == 28 and all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in quantised)


def test_the_dequantised_copy_is_written_once_and_named_after_its_content(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(policy, "HF_HOME", tmp_path)
    first = policy.dequantised_copy(*policy.load_model("toy", "float32", load_in_4bit=True))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert policy.dequantised_copy(*toy_policy(load_in_4bit=True)) == first and (first / "model.safetensors").stat().st_mtime_ns == written
    other = policy.dequantised_copy(*policy.load_model("toy", "bfloat16", load_in_4bit=True))
    assert other != first and sorted(path.name for path in (tmp_path / "rspo").iterdir()) == sorted([first.name, other.name])


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_8bit_adamw_resumes_to_the_bit(tmp_path, load_in_4bit):
    learn = lambda model, optimizer: step(model, optimizer, toy_rollouts(), torch.ones(6))
    model, optimizer = toy_policy(load_in_4bit=load_in_4bit, rank=64)[0], None
    optimizer = policy.make_optimizer(model, 1e-2, eight_bit=True)
    for _ in range(3):
        learn(model, optimizer)
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    saved = policy.save_checkpoint(tmp_path, 3, model, optimizer, {})
    fresh = toy_policy(load_in_4bit=load_in_4bit, rank=64)[0]
    fresh_optimizer = policy.make_optimizer(fresh, 1e-2, eight_bit=True)
    policy.load_checkpoint(saved, fresh, fresh_optimizer)
    for _ in range(2):
        learn(model, optimizer), learn(fresh, fresh_optimizer)
        assert same(values(fresh), values(model))


# ---------------------------------------------------------------- 6. memory

@pytest.mark.parametrize("kind", ["qwen2", "llama", "opt", "gpt2"])
def test_recomputed_activations_give_the_same_gradient_from_less_memory(learner, kind):
    kept, recomputed, rollouts = learner(kind), learner(kind), make_rollouts(6)
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (kept, recomputed):
        step(model, optimizer_of(model), rollouts, torch.linspace(-1, 2, 6))
    assert same(gradients(kept), gradients(recomputed)) and not any(m.training for m in recomputed.modules())


def test_the_memory_estimate_knows_what_recomputing_saves():
    kept, recomputed = (toy_policy(rank=8)[0] for _ in range(2))
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = [policy.learning_bytes(model, 1000) for model in (kept, recomputed)]
    assert parts[1]["activations"] < 0.6 * parts[0]["activations"] and parts[0]["weights"] == parts[1]["weights"]
    twice = policy.learning_bytes(kept, 2000)
    assert twice["activations"] == pytest.approx(2 * parts[0]["activations"], rel=1e-6)


def test_a_rehearsal_changes_nothing(learner):
    model = learner()
    before, state = values(model), torch.get_rng_state()
    policy.rehearse(model, prompt=8, answer=12, rows=30, micro_batch_tokens=100)
    assert same(values(model), before) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not any(m.training for m in model.modules())


def test_too_little_memory_is_said_before_the_first_step_with_the_flags_and_the_estimate(learner, monkeypatch):
    def exhausted(model, rollouts, temperature):
        assert len(rollouts) == 5 and all(len(r.prompt_ids) == 8 and len(r.completion_ids) == 12 for r in rollouts)
        raise torch.OutOfMemoryError("CUDA out of memory")
    model = learner()
    monkeypatch.setattr(policy, "token_logprobs", exhausted)
    with pytest.raises(UserError, match=r"5 answers of 20 tokens.*estimated .* GiB.*--micro-batch-tokens \(100\).*--max-new-tokens \(12\)"):
        policy.rehearse(model, prompt=8, answer=12, rows=30, micro_batch_tokens=100)
