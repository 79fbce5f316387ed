r"""Proof that problems, prompts and rewards are what lib/tasks.py says.

1. Find a divisor: the numbers are those of the definition, an answer is right if and only if it
   divides, and no other text earns anything. Graded rewards are min(1, log d / log 100).
2. Data sets: the split is a partition, 8 : 1 : 1, and no evaluation question is
   trained on. A bad file is refused with file and line, an unknown name with the nearest one.
3. Prompts: plain, the chat template with and without a \boxed of its own, the data's own. Special
   tokens are written once. What the model cannot read is refused with the numbers.
4. Rewards: each answer is graded by the task of its problem. Those that were cut off earn
   nothing, and an answer that hangs costs one time limit, is counted and harms no other.
"""

import json
import math
import random
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lib import marker, tasks
from lib.cli import UserError
from lib.tasks import Problem

DATA = ROOT.parent / "shared" / "data"


# ---------------------------------------------------------------- 1. find a divisor

def divisors(number):
    """All but 1 and the number, by trial of every candidate up to its half."""
    return {d for d in range(2, number // 2 + 1) if number % d == 0}


def test_the_numbers_are_those_of_the_definition():
    listed = set(tasks.composites())
    for number in [*random.Random(0).sample(range(10000, 100000), 2000), 10001, 99999]:
        found = {d for d in range(2, 100) if number % d == 0}
        last_digit_tells = bool({2, 5} & found)
        assert (number in listed) == bool(found and not last_digit_tells), number
    assert min(listed) > 10000 and max(listed) < 100000 and len(tasks.composites()) == len(listed)


def test_an_answer_is_right_if_and_only_if_it_divides():
    for number in random.Random(1).sample(tasks.composites(), 10):
        right = divisors(number)
        for d in range(number + 2):
            assert tasks.grade_divisor(str(d), str(number)) == (d in right)
        for d in right:
            reward = tasks.grade_divisor(str(d), str(number), graded=True)
            assert reward == pytest.approx(min(1.0, math.log(d) / math.log(100)), rel=1e-12)
        assert tasks.grade_divisor("2", str(number), graded=True) == 0


@pytest.mark.parametrize("text", [
    "", " ", "1", "0", "30003", "-3", "+3", "03", "3.0", "3e0", "3,", "3:", ":3", "3 7",
    "３", "٣", "³", "3<pad>", "0x3", "exit()", "__import__('os')", "3\x00", "9" * 5000,
    "3" * 16, "\ud800"])
def test_no_other_text_earns_anything(text):
    assert tasks.grade_divisor("3", "30003") == tasks.grade_divisor(" 3\n", "30003") == 1
    assert tasks.grade_divisor(text, "30003") == tasks.grade_divisor(text, "30003", True) == 0


# ---------------------------------------------------------------- 2. data sets

def write(path, *rows):
    """A file of lines: texts as they are, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def questions(problems):
    return [problem.question for problem in problems]


@pytest.mark.parametrize("name", tasks.GAMES)
def test_the_parts_are_a_partition_8_to_1_to_1(name):
    names = [name + part for part in ("", ":train", ":select", ":test")]
    whole, *parts = map(tasks.load_problems, names)
    assert {p.task for p in whole} == {name}
    assert len({p.id for p in whole}) == len(whole) == len(tasks.composites())
    assert sum(map(len, parts)) == len(whole) and set().union(*parts) == set(whole)
    for part, share in zip(parts, (0.8, 0.1, 0.1)):
        assert abs(len(part) - len(whole) * share) < 5 * (len(whole) * share * (1 - share)) ** 0.5
    assert questions(parts[2]) == questions(tasks.load_problems("divisor:test"))  # graded or not


def test_a_limit_is_a_fixed_choice():
    few, more = (tasks.load_problems("divisor:test", limit) for limit in (20, 50))
    assert few == tasks.load_problems("divisor:test", 20)
    assert len(set(few)) == 20 and set(few) < set(more)
    everything = tasks.load_problems("divisor:test")
    assert tasks.load_problems("divisor:test", 10**6) == everything


def test_a_jsonl_file_is_read_as_it_stands(tmp_path):
    path = write(
        tmp_path / "own.jsonl", {"id": "a", "problem": "1 + 1?", "answer": "2"}, "",
        {"problem": "Größe\u2028x?", "answer": 7},
        {"problem": "p", "answer": "\\frac12", "prompt": "exactly this:", "level": 3},
        {"problem": "a divisor of 91", "answer": 91, "prompt": "91/", "task": "divisor"})
    assert tasks.load_problems(path) == [
        Problem("a", "1 + 1?", "2"), Problem("own-3", "Größe\u2028x?", "7"),
        Problem("own-4", "p", "\\frac12", prompt="exactly this:", level=3),
        Problem("own-5", "a divisor of 91", "91", "divisor", "91/")]


def test_levels_can_be_picked(tmp_path):
    levels = (1, 2, "3", "Level 4", "Level ?", None)
    path = write(tmp_path / "own.jsonl", *(
        {"problem": f"p{i}", "answer": "1", "level": level} for i, level in enumerate(levels)))
    picked = lambda part: questions(tasks.load_problems(f"{path}:{part}"))
    assert picked("1") == ["p0"]
    assert picked("2-4") == ["p1", "p2", "p3"]
    assert picked("1-9") == ["p0", "p1", "p2", "p3"]
    train = set(picked("train"))
    assert picked("1-9:train") == [q for q in picked("1-9") if q in train] != []
    for part, said in (("5", "none of its 6"), ("1-9:5", "holds no problems")):
        with pytest.raises(UserError, match=said):
            picked(part)
    with pytest.raises(UserError, match="asks for levels 2, but divisor has no 'level'"):
        tasks.load_problems("divisor:2")


def test_a_training_set_keeps_its_levels_in_its_evaluation(monkeypatch):
    asked = []

    def load(name, limit=None):
        asked.append((name, limit))
        return [Problem(name, name, "1")]
    monkeypatch.setattr(tasks, "load_problems", load)
    names = tasks.train_and_eval("math:1-2", None, 5)[2:]
    assert names == ("math:1-2", "math500:1-2")
    assert asked == [("math500:1-2", None), ("math:1-2", None), ("math500:1-2", 5)]


def test_hub_data_goes_through_the_library_with_the_columns_and_levels_it_has(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder / "train.jsonl", {"question": "a", "answer": "#### 7", "level": "Level 2"},
          {"question": "b", "answer": "$x$", "level": "Level ?"})
    assert tasks.load_problems(str(folder)) == [
        Problem(f"{folder}-0", "a", "7", level=2), Problem(f"{folder}-1", "b", "x")]
    write(folder / "train.jsonl", {"question": "a", "solution": "7"})
    with pytest.raises(UserError, match="columns .*question.*solution.*answer"):
        tasks.load_problems(str(folder))


def test_an_id_that_comes_twice_is_refused(tmp_path):
    path = write(tmp_path / "own.jsonl", *(
        {"id": name, "problem": "p", "answer": "1"} for name in "aba"))
    with pytest.raises(UserError, match="line 3: the id 'a' is that of an earlier line"):
        tasks.load_problems(path)


@pytest.mark.parametrize("line, said", [
    ('{"problem": "p", "answer": ', "not a JSON object"), ("[1, 2]", "list"), ('"text"', "str"),
    ("null", "NoneType"), ("[" * 10**5, "not a JSON"), ('{"answer": "1"}', "no 'problem'"),
    ('{"problem": "p"}', "no 'answer'"), ('{"problem": " ", "answer": "1"}', "no 'problem'"),
    ('{"problem": "p", "answer": ""}', "no 'answer'"),
    ('{"problem": "p", "answer": null}', "'answer'"),
    ('{"problem": null, "answer": "1"}', "'problem'"),
    ('{"problem": "p", "answer": "1", "prompt": 5}', "'prompt' is a int"),
    ('{"problem": "p", "answer": "1", "task": "chess"}', "task 'chess' is none of math, divisor"),
    ('{"problem": "p", "answer": "1", "task": ["math"]}', "task ['math'] is none of"),
    ('{"problem": "p", "answer": "x", "task": "divisor"}', "answer 'x' of task divisor is no")])
def test_a_broken_line_is_named_with_file_and_line(tmp_path, line, said):
    good = {"problem": "p", "answer": "1"}
    path = write(tmp_path / "bad.jsonl", good, line, good)
    with pytest.raises(UserError) as refused:
        tasks.load_problems(path)
    assert f"{path}, line 2:" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("content, part, said", [
    (b"", "", "x.jsonl' holds no problems"), (b"\n \n", ":test", "x.jsonl:test' holds no problems"),
    (b"\xff\xfe", "", "x.jsonl cannot be read")])
def test_an_empty_data_set_and_a_file_that_is_no_text_are_refused(tmp_path, content, part, said):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        tasks.load_problems(f"{tmp_path}/x.jsonl{part}")


@pytest.mark.parametrize("name, said", [
    ("divisr", "'divisr' is unknown, did you mean divisor"),
    ("math50", "did you mean math500"), ("GSM8K", "GSM8K' is unknown"),
    ("qqq", "'qqq' is unknown; give a .jsonl file, owner/name of the hub, or one of div"),
    ("no/such.jsonl", "no/such.jsonl cannot be read"),
    ("gsm8k", "'gsm8k' could not be loaded"),
    ("no/such-data", "'no/such-data' could not be loaded")])
def test_what_cannot_be_had_is_one_sentence(name, said):
    with pytest.raises(UserError) as refused:
        tasks.load_problems(name)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_no_evaluation_question_is_trained_on(tmp_path):
    asked = {"problem": "What is  2 + 2?", "answer": "4"}
    train = write(tmp_path / "t.jsonl", asked, {"problem": "new", "answer": "1"})
    held_out = write(tmp_path / "e.jsonl", {"problem": "what is 2 + 2? ", "answer": "4"})
    kept, evaluated, *names = tasks.train_and_eval(train, held_out, None)
    assert questions(kept) == ["new"] and len(evaluated) == 1 and names == [train, held_out]
    with pytest.raises(UserError, match="nothing to train on"):
        tasks.train_and_eval(held_out, train, 1)  # whatever the limit: the whole file is kept out


@pytest.mark.parametrize("data", ["divisor", "divisor:train", "divisor-graded"])
def test_the_default_evaluation_data_is_the_held_out_part(data):
    problems, held_out, *names = tasks.train_and_eval(data, None, 30)
    base = data.split(":")[0]
    assert names == [f"{base}:train", f"{base}:test"]
    assert problems == tasks.load_problems(f"{base}:train")
    assert held_out == tasks.load_problems(f"{base}:test", 30)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA}")
def test_every_benchmark_file_loads():
    for path in sorted(DATA.glob("*.jsonl")):
        problems = tasks.load_problems(str(path))
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        assert len({p.id for p in problems}) == len(problems) == len(lines)
        assert all(p.question and p.answer and p.task == "math" for p in problems)


# ---------------------------------------------------------------- 3. prompts

MATH = Problem("m", "How many?", "3")
GAME = Problem("d7", "30003:", "30003", "divisor")
TURN = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def tokenizer_with(template):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")  # one token per character
    tokenizer.chat_template = template
    return tokenizer


def context(tokens):
    return SimpleNamespace(max_position_embeddings=tokens)


@pytest.mark.parametrize("template, problem, prompt", [
    (None, MATH, f"Question: How many?\n{tasks.INSTRUCTION}\nAnswer:"),
    (TURN, MATH, f"<user>How many?\n{tasks.INSTRUCTION}<assistant>"),
    ("In \\\\boxed{}." + TURN, MATH, "In \\\\boxed{}.<user>How many?<assistant>"),
    (TURN, GAME, "30003:"), (TURN, Problem("p", "q", "3", prompt="as it is"), "as it is")])
def test_a_prompt_asks_for_the_box_exactly_once(template, problem, prompt):
    assert tasks.render(problem, tokenizer_with(template)) == prompt


# How common families write: before the first message, a turn, what opens the answer.
IM = "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
FAMILIES = {
    "Qwen2.5-Math": (SYSTEM.replace("{}", tasks.INSTRUCTION), *IM),
    "Qwen2.5": (SYSTEM.replace("{}", "You are a helpful assistant."), *IM),
    "SmolLM2": ("", *IM),
    "Llama-3": ("<bos>", "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "Gemma": ("<bos>", "<start_of_turn>{role}\n{content}<end_of_turn>\n",
              "<start_of_turn>model\n"),
    "Mistral": ("<bos>", "[INST] {content} [/INST]", ""),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_the_common_families(family):
    before, turn, opens = FAMILIES[family]
    jinja = turn.replace("{role}", "{{ m['role'] }}").replace("{content}", "{{ m['content'] }}")
    tokenizer = tokenizer_with(
        before + "{% for m in messages %}" + jinja + "{% endfor %}"
        "{% if add_generation_prompt %}" + opens + "{% endif %}")
    asked = "How many?" if family == "Qwen2.5-Math" else f"How many?\n{tasks.INSTRUCTION}"
    expected = before + turn.replace("{role}", "user").replace("{content}", asked) + opens
    assert tasks.render(MATH, tokenizer) == expected and expected.count("\\boxed") == 1


@pytest.mark.parametrize("template", [None, "<eos>{{ messages[0].content[:5] }}"])
def test_special_tokens_are_written_once(template):
    """By the tokenizer before a plain text, by the chat template where there is one."""
    tokenizer = tokenizer_with(template)
    begins = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer._tokenizer.post_processor = begins
    plain = Problem("p", "", "", prompt="1234:")
    problem = plain if template is None else Problem("p", "1234:", "")
    [encoded] = tasks.encode([problem], tokenizer, context(99), 9)
    assert encoded.prompt_ids == (1, *tokenizer.convert_tokens_to_ids(list("1234:")))


def test_prompts_are_encoded_in_order_and_nothing_else_of_a_problem_changes():
    tokenizer = tokenizer_with(None)
    problems = tasks.load_problems("divisor:test", 5)
    encoded = tasks.encode(problems, tokenizer, context(None), 10**6)  # no context: no limit
    assert [tokenizer.decode(p.prompt_ids) for p in encoded] == questions(problems)
    assert [Problem(**{**vars(p), "prompt_ids": ()}) for p in encoded] == problems


@pytest.mark.parametrize("problem, new, said", [
    (GAME, 15, "problem d7: prompt of 6 tokens .* 15 exceed the model's context of 20 tokens"),
    (Problem("p", "q", "1", prompt=""), 1, "problem p: its prompt '' has no tokens"),
    (MATH, 1, "problem m: the toy knows one game only")])
def test_a_prompt_that_the_model_cannot_read_is_refused_with_the_numbers(problem, new, said):
    tokenizer = tokenizer_with(None)
    assert len(tasks.encode([GAME], tokenizer, context(20), 14)[0].prompt_ids) == 6
    with pytest.raises(UserError, match=said):
        tasks.encode([problem], tokenizer, context(20), new)


# ---------------------------------------------------------------- 4. rewards

HANGS = r"\boxed{(((9^{9999})^{9999})^{9999})\pi}"


def answers(*texts, finished=True):
    return [SimpleNamespace(text=text, finished=finished) for text in texts]


@pytest.mark.parametrize("text, answer, reward", [
    (r"so \boxed{7}.", "7", 1), (r"\boxed{5}, no: \boxed{6}", "6", 1),
    (r"\boxed{5}, no: \boxed{6}", "5", 0), (r"\boxed{\frac{1}{2}}", "0.5", 1),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1),
    (r"\boxed{ a b }", "ab", 1), (r"\boxed{25}", "025", 1), ("7", "7", 0),
    (r"\boxed{7", "7", 0), (r"\boxed{}", "", 0), (r"\boxed{8}", "7", 0), ("", "7", 0),
    (r"\boxed{}}{", "7", 0), (r"\boxed{" * 1000, "7", 0), (r"\boxed{" + "9" * 5000 + "}", "9", 0),
    (r"\boxed{" + "9" * 5000 + "}", "9" * 5000, 1), ("\\boxed{\ud800}", "7", 0),
    ("\\boxed{7\n}", "7", 1), (r"\boxed{__import__('os')}", "7", 0)])
def test_the_last_box_decides(text, answer, reward):
    assert tasks.grade(text, answer) == reward
    assert tasks.grade_all([Problem("m", "?", answer)], [answers(text)]) == ([[reward]], 0)


def test_all_are_graded_by_their_task_and_cut_off_answers_earn_nothing():
    problems = [Problem("m", "?", "0.5"), GAME, Problem("g", "", "30003", "divisor-graded")]
    groups = [answers(r"\boxed{\frac12}") + answers(r"\boxed{\frac12}", finished=False),
              answers("3", "7", "73") + answers("3", finished=False),
              answers("73") + answers("3", finished=False)]
    expected = [[1, 0], [1, 0, 1, 0], [math.log(73, 100), 0]]
    assert tasks.grade_all(problems, groups) == (expected, 0)
    assert [p.graded for p in problems] == [False, False, True]
    with pytest.raises(ValueError):
        tasks.grade_all(problems, groups[:2])


def test_a_hanging_answer_is_counted_and_harms_no_other(monkeypatch):
    monkeypatch.setattr(marker, "LIMIT_S", 0.4)
    problems = [Problem("a", "?", r"\pi"), GAME, Problem("b", "?", "0.5")]
    right, game = r"\boxed{\frac12}", "3"
    groups = [answers(HANGS, r"\boxed{\pi}"), answers(game, game), answers(right, "wrong", right)]
    assert tasks.grade_all(problems, groups) == ([[0, 1], [1, 1], [1, 0, 1]], 1)
    # the failures are those of a call
    assert tasks.grade_all(problems[1:], groups[1:]) == ([[1, 1], [1, 0, 1]], 0)


def test_answers_that_the_marker_lost_earn_nothing_and_are_counted(monkeypatch):
    asked = []

    def mark(pairs):
        asked.extend(pairs)
        return [None, 1.0, None]
    monkeypatch.setattr(marker, "mark", mark)
    groups = [answers("a") + answers("x", finished=False) + answers("b"),
              answers("7"), answers("c")]
    problems = [Problem("p", "?", "1"), GAME, Problem("q", "?", "2")]
    assert tasks.grade_all(problems, groups) == ([[0, 0, 1], [0], [0]], 2)
    assert asked == [("a", "1"), ("b", "1"), ("c", "2")]  # nothing that was cut off
    monkeypatch.setattr(marker, "mark", lambda pairs: [None] * len(pairs))
    assert tasks.grade("a", "1") == 0.0


def test_a_marker_that_cannot_start_is_one_sentence_each_time(monkeypatch):
    monkeypatch.setattr(marker, "_own", threading.local())  # no worker from an earlier test
    monkeypatch.setattr(marker.sys, "executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(UserError, match="did not start.*math-verify"):
            tasks.grade_all([MATH], [answers(r"\boxed{3}")])
