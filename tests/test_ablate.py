"""Proof that ablate.py runs the experiments that it names, and reports what they say.

1. Experiments are data: every flag exists, and every setting can run. A cell is named after its
   flags, so experiments share cells.
2. Verdicts, stars and intervals of a report agree. A setting with a failed cell is left out. What
   is reported is not what chose the toy's settings. Cells of two versions are not mixed.
3. A cell that fails harms no other, and its reason is in the report. Killed at once (-9), nothing
   runs on, and the same command goes on to the same numbers. What is done is not done again.
4. What cannot work is refused in one sentence.
"""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import ablate
import evaluate
import rspo
import train
from lib import cli, run, tasks
from lib.cli import UserError

STEPS, LIMIT = 12, 4
TINY = (f"--steps {STEPS} --prompts 2 --n 4 --eval-n 4 --save-every 4 --seeds 1 "
        f"--limit {LIMIT}").split()
SETTINGS = [(name, label, setting) for name, (_, settings) in ablate.EXPERIMENTS.items()
            for label, setting in settings.items()]
MEASURED = ("_per_s", "_seconds", "peak_memory_gb")  # columns that no two runs share


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """ablate.py sets it for its cells."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---------------------------------------------------------------- 1. experiments and cells

@pytest.mark.parametrize("name", ablate.EXPERIMENTS)
def test_an_experiment_asks_something_and_holds_settings_against_the_first(name):
    question, settings = ablate.EXPERIMENTS[name]
    assert question and len(settings) > 1
    folders = {ablate.cell(setting, 31, {}, Path("x"))[0] for setting in settings.values()}
    assert len(folders) == len(settings)  # no two are the same run


@pytest.mark.parametrize("name, label, setting", SETTINGS)
@pytest.mark.parametrize("scale", ["--quick", "--seeds=3"])
def test_train_takes_the_flags_of_every_cell(name, label, setting, scale):
    _, out, _, seeds, flags = ablate.settle([name, scale, "--no-tensorboard", "--lr", "0.01"])
    folder, words = ablate.cell(setting, seeds[-1], flags, out)
    args = train.settle([*words, "--run", str(folder)])
    train.check(args, graded=args.data.startswith("divisor-graded"))
    assert (args.seed, args.lr, args.tensorboard) == (seeds[-1], 0.01, False)
    assert {each: getattr(args, each) for each in setting} == setting | {"k": str(setting["k"])}


def test_the_experiments_are_what_they_are_called():
    settings = lambda name: ablate.EXPERIMENTS[name][1]
    assert {each["k"] for each in settings("sanity").values()} == {1}
    for label, each in settings("samples").items():
        n, prompts = each.get("n", 32), each.get("prompts", 16)  # the toy's own
        assert (n * prompts == 32 * 16) == ("equal steps" not in label)
    assert (cli.SETTINGS["n"].toy, cli.SETTINGS["prompts"].toy) == (32, 16)


def test_experiments_share_the_cells_of_equal_flags_and_no_others(tmp_path):
    of = lambda setting, seed=31, **flags: ablate.cell(setting, seed, flags, tmp_path)[0]
    same = [{"k": 4}, {"k": 4, "objective": "passk"}, {"k": 4, "flip": 0}]
    assert len({of(each) for each in same}) == 1
    others = [of({"k": 4}), of({"k": 4}, 32), of({"k": 4, "objective": "grpo"}), of({"k": 40}),
              of({"k": 4, "flip": 0.1}), of({"k": 4}, steps=3), of({"k": 4}, steps=30),
              of({"k": "1,4"}), of({"k": "4:1"}), of({"k": 4, "n": 8}), of({"k": 4}, n=8)]
    assert len(set(others)) == len(others)
    assert all(re.fullmatch(r"[\w.+-]+", folder.name) for folder in others)
    assert of({"k": 4, "objective": "grpo"}).name.startswith("k-4_objective-grpo_seed-31-")
    cells = lambda name: {of(each) for each in ablate.EXPERIMENTS[name][1].values()}
    assert cells("hitchhiking") & cells("curve") == {of({"k": 8})}


def test_the_seeds_of_an_experiment_are_as_many_as_asked_for():
    for flags, count in (([], 5), (["--quick"], 3), (["--seeds", "7"], 7), (["--quick"], 3)):
        seeds = ablate.settle(["noise", *flags])[3]
        assert len(seeds) == count and len(set(seeds)) == count
    full, quick = (set(ablate.settle(["noise", *flags])[3]) for flags in ([], ["--quick"]))
    assert not full & quick


# ---------------------------------------------------------------- 2. reports

KS = (1, 2, 4, 8, 16)
GAINS = {"k = 1": 0.0, "k = 2": 0.3, "k = 4": -0.2, "k = 8": 0.02}


def made_up(gains, S=3, M=30, n=16):
    """Results of an experiment whose settings answer so much better than the first."""
    torch.manual_seed(0)
    ids, chance = [f"p{i}" for i in range(M)], 0.2 + 0.4 * torch.rand(M, 1)
    row = {"pass@k": 0.5, "reward": 0.2, "distinct_correct": 1.0, "zero_weight_prompts": 0.0}
    right = lambda chance: (torch.rand(M, n) < chance).double().tolist()
    evaluation = lambda chance: {"ids": ids, "rewards": right(chance)}
    return {label: [(
        [evaluation(torch.tensor(0.2)), evaluation(chance + gain)],
        [{**row, "entropy": 1.0 + i} for i in range(8)], {"git_commit": "one"})
        for _ in range(S)] for label, gain in gains.items()}


def estimates(results, label, at=-1):
    rewards = torch.tensor([evals[at]["rewards"] for evals, *_ in results[label]])
    return torch.stack([rspo.pass_at_k(rewards, k) for k in KS], -1)  # (S, M, K)


def changes_in(text):
    """label -> cells of its change, of a report's table."""
    found, label = {}, None
    for line in text.split("```")[1].splitlines():
        label = next((each for each in GAINS if line.startswith(each)), label)
        found.setdefault(label, []).extend(re.findall(r"(?<!\S)[+-]\d*\.\S+", line))
    return {label: cells for label, cells in found.items() if cells}


def test_verdicts_and_stars_agree_with_the_intervals(tmp_path):
    results = made_up(GAINS)
    text = ablate.report("alignment", results, ["- nothing failed"], tmp_path)
    words, cells = set(), changes_in(text)
    assert list(cells) == list(GAINS)[1:]
    count = len(cells) * len(KS)
    assert f"all {count} intervals of changes hold at once" in text
    for label in cells:
        change = estimates(results, label) - estimates(results, "k = 1")
        mean, half = (each.tolist() for each in evaluate.interval(change, count))
        [said] = re.findall(rf"- {label} against k = 1: (.*)\.", text)
        expected = {}
        for k, m, h, shown in zip(KS, mean, half, cells[label], strict=True):
            word = "not separated" if abs(m) <= h else "better" if m > 0 else "worse"
            expected.setdefault(word, []).append(f"@{k}")
            assert shown.endswith("*") == (word != "not separated")
            assert float(shown.split("+-")[0]) == pytest.approx(m, abs=6e-4)
        assert said == "; ".join(f"{word} at {', '.join(at)}" for word, at in expected.items())
        words |= expected.keys()
    assert words == {"not separated", "better", "worse"}
    assert "- nothing failed" in text and "Is the k trained for the best at itself?" in text
    assert (tmp_path / "alignment.png").read_bytes()[:4] == b"\x89PNG"


def test_the_diagonal_compares_the_k_trained_for_with_every_other_one(tmp_path):
    results = made_up({f"k = {k}": 0.02 * k for k in KS})
    text = ablate.report("alignment", results, [], tmp_path)
    lines = re.findall(r"^- @(\d+): k = (\d+) minus (.*)$", text, flags=re.M)
    assert [(int(k), int(own)) for k, own, _ in lines] == [(k, k) for k in KS]
    for k, own, rest in lines:
        found = re.findall(r"(before|k = \d+) (\S+?)\+-([.\d]+)", rest)
        assert len(found) == 5
        for other, mean, half in found:
            old = ("k = 1", 0) if other == "before" else (other,)
            change = estimates(results, f"k = {own}") - estimates(results, *old)
            expected = [x[KS.index(int(k))].item() for x in evaluate.interval(change, 25)]
            assert [float(mean), float(half)] == pytest.approx(expected, abs=6e-4)


def test_a_verdict_is_what_its_interval_says(monkeypatch):
    change = KS, [.011, -.011, .009, -.009, .02], [.01] * 4 + [float("nan")]
    monkeypatch.setattr(evaluate, "difference", lambda *_: change)
    assert ablate.verdict(SimpleNamespace(name="a"), SimpleNamespace(name="b"), 5) == (
        "- a against b: better at @1; worse at @2; not separated at @4, @8, @16.")


def test_without_a_finished_setting_there_is_nothing_to_report(tmp_path):
    text = ablate.report("alignment", {}, ["- why"], tmp_path)
    assert "- why" in text and "k = 1, which all are held against, is not done." in text


def test_a_setting_with_a_failed_cell_is_left_out_whole(tmp_path, monkeypatch, capsys):
    """Else the seed that broke down would be missing, and what is left look better."""
    [[made]], missing = made_up({"any": 0.0}, S=1).values(), set()
    monkeypatch.setattr(ablate, "result", lambda folder: None if folder in missing else made)
    monkeypatch.setattr(ablate, "run_cells", lambda cells, workers: dict.fromkeys(cells, "why"))

    def text_without(k, seed):
        flags = ablate.settle(["alignment"])[4]
        missing.add(ablate.cell({"k": k}, seed, flags, tmp_path)[0])
        ablate.main(["alignment", "--seeds", "3", "--out", str(tmp_path)])
        return capsys.readouterr().out
    text = text_without(4, 32)
    assert re.findall("- (k = .*) is left out: k-4_seed-32.* failed, why", text) == ["k = 4"]
    shown = [k for k in KS if f"\nk = {k} " in text.split("```")[1]]
    assert shown == [1, 2, 8, 16] and "3 seed(s)" in text
    text = text_without(1, 31)  # the reference
    assert "k = 1, which all are held against, is not done." in text and "+-" not in text


@pytest.mark.parametrize("n", [4, 16])  # at n = 4 no estimate at 8 and 16 exists
def test_a_k_that_cannot_be_evaluated_is_left_out_of_the_report(tmp_path, n):
    text = ablate.report("alignment", made_up({f"k = {k}": 0.0 for k in KS}, n=n), [], tmp_path)
    assert re.findall(r"- @(\d+): k", text) == [str(k) for k in KS if k <= n]
    assert f"Each seed by itself, pass@{min(8, n)}:" in text


def test_other_columns_are_means_of_the_last_quarter_of_training_over_the_seeds():
    results = made_up(GAINS)["k = 1"]
    for seed, (_, metrics, _) in enumerate(results, 1):
        metrics[-1]["reward"] = seed / 10
    curve = ablate.curve_of("x", results)
    assert curve.metric == "pass" and curve.ks == KS and curve.values.shape == (3, 30, 5)
    torch.testing.assert_close(curve.more["reward"], torch.tensor([.15, .2, .25]).double())
    assert curve.more["entropy"].tolist() == [7.5] * 3  # of 7 and 8, the last two steps of eight


def test_a_cell_is_done_when_its_last_evaluation_is_there(tmp_path):
    folder = tmp_path / "cell"
    args = train.settle(["--steps", "2", "--run", str(folder)])
    assert ablate.result(folder) is None
    folder.mkdir()
    config = {"format": run.FORMAT, **train.config_of(args, {})}
    (folder / "config.json").write_text(json.dumps(config))
    assert ablate.result(folder) is None
    last = {"step": 2, "ids": ["a", "b", "c"], "rewards": [[0.0], [1.0], [0.5]]}
    cli.write_rows(folder / "metrics.jsonl", [{"step": 1}, {"step": 2}])
    cli.write_rows(folder / "evals.jsonl", [{**last, "step": 0}])
    with (folder / "evals.jsonl").open("a") as file:
        file.write(json.dumps(last))  # without its line end: it is being written
    assert ablate.result(folder) is None
    cli.write_rows(folder / "evals.jsonl", [{**last, "step": 0}, last], "w")
    assert ablate.result(folder) == (
        [{**last, "step": 0}, last], [{"step": 1}, {"step": 2}], run.read_config(folder))


def test_what_is_reported_is_not_what_chose_the_settings():
    for flags in ([], ["--quick"], ["--limit", "9"]):
        folder, words = ablate.cell({"k": 8}, 31, ablate.settle(["noise", *flags])[4], Path("x"))
        args = train.settle([*words, "--run", str(folder)])
        data = tasks.train_and_eval(args.data, args.eval_data, args.limit)
        assert data[2:] == ("divisor:train", "divisor:test")
        chose = {p.id for p in tasks.load_problems("divisor:select")}
        assert not chose & {p.id for part in data[:2] for p in part}


@pytest.mark.parametrize("change", ["ids", "git_commit"])
def test_cells_that_are_not_alike_are_not_mixed(tmp_path, change):
    results = made_up(GAINS)
    evals, _, config = results["k = 4"][2]
    (config if change == "git_commit" else evals[-1])[change] = ["other"]
    with pytest.raises(UserError, match="other held-out problems or another version of the code"):
        ablate.report("alignment", results, [], tmp_path)


# ---------------------------------------------------------------- 3. grids

@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """n = 4, so the settings k = 8 and k = 16 cannot run."""
    out = tmp_path_factory.mktemp("grid")
    ablate.main(["alignment", *TINY, "--out", str(out)])
    return out


def records(out):
    """Of each cell what does not depend on the machine's speed."""
    found = {}
    for path in sorted((out / "cells").glob("*/metrics.jsonl")):
        metrics, evals = ([row for _, row in cli.read_rows(path.with_name(name), appended=True)]
                          for name in ("metrics.jsonl", "evals.jsonl"))
        found[path.parent.name] = evals, [
            {name: row[name] for name in row if not name.endswith(MEASURED)} for row in metrics]
    return found


def test_a_failed_cell_harms_no_other_and_its_reason_is_in_the_report(grid):
    text = (grid / "alignment.md").read_text()
    [reason] = re.findall("- k = 8 is left out: k-8_seed-31-.* failed, (.*)", text)
    assert "--k 8 --objective passk: k is 8, but must be a whole number with 1 <= k <= n" in reason
    assert list(changes_in(text)) == ["k = 2", "k = 4"]
    assert "over 4 problems" in text and (grid / "alignment.png").stat().st_size > 10_000
    done = records(grid).values()
    sizes = [(len(metrics), len(evals[-1]["ids"])) for evals, metrics in done]
    assert sizes == [(STEPS, LIMIT)] * 3


def test_the_same_command_and_another_experiment_do_nothing_twice(
        grid, monkeypatch, tmp_path, capsys):
    grid = shutil.copytree(grid, tmp_path / "grid")
    asked, run_cells = [], ablate.run_cells

    def count(cells, workers):
        asked.append([folder.name.split("_")[0] for folder in cells])
        return run_cells(cells, workers)
    monkeypatch.setattr(ablate, "run_cells", count)
    before, reports = records(grid), []
    for name in ("alignment", "hitchhiking-2"):
        ablate.main([name, *TINY, "--out", str(grid)])
        reports.append((grid / f"{name}.md").read_text())
        assert reports[-1].strip() in capsys.readouterr().out
    found = records(grid)
    assert asked == [["k-8", "k-16"], ["k-2"]]  # only what failed, and what is new
    assert {name: found[name] for name in before} == before and len(found) == len(before) + 1
    [line, again] = (re.search("\nk = 2 .*", text)[0].split() for text in reports)
    assert line == again and "+-" in line[3]


def test_a_cell_that_is_killed_is_named_with_its_signal_and_goes_on(tmp_path):
    flags = dict(steps=3, prompts=2, n=4, limit=4, eval_n=4)
    cells = dict(ablate.cell({"k": k}, 1, flags, tmp_path) for k in (1, 2))
    (tmp_path / "cells").mkdir()
    first, second = cells
    known = set(multiprocessing.active_children())

    def kill_the_first():
        while not (new := set(multiprocessing.active_children()) - known):
            time.sleep(0.01)
        new.pop().kill()
    thread = threading.Thread(target=kill_the_first, daemon=True)
    thread.start()
    assert ablate.run_cells(cells, workers=1) == {first: "ended by signal 9"}
    assert ablate.result(first) is None and ablate.result(second)
    assert ablate.run_cells({first: cells[first]}, workers=1) == {} and ablate.result(first)


def alive(session):
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        found += [stat.parent.name] if int(of) == session and state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_killed_grid_leaves_no_process_and_goes_on_to_the_same_numbers(grid, tmp_path):
    command = [sys.executable, "ablate.py", "alignment", *TINY, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("cells/*/step_000004")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(alive(process.pid)) > 1
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun = [len(metrics) for _, metrics in records(tmp_path).values()]
    assert begun and max(begun) < STEPS, "a cell went on without its parent"
    assert not (tmp_path / "alignment.md").exists()
    ablate.main(command[2:])
    assert records(tmp_path) == records(grid)
    table = lambda out: (out / "alignment.md").read_text().split("```")[1]
    assert table(tmp_path) == table(grid)


# ---------------------------------------------------------------- 4. the command line

def test_without_an_experiment_all_are_listed(capsys):
    ablate.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ablate.EXPERIMENTS)
    assert max(map(len, lines)) <= 100
    assert list(ablate.settle(["all"])[0]) == list(ablate.EXPERIMENTS)


@pytest.mark.parametrize("flags, said", [
    ("alignmnt", "experiment 'alignmnt' is unknown, did you mean alignment?"),
    ("nothing-like-it", "experiment 'nothing-like-it' is unknown; python ablate.py lists"),
    *[(f"noise --{name} {value}", f"--{name} is what experiments vary: leave it out")
      for name, value in (("k", 4), ("objective", "loo"), ("flip", 0), ("seed", 0), ("run", "x"),
                          ("resume", "x"))],
    ("noise --seeds 0", "--seeds is 0, but must be at least 1"),
    ("noise --stps 3", "'--stps' is unknown, did you mean --steps"),
    ("noise alignment", "'alignment' is unknown"), ("noise --steps 0", "--steps is 0")])
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, flags, said):
    with pytest.raises(UserError) as refused:
        ablate.main([*flags.split(), "--out", str(tmp_path / "grid")])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "grid").exists()
