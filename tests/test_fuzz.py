"""Proof that no text gets in or gets through. Random and mutated input, from seeds, so that every finding can be repeated.

No exception but the one sentence of a UserError, no hang, no growing memory, and no reward for an answer that is not one:
of the graders, the Countdown parser, the readers of .jsonl files and of run directories, and the prompt renderer.

RSPO_FUZZ=100000 python -m pytest -s tests/test_fuzz.py      is the long version (here a few thousand inputs)
"""

import json
import os
import random
import re
import shutil
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import evaluate
import policy
import sample
import tasks
import train
from conftest import ROOT
from tasks import Problem, UserError

INPUTS = int(os.environ.get("RSPO_FUZZ", 3000))
SHARES = {"countdown": 0.3, "mathematics": 0.4, "problems": 0.1, "samples": 0.1, "prompts": 0.05, "records": 0.05}    # of all inputs
SPECIAL = ["<|im_end|>", "<|endoftext|>", "<eos>", "<pad>", "</s>", "<|im_start|>assistant", "\x00", "\ufeff", "\u2028", "\ud800", "\U0001f642", "５", "٥", "²"]
INFINITE = [r"e\sqrt{\infty}", r"\pi\infty", r"2^{\infty}\pi", r"2\sqrt{\infty}", r"4.5e\sqrt{3inf4.5e\sqrt{33}}", r"e\sqrt{\frac{1}{0}}", r"\pi(\infty-\infty)", r"\frac{\pi}{0}", r"x\infty"]
LATEX = [*"0123456799+-*/^_=<>!,.;:|()[]{}$%&~ xyznei", "\n", r"\boxed{", r"\boxed", "}", "{", r"\frac{", r"\frac", r"\sqrt{", r"\sqrt", r"\text{", r"\pi", r"\infty",
         r"\le", r"\pm", r"\cup", r"\{", r"\}", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\cdot", r"\binom{", r"\log", r"\sin", r"\int_0^",
         r"\sum", r"\overline{", r"^{\circ}", r"\in", r"\mathbb{R}", "10^{10}", "9^{9^{9}}", "7654321", " and ", "the answer is", "nan", "inf", "1e999", *SPECIAL]
# No fragment holds an 8, and these golds do: whatever is made of the fragments is no right answer.
GOLDS = ["8675309", r"\frac{8675309}{17}", r"\sqrt{8675309}", "(8,18)", r"\{8, 88\}", "x^2 + 8675309", "[8, 88)", "8675309_{10}", r"\text{eight hundred and eight}"]


def share(name):
    return max(1, int(INPUTS * SHARES[name]))


def mutate(rng, text, alphabet):
    """Text with a few of its parts left out, doubled, swapped, or replaced."""
    pieces = list(text)
    for _ in range(rng.randrange(1, 6)):
        i, j = sorted(rng.randrange(len(pieces) + 1) for _ in range(2))
        what = rng.randrange(5)
        pieces[i:j if what < 2 else i] = [] if what == 0 else pieces[i:j] * 2 if what == 1 else [rng.choice(alphabet)] if what < 4 else rng.choices(alphabet, k=9)
    return "".join(pieces)


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if Path("/proc/self/statm").exists() else 0.0


def attempt(function, slowest):
    """The function's value, None where it refused with one sentence; anything else it raises is a finding."""
    begin = time.perf_counter()
    try:
        return function()
    except UserError as error:
        assert "\n" not in str(error) and str(error)
    finally:
        slowest.append(time.perf_counter() - begin)


# ---------------------------------------------------------------- graders

def test_no_text_but_a_solution_earns_anything_in_countdown():
    rng, solutions, earned = random.Random(1), tasks.countdown_solutions(), 0
    keys, alphabet = sorted(solutions), [*"0123456789+-*/=():. ", "**", "//", "22", "0x", "1e1", "--", *SPECIAL]
    for _ in range(share("countdown")):
        numbers, target = key = rng.choice(keys)
        text = mutate(rng, rng.choice(solutions[key]), alphabet) if rng.random() < 0.7 else "".join(rng.choices(alphabet, k=rng.randrange(12)))
        answer = f"{numbers}={target}"
        exact, graded = tasks.grade_countdown(text, answer), tasks.grade_countdown(text, answer, graded=True)
        assert exact == (text in solutions[key]) and (graded == 1) == bool(exact) and 0 <= graded <= 1, (text, answer)
        valid = re.fullmatch(r"[1-9]([-+*][1-9]){3}", text) and sorted(re.findall("[1-9]", text)) == sorted(numbers)
        assert (graded > 0) == bool(valid), (text, answer)
        earned += exact
    assert earned > 0                               # some mutations change nothing that counts


def hostile_answers(rng):
    cases = [json.loads(line) for line in (ROOT / "tests" / "grader_cases.jsonl").read_text().splitlines()]
    real = [case["given"] for case in cases]
    while True:
        text = mutate(rng, rng.choice(real), LATEX) if rng.random() < 0.5 else "".join(rng.choices(LATEX, k=rng.randrange(1, 40)))
        for _ in range(rng.randrange(3)):
            text = "\\boxed{" + text + "}" * rng.randrange(1, 3)
        yield rng.choice(("", "8675309 ", "\\boxed{8675309} ", "= 8675309, so ")) + "\\boxed{" + re.sub("8|eight", "9", text) + rng.choice(("}", "} <eos>", "", "}$."))


def test_no_text_but_the_answer_earns_anything_in_mathematics_and_nothing_hangs_or_grows():
    rng, graders, slowest, count = random.Random(2), tasks.Graders(2), [], share("mathematics")
    answers = hostile_answers(rng)

    def one(job):
        text, gold = job
        boxed = tasks.last_boxed(text)
        return attempt(lambda: graders.grade(text, gold), slowest), text, gold, boxed

    def part(size):
        with ThreadPoolExecutor(2) as threads:
            for reward, text, gold, boxed in threads.map(one, [(next(answers), rng.choice(GOLDS)) for _ in range(size)]):
                assert reward == 0 or boxed == "8675309", (text, gold)
        workers = [graders._idle.get(), graders._idle.get()]
        [graders._idle.put(worker) for worker in workers]
        return resident_mb("self"), max(resident_mb(worker.pid) for worker in workers if worker.poll() is None)
    early = part(count // 4)
    late = part(count - count // 4)
    print(f"\nmathematics: {count} answers, slowest {max(slowest):.2f} s, {graders.failures} killed; resident MB: {early} -> {late}")
    assert max(slowest) < tasks.GRADE_LIMIT_S + 60  # and a worker's start, which is slow on a busy machine
    assert graders.failures <= count // 50 and late[0] - early[0] < 50 and late[1] - early[1] < 400


GAMES = ["42", r"$42$", r"42 \boxed{}", r"\boxed{}", r"\boxed{42", r"\boxed{42}\boxed{43}", r"\boxed{41,42,43}", r"\boxed{41 \text{ or } 42}", r"\boxed{42, 43}",
         r"\boxed{42 \vee 43}", r"\boxed{\{42, 43\}}", r"\boxed{x}", r"\boxed{answer}", r"\boxed{43 <|im_end|> 42}",
         r"\boxed{<|im_end|>}", r"\boxed{?}", r"\boxed{\text{the answer}}", r"\boxed{40 + 2}", r"\boxed{6 \cdot 7}", r"\boxed{\int_0^{42} 1 dx}", r"\boxed{42 \pm 1}",
         r"\boxed{[41, 43]}", r"\boxed{x \ge 42}", r"\boxed{42 = 43}", r"\boxed{\approx 42.1}", r"\boxed{4 2}", r"\boxed{41.999}", r"\boxed{0x2A}", r"\boxed{*}",
         "Please reason step by step, and put your final answer within \\boxed{}.", r"\boxed{" * 3000 + "42", r"\boxed{(((9^{9999})^{9999})^{9999}) + 42}",
         r"\boxed{" + "+".join(["1"] * 42) + "}", r"\boxed{\text{42}, \text{43}}", r"\boxed{42}}\boxed{43}", r"\fbox{42}", r"boxed{42}", "\\boxed{42\ud800}"]


@pytest.mark.parametrize("text", GAMES, ids=lambda text: ascii(text[:40]))
def test_reward_is_not_to_be_bought(text):
    """Not by the prompt's own pattern, several boxes, special tokens, work left to the grader, or by wearing it out."""
    assert tasks.grade(text, "42") == 0


@pytest.mark.parametrize("given", INFINITE)
def test_what_is_infinite_equals_no_number(given):
    """Found by the long version: sympy's numbers lose e sqrt(oo) - 2 pi, and it was right wherever the answer is irrational."""
    for gold in (r"2\pi", r"1+\sqrt{2}", r"\sqrt[3]{5}", r"\log 7", "x^2+1", r"\frac{1}{3}", "7"):
        assert tasks.grade(f"\\boxed{{{given}}}", gold) == 0
    assert tasks.grade(r"\boxed{-\infty}", r"-\infty") == tasks.grade(r"\boxed{(2, \infty)}", r"x > 2") == 1


def test_the_prompt_repeated_or_the_gold_pattern_earns_nothing_in_countdown():
    for text in ("2357=22:", "2357=22", "22", "2357=22:7*2+3+5", "7*2+3+5=22", "7*2+3+5<eos>", "7*2+3+5\n", " 7*2+3+5", "7*2+3+5 7*2+3+5", "(7*2)+3+5", "７*2+3+5", "2+3*5+7-2", ""):
        assert tasks.grade_countdown(text, "2357=22") == 0, text
    problem = Problem("c", "2357=22:", "2357=22", "countdown")
    assert tasks.grade_all([problem], [[("7*2+3+5", False), ("7*2+3+5", True)]]) == [[0, 1]]      # cut off is worth nothing


# ---------------------------------------------------------------- files

ROWS = [{"id": "a", "problem": "1 + 1?", "answer": "2", "level": 3, "prompt": "exactly"}, {"problem": "Größe\u2028x?", "answer": 7}, {"problem": "p", "answer": [1]}]
SAMPLES = [{"id": "i", "task": "countdown", "problem": "2357=22:", "answer": "2357=22", "model": "toy", "data": "countdown", "n": 2, "seed": 0,
            "answers": [{"text": "3*5+7-2", "finished": True, "tokens": 8}, {"text": "\u2028", "finished": False, "tokens": 1}]},
           {"id": "j", "task": "math", "problem": "p", "answer": "7", "model": "toy", "data": "countdown", "n": 2, "seed": 0,
            "answers": [{"text": "\\boxed{7}", "finished": True, "tokens": 3}] * 2}]
JSON = [*'{}[]",:\\ue0-+.', "null", "true", "NaN", "Infinity", "-1", "1e999", "9" * 5000, '"\\ud800"', '"../x"', "\\u0000", "[" * 3000, '{"a":' * 3000, "\n", "\r", "\u2028",
        '"id"', '"problem"', '"answer"', '"answers"', '"text"', '""', "{}", "[]", "\xff", *SPECIAL[:4]]


def hostile_file(rng, rows):
    """Bytes of a .jsonl file with a value exchanged, or mutated as text, or as bytes."""
    rows = json.loads(json.dumps(rows))
    if rng.random() < 0.5:
        row = rng.choice(rows)
        place = rng.choice(row["answers"]) if "answers" in row and rng.random() < 0.4 else row
        place[rng.choice(sorted(place))] = rng.choice([None, True, -1, 0, 1.5, 10**400, float("inf"), float("nan"), "", " ", "x", "../x", "\ud800", [], {}, [[]], {"a": 1}, "22"])
    text = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows) + "\n" * rng.randrange(2)
    if rng.random() < 0.6:
        text = mutate(rng, text, JSON)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def test_any_file_of_problems_is_read_or_refused_in_one_sentence(tmp_path):
    rng, slowest, read, path = random.Random(3), [], 0, tmp_path / "p.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(policy.TOY)
    for _ in range(share("problems")):
        path.write_bytes(data := hostile_file(rng, ROWS))
        problems = attempt(lambda: tasks.load_problems(f"{path}{rng.choice(('', ':train', ':3', ':1-3'))}", rng.choice((None, 1))), slowest)
        for problem in problems or []:
            read += 1
            assert problem.question.strip() and problem.answer.strip() and ".." not in Path(problem.id).parts, data
            json.dumps(vars(problem), ensure_ascii=False).encode()
            attempt(lambda: sample.encode_prompts([problem], tokenizer, 10**6, 1), slowest)
    for text in ('{"problem": "\\ud800", "answer": "1"}', '{"problem": "p", "answer": ' + "9" * 5000 + "}", '{"problem": "p", "answer": "1", "id": ".."}'):
        path.write_text(text)
        with pytest.raises(UserError, match="line 1"):
            tasks.load_problems(str(path))
    path.write_text('{"problem": "p", "answer": "1", "prompt": ""}')
    with pytest.raises(UserError, match="has no tokens"):
        sample.encode_prompts(tasks.load_problems(str(path)), tokenizer, 10**6, 1)
    assert read > share("problems") // 10 and max(slowest) < 5


def test_any_samples_file_is_read_or_refused_in_one_sentence(tmp_path):
    rng, slowest, read, path = random.Random(4), [], 0, tmp_path / "s.jsonl"
    settings = {"model": "toy", "data": "countdown", "n": 2, "seed": 0}
    for _ in range(share("samples")):
        path.write_bytes(hostile_file(rng, SAMPLES))
        attempt(lambda: sample.rows_done(path, settings), slowest)
        if found := attempt(lambda: evaluate.read_samples(path), slowest):
            problems, groups, tokens, data = found
            rewards = [[0.0] * len(group) for group in groups]
            curve = evaluate.make_curve("x", problems, rewards, (1,))
            evaluate.difference(curve, curve), evaluate.describe_answers(groups, tokens, rewards)
            read += 1
    assert read > share("samples") // 20 and max(slowest) < 5


def test_any_records_of_a_run_are_read_or_refused_in_one_sentence(tmp_path):
    rng, slowest, run = random.Random(5), [], tmp_path / "run"
    records = {"metrics.jsonl": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.1}], "evals.jsonl": [{"step": 0, "ids": ["a"], "rewards": [[1.0]]}],
               "samples.jsonl": [{"step": 0, "answers": [{"text": "x"}]}], "config.json": [{"flags": {"model": "toy", "seed": 0}}],
               "step_000001/adapter_config.json": [{"base_model_name_or_path": "toy", "r": 8, "lora_alpha": 8}], "step_000001/SHA256SUMS": [{"a": 1}]}
    for _ in range(share("records")):
        (run / "step_000001").mkdir(parents=True)
        for name, lines in records.items():
            (run / name).write_bytes(hostile_file(rng, lines) if rng.random() < 0.5 else (json.dumps(lines[0]) + "\n").encode())
        attempt(lambda: train.RunLog(run, 1), slowest), attempt(lambda: policy.read_run(run), slowest), attempt(lambda: policy.resolve_model(str(run)), slowest)
        attempt(lambda: policy.run_flags(run, ("model", "seed")) if policy.read_run(run) else None, slowest), attempt(lambda: policy.read_adapter(run / "step_000001"), slowest)
        assert policy.newest_checkpoint(run) is None
        shutil.rmtree(run)
    assert max(slowest) < 5


# ---------------------------------------------------------------- prompts

TEMPLATES = [None, "{{ messages[0].content }}=", "<|im_start|>{{ messages[0].role }}\n{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
             "\\boxed{{ '{}' }}{% for m in messages %}{{ m.content | trim }}{% endfor %}"]


def test_any_question_is_rendered_once_and_as_it_stands():
    rng, slowest, tokenizer = random.Random(6), [], AutoTokenizer.from_pretrained(policy.TOY)
    alphabet = [*LATEX, "{{ 7 * 7 }}", "{% for x in range(9**9) %}", "{# #}", "{{ messages.__class__ }}", "{% raw %}", *(chr(i) for i in range(32, 0x3000, 97) if unicodedata.category(chr(i)) != "Cs")]
    alphabet = [piece for piece in alphabet if piece != "\ud800"]             # refused by the loader
    for _ in range(share("prompts")):
        tokenizer.chat_template = rng.choice(TEMPLATES)
        question = "Q" + "".join(rng.choices(alphabet, k=rng.randrange(60))) + "Q"
        text = attempt(lambda: tasks.render(Problem("p", question, "1"), tokenizer), slowest)
        assert text.count(question) == 1 and (text.replace(question, "").count("\\boxed") == 1)
        for ids in attempt(lambda: sample.encode_prompts([Problem("p", question, "1")], tokenizer, 10**6, 1), slowest) or [(0,)]:
            assert ids and max(ids) < len(tokenizer)
    assert max(slowest) < 5
