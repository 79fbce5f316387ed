"""Proof that the learner is exactly on-policy and that a checkpoint holds all there is to it.

1. Log-probabilities are those of log_softmax(logits / T), row by row, end token included, for
   several architectures; running the head in chunks changes neither them nor their gradient.
2. The gradient of an update is that of the full softmax by autograd, for every micro-batch; at
   k = 1 a step is the plain policy gradient bit for bit; bad numbers change nothing.
3. Out of memory, the micro-batch is halved until it fits, with the gradient of a small one.
4. A sampler of another policy is refused before a parameter moves, also one that the adapter
   did not reach where rounding hides it; a sound one never is.
5. A fresh adapter changes nothing; nothing drops out; recomputed activations change no gradient.
   Our LoRA layer is PEFT's; recomputing leaves out its last product.
6. A checkpoint goes on bit for bit, is plain PEFT, holds no pickle and appears whole.
7. What a user may call a model resolves; what cannot be trained is refused in one sentence.
8. A 4-bit policy is its dequantised copy to the bit, gradient included (PEFT's layer in both).
"""

import copy
import json
import random
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import rspo
from lib import policy, run
from lib.cli import UserError
from lib.policy import BadNumbers, Learner, length, token_logprobs, trainable
from sample import HFSampler, Rollout

NAN, INF = float("nan"), float("inf")
COMMON = {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 48,
          "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
CONFIGS = {
    "qwen2": tf.Qwen2Config(**COMMON | {"pad_token_id": 1}),  # the pad token is the end token
    "llama": tf.LlamaConfig(**COMMON),
    "mistral": tf.MistralConfig(**COMMON, sliding_window=5),  # shorter than the sequences
    "gpt-neox": tf.GPTNeoXConfig(**COMMON),
    "opt": tf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3),
    "gpt2": tf.GPT2Config(**COMMON),
    "lfm2": tf.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),  # no plain cache
    # these change their logits after the head
    "gemma2": tf.Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=2.0),
    "granite": tf.GraniteConfig(**COMMON, logits_scaling=8.0),
    "cohere": tf.CohereConfig(**COMMON, logit_scale=0.0625),
    # PEFT puts no adapter on this one
    "mamba": tf.MambaConfig(**COMMON, state_size=4),
}
ARCHITECTURES = ["qwen2", "llama", "mistral", "gpt-neox", "opt", "gpt2", "lfm2"]


def save_model(kind, folder):
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(run.TOY)
    if CONFIGS[kind].pad_token_id == 1:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda kind: str(run.TOY) if kind == "toy" else save_model(
        kind, tmp_path_factory.mktemp(kind)))


def with_adapter(model, rank=4, std=0.025):
    """The model with an adapter that already does something."""
    model = policy.add_lora(model, rank, seed=0)
    torch.manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture
def learner(folder):
    """A tiny policy, ready to be learned by `adam`."""
    return lambda kind="qwen2", dtype="float32", std=0.025: with_adapter(
        policy.load_model(folder(kind), dtype=dtype)[0], std=std)


@pytest.fixture(autouse=True)
def unclipped(monkeypatch):
    monkeypatch.setattr(policy, "MAX_GRAD_NORM", INF)


def adam(model, **settings):
    defaults = {"lr": 1e-2, "temperature": 0.7, "micro_batch_tokens": 60}
    return Learner(model, **defaults | settings)


def make_rollouts(count, seed=0):
    """Prompts and answers of many lengths, with end and pad tokens in odd places."""
    rng = random.Random(seed)
    draw = lambda low, high: tuple(rng.randrange(23) for _ in range(rng.randrange(low, high)))
    answers = [(draw(1, 9), draw(0, 12) + (rng.choice((1, 1, 5)),)) for _ in range(count)]
    return [Rollout(prompt, ids, (-3.0,) * len(ids), "", ids[-1] == 1) for prompt, ids in answers]


def told(model, rollouts, temperature=0.7, noise=0.0, seed=0):
    """The rollouts with the log-probabilities that a sampler of `model` reports."""
    with torch.no_grad():
        logprobs = token_logprobs(model, rollouts, temperature)[0]
    rounding = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(seed))
    values = iter((logprobs + noise * rounding).tolist())
    return [replace(r, logprobs=tuple(next(values) for _ in r.logprobs)) for r in rollouts]


def step(learner, rollouts, weights):
    rollouts = told(learner.model, rollouts, learner.temperature)
    return learner.update(rollouts, torch.as_tensor(weights))


def reference(model, rollout, temperature=0.7):
    """One row, no padding, the whole softmax."""
    start = len(rollout.prompt_ids)
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    logprobs = (model(input_ids=ids).logits[0, start - 1:-1] / temperature).log_softmax(-1)
    return logprobs[range(len(rollout.completion_ids)), list(rollout.completion_ids)]


def longest_first(rollouts, *others):
    """As `update` goes through them with a micro-batch of one."""
    return sorted(zip(rollouts, *others), key=lambda row: -length(row[0]))


def values(model):
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name].nan_to_num(77), b[name].nan_to_num(77)) for name in a)


def assert_close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    assert (flat(a) - flat(b)).abs().max() <= tolerance * flat(b).abs().max()


# ---------------------------------------------------------------- 1. log-probabilities

@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_full_softmax(learner, kind, temperature):
    model, rollouts = learner(kind), make_rollouts(12)
    logprobs, rows = token_logprobs(model, rollouts, temperature)
    expected = [reference(model, rollout, temperature) for rollout in rollouts]
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=2e-5)
    assert rows.tolist() == [i for i, r in enumerate(rollouts) for _ in r.completion_ids]
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
    (whole, expected), (chunked, found) = results
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5)
    assert_close(found, expected)


# ---------------------------------------------------------------- 2. one update

@pytest.mark.parametrize("kind", ["qwen2", "gpt-neox"])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_the_gradient_is_that_of_the_full_softmax_for_every_micro_batch(
        learner, monkeypatch, kind, cap):
    monkeypatch.setattr(policy, "GAP_ALLOWED", {torch.float32: 9.0})  # the ratios are far from 1
    model = learner(kind)
    rollouts = told(model, make_rollouts(12), noise=0.5)
    weights = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    weights[::4] = 0  # these count in the mean all the same
    before, loss, ratios = values(model), 0, []
    for rollout, weight in zip(rollouts, weights):
        logprobs = reference(model, rollout)
        ratios.append((logprobs.detach() - torch.tensor(rollout.logprobs)).exp())
        ratio = ratios[-1].clamp(max=cap) if cap else 1.0
        loss = loss - (weight * ratio * logprobs).sum() / 12
    assert torch.cat(ratios).min() < 0.8 and torch.cat(ratios).max() > 1.5
    loss.backward()
    expected = gradients(model)
    for budget in (1, 40, 90, 10**6):
        model.load_state_dict(before, strict=False)
        stats = adam(model, micro_batch_tokens=budget, cap=cap).update(rollouts, weights)
        assert_close(gradients(model), expected)
        assert stats["grad_norm"] == pytest.approx(flat(expected).norm().item(), rel=1e-5)
        assert stats["learned_tokens"] == sum(
            len(r.completion_ids) for r, weight in zip(rollouts, weights) if weight)


def test_leaving_out_rows_of_weight_0_changes_no_bit(learner):
    model, rollouts = learner(), make_rollouts(10)
    weights = torch.tensor([0, 1.5, 0, 0, -2, 0, 0.25, 0, 0, 3])
    for rollout, weight in longest_first(rollouts, weights):
        (-(weight * token_logprobs(model, [rollout], 0.7)[0]).sum() / 10).backward()
    with_zeros = gradients(model)
    step(adam(model, micro_batch_tokens=1), rollouts, weights)
    assert same(gradients(model), with_zeros)


@pytest.mark.parametrize("cap, noise", [(0.0, 0.0), (1.5, 0.0), (1.5, 0.5)])
def test_equal_answers_are_learned_once_with_the_same_gradient(learner, monkeypatch, cap, noise):
    monkeypatch.setattr(policy, "GAP_ALLOWED", {torch.float64: 9.0})
    model, distinct = learner().double(), make_rollouts(6)  # so that rounding hides nothing
    rollouts = told(model, distinct * 3)
    if noise:  # the sampler saw equal answers with other chances: only two are equal in all
        rollouts = told(model, distinct * 3, noise=noise)
        rollouts[7] = rollouts[1]
    weights = torch.randn(18, generator=torch.Generator().manual_seed(0))
    weights[[0, 6, 12]] = torch.tensor([1, -1.5, 0.5])  # they cancel
    loss, before = 0, values(model)
    for rollout, weight in zip(rollouts, weights):
        logprobs = reference(model, rollout)
        ratio = (logprobs.detach() - torch.tensor(rollout.logprobs)).exp().clamp(max=cap or INF)
        loss = loss - (weight * (ratio if cap else 1.0) * logprobs).sum() / 18
    loss.backward()
    expected = gradients(model)
    learned = [r for i, r in enumerate(rollouts) if i != 7] if noise else distinct[1:]
    for budget in (1, 60, 10**6):
        model.load_state_dict(before, strict=False)
        stats = adam(model, micro_batch_tokens=budget, cap=cap).update(rollouts, weights)
        assert_close(gradients(model), expected, 1e-6)
        assert stats["learned_tokens"] == sum(len(r.completion_ids) for r in learned)


def test_answers_whose_weights_cancel_are_not_learned(learner):
    ours = adam(learner())
    before = values(ours.model)
    stats = step(ours, make_rollouts(3) * 2, [1.0, 2, -3, -1, -2, 3])
    assert (stats["grad_norm"], stats["learned_tokens"]) == (0.0, 0)
    assert same(values(ours.model), before)


@pytest.mark.parametrize("objective", ["passk", "maxk", "groupmax", "plugin", "reward"])
def test_at_k_1_a_step_is_the_plain_policy_gradient_bit_for_bit(learner, objective):
    ours, plain, rollouts = adam(learner(), micro_batch_tokens=1), learner(), make_rollouts(8)
    own = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-2,
                            (0.9, 0.95), weight_decay=0.0, fused=True)
    for rewards in (torch.tensor([[1., 0, 1, 0], [0, 0, 0, 1]]),
                    torch.tensor([[0., 1, 1, 1], [1, 1, 1, 0]])):
        step(ours, rollouts, rspo.OBJECTIVES[objective](rewards, 1).flatten())
        own.zero_grad()
        for rollout, reward in longest_first(rollouts, rewards.flatten()):
            start = len(rollout.prompt_ids)
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
            qwen = plain.base_model.model
            hidden = qwen.model(ids[:, :-1]).last_hidden_state[0, start - 1:]  # (T, D)
            logits = qwen.lm_head(hidden) / 0.7  # (T, V)
            logprob = logits.log_softmax(-1)[range(len(logits)), ids[0, start:]]  # (T,)
            (-reward * logprob.sum() / 8).backward()  # REINFORCE
        own.step()
        assert same(values(ours.model), values(plain))
    assert not same(values(plain), values(learner()))


def test_the_end_token_is_learned(learner):
    model, only_end = learner(), [Rollout((4, 5), (1,), (-3.0,), "", True)]
    before = token_logprobs(model, only_end, 1.0)[0].item()
    step(adam(model, temperature=1.0), only_end, [1.0])
    assert token_logprobs(model, only_end, 1.0)[0].item() > before + 1e-3


def test_the_gradient_norm_is_clipped_and_reported_unclipped(learner, monkeypatch):
    monkeypatch.setattr(policy, "MAX_GRAD_NORM", 0.5)
    model = learner()
    assert step(adam(model), make_rollouts(4), [100.0] * 4)["grad_norm"] > 1
    assert flat(gradients(model)).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("where, value", [("weight", NAN), ("weight", INF), ("parameter", NAN),
                                          ("gradient", NAN), ("sampler", NAN), ("sampler", -INF)])
def test_bad_numbers_change_nothing_at_all(learner, where, value):
    ours, untouched, rollouts = adam(learner()), adam(learner()), make_rollouts(6)
    for each in (ours, untouched):
        step(each, rollouts, torch.ones(6))
    spoiled, weights = told(ours.model, rollouts), torch.ones(6)
    parameter = next(iter(ours.named.values()))
    healthy = parameter.detach().clone()
    hook = parameter.register_hook(lambda g: g * (value if where == "gradient" else 1))
    if where == "weight":
        weights[5] = value
    if where == "sampler":
        spoiled[5] = replace(spoiled[5], logprobs=(value, *spoiled[5].logprobs[1:]))
    if where == "parameter":
        parameter.data[0, 0] = value
    before = values(ours.model)
    with pytest.raises((BadNumbers, UserError), match="nan|inf") as refused:
        ours.update(spoiled, weights)
    assert same(values(ours.model), before)
    if where == "weight":
        assert refused.value.rollout is spoiled[5]
    hook.remove()
    parameter.data.copy_(healthy)  # and the next good step is as if nothing had been
    for each in (ours, untouched):
        step(each, rollouts, torch.ones(6))
    assert same(values(ours.model), values(untouched.model))


def test_a_step_without_any_weight_changes_nothing(learner):
    ours = adam(learner())
    before = values(ours.model)
    assert ours.update(make_rollouts(6), torch.zeros(6)) == {
        "grad_norm": 0.0, "learned_tokens": 0, "logprob_gap_mean": None, "logprob_gap_max": None}
    assert same(values(ours.model), before)
    assert not ours.optimizer.state


@pytest.mark.parametrize("budget", [1, 17, 64, 300, 10**6])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    rollouts = [Rollout((i,) * random.Random(i).randrange(1, 40), (), (), "", False)
                for i in range(100)]
    batches = policy.micro_batches(rollouts, budget)
    assert sorted(r.prompt_ids[0] for batch in batches for r in batch) == list(range(100))
    assert all(len(batch) * max(map(length, batch)) <= budget
               for batch in batches if len(batch) > 1)
    assert (len(batches) == 100) == (budget == 1)
    assert (len(batches) == 1) == (budget == 10**6)


# ---------------------------------------------------------------- 3. too little memory

def starve(monkeypatch, where, calls):
    """Let these calls of token_logprobs run out of memory, counted where something is learned.

    Returns the size in tokens of every call to come.
    """
    sizes, learned, original = [], [], token_logprobs

    def exhausted(_=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def hungry(model, rollouts, temperature):
        sizes.append(len(rollouts) * max(map(length, rollouts)))
        logprobs, rows = original(model, rollouts, temperature)
        if logprobs.requires_grad:
            learned.append(rollouts)
            if len(learned) in calls:
                exhausted() if where == "forward" else logprobs.register_hook(exhausted)
        return logprobs, rows

    monkeypatch.setattr(policy, "token_logprobs", hungry)
    return sizes


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("calls, left", [([1], 120), ([1, 2, 3], 30), ([1, 3, 6], 30)])
def test_out_of_memory_halves_the_micro_batch_for_good_and_changes_no_bit(
        learner, monkeypatch, capsys, where, calls, left):
    ours, small = adam(learner(), micro_batch_tokens=240), adam(learner(), micro_batch_tokens=left)
    rollouts, weights = told(ours.model, make_rollouts(12)), torch.linspace(-1, 2, 12)
    small.update(rollouts, weights)
    with monkeypatch.context() as patch:
        starve(patch, where, calls)
        ours.update(rollouts, weights)
    assert ours.micro_batch_tokens == left
    assert same(gradients(ours.model), gradients(small.model))
    assert same(values(ours.model), values(small.model))
    assert capsys.readouterr().out.count("out of memory") == len(calls)
    sizes = starve(monkeypatch, where, [])
    assert step(ours, make_rollouts(12, 1), weights) == step(small, make_rollouts(12, 1), weights)
    assert max(sizes) <= left


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_too_little_memory_for_one_answer_is_said_in_one_sentence(learner, monkeypatch, where):
    ours, rollouts = adam(learner()), told(learner(), make_rollouts(6))
    before = values(ours.model)
    starve(monkeypatch, where, range(99))
    with pytest.raises(UserError, match="memory .* one answer .* --max-new-tokens") as refused:
        ours.update(rollouts, torch.ones(6))
    assert "\n" not in str(refused.value)
    assert same(values(ours.model), before) and not ours.optimizer.state


# ---------------------------------------------------------------- 4. the sampler's policy

def refused_untouched(ours, rollouts, said):
    before = values(ours.model)
    with pytest.raises(UserError, match=said) as refused:
        ours.update(rollouts, torch.ones(len(rollouts)))
    assert "\n" not in str(refused.value)
    assert same(values(ours.model), before) and not ours.optimizer.state


@pytest.mark.parametrize("fault", ["temperature", "a step behind", "another base"])
def test_another_policy_is_refused_before_a_parameter_moves(learner, fault):
    ours, rollouts = adam(learner()), make_rollouts(12)
    drawn = told(learner("llama") if fault == "another base" else ours.model, rollouts,
                 1.0 if fault == "temperature" else 0.7)
    if fault == "a step behind":
        step(ours, rollouts, torch.ones(12))
        ours = adam(ours.model)
    refused_untouched(ours, drawn, "disagree by")
    step(ours, rollouts, torch.ones(12))  # the truth is accepted


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_logits_that_are_changed_after_the_head_are_refused_at_the_first_step(learner, kind):
    model = learner(kind)
    tokenizer = tf.AutoTokenizer.from_pretrained(run.TOY)
    [group] = HFSampler(model, tokenizer, [1], 0.7, 12).generate([(4, 5, 6)], 8, seed=0)
    refused_untouched(adam(model), group, "disagree by .* logits")


@pytest.fixture(scope="module")
def answers():
    """Answers of the toy to a few numbers, by seed."""
    model, tokenizer = policy.load_model(str(run.TOY), dtype="float32")
    prompts = [tuple(tokenizer(f"{number}:").input_ids) for number in range(19307, 19315)]
    sampler = HFSampler(model, tokenizer, [1], 0.7, 12)
    return cache(lambda seed: sum(sampler.generate(prompts, 4, seed), []))


def sampled_by(model, rollouts, noise, seed=0, lost=False):
    """What a sampler with other rounding than the learner's reports, adapter lost or not."""
    exact = copy.deepcopy(model).float()
    with exact.disable_adapter() if lost else nullcontext():
        return told(exact, rollouts, noise=noise, seed=seed)


# the effect of these adapters is smaller than the gap that rounding is allowed
FAINT = pytest.mark.parametrize("dtype, std, noise", [
    ("float32", 2e-5, 1e-4), ("bfloat16", 2e-3, 5e-3)])


@FAINT
def test_an_adapter_that_never_arrived_is_refused_though_rounding_would_hide_it(
        learner, answers, dtype, std, noise):
    model, rollouts = learner("toy", dtype, std), answers(0)
    lost = sampled_by(model, rollouts, noise, lost=True)
    gap = policy.sampled_logprobs(lost) - policy.sampled_logprobs(told(model, rollouts))
    assert gap.abs().mean() < 0.6 * policy.GAP_ALLOWED[model.dtype]
    refused_untouched(adam(model, micro_batch_tokens=10**4), lost, "adapter did not reach")
    ours = adam(model, micro_batch_tokens=10**4)
    ours.update(sampled_by(model, rollouts, noise), torch.ones(len(rollouts)))
    assert ours.adapter_arrived


@FAINT
def test_whether_it_arrived_stays_open_while_it_does_nothing(learner, answers, dtype, std, noise):
    ours = adam(learner("toy", dtype, std=0.0), lr=0.0, micro_batch_tokens=10**4)
    for seed in range(5):
        drawn = sampled_by(ours.model, answers(seed), noise, seed)
        ours.update(drawn, torch.ones(len(drawn)))
        assert not ours.adapter_arrived


@pytest.mark.parametrize("std", [1e-6, 1e-4, 3e-4, 1e-3])  # below, in and above the rounding
def test_no_sound_sampler_is_refused_and_no_lost_adapter_believed(learner, answers, std):
    model = learner("toy", "bfloat16", std)

    def verdict(seed, lost):
        drawn = sampled_by(model, answers(seed), 0.0, lost=lost)
        ours = adam(model, lr=0.0, micro_batch_tokens=10**4)
        try:
            ours.update(drawn, torch.ones(len(drawn)))
        except UserError:
            return "refused"
        return "arrived" if ours.adapter_arrived else "open"

    assert "refused" not in {verdict(seed, lost=False) for seed in range(25)}
    assert "arrived" not in {verdict(seed, lost=True) for seed in range(25)}


@pytest.mark.parametrize("budget", [1, 30])  # a micro-batch holds one answer, or two
def test_small_micro_batches_do_not_keep_the_check_open(learner, answers, budget):
    model, rollouts = learner("toy", "bfloat16", 2e-3), answers(0)
    ours = adam(model, lr=0.0, micro_batch_tokens=budget)
    ours.update(sampled_by(model, rollouts, 5e-3), torch.ones(len(rollouts)))
    assert ours.adapter_arrived
    ours = adam(model, micro_batch_tokens=budget)
    lost = sampled_by(model, rollouts, 5e-3, lost=True)
    refused_untouched(ours, lost, "adapter did not reach")


def test_the_check_gathers_its_tokens_over_steps(learner, answers):
    model, rollouts = learner("toy", "bfloat16", 2e-3), answers(0)[16:30]
    count = sum(len(rollout.completion_ids) for rollout in rollouts)
    assert policy.TOKENS_TO_DECIDE / 2 <= count < policy.TOKENS_TO_DECIDE
    sound, lost = (sampled_by(model, rollouts, 5e-3, lost=lost) for lost in (False, True))
    ours, theirs = adam(model, lr=0.0), adam(model, lr=0.0)
    ours.update(sound, torch.ones(14))
    theirs.update(lost, torch.ones(14))
    assert not ours.adapter_arrived
    ours.update(sound, torch.ones(14))
    assert ours.adapter_arrived
    with pytest.raises(UserError, match="adapter did not reach"):
        theirs.update(lost, torch.ones(14))


def test_the_check_compares_the_same_tokens_with_policy_and_base(learner, answers):
    """Here the short answers, scored first, are told exactly, and the long ones badly."""
    model = learner("toy", "bfloat16", 2e-3)
    rollouts = told(model, answers(0))
    order = sorted(range(len(rollouts)), key=lambda i: policy.length(rollouts[i]))
    badly = sampled_by(model, rollouts, 0.05)
    mixed = [rollouts[i] if rank < len(order) * 3 // 4 else badly[i]
             for rank, i in enumerate(order)]
    ours = adam(model, lr=0.0, micro_batch_tokens=1)
    ours.update(mixed, torch.ones(len(mixed)))
    assert ours.adapter_arrived


@pytest.mark.parametrize("at, told_apart", [(0, True), (63, True), (64, False)])
def test_a_base_is_told_by_how_each_weight_begins(at, told_apart):
    model = policy.load_model(str(run.TOY))[0]
    before = policy.fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).flatten()[at] += 1
    assert (policy.fingerprint(model) != before) == told_apart


def test_the_check_of_the_sampler_needs_no_more_memory_than_learning(learner, monkeypatch):
    ours, sizes = adam(learner(), micro_batch_tokens=50), starve(monkeypatch, "forward", [])
    step(ours, make_rollouts(20), torch.ones(20))
    assert len(sizes) > 4 and max(sizes) <= 50


# ---------------------------------------------------------------- 5. the adapter and the model

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_only_it_learns(folder, kind):
    base = policy.load_model(folder(kind))[0]
    model = policy.add_lora(policy.load_model(folder(kind))[0], rank=4, seed=3)
    ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0))
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert len(trainable(model)) >= 16
    assert all("lora_" in name and p.dtype == torch.float32
               for name, p in trainable(model).items())
    assert same(values(model), values(policy.add_lora(base, rank=4, seed=3)))
    loud = with_adapter(policy.load_model(folder(kind))[0])
    assert not torch.allclose(loud(ids).logits, base(ids).logits, atol=1e-2)
    with loud.disable_adapter():  # and without it a learned policy is its reference model
        assert torch.equal(loud(ids).logits, policy.load_model(folder(kind))[0](ids).logits)


@pytest.mark.parametrize("kind, drops", [
    ("qwen2", ["attention_dropout"]), ("gpt-neox", ["attention_dropout", "hidden_dropout"]),
    ("opt", ["attention_dropout", "dropout", "layerdrop"]),
    ("gpt2", ["attn_pdrop", "embd_pdrop", "resid_pdrop"])])
def test_the_dropout_of_a_checkpoint_is_switched_off(folder, tmp_path, kind, drops):
    shutil.copytree(folder(kind), tmp_path / "wet")
    config = json.loads((tmp_path / "wet" / "config.json").read_text())
    assert config.keys() >= set(drops)
    config |= dict.fromkeys(drops, 0.5)
    (tmp_path / "wet" / "config.json").write_text(json.dumps(config))
    dry, wet = (with_adapter(policy.load_model(each)[0])
                for each in (folder(kind), str(tmp_path / "wet")))
    for model in (dry, wet):
        step(adam(model), make_rollouts(6), torch.ones(6))
    assert same(gradients(dry), gradients(wet))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "opt", "gpt2"])
def test_recomputed_activations_give_the_same_gradient(learner, kind):
    kept, recomputed, calls = learner(kind), learner(kind), []
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (kept, recomputed):
        layer = next(module for name, module in model.named_modules()
                     if ".0." in name and hasattr(module, "lora_A"))
        layer.register_forward_hook(lambda *_: calls.append(model))
        step(adam(model, micro_batch_tokens=10**4), make_rollouts(6), torch.linspace(-1, 2, 6))
    assert same(gradients(kept), gradients(recomputed))
    assert calls.count(recomputed) == calls.count(kept) + 1


def lora_layers(model, of=lora.Linear):
    return [module for module in model.modules() if type(module) is of]


@pytest.mark.parametrize("kind, theirs", [
    *((kind, 0) for kind in ARCHITECTURES if kind != "gpt2"), ("gpt2", 8)])  # Conv1D
def test_our_lora_layer_is_pefts(learner, kind, theirs):
    model, rollouts, found = learner(kind).double(), make_rollouts(6), []  # rounding hides nothing
    assert len(lora_layers(model)) == theirs
    assert bool(lora_layers(model, policy.LoraLinear)) == (theirs == 0)
    for _ in range(2):
        model.zero_grad()
        logprobs, _ = token_logprobs(model, rollouts, 1.0)
        logprobs.sum().backward()
        found.append((logprobs.double(), flat(gradients(model))))
        for module in lora_layers(model, policy.LoraLinear):
            module.__class__ = lora.Linear
    assert all(torch.allclose(*pair, rtol=0, atol=1e-5) for pair in zip(*found))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])  # our layer, PEFT's own
def test_an_adapter_that_was_trained_with_dropout_has_none_here(learner, folder, tmp_path, kind):
    learner(kind).save_pretrained(tmp_path)
    path, found = tmp_path / "adapter_config.json", []
    for dropout in (0.0, 0.5):
        config = json.loads(path.read_text()) | {"lora_dropout": dropout}
        path.write_text(json.dumps(config))
        model, _ = policy.load_model(folder(kind), tmp_path)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # so in training mode
        step(adam(model), make_rollouts(6), torch.ones(6))
        found.append(gradients(model))
    assert same(*found)


def test_a_merged_adapter_counts_once_and_one_on_the_head_is_left_to_peft(folder, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(policy.load_model(folder("llama"))[0], config).save_pretrained(tmp_path)
    model, _ = policy.load_model(folder("llama"), tmp_path, dtype="bfloat16")
    assert len(lora_layers(model)) == 1 and len(lora_layers(model, policy.LoraLinear)) == 2
    assert len(token_logprobs(model, make_rollouts(6), 1.0)[0])  # the head computes in bfloat16
    model, ids = with_adapter(policy.load_model(folder("qwen2"))[0]), torch.arange(2, 12)[None]
    apart = model(ids).logits
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, apart, atol=1e-4)
    with model.disable_adapter():
        base = policy.load_model(folder("qwen2"))[0](ids).logits
        assert torch.allclose(model(ids).logits, base, atol=1e-4)


@pytest.mark.parametrize("more", ["use_dora", "lora_bias"])
def test_more_than_lora_is_left_to_peft(folder, tmp_path, more):
    config = LoraConfig(r=4, target_modules="all-linear", **{more: True})
    get_peft_model(policy.load_model(folder("qwen2"))[0], config).save_pretrained(tmp_path)
    model, _ = policy.load_model(folder("qwen2"), tmp_path)
    assert len(lora_layers(model)) == 14 and not lora_layers(model, policy.LoraLinear)


def test_recomputing_leaves_out_the_last_product_of_a_layer(learner):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), named=None):
            if operation is torch.ops.aten.addmm_.default:
                products.append(tuple(given[2].shape))  # of the weights
            return operation(*given, **named or {})

    products, model = [], learner()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, rollouts = adam(model, micro_batch_tokens=10**4), told(model, make_rollouts(6))
    ours.adapter_arrived = True  # no further forward pass
    with Products():
        ours.update(rollouts, torch.ones(6))
    layers, down, gate = COMMON["num_hidden_layers"], (48, 32), (32, 48)
    assert products.count(down) == layers
    assert products.count(gate) == 2 * 2 * layers  # gate and up, both twice


# ---------------------------------------------------------------- 6. checkpoints

@pytest.fixture
def record(tmp_path):
    return run.Run(tmp_path / "run", {"flags": {}})


def test_a_checkpoint_goes_on_bit_for_bit(learner, folder, record):
    ours, weights = adam(learner()), torch.ones(6)
    for record.step in (1, 2):
        step(ours, make_rollouts(6, record.step), weights)
    record.save(ours)
    fresh = adam(policy.add_lora(policy.load_model(folder("qwen2"))[0], rank=4, seed=9))
    record.step = 0
    record.load(fresh)
    assert record.step == 2
    assert same(values(fresh.model), values(ours.model))
    for seed in (3, 4):
        for each in (ours, fresh):
            step(each, make_rollouts(6, seed), weights)
        assert same(values(fresh.model), values(ours.model))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_is_plain_peft_and_holds_no_pickle(learner, folder, record, steps):
    ours, ids = adam(learner()), torch.arange(8)[None]
    for record.step in range(1, steps + 1):
        step(ours, make_rollouts(6, record.step), torch.ones(6))
    saved = record.save(ours)  # at step 0 the optimizer holds no moments
    assert {path.suffix for path in saved.iterdir()} <= {".safetensors", ".json", ".md"}
    logits = ours.model.eval()(ids).logits
    base = tf.AutoModelForCausalLM.from_pretrained(folder("qwen2"))
    assert torch.equal(PeftModel.from_pretrained(base, saved)(ids).logits, logits)
    loaded, _ = policy.load_model(*run.resolve_model(str(saved)))
    assert torch.equal(loaded(ids).logits, logits)
    record.step = 99
    record.load(adam(loaded))
    assert record.step == steps
    assert same(values(loaded), values(ours.model))


def test_a_checkpoint_appears_whole_or_not_at_all(learner, record, monkeypatch):
    ours, record.step = adam(learner()), 3
    first = record.save(ours)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    record.step = 9
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(run, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        record.save(ours)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    there = lambda: sorted(path.name for path in record.folder.iterdir())
    assert there() == ["config.json", "step_000003"]
    assert run.newest_checkpoint(record.folder) == first
    assert record.save(ours) == run.newest_checkpoint(record.folder)
    assert there() == ["config.json", "step_000003", "step_000009"]
    assert run.newest_checkpoint(record.folder / "none") is None


# ---------------------------------------------------------------- 7. names and refusals

@pytest.mark.parametrize("name, base", [
    ("toy", str(run.TOY)), ("Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"),
    ("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("someone/some-model", "someone/some-model")])
def test_a_name_resolves_to_its_hub_id(name, base):
    assert run.resolve_model(name) == (base, None)


def make_run(folder, model, steps, learner):
    """A run directory as train.py leaves it, with a checkpoint of each of the steps."""
    flags = dict.fromkeys(run.RUN_FLAGS) | {"model": str(model)}
    record = run.Run(folder, {"flags": flags})
    for record.step in steps:
        record.save(learner)
    return folder


def test_a_folder_resolves_to_its_base_and_adapter(learner, folder, tmp_path):
    base, ours = folder("qwen2"), adam(learner())
    empty = make_run(tmp_path / "empty", base, [], ours)
    with pytest.raises(UserError, match="no whole checkpoint"):
        run.resolve_model(str(empty))
    first = make_run(tmp_path / "first", base, [999999, 1000000], ours)
    one, two = first / "step_999999", first / "step_1000000"
    assert run.resolve_model(base) == (base, None)
    assert run.resolve_model(str(one)) == (base, one)
    assert run.resolve_model(str(first)) == (base, two)
    again = make_run(tmp_path / "again", first, [5], ours)  # it went on from the run above
    assert run.resolve_model(str(again)) == (base, again / "step_000005")


@pytest.mark.parametrize("name, said", [
    ("toys", "'toys' is unknown, did you mean toy"),
    ("Qven2.5", "did you mean Qwen"), ("xyz", "'xyz' is unknown; give toy")])
def test_an_unknown_model_is_refused_with_the_nearest(name, said):
    with pytest.raises(UserError, match=said):
        run.resolve_model(name)


@pytest.mark.parametrize("name", ["runs/secnod", "./runs/secnod", "work/secnod",
                                  "{here}/runs/secnod", "../secnod", "~/secnod"])
def test_a_folder_that_is_missing_is_no_hub_id_and_the_runs_there_are_named(
        learner, folder, tmp_path, monkeypatch, name):
    for place in ("runs", "work"):
        for other in ("first", "second"):
            make_run(tmp_path / place / other, folder("qwen2"), [], adam(learner()))
    monkeypatch.chdir(tmp_path)
    name = name.format(here=tmp_path)
    with pytest.raises(UserError, match="does not exist") as refused:
        run.resolve_model(name)
    assert name in str(refused.value) and "\n" not in str(refused.value)
    if "runs" in name or "work" in name:
        assert "did you mean second" in str(refused.value)
        assert "first, second" in str(refused.value)
    for around, shown in (("runs", "first, second"), (".", "runs/first, runs/second")):
        with pytest.raises(UserError, match=f"{around} holds no run and no model.*{shown}"):
            run.resolve_model(around)


@pytest.mark.parametrize("spoil", ["no weights", "only a pickle", "no tokenizer", "no config",
                                   "config of nothing", "cut off", "other shapes",
                                   "weights missing", "empty"])
def test_a_folder_that_is_no_whole_model_is_refused_in_one_sentence(folder, tmp_path, spoil):
    shutil.copytree(folder("qwen2"), tmp_path, dirs_exist_ok=True)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(weights)
    if spoil in ("no weights", "only a pickle", "empty"):
        weights.unlink()
    if spoil == "only a pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    if spoil in ("no tokenizer", "empty"):
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
    if spoil in ("no config", "empty"):
        config.unlink()
    if spoil == "config of nothing":
        config.write_text("{}")
    if spoil == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    if spoil == "other shapes":
        tensors = {name: tensor[..., :4].contiguous() for name, tensor in tensors.items()}
        save_file(tensors, weights, {"format": "pt"})
    if spoil == "weights missing":
        save_file(dict(list(tensors.items())[:5]), weights, {"format": "pt"})
    with pytest.raises(UserError) as refused:
        policy.load_model(str(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_that_takes_no_adapter_is_refused_in_one_sentence(folder):
    with pytest.raises(UserError, match="no adapter .* mamba models") as refused:
        policy.add_lora(policy.load_model(folder("mamba"))[0], rank=4, seed=0)
    assert "\n" not in str(refused.value)


def test_a_model_that_is_not_here_is_refused_with_what_was_tried():
    with pytest.raises(UserError, match="Qwen/Qwen2.5-Math-1.5B .* folder") as refused:
        policy.load_model(*run.resolve_model("Qwen2.5-Math-1.5B"))
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------- 8. four bits

def test_a_4bit_policy_is_its_dequantised_copy_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(policy.LoraLinear, "forward", lora.Linear.forward)  # as in 4 bits
    rng = random.Random(0)
    draw = lambda count: tuple(rng.randrange(2, 12) for _ in range(count))
    answers = [draw(rng.randrange(2, 8)) + (1,) for _ in range(6)]
    rollouts = [Rollout(draw(8), ids, (-3.0,) * len(ids), "", True) for ids in answers]
    toy = str(run.TOY)
    policy.write_dequantised(toy, "float32", str(tmp_path))
    found = []
    for base, in_4bit in ((toy, True), (str(tmp_path), False), (toy, False)):
        model, _ = policy.load_model(base, dtype="float32", load_in_4bit=in_4bit)
        model = with_adapter(model, rank=8, std=0.1)
        with torch.no_grad():  # bitsandbytes may repack its weights when it only infers
            token_logprobs(model, rollouts, 1.0)
        token_logprobs(model, rollouts, 1.0)[0].sum().backward()
        states = [m.weight.quant_state for m in model.modules() if hasattr(m, "quant_state")]
        assert len(states) == (28 if in_4bit else 0)
        assert all(state.quant_type == "nf4" and state.nested for state in states)
        found.append(flat(gradients(model)))
    quantised, copied, original = found
    assert torch.equal(quantised, copied)
    monkeypatch.undo()  # with our layer, as a copy in full is trained
    model = with_adapter(policy.load_model(str(tmp_path), dtype="float32")[0], rank=8, std=0.1)
    token_logprobs(model, rollouts, 1.0)[0].sum().backward()
    assert lora_layers(model, policy.LoraLinear)
    assert torch.allclose(flat(gradients(model)), quantised, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(quantised, original, rtol=1e-2)
