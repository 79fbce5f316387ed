r"""Proof that problems, prompts and rewards are what lib/tasks.py says.

1. Countdown: the parser equals Python's own arithmetic (by `ast`, nothing is evaluated). Outside
   the grammar there is no value. Each number counts exactly once. Graded rewards are
   exp(-|value - target| / 5).
2. Data sets: the split is a partition with a tenth for testing, and no evaluation question is
   trained on. A bad file is refused with file and line, an unknown name with the nearest one.
3. Prompts: plain, the chat template with and without a \boxed of its own, the data's own. Special
   tokens are written once. What the model cannot read is refused with the numbers.
4. Rewards: each answer is graded by the task of its problem. Those that were cut off earn
   nothing, and an answer that hangs costs one time limit, is counted and harms no other.
"""

import ast
import json
import math
import operator
import random
import threading
from itertools import permutations, product
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lib import marker, tasks
from lib.cli import UserError
from lib.tasks import Problem

DATA = ROOT.parent / "shared" / "data"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


# ---------------------------------------------------------------- 1. Countdown

def by_ast(expression):
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return node.value
    return value(ast.parse(expression, mode="eval").body)


def in_grammar(text):
    """Digits 1..9 at even places, + - * at odd ones."""
    kinds = "123456789", "+-*"
    return len(text) % 2 == 1 and all(c in kinds[i % 2] for i, c in enumerate(text))


def test_the_parser_equals_pythons_arithmetic():
    rng = random.Random(0)
    every = (product(*(["123456789", "+-*"] * n)[:-1]) for n in (1, 2, 3))
    short = ("".join(pieces) for group in every for pieces in group)
    tail = lambda: rng.choice("+-*") + rng.choice("123456789")
    long = (rng.choice("123456789") + "".join(tail() for _ in range(rng.randrange(3, 12)))
            for _ in range(3000))
    noise = ("".join(rng.choices("0123456789+-*=:", k=rng.randrange(1, 6)))
             for _ in range(10000))
    for text in (*short, *long, *noise):
        assert tasks.countdown_value(text) == (by_ast(text) if in_grammar(text) else None), text


@pytest.mark.parametrize("text", [
    "", " ", "+3", "3+", "12+3", "0+5", "3+05", "3**5", "3--5", "3/5", "(3+5)", "3 +5", "3+5\n",
    "3+5=8", "３+5", "٣+5", "3+5<pad>", "1e3", "3.0", "exit()", "__import__('os')", "3+5" * 2,
    "3\x00+5"])
def test_outside_the_grammar_there_is_no_value(text):
    assert tasks.countdown_value(text) is None
    assert tasks.grade_countdown(text, "35=8", graded=True) == 0


@pytest.mark.parametrize("text, exact, graded", [
    ("3*5+7-2", 1, 1), ("7-2+5*3", 1, 1), ("2*5+7+3", 1, 1),
    ("3*7+5-2", 0, math.exp(-4 / 5)), ("2*3*5-7", 0, math.exp(-3 / 5)),
    ("2-3-5-7", 0, math.exp(-33 / 5)), ("7+3*2*5", 0, math.exp(-17 / 5)),
    ("3*5+7", 0, 0), ("3*5+7-2+2", 0, 0), ("2*5+7+5", 0, 0), ("3*5+8-4", 0, 0),
    ("2+2+9+9", 0, 0), ("22", 0, 0), ("2357=22", 0, 0)])
def test_numbers_count_exactly_once_and_a_miss_earns_its_distance(text, exact, graded):
    assert tasks.grade_countdown(text, "2357=20") == exact
    reward = tasks.grade_countdown(text, "2357=20", graded=True)
    assert reward == pytest.approx(graded, rel=1e-15)


def test_every_listed_solution_is_right_and_none_is_missing():
    listed = tasks.countdown_solutions()
    assert all(by_ast(text) == target for (_, target), texts in listed.items() for text in texts)
    known = sorted({numbers for numbers, _ in listed})
    for numbers in random.Random(2).sample(known, 80):
        found = {}
        for (a, b, c, d), (o, p, q) in product(set(permutations(numbers)),
                                               product("+-*", repeat=3)):
            expression = a + o + b + p + c + q + d
            found.setdefault(by_ast(expression), set()).add(expression)
        for target in range(10, 100):
            expressions = sorted(found.get(target, []))
            assert sorted(listed.get((numbers, target), [])) == expressions
            for expression in expressions:
                assert tasks.grade_countdown(expression, f"{numbers}={target}") == 1


# ---------------------------------------------------------------- 2. data sets

def write(path, *rows):
    """A file of lines: texts as they are, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def questions(problems):
    return [problem.question for problem in problems]


@pytest.mark.parametrize("name", ["countdown", "countdown-graded"])
def test_train_and_test_are_a_partition_with_a_tenth_for_testing(name):
    whole, train, test = (tasks.load_problems(name + part) for part in ("", ":train", ":test"))
    assert {p.task for p in whole} == {name}
    assert len({p.id for p in whole}) == len(whole) == len(tasks.countdown_solutions())
    assert not set(train) & set(test) and set(train) | set(test) == set(whole)
    assert abs(len(test) - len(whole) / 10) < 5 * (len(whole) * 0.09) ** 0.5
    assert questions(test) == questions(tasks.load_problems("countdown:test"))  # graded or not


def test_a_limit_is_a_fixed_choice():
    few, more = (tasks.load_problems("countdown:test", limit) for limit in (20, 50))
    assert few == tasks.load_problems("countdown:test", 20)
    assert len(set(few)) == 20 and set(few) < set(more)
    everything = tasks.load_problems("countdown:test")
    assert tasks.load_problems("countdown:test", 10**6) == everything


def test_a_jsonl_file_is_read_as_it_stands(tmp_path):
    path = write(
        tmp_path / "own.jsonl", {"id": "a", "problem": "1 + 1?", "answer": "2"}, "",
        {"problem": "Größe\u2028x?", "answer": 7},
        {"problem": "p", "answer": "\\frac12", "prompt": "exactly this:", "level": 3})
    assert tasks.load_problems(path) == [
        Problem("a", "1 + 1?", "2"), Problem("own-3", "Größe\u2028x?", "7"),
        Problem("own-4", "p", "\\frac12", prompt="exactly this:", level=3)]


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
    with pytest.raises(UserError, match="asks for levels 2, but countdown has no 'level'"):
        tasks.load_problems("countdown:2")


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


def test_an_id_that_comes_twice_is_named_with_both_lines(tmp_path):
    path = write(tmp_path / "own.jsonl", *(
        {"id": name, "problem": "p", "answer": "1"} for name in "aba"))
    with pytest.raises(UserError, match="line 3: the id 'a' is that of line 1"):
        tasks.load_problems(path)


@pytest.mark.parametrize("line, said", [
    ('{"problem": "p", "answer": ', "not a JSON object"), ("[1, 2]", "list"), ('"text"', "str"),
    ("null", "NoneType"), ("[" * 10**5, "not a JSON"), ('{"answer": "1"}', "no 'problem'"),
    ('{"problem": "p"}', "no 'answer'"), ('{"problem": " ", "answer": "1"}', "no 'problem'"),
    ('{"problem": "p", "answer": ""}', "no 'answer'"),
    ('{"problem": "p", "answer": null}', "'answer'"),
    ('{"problem": null, "answer": "1"}', "'problem'"),
    ('{"problem": "p", "answer": "1", "prompt": 5}', "'prompt' is a int")])
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
    ("countdwn", "'countdwn' is unknown, did you mean 'countdown'"),
    ("math50", "did you mean 'math500'"), ("GSM8K", "GSM8K' is unknown"),
    ("qqq", "'qqq' is unknown; give one of countdown"),
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


@pytest.mark.parametrize("data", ["countdown", "countdown:train", "countdown-graded"])
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
GAME = Problem("c7", "2357=22:", "2357=22", "countdown")
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
    (TURN, GAME, "2357=22:"), (TURN, Problem("p", "q", "3", prompt="as it is"), "as it is")])
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
    problems = tasks.load_problems("countdown:test", 5)
    encoded = tasks.encode(problems, tokenizer, context(None), 10**6)  # no context: no limit
    assert [tokenizer.decode(p.prompt_ids) for p in encoded] == questions(problems)
    assert [Problem(**{**vars(p), "prompt_ids": ()}) for p in encoded] == problems


@pytest.mark.parametrize("problem, new, said", [
    (GAME, 13, "problem c7: prompt of 8 tokens .* 13 exceed the model's context of 20 tokens"),
    (Problem("p", "q", "1", prompt=""), 1, "problem p: its prompt '' has no tokens"),
    (MATH, 1, "problem m: the tokenizer does not know all of its prompt")])
def test_a_prompt_that_the_model_cannot_read_is_refused_with_the_numbers(problem, new, said):
    tokenizer = tokenizer_with(None)
    assert len(tasks.encode([GAME], tokenizer, context(20), 12)[0].prompt_ids) == 8
    with pytest.raises(UserError, match=said):
        tasks.encode([problem], tokenizer, context(20), new)


def test_a_question_is_a_problem_and_a_game_knows_its_answer():
    assert tasks.question(" 1 + 1? ", "math500") == Problem("ask", "1 + 1?", "")
    for text in ("2357=22", "2357=22:", " 2357=22: "):
        for task in ("countdown", "countdown-graded"):
            asked = tasks.question(text, f"{task}:test")
            assert asked == Problem("ask", "2357=22:", "2357=22", task)


@pytest.mark.parametrize("text", [
    "22=2357", "235=22", "2357=220", "2357=5", "2357", "0123=22", "2357=22=1", "2+2"])
def test_a_question_that_the_toy_cannot_play_is_refused(text):
    with pytest.raises(UserError, match="four numbers 1 to 9 and a target 10 to 99"):
        tasks.question(text, "countdown:test")
    with pytest.raises(UserError, match="--ask is empty"):
        tasks.question(" : ", "math500")


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
    problems = [Problem("m", "?", "0.5"), GAME, Problem("g", "", "2357=22", "countdown-graded")]
    groups = [answers(r"\boxed{\frac12}") + answers(r"\boxed{\frac12}", finished=False),
              answers("3*5+7-2", "2*5+7+5", "7*2+3+5") + answers("7*2+3+5", finished=False),
              answers("3*5+7-2") + answers("7*2+3+5", finished=False)]
    expected = [[1, 0], [0, 0, 1, 0], [math.exp(-2 / 5), 0]]
    assert tasks.grade_all(problems, groups) == (expected, 0)
    assert [p.graded for p in problems] == [False, False, True]
    with pytest.raises(ValueError):
        tasks.grade_all(problems, groups[:2])


def test_a_hanging_answer_is_counted_and_harms_no_other(monkeypatch):
    monkeypatch.setattr(marker, "LIMIT_S", 0.4)
    problems = [Problem("a", "?", r"\pi"), GAME, Problem("b", "?", "0.5")]
    right, game = r"\boxed{\frac12}", "7*2+3+5"
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
              answers("3*5+7-2"), answers("c")]
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
