"""Proof that a sampler draws from softmax(logits / T) and nothing else, and says so truthfully.

1. Frequencies of one and two tokens are those of the full softmax, whatever settings the
   checkpoint brings along. The reported log-probabilities are the learner's, for prompts of
   different lengths, several architectures, in one batch or many.
2. A rollout ends with an end token iff it finished, and leaves the batch then; the same seed
   gives the same rollouts.
3. The script writes what evaluate.py reads, goes on where it stopped, and overwrites nothing.
4. Every script says what it wants in one sentence, before it imports what takes seconds.
"""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from conftest import ROOT
from test_policy import ARCHITECTURES, save_model, with_adapter

import evaluate
import sample
import train
from lib import cli, policy, run, tasks
from lib.cli import UserError
from sample import HFSampler, Rollout

MEDDLING = {"top_k": 2, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 5.0, "temperature": 0.1,
            "no_repeat_ngram_size": 1, "min_new_tokens": 2, "suppress_tokens": [5, 6],
            "forced_eos_token_id": 1, "bad_words_ids": [[7]], "do_sample": True}
PROMPTS = [(4, 5, 6), (7,), (3, 4, 5, 6, 7, 8, 9, 10, 11), (12, 13), (4, 5, 6)]


@pytest.fixture(scope="module")
def sampler_of(tmp_path_factory):
    """A sampler of a tiny random policy, whose checkpoint's generation settings meddle."""
    def make(kind="qwen2", temperature=1.0, max_new_tokens=12, stops=(1,)):
        folder = tmp_path_factory.mktemp(kind)
        save_model(kind, folder)
        tf.GenerationConfig(**MEDDLING, eos_token_id=1).save_pretrained(folder)
        model, tokenizer = policy.load_model(str(folder))
        return HFSampler(with_adapter(model, std=0.05), tokenizer, list(stops), temperature,
                         max_new_tokens)
    return make


def flat(groups):
    return [rollout for group in groups for rollout in group]


def ids_of(groups):
    return [rollout.completion_ids for rollout in flat(groups)]


def record(sampler, held):
    """Note the (rows, tokens) that each forward pass of a sampler holds."""
    sampler.model.register_forward_pre_hook(
        lambda _, args, given: held.append(tuple(given["attention_mask"].shape)),
        with_kwargs=True)


# ---------------------------------------------------------------- 1. the distribution

def probabilities(model, ids, temperature):
    logits = model(torch.tensor([ids])).logits[0, -1].double()  # (V,)
    return (logits / temperature).softmax(-1).tolist()


def chances(model, prompt, temperature):
    """{completion of at most two tokens: its chance}, from the whole softmax."""
    expected = {}
    for first, p in enumerate(probabilities(model, prompt, temperature)):
        if first == 1:
            expected[first,] = p
            continue
        for second, q in enumerate(probabilities(model, (*prompt, first), temperature)):
            expected[first, second] = p * q
    return expected


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("prompt, cache", [((4, 5, 6, 7), 2**18), ((9,), 3000)])
def test_frequencies_are_those_of_the_full_softmax(
        sampler_of, monkeypatch, temperature, prompt, cache):
    monkeypatch.setattr(sample, "CACHE_TOKENS", cache)
    sampler, n = sampler_of(temperature=temperature, max_new_tokens=2), 20_000
    with torch.no_grad():
        expected = chances(sampler.model, prompt, temperature)
    [group] = sampler.generate([prompt], n, seed=0)
    counts = Counter(rollout.completion_ids for rollout in group)
    assert counts.keys() <= expected.keys()
    for rollout in group[:2000]:
        chance = math.log(expected[rollout.completion_ids])
        assert sum(rollout.logprobs) == pytest.approx(chance, abs=2e-5)
    common = {ids: p for ids, p in expected.items() if n * p >= 5}
    chi2 = sum((counts[ids] - n * p) ** 2 / (n * p) for ids, p in common.items())
    assert abs(chi2 - len(common)) < 5 * (2 * len(common)) ** 0.5
    for ids, p in expected.items():
        assert abs(counts[ids] - n * p) < 5 * (n * p) ** 0.5 + 5


def assert_truthful(sampler, rollouts):
    """What the sampler reports is what the learner finds, alone and without rounding."""
    exact = copy.deepcopy(sampler.model).double()
    with torch.no_grad():
        alone = [policy.token_logprobs(exact, [r], sampler.temperature)[0] for r in rollouts]
    sampled = policy.sampled_logprobs(rollouts)
    torch.testing.assert_close(sampled, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("n, temperature, cache", [(1, 1.0, 2**18), (6, 0.7, 2**18), (6, 1.0, 40)])
def test_log_probabilities_are_the_learners_whatever_the_padding(
        sampler_of, monkeypatch, kind, n, temperature, cache):
    monkeypatch.setattr(sample, "CACHE_TOKENS", cache)
    sampler = sampler_of(kind, temperature)
    rollouts = flat(sampler.generate(PROMPTS, n, seed=0))
    assert [r.prompt_ids for r in rollouts] == [prompt for prompt in PROMPTS for _ in range(n)]
    assert_truthful(sampler, rollouts)
    assert max(map(policy.length, rollouts)) >= 14  # Mistral's window is 5


@pytest.mark.parametrize("cache, rows_at_most", [
    (1, 99), (40, 99), (100, 99), (2**18, 99), (2**18, 3), (2**18, 0)])
def test_many_small_batches_are_as_good_as_one_and_hold_less(
        sampler_of, monkeypatch, cache, rows_at_most):
    sampler, held = sampler_of(max_new_tokens=8), []
    vocabulary = sampler.model.get_output_embeddings().weight.shape[0]
    record(sampler, held)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "CACHE_TOKENS", cache)
        patch.setattr(policy, "LOGITS_AT_ONCE", rows_at_most * vocabulary + 1)
        groups = sampler.generate(PROMPTS, 5, seed=3)
        assert groups == sampler.generate(PROMPTS, 5, seed=3)
    assert [[r.prompt_ids for r in group] for group in groups] == [[p] * 5 for p in PROMPTS]
    assert all(rows * tokens <= cache for rows, tokens in held if rows > 1)
    assert max(rows for rows, _ in held) <= max(1, rows_at_most)
    assert len(set(ids_of(groups))) > 20  # no batch repeats another's random numbers
    assert_truthful(sampler, flat(groups))


# ---------------------------------------------------------------- 2. one rollout

@pytest.mark.parametrize("kind", ["qwen2", "lfm2"])
def test_finished_answers_leave_and_the_others_go_on_as_if_nothing_had_happened(sampler_of, kind):
    cold = {"kind": kind, "temperature": 1e-5}  # so cold that chance decides nothing
    endless = ids_of(sampler_of(**cold, stops=(22,)).generate(PROMPTS, 3, seed=0))
    stop = Counter(ids[4] for ids in endless if len(ids) > 4).most_common(1)[0][0]
    sampler, held = sampler_of(**cold, stops=(22, stop)), []
    record(sampler, held)
    found = ids_of(sampler.generate(PROMPTS, 3, seed=0))
    assert found == [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in endless]
    assert len(set(map(len, found))) > 1
    writing = [len({(i // 3, ids[:done]) for i, ids in enumerate(found) if len(ids) > done})
               for done in range(1, max(map(len, found)))]  # and so is what answers share
    assert [rows for rows, _ in held] == [len(PROMPTS), *writing]  # each prompt is read once


@pytest.mark.parametrize("stops", [(1,), (1, 5)])
def test_a_rollout_ends_with_an_end_token_iff_it_finished(sampler_of, stops):
    sampler = sampler_of(max_new_tokens=9, stops=stops)
    rollouts = flat(sampler.generate(PROMPTS, 40, seed=0))
    assert {r.finished for r in rollouts} == {True, False}
    assert {r.completion_ids[-1] for r in rollouts if r.finished} == set(stops)
    for r in rollouts:
        assert r.finished == (r.completion_ids[-1] in stops)
        assert not set(stops) & set(r.completion_ids[:-1])
        assert len(r.logprobs) == len(r.completion_ids)
        assert r.finished or len(r.completion_ids) == 9
        assert r.text == sampler.decode(
            r.completion_ids[:-1] if r.finished else r.completion_ids)


def test_the_same_seed_gives_the_same_rollouts_and_another_gives_others(sampler_of):
    sampler = sampler_of()
    first = sampler.generate(PROMPTS, 4, 7)
    torch.manual_seed(99)  # no other random numbers matter
    assert sampler.generate(PROMPTS, 4, 7) == first
    assert sampler.generate(PROMPTS, 4, 8) != first
    assert ids_of(first[:1]) != ids_of(first[-1:])  # the same prompt, asked twice


def test_each_block_of_problems_has_its_own_seeds_and_can_be_the_first(sampler_of, monkeypatch):
    monkeypatch.setattr(HFSampler, "block", 2)
    problems = [SimpleNamespace(prompt_ids=(4, 5, 6))] * 5
    blocks = list(sample.sample_blocks(sampler_of(), problems, 3, (0, "test"), ""))
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert len({tuple(ids_of(block)[:3]) for block in blocks}) == 3
    again = sample.sample_blocks(sampler_of(), problems, 3, (0, "test"), "", start=2)
    assert list(again) == blocks[1:]


def recording_vllm(model, tokenizer, taken):
    """vLLM's part that VLLMSampler speaks to. It notes the seed of each answer, as vLLM draws it
    (request seed + index), and lets the plain sampler answer."""
    own = HFSampler(model, tokenizer, [1], 1.0, 12)

    def generate(asked, settings, lora_request, use_tqdm):
        results = []
        for prompt, each in zip(asked, settings, strict=True):
            taken.extend(each["seed"] + j for j in range(each["n"]))
            [group] = own.generate([prompt["prompt_token_ids"]], each["n"], each["seed"])
            results.append(SimpleNamespace(outputs=[
                SimpleNamespace(index=j, token_ids=r.completion_ids,
                                logprobs=SimpleNamespace(logprobs=r.logprobs))
                for j, r in enumerate(group)]))
        return results

    engine = SimpleNamespace(remove_lora=lambda _: None)
    return SimpleNamespace(generate=generate, llm_engine=engine)


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_no_two_samples_share_a_random_stream(monkeypatch, tmp_path, kind):
    """Over steps, problems, blocks of evaluations, seeds 31 and 32, and sample.py's own."""
    taken, calls = [], []
    fake = SimpleNamespace(SamplingParams=dict, TokensPrompt=dict, LLM=None, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(
        LoRARequest=lambda name, number, path: SimpleNamespace(lora_int_id=number)))
    monkeypatch.setattr(sample, "pick_sampler", lambda *_: kind)
    monkeypatch.setattr(HFSampler, "block", 3)
    monkeypatch.setattr(sample.VLLMSampler, "block", 3)

    def make(args, model, tokenizer, problems, folder, gpu_memory):
        if kind == "hf":
            return HFSampler(model, tokenizer, [1], 1.0, 12)
        fake.LLM = lambda base, **settings: recording_vllm(model, tokenizer, taken)
        return sample.VLLMSampler(str(run.TOY), tokenizer, [1], 1.0, 12, dtype="float32", rank=8,
                                  context=32, gpu_memory=0.5, folder=folder)

    def generate(self, prompts, n, seed):
        calls.append(seed % 2**32)  # a generator on the CPU keeps no more of its seed
        return original(self, prompts, n, seed)
    monkeypatch.setattr(sample, "make_sampler", make)
    original = HFSampler.generate
    if kind == "hf":
        monkeypatch.setattr(HFSampler, "generate", generate)
    for seed in (31, 32):
        flags = ["--seed", str(seed), "--limit", "7"]
        train.main([*flags, "--steps", "3", "--prompts", "4", "--n", "6", "--eval-n", "5",
                    "--eval-every", "1", "--run", str(tmp_path / str(seed))])
        script(*flags, "--n", 5, "--out", tmp_path / f"{seed}.jsonl")
    drawn = calls if kind == "hf" else taken
    assert len(drawn) == (2 * (3 + 4 * 3 + 3) if kind == "hf" else 2 * (3 * 24 + 5 * 35))
    assert len(set(drawn)) == len(drawn)


SAYS = "{% for m in messages %}{{ m.content }}"


@pytest.mark.parametrize("template, ends, stops", [
    (None, 1, [1]), (None, [1, 7], [1, 7]), (None, None, [1]),
    (SAYS + "<pad>\n{% endfor %}", [1], [0, 1]),  # a special token closes each turn
    (SAYS + ":{% endfor %}", [1], [1]),  # an ordinary one does
    (SAYS + "{% endfor %}", [1], [1]), ("{{ messages[0].content }}", [1], [1])])
def test_the_token_that_ends_a_turn_ends_an_answer(template, ends, stops):
    tokenizer = tf.AutoTokenizer.from_pretrained(run.TOY)
    tokenizer.chat_template = template
    model = SimpleNamespace(generation_config=tf.GenerationConfig(eos_token_id=ends))
    assert sample.stop_ids(model, tokenizer) == stops


def test_a_model_without_an_end_token_is_refused():
    tokenizer = tf.AutoTokenizer.from_pretrained(run.TOY)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end token, so every answer would be cut off"):
        sample.stop_ids(SimpleNamespace(generation_config=tf.GenerationConfig()), tokenizer)


# ---------------------------------------------------------------- 3. the script

def script(*flags):
    sample.main([str(flag) for flag in flags])


def test_the_script_writes_what_evaluate_reads(tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    script("--n", 6, "--limit", 5, "--temperature", 0.8, "--seed", 3, "--out", out)
    assert f"python evaluate.py --model {out}" in capsys.readouterr().out
    problems, groups, settings = evaluate.read_samples(out)
    data = settings["data"]
    assert problems == tasks.load_problems(data, 5)
    model, tokenizer = policy.load_model(str(run.TOY))
    row = json.loads(out.read_text().splitlines()[0])
    sampler = HFSampler(model, tokenizer, [1], 0.8, row["max_new_tokens"])
    encoded = tasks.encode(problems, tokenizer, model.config, row["max_new_tokens"])
    seed = sample.stream(3, "sample", data, 0)
    expected = sampler.generate([p.prompt_ids for p in encoded], 6, seed)
    assert [[(a.text, a.finished) for a in group] for group in groups] == [
        [(r.text, r.finished) for r in group] for group in expected]
    assert row["data"] == data and data.endswith(":test")
    assert (row["model"], row["temperature"], row["seed"], row["n"]) == ("toy", 0.8, 3, 6)


def test_answers_with_odd_line_ends_are_read_back(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e\x0cf", "g\nh"]
    answers = [{"text": text, "finished": True} for text in texts]
    data = tmp_path / "d.jsonl"
    cli.write_rows(data, [{"id": "i", "problem": "p\u2029q", "answer": "1"}])
    [p] = tasks.load_problems(str(data))
    row = dict.fromkeys(sample.HEAD, "x") | {
        "data": str(data), "n": 4, "limit": None, "data_digest": tasks.digest_of([p])}
    cli.write_rows(tmp_path / "s.jsonl", [row | {"id": "i", "answer": "1", "answers": answers}])
    [problem], [group], _ = evaluate.read_samples(tmp_path / "s.jsonl")
    assert problem == p == tasks.Problem("i", "p\u2029q", "1")
    assert [answer.text for answer in group] == texts


@pytest.mark.parametrize("content, said", [
    ("precious", "is not a file of sample.py"), ("precious\n", "line 1: not a JSON object"),
    ('{"problem": "1 + 1", "answer": "2"}\n', "was made with data = None"),
    ("{}", "is not a file of sample.py")])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content, said):
    out = tmp_path / "s.jsonl"
    out.write_text(content)
    with pytest.raises(UserError, match=said):
        script("--n", 2, "--limit", 2, "--out", out)
    assert out.read_text() == content


@pytest.mark.parametrize("lines, rest", [
    (0, '{"data": "diviso'), (1, ""), (3, '{"data": "divi'), (4, ""), (5, "")])
def test_an_interrupted_file_is_continued_to_the_same_bytes(monkeypatch, tmp_path, lines, rest):
    monkeypatch.setattr(HFSampler, "block", 2)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    script("--n", 3, "--limit", 5, "--out", whole)
    broken.write_text("".join(whole.read_text().splitlines(keepends=True)[:lines]) + rest)
    script("--n", 3, "--limit", 5, "--out", broken)
    assert broken.read_text() == whole.read_text()


@pytest.mark.parametrize("flags, said", [
    (["--seed", 1], "seed = 0, not 1"), (["--temperature", 0.5], "temperature = 1.0, not 0.5"),
    (["--max-new-tokens", 7], "max_new_tokens = 6, not 7"), (["--n", 3], "n = 2, not 3")])
def test_a_file_of_other_settings_is_refused_and_kept(tmp_path, flags, said):
    out = tmp_path / "s.jsonl"
    script("--n", 2, "--limit", 2, "--out", out)
    before = out.read_text()
    with pytest.raises(UserError, match=f"was made with {said}"):
        script("--n", 2, "--limit", 2, "--out", out, *flags)
    assert out.read_text() == before


@pytest.mark.parametrize("flags, said", [
    (["--n", 0], "--n is 0, but must be at least 1"), (["--limit", 0], "--limit is 0"),
    (["--max-new-tokens", 0], "--max-new-tokens is 0"), (["--n", "two"], "--n: invalid int"),
    (["--temperature", 0], "--temperature is 0.0, but must be at least"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--temperature", "inf"], "--temperature is inf"),
    (["--max-new-tokens", 30], "tokens 30 exceed the model's context of 32"),
    (["--model", "tou"], "did you mean toy"),
    (["--data", "divisr"], "'divisr' is unknown, did you mean"),
    (["--ask", "1", "--data", "math"], "leave --data out"), (["--ask", " "], "must be a question")])
def test_what_cannot_work_is_refused_and_nothing_is_written(monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        script("--limit", 2, "--n", 2, *flags)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_answers_to_a_question_that_agree_are_counted_together(capsys):
    script("--ask", "30003", "--n", 40)
    counted, first = capsys.readouterr().out.split("\n\nthe first one in full:\n\n")
    lines = [line.split() for line in counted.splitlines()]  # count of 40 answer
    counts = [int(words[0]) for words in lines]
    assert sum(counts) == 40
    assert counts == sorted(counts, reverse=True) and counts[0] > 1
    said = {words[3] for words in lines}
    assert len(said) == len(lines) and first.strip() in said
    assert any(tasks.grade_divisor(text, "30003") for text in said)


@pytest.mark.parametrize("question", ["3000x", "30003=3", "-3000", "2+2"])
def test_the_toy_is_asked_its_own_questions_only(question):
    with pytest.raises(UserError, match="to divide a number such as 19307"):
        script("--ask", question)


def test_an_answer_is_asked_of_a_chat_model_too(capsys, tmp_path):
    save_model("llama", tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(run.TOY)
    tokenizer.chat_template = "{{ messages[0]['content'] or '\\\\boxed' }}"
    tokenizer.save_pretrained(tmp_path)
    script("--model", tmp_path, "--ask", "11", "--n", 3, "--max-new-tokens", 4)
    assert "of 3   (cut off)" in capsys.readouterr().out


# ---------------------------------------------------------------- 4. the door of every script

SCRIPTS = pytest.mark.parametrize("name", ["train.py", "sample.py", "evaluate.py", "ablate.py"])


def python(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@SCRIPTS
def test_help_fits_80_columns_and_shows_examples(name):
    shown = python(name, "--help")
    lines = shown.stdout.splitlines()
    assert shown.returncode == 0
    assert max(map(len, lines)) <= 80
    assert sum(f"python {name} " in line for line in lines) >= 2


@SCRIPTS
def test_a_typo_is_refused_in_one_sentence_before_torch_is_imported(name):
    refused = python("-X", "importtime", name, "--temprature", "1")
    imports = [line for line in refused.stderr.splitlines() if line.startswith("import time:")]
    assert len(imports) > 20 and not any(line.endswith("| torch") for line in imports)
    [said] = set(refused.stderr.splitlines()) - set(imports)
    assert "'--temprature' is unknown" in said and "did you mean --temperature?" in said
    assert refused.returncode == 1


@SCRIPTS
def test_without_the_packages_a_script_says_what_to_install(name):
    refused = python("-S", name)  # no site-packages
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "torch is missing: pip install -r requirements.txt" in refused.stderr


@pytest.mark.parametrize("word, hint", [
    ("--learning-rate", "--lr"), ("--batch-size", "--prompts"), ("--output-dir", "--run"),
    ("--group-size", "--n"), ("--num-generations", "--n"), ("--epochs", "--steps"),
    ("--Learning_Rate", "--lr"), ("--LR", "--lr"), ("--baseline", "--objective"),
    ("k=8", "--k 8"), ("--K=8", "--k 8"), ("--learning-rate=1e-4", "--lr 1e-4"),
    ("--modl=Qwen2.5-Math-1.5B", "--model Qwen2.5-Math-1.5B"),
    ("N=4", "--n 4"), ("batch_size=4", "--prompts 4"),
    ("--batch-size=4", "--prompts 4")])
def test_what_others_call_a_flag_is_answered_with_ours(word, hint):
    argv = [word, *([] if "=" in word else ["1"])]
    with pytest.raises(UserError) as refused:
        cli.parse("", cli.SETTINGS, argv)
    said = str(refused.value)
    assert repr(word) in said and f"did you mean {hint}?" in said and "\n" not in said


@pytest.mark.parametrize("word", ["--top-p", "--top-k=5", "--min_p"])
def test_what_would_cut_the_softmax_is_refused_with_the_reason(word):
    with pytest.raises(UserError, match="right only for the whole softmax"):
        cli.parse("", cli.SETTINGS, [word, "0.9"])
