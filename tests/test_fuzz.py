r"""Proof that no text gets in or gets through: random and mutated input, from seeds.

No exception but the one sentence of a refusal, no hang, no growing memory, and no reward for an
answer that is not one: of the graders, of the readers of .jsonl files and of run directories, and
of the prompt renderer.

RSPO_FUZZ=100000 python -m pytest -s tests/test_fuzz.py    the long version (here 3,000 inputs)
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import evaluate
import sample
from lib import cli, marker, run, tasks
from lib.cli import UserError
from lib.tasks import Problem

INPUTS = int(os.environ.get("RSPO_FUZZ", 3000))
SHARES = {"divisor": 0.3, "mathematics": 0.35, "problems": 0.1, "samples": 0.1,
          "prompts": 0.05, "runs": 0.1}  # of all inputs
SPECIAL = ["<|im_end|>", "<|endoftext|>", "<eos>", "<pad>", "</s>", "<|im_start|>assistant",
           "\x00", "\ufeff", "\u2028", "\ud800", "\U0001f642", "５", "٥", "²"]
LATEX = [
    *"0123456799+-*/^_=<>!,.;:|()[]{}$%&~ xyznei", "\n", "}", "{", r"\boxed{", r"\boxed",
    r"\frac{", r"\frac", r"\sqrt{", r"\sqrt", r"\text{", r"\pi", r"\infty", r"\le", r"\pm",
    r"\cup", r"\{", r"\}", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\",
    r"\cdot", r"\binom{", r"\log", r"\sin", r"\int_0^", r"\sum", r"\overline{", r"^{\circ}",
    r"\in", r"\mathbb{R}", "10^{10}", "9^{9^{9}}", "7654321", " and ", "the answer is", "nan",
    "inf", "1e999", *SPECIAL]
# No fragment holds an 8, and these do: whatever is made of the fragments is no right answer.
GOLDS = ["8675309", r"\frac{8675309}{17}", r"\sqrt{8675309}", "(8,18)", r"\{8, 88\}",
         "x^2 + 8675309", "[8, 88)", "8675309_{10}", r"\text{eight hundred and eight}"]
UNLIMITED = SimpleNamespace(max_position_embeddings=None)  # a model's config


def share(name):
    return max(1, int(INPUTS * SHARES[name]))


def mutate(rng, text, alphabet):
    """Text with a few of its parts left out, doubled, swapped, or replaced."""
    pieces = list(text)
    for _ in range(rng.randrange(1, 6)):
        i, j = sorted(rng.randrange(len(pieces) + 1) for _ in range(2))
        what = rng.randrange(5)
        if what < 2:
            pieces[i:j] = pieces[i:j] * 2 if what else []
        else:
            pieces[i:i] = [rng.choice(alphabet)] if what < 4 else rng.choices(alphabet, k=9)
    return "".join(pieces)


def attempt(function, *arguments):
    """The function's value; None where it refused with a sentence. All else is a finding."""
    begin = time.process_time()
    try:
        return function(*arguments)
    except (UserError, OSError) as error:  # which cli.run_script prints
        assert str(error) and "\n" not in str(error)
    finally:
        assert time.process_time() - begin < 5


# ---------------------------------------------------------------- graders

def test_no_text_but_a_divisor_earns_anything():
    rng, earned = random.Random(1), 0
    alphabet = [*"0123456789+-*/=():. ", "**", "//", "22", "0x", "1e1", "--", *SPECIAL]
    numbers = rng.sample(tasks.composites(), 50)
    divisors = {number: {str(d) for d in range(2, number) if number % d == 0} for number in numbers}
    for _ in range(share("divisor")):
        number = rng.choice(numbers)
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        if rng.random() < 0.7:
            text = mutate(rng, rng.choice(sorted(divisors[number])), alphabet)
        exact = tasks.grade_divisor(text, str(number))
        graded = tasks.grade_divisor(text, str(number), graded=True)
        assert exact == (text.strip() in divisors[number]), (text, number)
        assert (graded > 0) == bool(exact) and graded <= exact, (text, number)
        earned += exact
    assert earned > 0  # some mutations change nothing that counts


def test_the_prompt_repeated_or_the_gold_pattern_earns_nothing():
    for text in ("30003:", "30003", "1", "30003:3", "3=30003", "3<eos>", "3 3", "(3)", "３", "3:",
                 "03", "3.0", "-3", ""):
        assert tasks.grade_divisor(text, "30003") == 0, text


def hostile_answers(rng):
    cases = (ROOT / "tests" / "grader_cases.jsonl").read_text(encoding="utf-8").splitlines()
    real = [json.loads(case)["given"] for case in cases]
    while True:
        text = "".join(rng.choices(LATEX, k=rng.randrange(1, 40)))
        if rng.random() < 0.5:
            text = mutate(rng, rng.choice(real), LATEX)
        for _ in range(rng.randrange(3)):
            text = "\\boxed{" + text + "}" * rng.randrange(1, 3)
        before = rng.choice(("", "8675309 ", "\\boxed{8675309} ", "= 8675309, so "))
        behind = rng.choice(("}", "} <eos>", "", "}$."))
        yield before + "\\boxed{" + re.sub("8|eight", "9", text) + behind


def resident_mb(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory():
    """Of this process, and of its largest child: MB."""
    children = Path("/proc/self/task").glob("*/children")
    pids = [pid for path in children for pid in path.read_text().split()]
    return resident_mb("self"), max(map(resident_mb, pids))


def test_no_text_but_the_answer_earns_anything_in_mathematics_and_nothing_hangs_or_grows():
    rng, count, lost, sizes = random.Random(2), share("mathematics"), 0, []
    answers = hostile_answers(rng)
    for part in (count // 4, count - count // 4):
        for begin in range(0, part, 200):
            pairs = [(next(answers), rng.choice(GOLDS)) for _ in range(min(200, part - begin))]
            for (text, gold), reward in zip(pairs, marker.mark(pairs), strict=True):
                lost += reward is None
                assert not reward or marker.last_boxed(text) == "8675309", (text, gold)
        if Path("/proc/self/task").is_dir():
            sizes.append(memory())
    print(f"\nmathematics: {count} answers, {lost} lost; resident MB early and late: {sizes}")
    assert lost <= count // 50
    for early, late, allowed in zip(*sizes, (50, 400)):
        assert late - early < allowed


GAMES = [
    "42", r"$42$", r"42 \boxed{}", r"\boxed{}", r"\boxed{42", r"\boxed{42}\boxed{43}",
    r"\boxed{41,42,43}", r"\boxed{41 \text{ or } 42}", r"\boxed{42, 43}", r"\boxed{42 \vee 43}",
    r"\boxed{\{42, 43\}}", r"\boxed{x}", r"\boxed{answer}", r"\boxed{43 <|im_end|> 42}",
    r"\boxed{<|im_end|>}", r"\boxed{?}", r"\boxed{\text{the answer}}", r"\boxed{40 + 2}",
    r"\boxed{6 \cdot 7}", r"\boxed{\int_0^{42} 1 dx}", r"\boxed{42 \pm 1}", r"\boxed{[41, 43]}",
    r"\boxed{x \ge 42}", r"\boxed{42 = 43}", r"\boxed{\approx 42.1}", r"\boxed{4 2}",
    r"\boxed{41.999}", r"\boxed{0x2A}", r"\boxed{*}", tasks.INSTRUCTION,
    r"\boxed{" * 3000 + "42", r"\boxed{(((9^{9999})^{9999})^{9999}) + 42}",
    r"\boxed{" + "+".join(["1"] * 42) + "}", r"\boxed{\text{42}, \text{43}}",
    r"\boxed{42}}\boxed{43}", r"\fbox{42}", r"boxed{42}", "\\boxed{42\ud800}"]


def test_reward_is_not_to_be_bought():
    """Not by the prompt's own pattern, several boxes, special tokens, work left to the grader."""
    rewards = marker.mark([(text, "42") for text in GAMES])
    assert [text for text, reward in zip(GAMES, rewards, strict=True) if reward] == []


def test_what_is_infinite_equals_no_number():
    """Found by the long version: sympy's numbers lose e sqrt(oo) - 2 pi.

    It was right wherever the answer is irrational.
    """
    infinite = [r"e\sqrt{\infty}", r"\pi\infty", r"2^{\infty}\pi", r"2\sqrt{\infty}",
                r"4.5e\sqrt{3inf4.5e\sqrt{33}}", r"e\sqrt{\frac{1}{0}}", r"\pi(\infty-\infty)",
                r"\frac{\pi}{0}", r"x\infty"]
    finite = [r"2\pi", r"1+\sqrt{2}", r"\sqrt[3]{5}", r"\log 7", "x^2+1", r"\frac{1}{3}", "7"]
    pairs = [(f"\\boxed{{{given}}}", gold) for given in infinite for gold in finite]
    wrong = [pair for pair, reward in zip(pairs, marker.mark(pairs)) if reward]
    assert wrong == []
    right = [(r"\boxed{-\infty}", r"-\infty"), (r"\boxed{(2, \infty)}", "x > 2")]
    assert marker.mark(right) == [1, 1]


# ---------------------------------------------------------------- files

ROWS = [{"id": "a", "problem": "1 + 1?", "answer": "2", "level": 3, "prompt": "exactly"},
        {"problem": "Größe\u2028x?", "answer": 7}, {"problem": "p", "answer": [1]}]
ASKED = tasks.load_problems("divisor", 2)
OF_ALL = dict.fromkeys(sample.HEAD, "x") | {
    "data": "divisor", "n": 2, "limit": 2, "data_digest": tasks.digest_of(ASKED)}
SAMPLES = [{**OF_ALL, "id": p.id, "answer": p.answer, "answers": [
    {"text": "3", "finished": True}, {"text": "\u2028", "finished": False}]} for p in ASKED]
JSON = [*'{}[]",:\\ue0-+.', "null", "true", "NaN", "Infinity", "-1", "1e999", "9" * 5000,
        '"\\ud800"', '"../x"', "\\u0000", "[" * 3000, '{"a":' * 3000, "\n", "\r", "\u2028",
        '"id"', '"problem"', '"answer"', '"answers"', '"text"', '""', "{}", "[]", "\xff",
        *SPECIAL[:4]]
VALUES = [None, True, -1, 0, 1.5, 10**400, float("inf"), float("nan"), "", " ", "x", "../x",
          "\ud800", "\x00", [], {}, [[]], {"a": 1}, "22"]


def hostile_file(rng, rows):
    """Bytes of a .jsonl file with a value exchanged, or mutated as text, or as bytes."""
    rows = json.loads(json.dumps(rows))
    if rng.random() < 0.5:
        row = rng.choice(rows)
        inner = [each for value in row.values() for each in (value, *(
            value if isinstance(value, list) else ())) if isinstance(each, dict)]
        place = rng.choice(inner) if inner and rng.random() < 0.4 else row
        place[rng.choice(sorted(place))] = rng.choice(VALUES)
    ascii_only = rng.random() < 0.5
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    text += "\n" * rng.randrange(2)
    if rng.random() < 0.6:
        text = mutate(rng, text, JSON)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(run.TOY)


def test_any_file_of_problems_is_read_or_refused_in_one_sentence(tmp_path, tokenizer):
    rng, read, path = random.Random(3), 0, tmp_path / "p.jsonl"
    for _ in range(share("problems")):
        path.write_bytes(data := hostile_file(rng, ROWS))
        part, limit = rng.choice(("", ":train", ":3", ":1-3")), rng.choice((None, 1))
        for problem in attempt(tasks.load_problems, f"{path}{part}", limit) or []:
            read += 1
            assert problem.question.strip() and problem.answer.strip(), data
            json.dumps(vars(problem), ensure_ascii=False).encode()
            attempt(tasks.encode, [problem], tokenizer, UNLIMITED, 1)
    assert read > share("problems") // 10


@pytest.mark.parametrize("text", [
    '{"problem": "\\ud800", "answer": "1"}',
    '{"problem": "p", "answer": ' + "9" * 5000 + "}"])
def test_half_a_character_and_a_huge_number_are_refused(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="line 1"):
        tasks.load_problems(str(path))


def test_any_samples_file_is_read_or_refused_in_one_sentence(tmp_path):
    rng, read, path = random.Random(4), 0, tmp_path / "s.jsonl"
    for _ in range(share("samples")):
        path.write_bytes(hostile_file(rng, SAMPLES))
        attempt(sample.rows_done, path, OF_ALL)
        if found := attempt(evaluate.read_samples, path):
            problems, groups, *_ = found
            rewards = [[0.0] * len(group) for group in groups]
            curve = evaluate.make_curve("x", problems, rewards, (1,))
            evaluate.difference(curve, curve)
            read += 1
    assert read > share("samples") // 20


RECORDS = {
    "metrics.jsonl": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.1}],
    "evals.jsonl": [{"step": 0, "ids": ["a"], "rewards": [[1.0]]}],
    "config.json": [{"format": run.FORMAT, "flags": {
        **{name: cli.SETTINGS[name].default for name in run.RUN_FLAGS}, "model": "toy"}}],
    "step_000001/adapter_config.json": [
        {"base_model_name_or_path": "toy", "r": 8, "lora_alpha": 8, "peft_type": "LORA"}],
    "step_000001/adapter_model.safetensors": [{"x": 1}],
    "step_000001/optimizer.safetensors": [{"x": 1}],
}


def hostile_run(rng, folder):
    """A run directory with hostile files, and a checkpoint that is what was written or is not."""
    checkpoint = folder / "step_000001"
    checkpoint.mkdir(parents=True)
    for name, rows in RECORDS.items():
        if name == "config.json" and rng.random() < 0.1:
            [config] = rows
            rows = [config | {"flags": config["flags"] | {"model": rng.choice(VALUES)}}]
        good = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(hostile_file(rng, rows) if rng.random() < 0.4 else good)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in checkpoint.iterdir()}
    state, whole = [{"base": "x", "sha256": sums}], rng.random() < 0.7
    (checkpoint / "state.json").write_bytes(
        json.dumps(state[0]).encode() if whole else hostile_file(rng, state))
    return checkpoint, whole


def test_any_run_directory_is_read_or_refused_in_one_sentence(tmp_path):
    rng, folder, found = random.Random(5), tmp_path / "run", {"config": 0, "model": 0, "rows": 0}
    for _ in range(share("runs")):
        checkpoint, whole = hostile_run(rng, folder)
        if whole:
            assert run.newest_checkpoint(folder) == checkpoint
        attempt(run.newest_checkpoint, folder)
        attempt(run.read_adapter, checkpoint)
        for name in (folder, checkpoint):
            found["model"] += attempt(run.resolve_model, str(name)) is not None
            attempt(run.flags_of, str(name))
        if attempt(run.read_config, folder):
            found["config"] += 1
            shutil.rmtree(checkpoint)  # so that all of the records are made again
            made = run.Run(folder)
            attempt(made.load, None)
            found["rows"] += sum(len(attempt(made.read, name) or [])
                                 for name in RECORDS if name.endswith(".jsonl"))
            made._lock.close()
        shutil.rmtree(folder)
    assert min(found.values()) > share("runs") // 10, found


# ---------------------------------------------------------------- prompts

TEMPLATES = [
    None, "{{ messages[0].content }}=",
    "<|im_start|>{{ messages[0].role }}\n{{ messages[0].content }}<|im_end|>"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
    "\\boxed{{ '{}' }}{% for m in messages %}{{ m.content | trim }}{% endfor %}"]


def test_any_question_is_rendered_once_and_as_it_stands(tokenizer):
    rng = random.Random(6)
    alphabet = [
        *LATEX, "{{ 7 * 7 }}", "{% for x in range(9**9) %}", "{# #}",
        "{{ messages.__class__ }}", "{% raw %}",
        *(chr(i) for i in range(32, 0x3000, 97) if unicodedata.category(chr(i)) != "Cs")]
    alphabet = [piece for piece in alphabet if piece != "\ud800"]  # refused by the loader
    for _ in range(share("prompts")):
        tokenizer.chat_template = rng.choice(TEMPLATES)
        question = "Q" + "".join(rng.choices(alphabet, k=rng.randrange(60))) + "Q"
        problem = Problem("p", question, "1")
        text = attempt(tasks.render, problem, tokenizer)
        assert text.count(question) == 1 and text.replace(question, "").count("\\boxed") == 1
        for encoded in attempt(tasks.encode, [problem], tokenizer, UNLIMITED, 1) or []:
            assert encoded.prompt_ids and max(encoded.prompt_ids) < len(tokenizer)
