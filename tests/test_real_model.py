"""Proof of benchmarks/real_model.py, on answers that are made up (the model is not needed).

1. No number, and no pair of factors, is in two parts of the data, nor among the examples.
2. The report's numbers are those counted by hand; k is chosen by its own pass@k.
3. What is not finished is not reported.
4. Another model and task: what is run, and how its answers are graded and counted.
"""

import json
import shutil
import subprocess
from math import comb
from pathlib import Path

import pytest

import evaluate
import sample
from benchmarks import real_model, smollm2
from lib import cli, run, tasks

NUMBERS = ("21021", "33033", "10007", "30003", "77077", "39039")  # 10007 is prime
MIXED = ["3"] * 8 + ["7"] * 7 + ["-"]


STEPS = real_model.SMOLLM2.steps


def write(folder, phase, arm, rate, seed, texts, steps=STEPS):
    """A run that has done so many steps, and its answers: the same texts to each number."""
    path = folder / f"{phase}-{arm}-{rate}-{seed}"
    if arm != "before":
        path.mkdir()
        flags = dict.fromkeys(run.RUN_FLAGS) | {"steps": STEPS}
        config = {"format": run.FORMAT, "flags": flags, "git_commit": ""}
        (path / "config.json").write_text(json.dumps(config))
        cli.write_rows(path / "evals.jsonl", [{"step": step, "rewards": []} for step in (0, steps)])
        cli.write_rows(path / "metrics.jsonl", [
            {"step": step, "reward": seed / 100, "entropy": 1.5, "distinct_correct": 2.0,
             "sample_seconds": 3.0, "learn_seconds": step, "peak_memory_gb": 4.0}
            for step in range(1, steps + 1)])
    data = folder / "numbers.jsonl"
    cli.write_rows(data, [{"id": number, "problem": number, "answer": number, "task": "divisor"}
                          for number in NUMBERS], "w")
    head = dict.fromkeys(sample.HEAD, "x") | {
        "data": str(data), "n": 16, "limit": None,
        "data_digest": tasks.digest_of(tasks.load_problems(str(data)))}
    answers = [{"text": text, "finished": text != "-"} for text in texts]
    cli.write_rows(path.with_name(path.name + ".jsonl"), [
        {**head, "id": number, "answer": number, "answers": answers} for number in NUMBERS])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "SMOLLM2", real_model.SMOLLM2._replace(
        out=tmp_path, select=len(NUMBERS), final=len(NUMBERS)))
    for rate in real_model.SMOLLM2.rates:  # the best for one is not the best for the other
        write(tmp_path, "select", "k1", rate, 21, ["3"] * 16 if rate == "2e-4" else MIXED)
        write(tmp_path, "select", "k8", rate, 21, MIXED if rate == "4e-4" else ["3"] * 16)
    write(tmp_path, "final", "before", "0", 31, ["5"] * 16)
    for seed in real_model.SMOLLM2.seeds:
        write(tmp_path, "final", "k1", "2e-4", seed, ["3"] * 16)
        write(tmp_path, "final", "k8", "4e-4", seed, MIXED)
    return tmp_path


def by_hand(texts, k):
    """Mean over the numbers of the share of k-subsets of the answers with a right one."""
    wrong = [sum(text == "-" or int(number) % int(text) > 0 for text in texts)
             for number in NUMBERS]
    return sum(1 - comb(w, k) / comb(16, k) for w in wrong) / len(NUMBERS)


# ---------------------------------------------------------------- 1. the data

def test_no_number_is_in_two_parts_or_among_the_examples(tmp_path):
    path = tmp_path / "divisors.jsonl"
    cli.write_rows(path, list(smollm2.divisors()), "w")
    parts = [{p.answer for p in tasks.load_problems(f"{path}:{part}")}
             for part in ("train", "select", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 4000
    assert not set.union(*parts) & {str(number) for number, _ in smollm2.EXAMPLES}
    for part, limit in (("select", 80), ("test", 160)):
        assert len(tasks.load_problems(f"{path}:{part}", limit)) == limit


def test_no_pair_of_factors_is_in_two_parts_or_among_the_examples(tmp_path):
    path = tmp_path / "products.jsonl"
    cli.write_rows(path, list(smollm2.products()), "w")
    parts = [[p for p in tasks.load_problems(f"{path}:{part}")]
             for part in ("train", "select", "test")]
    pairs = [frozenset(map(int, p.question.split("*"))) for part in parts for p in part]
    assert len(pairs) == len(set(pairs)) == 20 * 70 + 20 * 19 // 2 - len(smollm2.FACTORS)
    assert not set(pairs) & {frozenset(pair) for pair in smollm2.FACTORS}
    products = real_model.TASKS["products"]
    assert len(parts[1]) >= products["select"] and len(parts[2]) >= products["final"]
    for p in parts[2]:
        a, b = map(int, p.question.split("*"))
        assert 10 < a < 100 and 10 < b < 100 and min(a, b) <= 30 and int(p.answer) == a * b
        assert p.prompt.startswith("47*23 = \\boxed1081<|im_end|>\n")
        assert p.prompt.endswith(f"\n{p.question} =")


# ---------------------------------------------------------------- 2. the numbers

def test_each_k_is_chosen_by_its_own_pass_at_k(folder):
    chosen, table = real_model.choose(real_model.SMOLLM2)
    assert chosen == {"before": "0", "k1": "2e-4", "k8": "4e-4"}
    assert f"{by_hand(MIXED, 1):.3f}   {by_hand(MIXED, 8):.3f}  chosen" in table


def test_the_report_holds_what_is_counted_by_hand(folder, capsys):
    real_model.main(["--report"])
    shown = capsys.readouterr().out
    _, levels, differences = shown.split("\npass@k ")
    for k in (2, 4, 8, 16):
        assert f"{by_hand(['3'] * 16, k):.3f}"[1:] in levels
        assert f"{by_hand(MIXED, k):.3f}"[1:] in levels
    for k in (1, 2, 4, 8, 16):
        change = by_hand(MIXED, k) - by_hand(["3"] * 16, k)
        assert f"{change:+.3f}".replace("0.", ".") in differences
    assert "said 3 0.500  7 0.438  (cut off) 0.062" in shown
    assert "reward               0.32   0.32" in shown  # of seeds 31, 32, 33
    assert "learn_seconds        1.00   5.00  10.00  15.00  20.00  10.50  20.00" in shown
    assert "k8        3*  3*  3*  3*  3*  3*  3*  3*" in shown
    assert (folder / "smollm2-divisors.png").stat().st_size > 0


def test_the_seeds_of_a_setting_stay_apart(folder):
    seeds = [real_model.samples_of(real_model.SMOLLM2, ("final", "k8", "4e-4", seed))
             for seed in real_model.SMOLLM2.seeds]
    assert real_model.curve_of("k8", seeds).values.shape == (3, len(NUMBERS), 5)


# ---------------------------------------------------------------- 3. what is not finished

def test_what_is_not_finished_is_not_reported(folder, capsys):
    shutil.rmtree(folder / "final-k8-4e-4-33")
    write(folder, "final", "k8", "4e-4", 33, MIXED, steps=19)
    real_model.main(["--report"])
    shown = capsys.readouterr().out
    assert "finished: before, k1\n" in shown
    assert "k8: " not in shown


def test_without_a_finished_selection_nothing_is_chosen(folder):
    (folder / "select-k8-1e-4-21.jsonl").write_text("")
    with pytest.raises(cli.UserError, match="selection"):
        real_model.main(["--report"])


@pytest.mark.parametrize("lost", ["final-before", "final-k"])
def test_without_answers_before_and_after_training_nothing_is_compared(folder, lost):
    for path in folder.glob(f"{lost}*.jsonl"):
        path.unlink()
    with pytest.raises(cli.UserError, match="before training, or one k"):
        real_model.main(["--report"])


# ---------------------------------------------------------------- 4. another model and task

@pytest.fixture
def another(tmp_path):
    """A folder that is taken for a model, and the experiment with it."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    words = ["--model", str(tmp_path / "other"), "--task", "products", "--report"]
    return real_model.settle(words)[1]


def test_another_model_has_a_folder_of_its_own(another):
    assert another.out == Path("runs/real/other-products")
    assert another.task == "products"
    assert real_model.settle(["--report"])[1] is real_model.SMOLLM2


@pytest.mark.parametrize("words, said", [
    (["--task", "products"], "give --model FOLDER"),
    (["--model", "no-such-folder"], "config.json"),
    (["--model", "no-such-folder", "--task", "sums"], "invalid choice")])
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(words, said):
    with pytest.raises(cli.UserError, match=said):
        real_model.settle(words)


def test_training_and_sampling_get_the_same_answers_and_other_problems(another, tmp_path,
                                                                        monkeypatch):
    calls = []
    monkeypatch.setattr(real_model.subprocess, "run", lambda words, **how: (
        calls.append(words[1:]), subprocess.CompletedProcess(words, 0))[1])
    real_model.work(another._replace(out=tmp_path), ("final", "k8", "1e-4", 31))
    (_, *train), (_, *draw) = calls
    value = lambda words, flag: str(words[words.index(flag) + 1])
    for flag, wanted in (("--k", "8"), ("--lr", "1e-4"), ("--seed", "31"), ("--prompts", "8"),
                         ("--steps", "12"), ("--data", "runs/products.jsonl:train"),
                         ("--max-new-tokens", "8")):
        assert value(train, flag) == wanted
    assert value(draw, "--data") == "runs/products.jsonl:test"
    assert value(draw, "--limit") == "150"
    for flag in ("--n", "--max-new-tokens", "--temperature", "--dtype"):
        assert value(train, flag) == value(draw, flag)


def test_products_are_counted_by_how_many_answers_are_right():
    problems = [tasks.Problem(str(i), "12*34", "408") for i in range(4)]
    box = lambda text: evaluate.Answer(f" \\boxed{text}", True)
    groups = [[box(408)] * right + [box(418)] * (15 - right) + [evaluate.Answer("408", True)]
              for right in (0, 1, 3, 15)]
    samples = [evaluate.Samples(problems, groups, {})]
    assert real_model.shares(samples) == {
        "0": .25, "1": .25, "2 to 3": .25, "4 to 7": 0, "8 to 15": .25, "16": 0}


def test_a_model_needs_a_file_and_a_folder():
    with pytest.raises(cli.UserError, match="belong together"):
        smollm2.main(["--gguf", "model.gguf"])
    with pytest.raises(cli.UserError, match="no such file"):
        smollm2.main(["--gguf", "model.gguf", "--out", "somewhere"])
