"""Proof of benchmarks/real_model.py, on answers that are made up (the model is not needed).

1. No number is in two parts of the data, nor among the examples of the prompt.
2. The report's numbers are those counted by hand; k is chosen by its own pass@k.
3. What is not finished is not reported.
"""

import json
from math import comb

import pytest

import sample
from benchmarks import real_model, smollm2
from lib import cli, run, tasks

NUMBERS = ("21021", "33033", "10007", "30003", "77077", "39039")  # 10007 is prime
MIXED = ["3"] * 8 + ["7"] * 7 + ["-"]


def write(folder, phase, arm, rate, seed, texts, steps=real_model.STEPS):
    """A run that has done so many steps, and its answers: the same texts to each number."""
    path = folder / f"{phase}-{arm}-{rate}-{seed}"
    if arm != "before":
        path.mkdir()
        flags = dict.fromkeys(run.RUN_FLAGS) | {"steps": real_model.STEPS}
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
    cli.write_rows(path.with_name(path.name + ".jsonl"), [
        {"id": number, "problem": number, "answer": number, "task": "divisor", "data": str(data),
         "n": 16, "digest": sample.fingerprint(p),
         "answers": [{"text": text, "finished": text != "-"} for text in texts]}
        for number, p in zip(NUMBERS, tasks.load_problems(str(data)))])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "OUT", tmp_path)
    held_out = {"select": ("select", len(NUMBERS)), "final": ("test", len(NUMBERS))}
    monkeypatch.setattr(real_model, "HELD_OUT", held_out)
    for rate in real_model.RATES:  # the best for one is not the best for the other
        write(tmp_path, "select", "k1", rate, 21, ["3"] * 16 if rate == "2e-4" else MIXED)
        write(tmp_path, "select", "k8", rate, 21, MIXED if rate == "4e-4" else ["3"] * 16)
    write(tmp_path, "final", "before", "0", 31, ["5"] * 16)
    for seed in real_model.SEEDS:
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
    for part, limit in real_model.HELD_OUT.values():
        assert len(tasks.load_problems(f"{path}:{part}", limit)) == limit


# ---------------------------------------------------------------- 2. the numbers

def test_each_k_is_chosen_by_its_own_pass_at_k(folder):
    chosen, table = real_model.choose()
    assert chosen == {"before": "0", "k1": "2e-4", "k8": "4e-4", "groupmax8": "4e-4"}
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
    assert "says 3 0.500  7 0.438  (cut off) 0.062" in shown
    assert "reward               0.32   0.32" in shown  # of seeds 31, 32, 33
    assert "learn_seconds        1.00   5.00  10.00  15.00  20.00  10.50  20.00" in shown
    assert "k8        3*  3*  3*  3*  3*  3*  3*  3*" in shown
    assert (folder / "smollm2.png").stat().st_size > 0


def test_the_seeds_of_a_setting_stay_apart(folder):
    seeds = [real_model.samples_of(("final", "k8", "4e-4", seed)) for seed in real_model.SEEDS]
    assert real_model.curve_of("k8", seeds).values.shape == (3, len(NUMBERS), 5)


# ---------------------------------------------------------------- 3. what is not finished

def test_what_is_not_finished_is_not_reported(folder, capsys):
    for seed in real_model.SEEDS:
        write(folder, "final", "groupmax8", "4e-4", seed, MIXED, steps=20 if seed < 33 else 19)
    real_model.main(["--report"])
    shown = capsys.readouterr().out
    assert "finished: before, k1, k8\n" in shown
    assert "groupmax8: " not in shown


def test_without_a_finished_selection_nothing_is_chosen(folder):
    (folder / "select-k8-1e-4-21.jsonl").write_text("")
    with pytest.raises(cli.UserError, match="selection"):
        real_model.main(["--report"])


def test_without_the_answers_before_training_nothing_is_compared(folder):
    (folder / "final-before-0-31.jsonl").unlink()
    with pytest.raises(cli.UserError, match="before training"):
        real_model.main(["--report"])
