"""Proof that a pass@k curve, its interval and a comparison are what they are called.

1. A curve equals brute force over all subsets, problem by problem.
2. The interval of a change is Student's: over problems, or over seeds and problems, where it
   covers the truth about new ones. That of a share covers it on hard and easy sets, too, where
   Student's does not. A comparison is paired by problem. A star means that 0 is outside.
3. No number is lost in the table, which has at most 100 columns, and the file beside the figure
   holds the same. No figure needs or changes a backend of matplotlib.
4. evaluate.py takes the toy, a run directory, a checkpoint and samples files, alone or together,
   and says the same about a model as about its samples. Killed, it goes on to the same bytes.
5. Like with like: all of a comparison is sampled at the same settings or refused. Content decides,
   not names: changed weights, questions and gold answers are noticed, in any row. Nothing is a
   silent zero.
6. k > n is refused with the numbers, a broken samples file with file and line.
"""

import csv
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from itertools import combinations

import numpy
import pytest
import torch
from conftest import ROOT

import evaluate
import rspo
import sample
import train
from evaluate import Curve, difference, interval, make_curve, read_samples, table
from lib import policy, run, tasks
from lib.cli import UserError
from lib.tasks import Problem

RNG = random.Random(0)
PROBLEMS = [Problem(f"p{i}", f"q{i}", "15") for i in range(12)]
GRADED = [Problem(p.id, p.question, p.answer, "divisor-graded") for p in PROBLEMS]
RIGHT = [[float(RNG.random() < i / 12) for _ in range(6)] for i in range(12)]
REAL = [[RNG.choice([0, 0.25, RNG.random(), 1]) for _ in range(6)] for _ in range(12)]


# ---------------------------------------------------------------- 1. curves

@pytest.mark.parametrize("problems, rewards, ks, metric", [
    (PROBLEMS, RIGHT, (1, 2, 3, 6), "pass"), (GRADED, REAL, (1, 3, 5), "max"),
    (PROBLEMS[:1], RIGHT[5:6], None, "pass")])
def test_a_curve_equals_brute_force(problems, rewards, ks, metric):
    curve = make_curve("name", problems, rewards, ks)
    assert (curve.name, curve.metric, curve.ks) == ("name", metric, ks or (1, 2, 4))
    assert curve.problems == tuple(p.id for p in problems)
    brute = [[statistics.fmean(map(max, combinations(group, k))) for k in curve.ks]
             for group in rewards]
    brute = torch.tensor(brute, dtype=torch.float64)
    torch.testing.assert_close(curve.values, brute, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ks, rewards, said", [
    ((7,), RIGHT, "k is 7, but x has n = 6"), ((1, 100), RIGHT, "k is 100, but x has n = 6"),
    ((0, 1), RIGHT, "k is 0, but x has n = 6")])
def test_k_above_n_is_refused_with_the_numbers(ks, rewards, said):
    with pytest.raises(UserError, match=said):
        make_curve("x", PROBLEMS, rewards, ks)


@pytest.mark.parametrize("n, ks", [
    (1, (1,)), (6, (1, 2, 4)), (32, (1, 2, 4, 8, 16, 32)), (33, (1, 2, 4, 8, 16, 32))])
def test_default_ks_are_the_powers_of_two_up_to_n(n, ks):
    assert evaluate.powers_of_two(n) == ks


# ---------------------------------------------------------------- 2. intervals and comparisons

def quantile_by_integration(freedom):
    """Where Student's density, integrated numerically, has 97.5 % of its mass below."""
    c = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.pi**0.5
    below = lambda t: 0.5 + c * simpson(math.atan(t / freedom**0.5))

    def simpson(end, parts=400):  # of cos^(freedom - 1), after t = sqrt(freedom) tan(x)
        values = [math.cos(end * i / parts) ** (freedom - 1) for i in range(parts + 1)]
        inner = 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
        return (values[0] + inner + values[-1]) * end / parts / 3
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.975 else (low, middle)
    return low


def test_the_quantile_is_students():
    assert quantile_by_integration(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-6)
    for freedom in (*range(1, 40), 60, 100, 199, 1000, 10**5):
        exact = quantile_by_integration(freedom)
        assert evaluate.student(freedom) == pytest.approx(exact, rel=0.01), freedom
    for tenth in range(10, 400):  # in between: never much too narrow
        assert evaluate.student(tenth / 10) > 0.99 * quantile_by_integration(tenth / 10)


def test_the_interval_over_problems():
    values = make_curve("x", PROBLEMS, RIGHT, (1, 2)).values  # (M, K)
    mean, half = interval(values)
    for k in range(2):
        column = values[:, k].tolist()
        error = statistics.stdev(column) / 12**0.5
        assert mean[k].item() == pytest.approx(statistics.fmean(column), rel=1e-12)
        assert half[k].item() == pytest.approx(quantile_by_integration(11) * error, rel=0.01)
    torch.testing.assert_close(interval(values[None]), (mean, half))  # one seed
    assert interval(values[:1])[1].isnan().all()  # one problem says nothing about others


def test_the_interval_over_seeds_and_problems():
    """The degrees of freedom are those of Welch and Satterthwaite."""
    S, M = 4, 7
    values = torch.randn(S, M, 2, generator=torch.Generator().manual_seed(0)).double()
    mean, half = interval(values)
    for k in range(2):
        rows = values[:, :, k].tolist()
        parts = [(statistics.variance(map(statistics.fmean, each)) / len(each), len(each) - 1)
                 for each in (rows, list(zip(*rows)))]
        total = sum(part for part, _ in parts)
        freedom = total**2 / sum(part**2 / free for part, free in parts)
        assert mean[k].item() == pytest.approx(statistics.fmean(map(statistics.fmean, rows)))
        assert half[k].item() == pytest.approx(evaluate.student(freedom) * total**0.5, rel=1e-6)
    values = torch.tensor([[1., 3.], [5., 3.]]).double()[..., None]  # seed means 2, 4; problems 3
    assert [each.item() for each in interval(values)] == [3, pytest.approx(12.71, rel=0.01)]
    assert [each.item() for each in interval(torch.ones(3, 5, 1).double())] == [1, 0]


@pytest.mark.parametrize("of_seeds, of_problems", [(0.3, 1.0), (1.0, 0.3), (0.0, 0.0)])
def test_the_interval_covers_the_truth_over_new_seeds_and_new_problems(of_seeds, of_problems):
    torch.manual_seed(0)
    covered, trials = 0, 2000
    for _ in range(trials):
        values = torch.randn(5, 40, 1)
        values += of_seeds * torch.randn(5, 1, 1) + of_problems * torch.randn(1, 40, 1)
        mean, half = interval(values.double())
        covered += (mean.abs() <= half).item()
    assert 0.94 <= covered / trials <= 0.999


# chance that an answer to a problem is right, over problems: Beta(a, b)
AIME, HARDER, MATH = (0.15, 1.5), (0.1, 3.0), (1.0, 0.6)


def coverage(interval_of, a, b, M, k, n=64, trials=2000):
    """How often the interval of pass@k, of n answers to M problems, holds the truth."""
    rng = numpy.random.default_rng(M * 1000 + k)
    right = rng.binomial(n, rng.beta(a, b, (M, trials)))
    chance = torch.stack([rspo.pass_at_k([1.0] * c + [0.0] * (n - c), k) for c in range(n + 1)])
    truth = 1 - math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(b)
                         - math.lgamma(a + b + k))  # of 1 - (1 - w)^k
    low, high = interval_of(chance[torch.tensor(right)])  # (M, trials)
    return ((low <= truth + 1e-9) & (truth - 1e-9 <= high)).double().mean().item()


def students(values):
    mean, half = interval(values)
    return mean - half, mean + half


@pytest.mark.parametrize("kind", [AIME, HARDER, MATH])
def test_the_interval_of_a_level_covers_the_truth_on_hard_and_easy_sets(kind):
    shares = lambda values: evaluate.level("pass@", values)[1:]
    plain = []
    for M in (30, 40, 200, 500):
        for k in evaluate.powers_of_two(64):
            assert coverage(shares, *kind, M, k) >= 0.94, (M, k)
            plain.append(coverage(students, *kind, M, k))
    assert min(plain) < 0.94  # Student's alone is too narrow
    assert kind != MATH or min(plain) < 0.5


def test_the_interval_of_a_level_stays_between_0_and_1_around_the_mean():
    torch.manual_seed(0)
    values = torch.rand(3, 9, 4).double().round() * torch.tensor([0, 1, 0.5, 1])
    values[..., 3] = 1
    mean, low, high = evaluate.level("pass@", values)
    torch.testing.assert_close(mean, values.mean((0, 1)))
    assert ((0 <= low) & (low <= mean) & (mean <= high) & (high <= 1)).all()
    assert (low < high).all() and high[3] == 1 and low[0] == 0
    two = torch.cat([values, torch.zeros(3, 1, 4), torch.ones(3, 1, 4)], 1)  # over seeds, too
    middle, half = interval(two)
    torch.testing.assert_close(low[1], (middle - half).clamp(min=0)[1])
    tokens = evaluate.level("tokens", 90 * values)
    torch.testing.assert_close(torch.stack(tokens[1:]), torch.stack(students(90 * values)))


def test_a_comparison_is_paired_by_problem():
    before = make_curve("b", PROBLEMS, RIGHT, (1, 2, 4))
    shuffled = make_curve("a", PROBLEMS[::-1][:9], RIGHT[::-1][:9], (2, 4, 5))
    ks, mean, half = difference(shuffled, before)  # the same answers: exactly no change
    assert (ks, mean.tolist(), half.tolist()) == ((2, 4), [0, 0], [0, 0])

    raised = [[1.0, *group[1:]] for group in RIGHT[:9]]
    ks, mean, half = difference(make_curve("a", PROBLEMS[:9], raised, (1, 4)), before)
    gains = [statistics.fmean(new) - statistics.fmean(old) for new, old in zip(raised, RIGHT)]
    assert ks == (1, 4) and mean[0].item() == pytest.approx(statistics.fmean(gains))
    error = statistics.stdev(gains) / 3
    assert half[0].item() == pytest.approx(evaluate.student(8) * error, rel=1e-6)

    other = Curve("o", "pass", (1,), torch.zeros(2, 1), ("x", "y"))
    assert difference(other, before) is None
    assert difference(make_curve("g", GRADED, REAL), before) is None
    assert difference(make_curve("k", PROBLEMS, RIGHT, (3,)), before) is None


def test_a_comparison_over_seeds_is_paired_by_seed_and_problem():
    torch.manual_seed(0)
    names, noise = tuple("abcdef"), 9 * torch.randn(3, 6, 1).double()
    gain = torch.tensor([0.1, 0.2, 0.3]).double()[:, None, None]
    before = Curve("b", "pass", (1,), noise, names)
    after = Curve("a", "pass", (1,), (noise + gain)[:, [5, 4, 3, 2, 1, 0]], names[::-1])
    ks, mean, half = difference(after, before)
    assert mean.item() == pytest.approx(0.2)
    assert half.item() == pytest.approx(evaluate.student(2) * 0.1 / 3**0.5, rel=1e-6)


# ---------------------------------------------------------------- 3. tables and figures

def curves_named(names, ks=(1, 2), M=6, tokens=9.0):
    torch.manual_seed(0)
    return [Curve(name, "pass", ks, torch.rand(M, len(ks)).double() * 0.999,
                  tuple(f"p{i}" for i in range(M)),
                  {"tokens": tokens * torch.rand(M).double(), "cut off": torch.zeros(M).double()})
            for name in names]


def test_a_star_marks_changes_whose_interval_excludes_0():
    flat = lambda name, *values: Curve(name, "pass", (1, 2), torch.tensor(values).double(),
                                       tuple("abcd"))
    base = flat("base", [.1, .5], [.2, .5], [.3, .5], [.4, .5])
    after = flat("run", [.3, .5], [.4, .875], [.5, .125], [.62, .5])
    head, first, second, change, last = table([base, after]).splitlines()
    assert head.split() == ["pass@1", "pass@2"]
    assert first.split() == ["base", ".250+-.457", ".500+-.332"]
    assert second.split() == ["run", ".455+-.366", ".500+-.415"]
    assert change.split()[-2:] == ["+.205+-.016*", "+.000+-.487"]
    assert change.startswith("  minus base (4 problems) ")
    assert last.endswith("over 4 problems; * = a change whose interval excludes 0")


@pytest.mark.parametrize("mean, half, minus, shown", [
    (.0101, .01, "base", "+.010+-.010*"), (.0099, .01, "base", "+.010+-.010"),
    (-.0101, .01, "base", "-.010+-.010*"), (-.0099, .01, "base", "-.010+-.010"),
    (.5, math.nan, "base", "+.500+-nan"), (.5, .01, "", ".500+-.010"), (1, 0, "", "1.000+-.000"),
    (20.04, 1.5, "", "20.0+-1.5"), (-20.04, 1.5, "base", "-20.0+-1.5*")])
def test_a_cell_is_a_number_its_half_width_and_a_star(mean, half, minus, shown):
    row = {"mean": mean, "low_95": mean - half, "high_95": mean + half, "minus": minus}
    assert evaluate.cell(row).strip() == shown


LONG = "Qwen2.5-Math-1.5B-Instruct-passk-k8-20261125-013000-"


@pytest.mark.parametrize("name, data, n, tokens", [
    ("{}", "math500", 64, 9.0), (LONG + "{}", "", 64, 9.0), ("{}-" + LONG, "math500", 64, 9.0),
    ("{}", "/home/someone/" + "a-long-folder/" * 6 + "x.jsonl", 64, 9.0),
    ("sixteen-letters{}", "", 8, 3e4)])
def test_the_table_has_at_most_100_columns_and_loses_no_number(name, data, n, tokens):
    ks = evaluate.powers_of_two(n)
    for count in (1, 2, 4):
        names = [name.format(i) for i in range(count)]
        curves = curves_named(names, ks, tokens=tokens)
        lines = table(curves, data).splitlines()
        assert max(map(len, lines)) <= 100
        printed = sorted(word for line in lines for word in line.split() if "+-" in word)
        assert printed == sorted(evaluate.cell(row).strip() for row in evaluate.summary(curves))
        assert len(printed) == count * (len(ks) + 2) + (count - 1) * len(ks)


def test_a_change_is_over_the_shared_problems_and_says_how_many():
    both = curves_named(["a", "b"])
    other = Curve("c", "pass", (1, 2), torch.rand(3, 2).double(), ("p1", "p2", "new"))
    rows = evaluate.summary([*both, other])
    found = {(row["model"], row["minus"]): row["problems"] for row in rows}
    assert found == {("a", ""): 6, ("b", ""): 6, ("b", "a"): 6, ("c", ""): 3, ("c", "a"): 2}
    text = table([*both, other])
    assert "minus a (6 problems)" in text and "minus a (2 problems)" in text
    assert "over 6, 3 problems" in text


def test_many_comparisons_hold_at_once():
    """Bonferroni: over repeated experiments without any effect, of 20 changes at most 5 % of the
    experiments have one whose interval excludes 0; uncorrected, most have."""
    generator = torch.Generator().manual_seed(0)
    wrong = {1: 0, 20: 0}
    for _ in range(400):
        values = torch.randn(40, 20, generator=generator).double()
        for comparisons in wrong:
            mean, half = interval(values, comparisons)
            wrong[comparisons] += bool((mean.abs() > half).any())
    assert wrong[20] <= 30 and wrong[1] >= 200
    curves = curves_named(["a", "b"])
    _, _, single = difference(curves[1], curves[0])
    _, _, joint = difference(curves[1], curves[0], 2)
    assert (joint > single).all()
    assert "all 2 intervals of changes hold at once" in table(curves, "", 2)


def test_a_method_has_one_look_in_every_figure():
    """Colours that the colour-blind tell apart; no two curves of a figure look alike."""
    import bandit
    names = ["toy", "RSPO k = 8, step 100", "group max k = 8", "k = 1", "k = 2", "k = 4", "k = 16"]
    for order in (names, names[::-1]):
        looks = dict(zip(order, evaluate.looks_of(order)))
        colors = {name: look["color"] for name, look in looks.items()}
        assert colors["RSPO k = 8, step 100"] == evaluate.LOOKS["k = 8"][0]
        assert colors["group max k = 8"] == "#000000" and len({*colors.values()}) == 7
        assert len({look["marker"] for look in looks.values()}) == 7
    assert {k: evaluate.LOOKS[f"k = {k}"][0] for k in bandit.COLORS} == bandit.COLORS
    assert evaluate.looks_of(["k = 8", "k = 8, 5% flipped"])[0]["color"] == bandit.COLORS[8]
    others = evaluate.looks_of(["toy", "another", "RSPO k = 1", "k = 8"])  # leave them theirs
    assert [look["color"] for look in others[2:]] == [bandit.COLORS[1], bandit.COLORS[8]]
    assert len({look["marker"] for look in others}) == 4


@pytest.mark.parametrize("ks, metric, label", [
    (["8", "8"], "pass", "pass@8"), (["1,4", "1,4"], "max", "max@1,4"),
    (["8", "7"], "pass", "pass@k")])  # a schedule
def test_the_column_of_the_training_k_is_called_by_its_k_where_it_has_one(ks, metric, label):
    rows = [{"k": k, "reward": 0.1, f"{metric}@1": 0.1, f"{metric}@k": 0.5} for k in ks]
    assert evaluate.best_of_k(rows) == (f"{metric}@k", label)


DRAW = """if True:
    import json, sys
    from pathlib import Path
    import ablate, bandit, evaluate, train, matplotlib, torch
    curves = [evaluate.Curve(name, "pass", (1, 2), torch.rand(2, 3, 2), ("a", "b", "c"))
              for name in "xy"]
    folder = Path(sys.argv[1])
    evaluate.plot(curves, folder / "curves.png", "title")
    row = {"reward": 0.5, "pass@k": 0.5, "entropy": 1.0, "zero_weight_prompts": 0.0,
           "completion_tokens": 9.0, "grad_norm": 1.0}
    evaluate.plot_history([{"step": i, "k": "4", **row} for i in (1, 2)], folder / "history.png")
    ablate.draw(curves, folder / "report.png")
    print([name for name in sys.modules if "matplotlib.pyplot" in name or "backend_tk" in name])
    print(dict.__getitem__(matplotlib.rcParams, "backend"))"""


def test_no_figure_needs_or_changes_a_backend(tmp_path):
    """With a backend that cannot be loaded, such as a notebook's outside its notebook."""
    done = subprocess.run(
        [sys.executable, "-c", DRAW, tmp_path], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "MPLBACKEND": "module://nowhere"})
    assert done.stdout == "[]\nmodule://nowhere\n", done.stderr
    for name in ("curves", "history", "report"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- 4. the script

@pytest.fixture
def go(capsys):
    """What a script prints, called with flags."""
    def main(module, *flags):
        module.main([str(each) for each in flags])
        return capsys.readouterr().out
    return main


def numbers(path):
    """Of a .csv: (model, minus) -> metric -> mean and both ends of its interval."""
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["model"], row["minus"]
            each = tuple(float(row[name]) for name in ("mean", "low_95", "high_95"))
            found.setdefault(key, {})[row["metric"]] = each
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory as train.py leaves it, with an adapter that does something."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    args = train.settle(["--run", str(folder), "--limit", "9", "--lora-rank", "4",
                         "--steps", "400"])
    args.data, args.eval_data = "divisor:train", "divisor:test"
    model = policy.add_lora(policy.load_model(str(run.TOY))[0], 4, seed=0)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    made = run.Run(folder, train.config_of(args, {}))
    made.step = 7
    made.save(policy.Learner(model, 1e-3, 1.0, 10**4))
    return folder


def test_a_model_and_its_samples_are_judged_alike(go, tmp_path, trained):
    samples = {}
    for source in ("toy", trained, trained / "step_000007"):
        samples[source] = tmp_path / f"{len(samples)}.jsonl"
        go(sample, "--model", source, "--n", 8, "--limit", 9, "--out", samples[source])
    figure = tmp_path / "new" / "folder" / "curves.png"
    printed = go(evaluate, "--n", 8, "--limit", 9, "--out", figure,
                 "--model", *samples, *samples.values())
    found = numbers(figure.with_suffix(".csv"))
    of = lambda name: found[name, ""]
    run_name, checkpoint = str(trained), str(trained / "step_000007")  # else they are called alike
    assert of("toy") == of("0.jsonl") != of(run_name)
    assert of(run_name) == of("1.jsonl") == of(checkpoint) == of("2.jsonl")
    assert set(of("toy")) == {"pass@1", "pass@2", "pass@4", "pass@8", "cut off"}

    problems, groups, *_ = read_samples(samples["toy"])
    rewards = [[float(a.finished) * tasks.grade_divisor(a.text, p.answer) for a in group]
               for p, group in zip(problems, groups)]
    by_hand = make_curve("", problems, rewards)
    for k, *each in zip(by_hand.ks, *evaluate.level("pass@", by_hand.values)):
        expected = tuple(value.item() for value in each)
        assert of("toy")[f"pass@{k}"] == pytest.approx(expected, rel=1e-6)
    assert of("toy")["cut off"][0] == statistics.fmean(not a.finished for g in groups for a in g)
    assert set(found["0.jsonl", "toy"].values()) == {(0.0, 0.0, 0.0)}
    assert "over 9 problems" in printed and figure.read_bytes()[:4] == b"\x89PNG"


def test_a_run_brings_its_own_settings(go, tmp_path, trained):
    printed = go(evaluate, "--model", trained, "--n", 2, "--out", tmp_path / "x.png")
    head = "divisor:test pass@1 pass@2 cut off".split()
    assert "over 9 problems" in printed and printed.splitlines()[0].split() == head
    [samples] = (tmp_path / "x").iterdir()
    row = json.loads(samples.read_text().split("\n")[0])
    assert (row["temperature"], row["max_new_tokens"], row["n"]) == (1.0, 6, 2)


def test_graded_data_gives_max_at_k_at_the_ks_asked_for(go, tmp_path):
    printed = go(evaluate, "--data", "divisor-graded:test", "--limit", 5, "--n", 6, "--k", "3,1",
                 "--out", tmp_path / "x.png")
    head = ["divisor-graded:test", "max@1", "max@3", "cut", "off"]
    assert printed.splitlines()[0].split() == head and "over 5 problems" in printed


def test_what_was_sampled_is_not_sampled_again(go, monkeypatch, tmp_path):
    flags = ["--model", "toy", "--n", 4, "--limit", 9, "--out", tmp_path / "x.png"]
    first = go(evaluate, *flags)
    monkeypatch.setattr(sample, "open_sampler", lambda *_: 1 / 0)
    again = go(evaluate, *flags)
    assert again.count("is complete") == 1 and again.endswith(first)
    monkeypatch.undo()
    (tmp_path / "x").rename(tmp_path / "y")  # the samples are drawn again, the same
    assert go(evaluate, *flags) == first


def test_an_evaluation_that_was_killed_goes_on_and_says_the_same(go, monkeypatch, tmp_path):
    monkeypatch.setattr(sample.HFSampler, "block", 4)
    flags = lambda name: ["--n", 3, "--limit", 10, "--out", tmp_path / f"{name}.png"]
    whole = go(evaluate, *flags("whole"))
    original, calls = sample.HFSampler.generate, []

    def dies(self, *arguments):
        calls.append(arguments)
        return original(self, *arguments) if len(calls) < 3 else 1 / 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sample.HFSampler, "generate", dies)
        go(evaluate, *flags("killed"))
    [left] = (tmp_path / "killed").iterdir()
    lines = left.read_text().split("\n")
    assert len(lines) == 9  # two blocks and nothing behind their newline
    left.write_text("\n".join([*lines[:6], lines[6][:30]]))  # half a row, half a block
    assert go(evaluate, *flags("killed")).replace("killed", "whole") == whole
    assert left.read_text() == (tmp_path / "whole" / left.name).read_text()


def test_a_model_that_has_changed_is_sampled_again(go, tmp_path, trained):
    """A folder by its files' sizes and times, a checkpoint by its own checksums."""
    model, later = tmp_path / "model", tmp_path / "run"
    shutil.copytree(run.TOY, model)
    shutil.copytree(trained, later)
    flags = ["--model", model, later, "--n", 2, "--max-new-tokens", 12, "--limit", 3,
             "--data", "divisor:test", "--out", tmp_path / "x.png"]
    said = "is sampled again: weights, settings or data changed"
    assert said not in go(evaluate, *flags)
    assert go(evaluate, *flags).count("is complete") == 2
    (model / "model.safetensors").touch()
    (later / "step_000007" / "adapter_model.safetensors").touch()  # the same numbers
    printed = go(evaluate, *flags)
    assert printed.count("is complete") == 1 and f"{model} on divisor:test" in printed
    assert said in printed
    save(later, 0.2, step=7)  # under the same name
    printed = go(evaluate, *flags)
    assert printed.count("is complete") == 1 and f"{later} on divisor:test" in printed
    assert len(list((tmp_path / "x").iterdir())) == 4


# ---------------------------------------------------------------- 5. like with like

def make_run(folder, std=0.0, step=7, **flags):
    """A run directory whose newest checkpoint is that of `step`, as train.py leaves it."""
    given = {"run": folder, "limit": 20, "lora_rank": 4, "steps": 400, **flags}
    words = [word for name, value in given.items()
             for word in (f"--{name.replace('_', '-')}", str(value))]
    args = train.settle(words)
    args.data, args.eval_data = "divisor:train", "divisor:test"
    made = run.Run(folder, train.config_of(args, {}))
    made._lock.close()
    save(folder, std, step)
    return folder


def save(folder, std, step):
    shutil.rmtree(folder / f"step_{step:06d}", ignore_errors=True)
    model = policy.add_lora(policy.load_model(str(run.TOY))[0], 4, seed=0)
    for name, parameter in policy.trainable(model).items():
        if std and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    made = run.Run.__new__(run.Run)
    made.folder, made.step = folder, step
    made.save(policy.Learner(model, 1e-3, 1.0, 10**4))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_policy_that_never_moved_gains_nothing_whatever_it_was_trained_at(go, tmp_path):
    """At temperature .6 it "gained" +.075 +- .020 on its own base, which was sampled at 1."""
    still = make_run(tmp_path / "still", temperature=0.6, max_new_tokens=9, seed=3)
    go(evaluate, "--model", "toy", still, "--n", 8, "--out", tmp_path / "x.png")
    sampled = [rows_of(path) for path in (tmp_path / "x").iterdir()]
    assert [len(rows) for rows in sampled] == [20, 20]
    for name, value in {"temperature": 0.6, "max_new_tokens": 9, "limit": 20, "n": 8}.items():
        assert {row[name] for rows in sampled for row in rows} == {value}
    found = numbers(tmp_path / "x.csv")
    change = found["RSPO k = 4, step 7 of 400", "toy"]
    assert all(low <= 0 <= high for _, low, high in change.values())


@pytest.mark.parametrize("name, values", [
    ("temperature", (0.6, 1.0)), ("max_new_tokens", (9, 12)), ("limit", (20, 21))])
def test_runs_of_other_settings_are_compared_at_what_the_flags_say_or_refused(
        go, monkeypatch, tmp_path, name, values):
    runs = [make_run(tmp_path / f"run{i}", **{name: value}) for i, value in enumerate(values)]
    flags = ["--model", *runs, "--n", 2, "--out", tmp_path / "x.png"]
    with monkeypatch.context() as patch, pytest.raises(UserError) as refused:
        patch.setattr(sample, "open_sampler", lambda *_: 1 / 0)
        go(evaluate, *flags)
    said = f"{name} is {values[0]!r} in {runs[0]} and {values[1]!r} in {runs[1]}"
    assert said in str(refused.value) and not (tmp_path / "x").exists()
    go(evaluate, *flags, f"--{name.replace('_', '-')}", values[0])
    for path in (tmp_path / "x").iterdir():
        assert {row[name] for row in rows_of(path)} == {values[0]}


@pytest.mark.parametrize("flag, values", [
    ("--temperature", (1.0, 0.5)), ("--n", (2, 4)), ("--max-new-tokens", (12, 9)),
    ("--limit", (5, 6)), ("--data", ("divisor:test", "divisor:train"))])
def test_samples_files_of_other_settings_are_not_compared(
        go, monkeypatch, tmp_path, flag, values):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, value in zip(files, values):
        given = {"--n": 2, "--limit": 5, flag: value, "--out": path}
        go(sample, *(word for pair in given.items() for word in pair))
    said = f"is {values[0]!r} in {files[0]} and {values[1]!r} in {files[1]}"
    monkeypatch.setattr(sample, "open_sampler", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=re.escape(said)):
        go(evaluate, "--model", *files, "--out", tmp_path / "x.png")
    with pytest.raises(UserError, match=re.escape(f"is {values[1]!r} in the command line")):
        go(evaluate, "--model", files[0], flag, values[1], "--out", tmp_path / "x.png")


DATA = [{"id": f"p{i}", "problem": f"{i}", "answer": "1", "prompt": f"{i}{i}:"}
        for i in range(1, 6)]
FROM_FILE = ["--n", 2, "--max-new-tokens", 5, "--limit", 5]
CHANGES = [{"problem": "another"}, {"prompt": "77:"}, {"answer": "2"}, {"level": 3}, {"id": "q"}]


def write_data(path, **last):
    """Five problems, of which the last is changed."""
    path.write_text("".join(json.dumps(row) + "\n" for row in [*DATA[:4], DATA[4] | last]))


@pytest.mark.parametrize("last", CHANGES)
def test_a_problem_that_has_changed_is_noticed_and_sampled_again(go, tmp_path, last):
    data, out = tmp_path / "data.jsonl", tmp_path / "s.jsonl"
    write_data(data)
    flags = ["--data", data, *FROM_FILE]
    go(evaluate, *flags, "--out", tmp_path / "x.png")
    go(sample, *flags, "--out", out)
    before = out.read_text()
    write_data(data, **last)
    if "answer" in last:  # what was drawn does not depend on it
        assert "1 gold answers have changed" in go(
            evaluate, *flags, "--out", tmp_path / "x.png")
        return
    printed = go(evaluate, *flags, "--out", tmp_path / "x.png")
    assert "is sampled again: weights, settings or data changed" in printed
    with pytest.raises(UserError, match="was made with data_digest = .*line 1"):
        go(sample, *flags, "--out", out)
    assert out.read_text() == before


def test_gold_answers_are_those_of_the_data_as_they_are_now(go, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "s.jsonl"
    write_data(data)
    go(sample, "--data", data, *FROM_FILE, "--out", out)
    rows = rows_of(out)
    for row in rows:
        row["answers"] = [{"text": "\\boxed{2}", "finished": True}] * 2
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", out, "--out", tmp_path / "x.png"]
    go(evaluate, *flags)
    assert numbers(tmp_path / "x.csv")["s.jsonl", ""]["pass@1"][0] == 0
    write_data(data, answer="2")
    assert f"1 gold answers have changed in {data} since" in go(evaluate, *flags)
    assert numbers(tmp_path / "x.csv")["s.jsonl", ""]["pass@1"][0] == pytest.approx(0.2)
    for last in (change for change in CHANGES if "answer" not in change):
        write_data(data, **last)
        with pytest.raises(UserError, match=f"line 1: {data} asks something else now: sample it"):
            go(evaluate, *flags)
    data.unlink()
    with pytest.raises(UserError, match="data.jsonl cannot be read"):
        go(evaluate, *flags)


def test_a_file_is_not_continued_with_other_weights(go, monkeypatch, tmp_path):
    monkeypatch.setattr(sample.HFSampler, "block", 2)
    folder, out = make_run(tmp_path / "run", std=0.1), tmp_path / "s.jsonl"
    flags = ["--model", folder, "--n", 2, "--limit", 6, "--out", out]
    go(sample, *flags)
    whole = out.read_text()
    half = "".join(whole.splitlines(keepends=True)[:3])
    out.write_text(half)
    save(folder, 0.2, 7)  # other numbers under the same names
    with pytest.raises(UserError, match="was made with weights = "):
        go(sample, *flags)
    assert out.read_text() == half
    lines = whole.splitlines(keepends=True)
    out.write_text("".join([*lines[:3], lines[3].replace('"weights": "', '"weights": "0')]))
    save(folder, 0.1, 7)
    with pytest.raises(UserError, match="was made with weights = "):  # every row is looked at
        go(sample, *flags)


def test_answers_that_the_grader_lost_are_counted_printed_and_written(go, monkeypatch, tmp_path):
    data = tmp_path / "data.jsonl"
    write_data(data)
    grade_all = tasks.grade_all
    monkeypatch.setattr(tasks, "grade_all", lambda *given: (grade_all(*given)[0], 3))
    printed = go(evaluate, "--data", data, *FROM_FILE, "--out", tmp_path / "x.png")
    assert "3 answers of toy were not graded: they earn 0" in printed
    with (tmp_path / "x.csv").open(newline="") as file:
        assert {row["grader_failures"] for row in csv.DictReader(file)} == {"3"}


def test_models_are_called_what_they_are_and_never_alike(tmp_path):
    a = make_run(tmp_path / "a" / "x", k=8, step=400)
    b = make_run(tmp_path / "b" / "x", k=8, step=400, seed=1)
    c = make_run(tmp_path / "c", k="8:1", objective="groupmax", step=250)
    checkpoint = str(c / "step_000250")
    a, b, c = map(str, (a, b, c))
    assert evaluate.names_of(["toy", a, c, checkpoint, "s/1.jsonl"]) == {
        "toy": "toy", a: "RSPO k = 8, step 400 of 400", c: c, checkpoint: checkpoint,
        "s/1.jsonl": "1.jsonl"}
    assert evaluate.names_of([c]) == {c: "groupmax k = 8:1, step 250 of 400"}
    assert evaluate.names_of([a, b]) == {a: a, b: b}
    plain = str(shutil.copytree(run.TOY, tmp_path / "c" / "merged"))  # no checkpoint, but in a run
    assert evaluate.names_of([plain]) == {plain: "merged"}


# ---------------------------------------------------------------- 6. refusals

FIRST, SECOND = DIVISORS = tasks.load_problems("divisor:test", 2)
GOOD, LATER = ({
    "data": "divisor:test", "model": "toy", "n": 3, "temperature": 1.0, "max_new_tokens": 6,
    "sampler": "hf", "dtype": "float32", "load_in_4bit": False, "limit": 2, "seed": 0,
    "checkpoint": None, "weights": "w", "data_digest": tasks.digest_of(DIVISORS),
    "id": p.id, "answer": p.answer, "answers": [{"text": "7", "finished": True}] * 3}
    for p in DIVISORS)


@pytest.mark.parametrize("bad", [
    "", "{", "[]", "null", json.dumps(LATER)[:-20],
    *[json.dumps(LATER | change) for change in (
        {"answers": []}, {"answers": [{"text": "x"}] * 3}, {"answers": 5}, {"answers": ["x"] * 3},
        {"answers": [{"text": 5, "finished": True}] * 3}, {"n": 4}, {"data_digest": "0"},
        {"answers": LATER["answers"][:2]}, {"id": "j"}, {"id": FIRST.id}, {"id": 5}, {"data": 5},
        *({name: None} for name in evaluate.SHARED if name != "limit"))],
    *[json.dumps({name: value for name, value in LATER.items() if name != missing})
      for missing in LATER.keys() - {"answer"}]])
def test_a_broken_samples_file_is_refused_with_file_and_line(go, tmp_path, bad):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), bad]))
    if not bad:  # an empty line is none
        assert "pass@1" in go(evaluate, "--model", path, "--out", tmp_path / "x.png")
        return
    with pytest.raises(UserError) as refused:
        go(evaluate, "--model", path, "--out", tmp_path / "x.png")
    assert f"{path}, line 2" in str(refused.value) and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("content, said", [
    (json.dumps(GOOD | {"temperature": None}).encode(), ", line 1: .* a setting is null"),
    (b"", "holds no samples"), (b"\xff\xfe", "cannot be read"), (None, "cannot be read"),
    *[("\n".join(map(json.dumps, (GOOD, LATER | {key: "b"}))).encode(),
       f", line 2: {key} is 'b', but {GOOD[key]!r} in the first line")
      for key in sample.HEAD],
    ("\n".join(map(json.dumps, (GOOD, LATER, GOOD))).encode(),
     f", line 3: the id '{FIRST.id}' is not the next one of divisor:test")])
def test_an_empty_or_missing_or_mixed_samples_file_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "s.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"s.jsonl ?{said}"):
        read_samples(tmp_path / "s.jsonl")


@pytest.mark.parametrize("flags, said", [
    ("--n 4 --k 1,8", "k is 8, but toy has n = 4"), ("--n 4 --k 0", "k is 0"),
    ("--k x", "--k is 'x', but must be a number or a list (1,4,16)"), ("--k 1,,2", "'1,,2'"),
    ("--model s.jsonl --k 4", "k is 4, but s.jsonl has n = 3"), ("--model s.jsonl --k 0", "k is 0"),
    ("--model s.jsonl --n 4", "n is 4 in the command line and 3 in s.jsonl"),
    ("--model s.jsonl --data math500",
     "data is 'math500' in the command line and 'divisor:test' in s.jsonl"),
    ("--model tox", "'tox' is unknown, did you mean toy"),
    ("--model toy tox", "'tox' is unknown"), ("--model toy runs/x", "runs/x does not exist"),
    ("--data mathh", "did you mean"), ("--temperature -1", "--temperature is -1"),
    ("--tempreature 1", "did you mean")])
def test_what_cannot_be_estimated_is_refused_before_any_figure(
        go, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.jsonl").write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setattr(sample, "open_sampler", lambda *_: 1 / 0)
    with pytest.raises(UserError) as refused:
        go(evaluate, *flags.split())
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
