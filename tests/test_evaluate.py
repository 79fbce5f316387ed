"""Proof that a pass@k curve, its interval and a comparison are what they are called.

1. A curve equals brute force over all subsets, problem by problem, also where problems have different n; the interval
   is mean +- 1.96 standard errors over problems; a comparison is paired by problem.
2. evaluate.py takes the toy, a run directory, a checkpoint, samples files, alone or together, and says the same about a
   model as about its samples.
3. k > n is refused with the numbers, a broken samples file with file and line.
"""

import json
import random
import statistics
import sys
from itertools import combinations

import pytest
import torch

import evaluate
import policy
import sample
from evaluate import Curve, difference, interval, make_curve, read_samples, table
from tasks import Problem, UserError

RNG = random.Random(0)
PROBLEMS = [Problem(f"p{i}", f"q{i}", "1=1") for i in range(12)]
GRADED = [Problem(p.id, p.question, p.answer, "countdown-graded") for p in PROBLEMS]
RIGHT = [[float(RNG.random() < i / 12) for _ in range(6)] for i in range(12)]
REAL = [[RNG.choice([0, 0.25, RNG.random(), 1]) for _ in range(6)] for _ in range(12)]
UNEVEN = [group[:RNG.randrange(4, 7)] for group in RIGHT]


# ---------------------------------------------------------------- 1. the numbers

@pytest.mark.parametrize("problems, rewards, ks, metric", [
    (PROBLEMS, RIGHT, (1, 2, 3, 6), "pass"), (GRADED, REAL, (1, 3, 5), "max"), (PROBLEMS, UNEVEN, (1, 2, 4), "pass"), (PROBLEMS[:1], RIGHT[5:6], None, "pass")])
def test_a_curve_equals_brute_force(problems, rewards, ks, metric):
    curve = make_curve("name", problems, rewards, ks)
    assert (curve.name, curve.metric, curve.ks, curve.problems) == ("name", metric, ks or (1, 2, 4), tuple(p.id for p in problems))
    brute = [[statistics.fmean(map(max, combinations(group, k))) for k in curve.ks] for group in rewards]
    torch.testing.assert_close(curve.values, torch.tensor(brute, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ks, said", [((7,), "k is 7, but x has n = 6"), ((1, 100), "k is 100, but x has n = 6")])
def test_k_above_n_is_refused_with_the_numbers(ks, said):
    with pytest.raises(UserError, match=said):
        make_curve("x", PROBLEMS, RIGHT, ks)
    with pytest.raises(UserError, match="has n = 4"):
        make_curve("x", PROBLEMS, [*RIGHT[:11], RIGHT[11][:4]], (6,))                    # the problem with the fewest answers counts


@pytest.mark.parametrize("n, ks", [(1, (1,)), (6, (1, 2, 4)), (32, (1, 2, 4, 8, 16, 32)), (33, (1, 2, 4, 8, 16, 32))])
def test_default_ks_are_the_powers_of_two_up_to_n(n, ks):
    assert evaluate.powers_of_two(n) == ks


def test_the_interval_is_over_problems():
    values = make_curve("x", PROBLEMS, RIGHT, (1, 2)).values
    mean, half = interval(values)
    for k in range(2):
        column = values[:, k].tolist()
        assert mean[k].item() == pytest.approx(statistics.fmean(column), rel=1e-12)
        assert half[k].item() == pytest.approx(1.96 * statistics.stdev(column) / 12 ** 0.5, rel=1e-12)
    assert interval(values[:1])[1].isnan().all()                  # one problem says nothing about others


def test_a_comparison_is_paired_by_problem():
    before, after = make_curve("b", PROBLEMS, RIGHT, (1, 2, 4)), make_curve("a", PROBLEMS[::-1][:9], RIGHT[::-1][:9], (2, 4, 5))
    ks, mean, half = difference(after, before)
    assert ks == (2, 4) and mean.tolist() == [0, 0] and half.tolist() == [0, 0]         # the same answers, shuffled: exactly no change
    better = make_curve("a", PROBLEMS[:9], [[1.0, *group[1:]] for group in RIGHT[:9]], (1, 4))
    ks, mean, half = difference(better, before)
    gains = [statistics.fmean([1.0, *group[1:]]) - statistics.fmean(group) for group in RIGHT[:9]]
    assert ks == (1, 4) and mean[0].item() == pytest.approx(statistics.fmean(gains)) and len(gains) == 9
    assert half[0].item() == pytest.approx(1.96 * statistics.stdev(gains) / 3)
    other = Curve("o", "pass", (1,), torch.zeros(2, 1), ("x", "y"))
    assert difference(other, before) is None and difference(make_curve("g", GRADED, REAL), before) is None


def test_a_star_marks_differences_whose_interval_excludes_0():
    flat = lambda name, *values: Curve(name, "pass", (1, 2), torch.tensor(values, dtype=torch.float64), tuple("abcd"[:len(values)]))
    before = flat("base", [.1, .5], [.2, .5], [.3, .5], [.4, .5])
    lines = table([before, flat("run", [.3, .5], [.4, .9], [.5, .1], [.61, .5])]).splitlines()
    assert lines[0].split() == ["pass@1", "pass@2"] and lines[1].split() == ["base", "0.250", "+-", "0.127", "0.500", "+-", "0.000"]
    assert lines[3].split() == ["run", "-", "base", "+0.203", "+-", "0.005*", "+0.000", "+-", "0.320"]
    assert lines[-1].startswith("95 % intervals over 4 problems")


# ---------------------------------------------------------------- 2. the script

def run(monkeypatch, capsys, module, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    module.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory as train.py leaves it, with an adapter that does something."""
    run, model = tmp_path_factory.mktemp("runs") / "trained", policy.add_lora(policy.load_model("toy")[0], 4, 8, seed=0)
    torch.manual_seed(0)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save_checkpoint(run, 7, model, torch.optim.AdamW(policy.trainable(model).values()), {})
    flags = {"model": "toy", "eval_data": "countdown:test", "limit": 9, "temperature": 1.0, "max_new_tokens": 12, "sampler": "hf", "dtype": "auto",
             "load_in_4bit": False, "seed": 0}
    (run / "config.json").write_text(json.dumps({"flags": flags}))
    return run


def test_a_model_and_its_samples_are_judged_alike(monkeypatch, capsys, tmp_path, trained):
    samples = {}
    for source in ("toy", str(trained), str(trained / "step_000007")):
        samples[source] = tmp_path / f"{len(samples)}.jsonl"
        run(monkeypatch, capsys, sample, "--model", source, "--n", 8, "--limit", 9, "--out", samples[source])
    figure = tmp_path / "new" / "folder" / "curves.png"
    printed = run(monkeypatch, capsys, evaluate, "--n", 8, "--limit", 9, "--out", figure, "--model", *samples, *samples.values())
    row = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:7]}
    assert row["toy"] == row["0.jsonl"] and row["trained"] == row["1.jsonl"] == row["step_000007"] == row["2.jsonl"] != row["toy"]
    problems, groups, _, _ = read_samples(samples["toy"])
    by_hand = make_curve("", problems, [[float(evaluate.tasks.grade_countdown(text, p.answer)) for text, _ in g] for p, g in zip(problems, groups)])
    assert row["toy"][::3][:4] == [f"{value:.3f}" for value in by_hand.values.mean(0).tolist()]
    assert "0.jsonl - toy" in printed and "over 9 problems" in printed and figure.read_bytes()[:4] == b"\x89PNG"


def test_a_run_brings_its_own_settings(monkeypatch, capsys, tmp_path, trained):
    printed = run(monkeypatch, capsys, evaluate, "--model", trained, "--n", 2, "--out", tmp_path / "x.png")
    assert "over 9 problems" in printed and printed.splitlines()[0].split()[:4] == ["countdown:test", "pass@1", "pass@2", "maj@2"]


def test_graded_data_gives_max_at_k_at_the_ks_asked_for(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, evaluate, "--data", "countdown-graded:test", "--limit", 5, "--n", 6, "--k", "3,1", "--out", tmp_path / "x.png")
    assert printed.splitlines()[0].split()[:4] == ["countdown-graded:test", "max@1", "max@3", "maj@6"] and "over 5 problems" in printed


def test_the_majority_vote_counts_the_most_frequent_box_and_shares_a_tie():
    box = lambda *answers: [(f"so \\boxed{{{answer}}}", True) for answer in answers]
    groups = [box("1", "2", "2 ", "3"), box("1", "1", "2", "2"), [*box("5"), ("\\boxed{7}", False), ("\\boxed{7}", False), ("no box", True)], [("x", False)] * 4]
    rewards = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = evaluate.describe_answers(groups, [[1, 2, 3, 6]] * 4, rewards)
    assert found["maj@4"].tolist() == [0, 0.5, 0.5, 0] and found["tokens"].tolist() == [3] * 4 and found["cut off"].tolist() == [0, 0, 0.5, 1]


def test_several_data_sets_give_one_table_numbers_beside_it_and_are_not_sampled_twice(monkeypatch, capsys, tmp_path):
    data = [tmp_path / "easy" / "test.jsonl", tmp_path / "hard" / "test.jsonl"]            # the same name, the same ids
    for i, path in enumerate(data):
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"id": f"p{j}", "problem": f"{i}{j}", "answer": "1", "prompt": f"{j}{i}="}) + "\n" for j in range(3 + i)))
    flags = ["--data", ",".join(map(str, data)), "--n", 4, "--max-new-tokens", 5, "--out", tmp_path / "x.png", "--limit", 9]
    first = run(monkeypatch, capsys, evaluate, *flags)
    assert first.count("pass@1") == 3 and "mean of 2 data sets" in first and "over 3, 4 problems" in first
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {(row["data"], row["metric"]) for row in rows} == {(str(d), m) for d in data for m in ("pass@1", "pass@2", "pass@4", "maj@4", "tokens", "cut off")}
    assert len((tmp_path / "x.csv").read_text().splitlines()) == len(rows) + 1 and [row["problems"] for row in rows[::6]] == [3, 4]
    monkeypatch.setattr(sample, "open_sampler", lambda *_: 1 / 0)
    again = run(monkeypatch, capsys, evaluate, *flags)
    assert again.count("is complete already") == 2 and again.split("is complete already")[-1].split("\n", 1)[1] == first


def test_an_evaluation_that_was_killed_goes_on_and_says_the_same(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sample.HFSampler, "block_tokens", 4 * 3 * 20)
    flags = lambda name: ["--n", 3, "--limit", 10, "--out", tmp_path / f"{name}.png"]
    whole = run(monkeypatch, capsys, evaluate, *flags("whole"))
    original, seen = sample.HFSampler.generate, []

    def dies(self, *arguments):
        seen.append(1)
        return original(self, *arguments) if len(seen) < 3 else 1 / 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sample.HFSampler, "generate", dies)
        run(monkeypatch, capsys, evaluate, *flags("killed"))
    left, = (tmp_path / "killed").iterdir()
    assert len(left.read_text().splitlines()) == 8
    assert run(monkeypatch, capsys, evaluate, *flags("killed")).replace("killed", "whole") == whole
    assert left.read_text() == (tmp_path / "whole" / left.name).read_text()


def test_samples_of_a_model_that_has_changed_are_not_taken_for_its_own(monkeypatch, capsys, tmp_path, trained):
    flags = ["--model", trained, "--n", 2, "--out", tmp_path / "x.png"]
    run(monkeypatch, capsys, evaluate, *flags)
    (trained / "step_000007" / "adapter_model.safetensors").touch()
    assert "complete already" not in run(monkeypatch, capsys, evaluate, *flags) and len(list((tmp_path / "x").iterdir())) == 2


# ---------------------------------------------------------------- 3. refusals


@pytest.mark.parametrize("flags, said", [(["--n", 3], "--n does not apply"), (["--data", "math500"], "holds answers to 'countdown', not to --data math500")])
def test_flags_that_cannot_apply_to_drawn_samples_are_refused(monkeypatch, capsys, tmp_path, flags, said):
    (tmp_path / "s.jsonl").write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(UserError, match=said):
        run(monkeypatch, capsys, evaluate, "--model", tmp_path / "s.jsonl", "--out", tmp_path / "x.png", *flags)

GOOD = {"id": "i", "task": "countdown", "problem": "2357=22:", "answer": "2357=22", "data": "countdown",
        "answers": [{"text": "3*5+7", "finished": True, "tokens": 6}] * 3}


@pytest.mark.parametrize("bad", ["", "{", "[]", "null", json.dumps({**GOOD, "answers": []}), json.dumps({**GOOD, "answers": [{"text": "x"}]}),
                                 json.dumps({**GOOD, "answers": 5}), json.dumps({k: v for k, v in GOOD.items() if k != "answer"}),
                                 json.dumps({**GOOD, "task": "chess"}), json.dumps({**GOOD, "answer": "22"}), json.dumps(GOOD)[:-20]])
def test_a_broken_samples_file_is_refused_with_file_and_line(monkeypatch, capsys, tmp_path, bad):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), bad, json.dumps({**GOOD, "id": "j"})]))
    with pytest.raises(UserError) as refused:
        run(monkeypatch, capsys, evaluate, "--model", path, "--out", tmp_path / "x.png")
    assert f"{path}, line 2" in str(refused.value)


@pytest.mark.parametrize("content, said", [(b"", "holds no problems"), (b"\xff\xfe", "cannot be read"), (None, "cannot be read")])
def test_an_empty_or_missing_samples_file_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "s.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"s.jsonl {said}"):
        read_samples(tmp_path / "s.jsonl")


@pytest.mark.parametrize("flags, said", [
    (["--n", 4, "--k", "1,8"], "--k is 1,8, but every k must lie in 1..n = 4"), (["--n", 4, "--k", 0], "1..n = 4"), (["--k", "x"], "'x' is not a number"),
    (["--model", "s.jsonl", "--k", 4], "k is 4, but s.jsonl has n = 3"), (["--model", "s.jsonl", "--k", 0], "k is 0"), (["--k", "1,,2"], "'1,,2'"), (["--temperature", -1], "--temperature is -1")])
def test_what_cannot_be_estimated_is_refused_before_any_figure(monkeypatch, capsys, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.jsonl").write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(UserError) as refused:
        run(monkeypatch, capsys, evaluate, *flags, *([] if "s.jsonl" in flags else ["--limit", 2]))
    assert said in str(refused.value).replace("--k is 0", "k is 0") and not (tmp_path / "runs").exists()
