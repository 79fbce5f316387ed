"""Proof that a sampler draws from softmax(logits / T) and from nothing else, and says so truthfully.

1. Frequencies of one and two tokens are those of the full softmax, whatever top-k, top-p, penalties or temperature
   the checkpoint brings along; the reported log-probabilities are the learner's, for prompts of different lengths,
   several architectures, in one batch or many.
2. A rollout ends with an end token iff it finished; the same seed gives the same rollouts.
3. Prompts: special tokens once, and never longer than the context.
4. The script writes what evaluate.py reads, and overwrites nothing.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers as tf

import evaluate
import policy
import sample
import tasks
from conftest import ROOT
from sample import HFSampler, encode_prompts
from tasks import Problem, UserError
from test_policy import ARCHITECTURES, save_model
from toy.pretrain import make_tokenizer

MEDDLING = dict(top_k=2, top_p=0.5, min_p=0.2, repetition_penalty=5.0, temperature=0.1, no_repeat_ngram_size=1, min_new_tokens=2,
                suppress_tokens=[5, 6], forced_eos_token_id=1, bad_words_ids=[[7]], do_sample=True)
PROMPTS = [(4, 5, 6), (7,), (3, 4, 5, 6, 7, 8, 9, 10, 11), (12, 13), (4, 5, 6)]


@pytest.fixture(scope="module")
def sampler_of(tmp_path_factory):
    """A sampler of a tiny random model with an adapter, as training uses it; the checkpoint's generation settings meddle."""
    def make(kind="qwen2", **settings):
        folder = tmp_path_factory.mktemp(kind)
        save_model(kind, folder)
        tf.GenerationConfig(**{**MEDDLING, "eos_token_id": 1, **settings}).save_pretrained(folder)
        model, tokenizer = policy.load_model(str(folder))
        model = policy.add_lora(model, rank=4, alpha=8, seed=0)
        for name, parameter in policy.trainable(model).items():
            torch.nn.init.normal_(parameter, std=0.2)
        return HFSampler(model, tokenizer)
    return make


def probabilities(model, ids, temperature):
    return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1).tolist()


# ---------------------------------------------------------------- 1. the distribution

@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("prompt, stage", [((4, 5, 6, 7), 64), ((9,), 1)])
def test_frequencies_are_those_of_the_full_softmax(sampler_of, monkeypatch, temperature, prompt, stage):
    monkeypatch.setattr(sample, "STAGE_TOKENS", stage)
    sampler, n = sampler_of(), 20_000
    expected = {}                                                 # completion of at most two tokens -> chance
    with torch.no_grad():
        for first, p in enumerate(probabilities(sampler.model, prompt, temperature)):
            seconds = probabilities(sampler.model, (*prompt, first), temperature)
            expected.update({(first,): p} if first == 1 else {(first, second): p * q for second, q in enumerate(seconds)})
    [group] = sampler.generate([prompt], n, temperature, 2, seed=0)
    counts = dict.fromkeys(expected, 0)
    for rollout in group:
        counts[rollout.completion_ids] += 1
        assert sum(rollout.logprobs) == pytest.approx(math.log(expected[rollout.completion_ids]), abs=1e-4)
    common = {ids: p for ids, p in expected.items() if n * p >= 5}
    chi2 = sum((counts[ids] - n * p) ** 2 / (n * p) for ids, p in common.items())
    assert abs(chi2 - len(common)) < 5 * (2 * len(common)) ** 0.5
    for ids, p in expected.items():
        assert abs(counts[ids] - n * p) < 5 * (n * p) ** 0.5 + 5


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("n, temperature, stage", [(1, 1.0, 64), (6, 0.7, 64), (6, 1.0, 3)])
def test_log_probabilities_are_the_learners_whatever_the_padding(sampler_of, monkeypatch, kind, n, temperature, stage):
    monkeypatch.setattr(sample, "STAGE_TOKENS", stage)
    sampler = sampler_of(kind)
    groups = sampler.generate(PROMPTS, n, temperature, 12, seed=0)
    rollouts = [rollout for group in groups for rollout in group]
    assert [rollout.prompt_ids for rollout in rollouts] == [prompt for prompt in PROMPTS for _ in range(n)]
    one_by_one = [policy.token_logprobs(sampler.model, [rollout], temperature)[0] for rollout in rollouts]      # no padding at all
    torch.testing.assert_close(torch.tensor([x for r in rollouts for x in r.logprobs]), torch.cat(one_by_one), rtol=0, atol=1e-4)
    assert policy.agreement(sampler.model, rollouts, temperature)[1] < 1e-4


@pytest.mark.parametrize("row_tokens", [1, 40, 100])
def test_many_small_batches_are_as_good_as_one(sampler_of, monkeypatch, row_tokens):
    monkeypatch.setattr(sample, "CACHE_TOKENS", row_tokens)
    sampler = sampler_of()
    groups = list(sample.sample_problems(sampler, PROMPTS, 5, 1.0, 8, 3, "test"))
    assert [[r.prompt_ids for r in group] for group in groups] == [[prompt] * 5 for prompt in PROMPTS]
    assert policy.agreement(sampler.model, [r for group in groups for r in group], 1.0)[1] < 1e-4
    assert groups == list(sample.sample_problems(sampler, PROMPTS, 5, 1.0, 8, 3, "test"))
    first, last = groups[0], groups[-1]                           # the same prompt twice does not get the same answers
    assert [r.completion_ids for r in first] != [r.completion_ids for r in last]


def test_finished_answers_leave_and_the_others_go_on_as_if_nothing_had_happened(sampler_of, monkeypatch):
    often, calls = sampler_of().generate(PROMPTS, 1, 1e-5, 12, seed=0)[0][0].completion_ids[4], []
    sampler = sampler_of(eos_token_id=[1, often])
    whole = sampler.generate(PROMPTS, 3, 1e-5, 12, seed=0)        # so cold that chance decides nothing
    generate = sampler.model.generate
    monkeypatch.setattr(sampler.model, "generate", lambda **given: calls.append(len(given["input_ids"])) or generate(**given))
    monkeypatch.setattr(sample, "STAGE_TOKENS", 2)
    assert [[r.completion_ids for r in group] for group in sampler.generate(PROMPTS, 3, 1e-5, 12, seed=0)] == [
        [r.completion_ids for r in group] for group in whole]
    ends = sorted(len(r.completion_ids) if r.finished else 99 for group in whole for r in group)
    assert calls == [sum(end > done for end in ends) for done in range(0, 12, 2) if ends[-1] > done] and calls[0] > calls[-1]


# ---------------------------------------------------------------- 2. one rollout

@pytest.mark.parametrize("stops, stage", [(1, 64), ([1, 5], 64), ([1, 5], 4)])
def test_a_rollout_ends_with_an_end_token_iff_it_finished(sampler_of, monkeypatch, stops, stage):
    monkeypatch.setattr(sample, "STAGE_TOKENS", stage)
    sampler = sampler_of(eos_token_id=stops)
    ends, rollouts = {1, 5} if stops != 1 else {1}, [r for g in sampler.generate(PROMPTS, 40, 1.0, 9, seed=0) for r in g]
    assert {r.finished for r in rollouts} == {True, False} and {r.completion_ids[-1] for r in rollouts if r.finished} == ends
    for r in rollouts:
        assert r.finished == (r.completion_ids[-1] in ends) and not ends & set(r.completion_ids[:-1])
        assert len(r.logprobs) == len(r.completion_ids) and (r.finished or len(r.completion_ids) == 9)
        assert r.text == sampler.tokenizer.decode([i for i in r.completion_ids if not (r.finished and i in ends)])


def test_the_same_seed_gives_the_same_rollouts_and_another_gives_others(sampler_of):
    sampler = sampler_of()
    first, again, other = (sampler.generate(PROMPTS, 4, 1.0, 8, seed) for seed in (7, 7, 8))
    assert first == again and first != other and first[0] != first[-1]


# ---------------------------------------------------------------- 3. prompts

@pytest.mark.parametrize("template, ids", [(None, [1, *range(3, 7), 16]), ("<eos>{{ messages[0].content }}", [1, *range(3, 7), 16])])
def test_special_tokens_are_written_once(monkeypatch, template, ids):
    from tokenizers.processors import TemplateProcessing
    tokenizer = make_tokenizer()                                  # whose beginning token is <eos>, put before every plain text
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.chat_template = template
    monkeypatch.setattr(tasks, "INSTRUCTION", "")
    prompt = Problem("p", "", "", prompt="1234:") if template is None else None
    if template:
        monkeypatch.setattr(tasks, "render", lambda problem, tok: tok.apply_chat_template([{"content": "1234:"}], tokenize=False))
    assert encode_prompts([prompt], tokenizer, 99, 9) == [tuple(ids)]


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers():
    problem = Problem("c7", "2357=22:", "2357=22", "countdown")
    assert len(encode_prompts([problem], make_tokenizer(), 20, 12)[0]) == 8
    with pytest.raises(UserError, match="problem c7: prompt of 8 tokens .* 13 exceed the model's context of 20 tokens"):
        encode_prompts([problem], make_tokenizer(), 20, 13)


@pytest.mark.parametrize("template, stops", [
    (None, {1}), ("{% for m in messages %}{{ m.content }}<pad>\n{% endfor %}", {0, 1}), ("{% for m in messages %}{{ m.content }}={% endfor %}", {1}),
    ("{{ messages[0].content }}", {1}), ("{% for m in messages %}{{ m.content }}{% endfor %}", {1})])
def test_the_token_that_ends_a_turn_ends_an_answer(template, stops):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template                              # <pad> (0) and <eos> (1) are special, = is not
    assert set(sample.stop_ids(tf.GenerationConfig(eos_token_id=[1]), tokenizer)) == stops


# ---------------------------------------------------------------- 4. the script

def run(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


def test_the_script_writes_what_evaluate_reads(monkeypatch, tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    run(monkeypatch, sample, "--n", 6, "--limit", 5, "--temperature", 0.8, "--seed", 3, "--out", out)
    assert f"{out} holds 5 problems x 6 answers" in capsys.readouterr().out
    problems, groups, _, data = evaluate.read_samples(out)
    assert problems == tasks.load_problems("countdown:test", 5) and data == "countdown:test"
    model, tokenizer = policy.load_model("toy")
    expected = HFSampler(model, tokenizer).generate(encode_prompts(problems, tokenizer, 32, 12), 6, 0.8, 12, seed=3)
    assert groups == [[(r.text, r.finished) for r in group] for group in expected]
    row = json.loads(out.read_text().splitlines()[0])
    assert (row["model"], row["data"], row["temperature"], row["seed"]) == ("toy", "countdown:test", 0.8, 3)


def test_answers_with_odd_line_ends_are_read_back(tmp_path):
    answers = [{"text": text, "finished": True, "tokens": 1} for text in ("a\u2028b", "c\x85d", "e\x0cf", "g\nh")]
    row = {"id": "i", "task": "math", "problem": "p\u2029q", "answer": "1", "data": "d", "answers": answers}
    (tmp_path / "s.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")             # as the script writes
    problems, groups, *_ = evaluate.read_samples(tmp_path / "s.jsonl")
    assert problems == [Problem("i", "p\u2029q", "1")] and groups == [[(a["text"], True) for a in answers]]


@pytest.mark.parametrize("content", ["precious", "precious\n", '{"problem": "1 + 1", "answer": "2"}\n', "{}"])
def test_a_file_of_something_else_is_refused_and_kept(monkeypatch, tmp_path, content):
    out = tmp_path / "s.jsonl"
    out.write_text(content)
    with pytest.raises(UserError, match="not a row of this version's sample.py"):
        run(monkeypatch, sample, "--n", 2, "--limit", 2, "--out", out)
    assert out.read_text() == content


@pytest.mark.parametrize("lines, rest", [(0, '{"id": "countd'), (1, ""), (3, '{"id": "coun'), (4, ""), (5, "")])
def test_an_interrupted_file_is_continued_to_the_same_bytes(monkeypatch, tmp_path, lines, rest):
    monkeypatch.setattr(HFSampler, "block_tokens", 2 * 3 * 20)                  # two problems at a time
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(monkeypatch, sample, "--n", 3, "--limit", 5, "--out", whole)
    broken.write_text("".join(whole.read_text().splitlines(keepends=True)[:lines]) + rest)
    run(monkeypatch, sample, "--n", 3, "--limit", 5, "--out", broken)
    assert broken.read_text() == whole.read_text()


@pytest.mark.parametrize("flags, said", [(["--seed", 1], "seed = 0, not 1"), (["--temperature", 0.5], "temperature = 1.0, not 0.5"), (["--data", "countdown"], "data = ")])
def test_a_file_of_other_settings_is_refused_and_kept(monkeypatch, tmp_path, flags, said):
    out = tmp_path / "s.jsonl"
    run(monkeypatch, sample, "--n", 2, "--limit", 2, "--out", out)
    before = out.read_text()
    with pytest.raises(UserError, match=f"was made with {said}"):
        run(monkeypatch, sample, "--n", 2, "--limit", 2, "--out", out, *flags)
    assert out.read_text() == before


@pytest.mark.parametrize("flags, said", [
    (["--n", 0], "--n is 0, but must be at least 1"), (["--limit", 0], "--limit is 0"), (["--max-new-tokens", 0], "--max-new-tokens is 0"),
    (["--temperature", 0], "--temperature is 0.0, but must be above 0"), (["--temperature", "nan"], "--temperature is nan"),
    (["--temperature", "inf"], "--temperature is inf"), (["--max-new-tokens", 30], "tokens 30 exceed the model's context of 32"),
    (["--model", "tou"], "did you mean 'toy'"), (["--data", "countdwn"], "did you mean 'countdown'"), (["--n", "two"], "--n: invalid int"),
    (["--out", "no-such-folder/s.jsonl"], "no-such-folder")])
def test_what_cannot_work_is_refused_in_one_sentence_and_nothing_is_written(monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        run(monkeypatch, sample, "--limit", 2, "--n", 2, *flags)
    assert said in str(refused.value) and "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_question_is_answered_n_times_and_answers_that_agree_are_counted_together(monkeypatch, capsys):
    run(monkeypatch, sample, "--ask", "2357=22:", "--n", 40)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]         # count of 40 answer reward r
    counts = [int(words[0]) for words in lines]
    assert sum(counts) == 40 and counts == sorted(counts, reverse=True) and counts[0] > 1
    assert len({words[3] for words in lines}) == len(lines)
    assert all(float(words[5]) == tasks.grade_countdown(words[3], "2357=22") for words in lines if words[3] != "(cut")
    assert any(words[5] == "1" for words in lines)


def test_a_cut_off_answer_to_a_question_earns_nothing_however_right(monkeypatch, capsys):
    right = sample.Rollout((5,), (6,), (0.0,), "9+9+9+9", False)                    # no end token
    monkeypatch.setattr(sample.HFSampler, "generate", lambda *args: [[right, right]])
    run(monkeypatch, sample, "--ask", "9999=36", "--n", 2)
    assert capsys.readouterr().out.split() == "2 of 2 (cut off) reward 0".split()


@pytest.mark.parametrize("question", ["22=2357", "235=22", "2357=220", "2357", "0123=22", "2357=22=1", "2+2"])
def test_the_toy_is_asked_countdown_only(monkeypatch, question):
    with pytest.raises(UserError, match="four numbers 1 to 9 and a target 10 to 99"):
        run(monkeypatch, sample, "--ask", question)


def test_an_answer_is_asked_of_a_chat_model_too(monkeypatch, capsys, tmp_path):
    save_model("llama", tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ '\\\\boxed' }}{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    run(monkeypatch, sample, "--model", tmp_path, "--ask", "1+1", "--n", 3, "--max-new-tokens", 4)
    assert "of 3   (cut off)" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "ablate.py"])
def test_help_fits_a_screen(script):
    text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) <= 52 and max(map(len, text.splitlines())) <= 150
