"""Proof that problems, prompts and rewards are what tasks.py says.

1. Countdown: the parser equals Python's own arithmetic (by `ast`, nothing is evaluated), everything outside the
   grammar is None, the numbers count exactly once, graded rewards are exp(-|value - target| / 5).
2. Data sets: the split is a partition with a tenth for testing, no evaluation question is trained on, a bad file is
   refused with file and line, an unknown name with the nearest known one.
3. Prompts: plain, chat template with and without its own \\boxed, the data's own.
4. Mathematics: the last balanced box decides; a hanging answer costs one time limit and nothing else.
"""

import ast
import json
import math
import operator
import random
import subprocess
import sys
import threading
from itertools import permutations, product

import pytest

import tasks
from conftest import ROOT
from tasks import Graders, Problem, UserError
from toy.pretrain import make_tokenizer

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
    return len(text) % 2 == 1 and all(c in ("+-*" if i % 2 else "123456789") for i, c in enumerate(text))


def test_the_parser_equals_pythons_arithmetic():
    short = ("".join(s) for n in (1, 2, 3) for s in product(*(["123456789", "+-*"] * n)[:-1]))      # all of them
    rng = random.Random(0)
    long = (rng.choice("123456789") + "".join(rng.choice("+-*") + rng.choice("123456789") for _ in range(rng.randrange(3, 12)))
            for _ in range(3000))
    noise = ("".join(rng.choice("0123456789+-*=:") for _ in range(rng.randrange(1, 6))) for _ in range(10000))
    for text in (*short, *long, *noise):
        assert tasks.countdown_value(text) == (by_ast(text) if in_grammar(text) else None), text


@pytest.mark.parametrize("text", ["", " ", "+3", "3+", "12+3", "0+5", "3+05", "3**5", "3--5", "3/5", "(3+5)", "3 +5", "3+5\n", "3+5=8",
                                  "３+5", "٣+5", "3+5<pad>", "1e3", "3.0", "exit()", "__import__('os')", "3+5" * 2, "3\x00+5"])
def test_outside_the_grammar_there_is_no_value(text):
    assert tasks.countdown_value(text) is None and tasks.grade_countdown(text, "35=8", graded=True) == 0


@pytest.mark.parametrize("text, exact, graded", [
    ("3*5+7-2", 1, 1), ("7-2+5*3", 1, 1), ("3*7+5-2", 0, math.exp(-4 / 5)), ("2*5+7+3", 1, 1),
    ("2*3*5-7", 0, math.exp(-3 / 5)), ("2-3-5-7", 0, math.exp(-33 / 5)), ("7+3*2*5", 0, math.exp(-17 / 5)),
    ("3*5+7", 0, 0), ("3*5+7-2+2", 0, 0), ("2*5+7+5", 0, 0), ("3*5+8-4", 0, 0), ("2+2+9+9", 0, 0), ("22", 0, 0), ("2357=22", 0, 0)])
def test_numbers_count_exactly_once_and_a_miss_earns_its_distance(text, exact, graded):
    assert tasks.grade_countdown(text, "2357=20") == exact
    assert tasks.grade_countdown(text, "2357=20", graded=True) == pytest.approx(graded, rel=1e-15)


def test_every_listed_solution_is_right_and_none_is_missing():
    listed = tasks.countdown_solutions()
    assert all(by_ast(expression) == target for (_, target), group in listed.items() for expression in group)
    for numbers in random.Random(2).sample(sorted({numbers for numbers, _ in listed}), 80):
        found = {}
        for (a, b, c, d), (o, p, q) in product(set(permutations(numbers)), product("+-*", repeat=3)):
            found.setdefault(by_ast(a + o + b + p + c + q + d), set()).add(a + o + b + p + c + q + d)
        for target in range(10, 100):
            assert sorted(listed.get((numbers, target), [])) == sorted(found.get(target, []))
            for expression in found.get(target, []):
                assert tasks.grade_countdown(expression, f"{numbers}={target}") == 1


# ---------------------------------------------------------------- 2. data sets

@pytest.mark.parametrize("name", ["countdown", "countdown-graded"])
def test_train_and_test_are_a_partition_with_a_tenth_for_testing(name):
    whole, train, test = (tasks.load_problems(name + part) for part in ("", ":train", ":test"))
    assert {p.task for p in whole} == {name} and len({p.id for p in whole}) == len(whole) == len(tasks.countdown_solutions())
    assert not set(train) & set(test) and set(train) | set(test) == set(whole)
    assert abs(len(test) - len(whole) / 10) < 5 * (len(whole) * 0.09) ** 0.5
    assert [p.question for p in test] == [p.question for p in tasks.load_problems("countdown:test")]       # graded or not


def test_a_limit_is_a_fixed_choice():
    few, more = tasks.load_problems("countdown:test", 20), tasks.load_problems("countdown:test", 50)
    assert few == tasks.load_problems("countdown:test", 20) and len(set(few)) == 20 and set(few) < set(more)
    assert len(tasks.load_problems("countdown:test", 10**6)) == len(tasks.load_problems("countdown:test"))


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def test_a_jsonl_file_is_read_as_it_stands(tmp_path):
    path = write(tmp_path / "own.jsonl", {"id": "a", "problem": "1 + 1?", "answer": "2"}, "", {"problem": "Größe\u2028x?", "answer": 7},
                 {"problem": "p", "answer": "\\frac12", "prompt": "exactly this:", "level": 3})
    assert tasks.load_problems(path) == [Problem("a", "1 + 1?", "2"), Problem("own-3", "Größe\u2028x?", "7"),
                                         Problem("own-4", "p", "\\frac12", prompt="exactly this:", level=3)]


def test_levels_can_be_picked(tmp_path):
    rows = [{"problem": f"p{i}", "answer": "1", "level": level} for i, level in enumerate((1, 2, "3", "Level 4", "Level ?", None))]
    path = write(tmp_path / "own.jsonl", *rows)
    picked = lambda part: [p.question for p in tasks.load_problems(f"{path}:{part}")]
    assert (picked("1"), picked("2-4"), picked("1-9")) == (["p0"], ["p1", "p2", "p3"], ["p0", "p1", "p2", "p3"])
    assert picked("1-9:train") == [q for q in picked("1-9") if q in [p.question for p in tasks.load_problems(f"{path}:train")]] != []
    for part, said in (("5", "none of the 6"), ("1-9:5", "holds no problems")):
        with pytest.raises(UserError, match=said):
            picked(part)
    with pytest.raises(UserError, match="asks for levels 2, but countdown has no 'level'"):
        tasks.load_problems("countdown:2")


def test_a_training_set_keeps_its_levels_in_its_evaluation(monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "load_problems", lambda name, limit=None: asked.append(name) or [Problem(name, name, "1")])
    assert tasks.train_and_eval("math:1-2", None, 5)[2:] == ("math:1-2", "math500:1-2") and asked[0] == "math500:1-2"


def test_hub_data_goes_through_the_library_with_the_columns_and_levels_it_has(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"question": "a", "answer": "#### 7", "level": "Level 2"}, {"question": "b", "answer": "$x$", "level": "Level ?"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tasks.load_problems(str(folder)) == [Problem(f"{folder}-0", "a", "7", level=2), Problem(f"{folder}-1", "b", "x")]
    (folder / "train.jsonl").write_text('{"question": "a", "solution": "7"}\n')
    with pytest.raises(UserError, match="has the columns .*question.*solution.*, but needs .*answer"):
        tasks.load_problems(str(folder))


def test_an_id_that_comes_twice_is_named_with_both_lines(tmp_path):
    path = write(tmp_path / "own.jsonl", {"id": "a", "problem": "p", "answer": "1"}, {"problem": "q", "answer": "1"}, {"id": "a", "problem": "r", "answer": "1"})
    with pytest.raises(UserError, match="line 3: the id 'a' is that of line 1"):
        tasks.load_problems(path)


@pytest.mark.parametrize("line, said", [
    ('{"problem": "p", "answer": ', "not a JSON object"), ("[1, 2]", "list"), ('"text"', "str"), ("null", "NoneType"), ("[" * 10**5, "not a JSON"),
    ('{"answer": "1"}', "no 'problem'"), ('{"problem": "p"}', "no 'answer'"), ('{"problem": " ", "answer": "1"}', "no 'problem'"),
    ('{"problem": "p", "answer": ""}', "no 'answer'"), ('{"problem": "p", "answer": null}', "'answer'"), ('{"problem": null, "answer": "1"}', "'problem'"),
    ('{"problem": "p", "answer": "1", "prompt": 5}', "'prompt' is a int")])
def test_a_broken_line_is_named_with_file_and_line(tmp_path, line, said):
    path = write(tmp_path / "bad.jsonl", {"problem": "p", "answer": "1"}, line, {"problem": "q", "answer": "1"})
    with pytest.raises(UserError) as refused:
        tasks.load_problems(path)
    assert f"{path}, line 2:" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("content, part, said", [
    (b"", "", "x.jsonl' holds no problems"), (b"\n \n", ":test", "x.jsonl:test' holds no problems"), (b"\xff\xfe", "", "x.jsonl cannot be read")])
def test_an_empty_data_set_and_a_file_that_is_no_text_are_refused(tmp_path, content, part, said):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        tasks.load_problems(f"{tmp_path}/x.jsonl{part}")


@pytest.mark.parametrize("name, said", [
    ("countdwn", "'countdwn' is unknown, did you mean 'countdown'"), ("math50", "did you mean 'math500'"), ("GSM8K", "GSM8K' is unknown"),
    ("qqq", "'qqq' is unknown; give one of countdown"), ("no/such.jsonl", "no/such.jsonl cannot be read"), ("gsm8k", "'gsm8k' could not be loaded"),
    ("no/such-data", "'no/such-data' could not be loaded")])
def test_what_cannot_be_had_is_one_sentence(name, said):
    with pytest.raises(UserError) as refused:
        tasks.load_problems(name)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_no_evaluation_question_is_trained_on(tmp_path):
    same = [{"problem": "What is  2 + 2?", "answer": "4"}, {"problem": "new", "answer": "1"}]
    train, held_out = write(tmp_path / "t.jsonl", *same), write(tmp_path / "e.jsonl", {"problem": "what is 2 + 2? ", "answer": "4"})
    kept, evaluated, *names = tasks.train_and_eval(train, held_out, None)
    assert [p.question for p in kept] == ["new"] and len(evaluated) == 1 and names == [train, held_out]
    with pytest.raises(UserError, match="nothing to train on"):
        tasks.train_and_eval(held_out, train, 1)                 # limited to 1 or not: the whole evaluation file is kept out


@pytest.mark.parametrize("data", ["countdown", "countdown:train", "countdown-graded"])
def test_the_default_evaluation_data_is_the_held_out_part(data):
    problems, held_out, *names = tasks.train_and_eval(data, None, 30)
    base = data.split(":")[0]
    assert names == [f"{base}:train", f"{base}:test"] and problems == tasks.load_problems(f"{base}:train")
    assert held_out == tasks.load_problems(f"{base}:test", 30)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA}")
def test_every_benchmark_file_loads():
    for path in sorted(DATA.glob("*.jsonl")):
        problems = tasks.load_problems(str(path))
        assert len({p.id for p in problems}) == len(problems) == sum(1 for line in path.open(encoding="utf-8") if line.strip())
        assert all(p.question and p.answer and p.task == "math" for p in problems)


# ---------------------------------------------------------------- 3. prompts

MATH = Problem("m", "How many?", "3")
TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("template, problem, prompt", [
    (None, MATH, f"Question: How many?\n{tasks.INSTRUCTION}\nAnswer:"), (TURN, MATH, f"<user>How many?\n{tasks.INSTRUCTION}<assistant>"),
    ("Put it in \\\\boxed{}." + TURN, MATH, "Put it in \\\\boxed{}.<user>How many?<assistant>"),
    (TURN, Problem("c", "2357=22:", "2357=22", "countdown"), "2357=22:"), (TURN, Problem("p", "q", "3", prompt="as it is"), "as it is")])
def test_a_prompt_asks_for_the_box_exactly_once(template, problem, prompt):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert tasks.render(problem, tokenizer) == prompt


# How the common families write a turn: (what stands before the first message, a turn, what opens the answer).
IM = ("", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n")
FAMILIES = {
    "Qwen2.5-Math": ("<|im_start|>system\n" + tasks.INSTRUCTION + "<|im_end|>\n", *IM[1:]),
    "Qwen2.5": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", *IM[1:]), "SmolLM2": IM,
    "Llama-3": ("<bos>", "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "Gemma": ("<bos>", "<start_of_turn>{role}\n{content}<end_of_turn>\n", "<start_of_turn>model\n"),
    "Mistral": ("<bos>", "[INST] {content} [/INST]", ""),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_the_common_families(family):
    before, turn, opens = FAMILIES[family]
    jinja = turn.replace("{role}", "{{ m['role'] }}").replace("{content}", "{{ m['content'] }}")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (before.replace("\\", "\\") + "{% for m in messages %}" + jinja + "{% endfor %}"
                               + "{% if add_generation_prompt %}" + opens + "{% endif %}")
    question = "How many?" if family == "Qwen2.5-Math" else f"How many?\n{tasks.INSTRUCTION}"
    expected = before + turn.replace("{role}", "user").replace("{content}", question) + opens
    assert tasks.render(MATH, tokenizer) == expected and expected.count("\\boxed") == 1


# ---------------------------------------------------------------- 4. mathematics

@pytest.fixture(scope="module")
def grader():
    return Graders(1)


@pytest.mark.parametrize("text, answer, reward", [
    (r"so \boxed{7}.", "7", 1), (r"\boxed{5}, no: \boxed{6}", "6", 1), (r"\boxed{5}, no: \boxed{6}", "5", 0), (r"\boxed{\frac{1}{2}}", "0.5", 1),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1), (r"\boxed{ a b }", "ab", 1), (r"\boxed{25}", "025", 1),
    ("7", "7", 0), (r"\boxed{7", "7", 0), (r"\boxed{}", "", 0), (r"\boxed{8}", "7", 0), ("", "7", 0), (r"\boxed{}}{", "7", 0),
    (r"\boxed{" * 1000, "7", 0), (r"\boxed{" + "9" * 5000 + "}", "9", 0), (r"\boxed{" + "9" * 5000 + "}", "9" * 5000, 1),
    ("\\boxed{\ud800}", "7", 0), ("\\boxed{7\n}", "7", 1), (r"\boxed{__import__('os')}", "7", 0)])
def test_the_last_box_decides(grader, text, answer, reward):
    assert grader.grade(text, answer) == reward and grader.failures == 0


def test_a_hanging_answer_costs_one_limit_and_the_next_is_graded():
    grader = Graders(1, limit_s=1)
    for failures in (1, 2, 3):
        assert grader.grade(r"\boxed{(((9^{9999})^{9999})^{9999})\pi}", r"\pi") == 0 and grader.failures == failures
        assert grader.grade(r"\boxed{\frac12}", "0.5") == 1 and grader.failures == failures


def test_a_worker_that_dies_is_replaced_and_the_next_answer_is_graded(monkeypatch):
    dying = lambda: subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    grader, start = Graders(1), Graders._start
    for failures in (1, 2, 3):
        monkeypatch.setattr(Graders, "_start", staticmethod(dying))
        assert grader.grade(r"\boxed{2}", "3") == 0 and grader.failures == failures
        monkeypatch.setattr(Graders, "_start", staticmethod(start))
        assert grader.grade(r"\boxed{\frac12}", "0.5") == 1 and grader.failures == failures
        grader._idle.get().kill(), grader._idle.put(None)


def test_all_are_graded_by_their_task_and_cut_off_answers_earn_nothing(monkeypatch, grader):
    monkeypatch.setattr(tasks, "graders", lambda: grader)
    problems = [Problem("m", "?", "0.5"), Problem("c", "", "2357=22", "countdown"), Problem("g", "", "2357=22", "countdown-graded")]
    groups = [[(r"\boxed{\frac12}", True), (r"\boxed{\frac12}", False)], [("3*5+7-2", True), ("2*5+7+5", True), ("2*7+5+3", False)],
              [("3*5+7-2", True)]]
    assert tasks.grade_all(problems, groups) == [[1, 0], [0, 0, 0], [math.exp(-2 / 5)]]
    with pytest.raises(ValueError):
        tasks.grade_all(problems, groups[:2])


def test_a_worker_that_cannot_start_is_said_every_time_and_never_waited_for(monkeypatch):
    def fails():
        raise UserError("the grading worker did not start")
    monkeypatch.setattr(Graders, "_start", staticmethod(fails))
    grader, said = Graders(1), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: said.append(pytest.raises(UserError, grader.grade, r"\boxed{1}", "2")), daemon=True)
        thread.start()
        thread.join(5)
    assert len(said) == 2, "the second answer waits for a worker for ever"


def test_ctrl_c_in_the_terminal_does_not_reach_the_workers():
    """A terminal signals the whole process group; train.py then finishes its step, which needs its graders."""
    script = """if True:
        import os, signal, time, tasks
        signal.signal(signal.SIGINT, lambda *_: None)
        grader = tasks.Graders(1)
        grader.grade(r"\\boxed{1}", "2")
        worker = grader._idle.get()
        os.killpg(0, signal.SIGINT)
        time.sleep(0.5)
        print("worker", worker.poll())"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, start_new_session=True, capture_output=True, text=True)
    assert done.stdout == "worker None\n", done.stdout + done.stderr
