"""Proof that `make demo` shows what its two runs did, on one screen, and says what went wrong."""

import re

import pytest
import torch

import rspo
from lib import cli, tasks
from lib.cli import UserError
from toy import demo

FLAGS = ("--steps", "3", "--limit", "30", "--eval-n", "32", "--n", "16", "--prompts", "4")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Its run directories and what it prints."""
    folder = tmp_path_factory.mktemp("new") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FOLDER", folder)
        patch.chdir(folder.parent)
        patch.setattr(demo, "FLAGS", FLAGS)
        patch.setattr("sys.argv", ["demo.py"])
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(
            " ".join(map(str, words)).split("\n")))
        demo.main()
    return folder, lines


def test_it_fits_on_one_screen(shown):
    _, lines = shown
    assert len(lines) <= 25 and max(map(len, lines)) <= 80


def test_its_numbers_are_those_of_the_runs(shown):
    folder, lines = shown
    text = "\n".join(lines)
    first = cli.read_rows(folder / "k-1/evals.jsonl")[0][1]
    last = {k: cli.read_rows(folder / f"k-{k}/evals.jsonl")[-1][1] for k in demo.KS}
    assert {k: each["step"] for k, each in last.items()} == {1: 3, 8: 3}
    assert first == cli.read_rows(folder / "k-8/evals.jsonl")[0][1]  # they begin alike
    at = [rspo.pass_at_k(each["rewards"], 8).mean() for each in (first, *last.values())]
    said = [float(number) for number in re.findall(r"(?<=\s)\.\d\d", text)][:3]
    assert said == pytest.approx([float(each) for each in at], abs=0.00501)
    assert (folder / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_the_hits_that_it_marks_are_divisors(shown):
    _, lines = shown
    begin = next(i for i, line in enumerate(lines) if line.startswith("eight answers"))
    groups = lines[begin + 1:begin + 10]
    for i in (0, 3, 6):
        number = groups[i].split()[0]
        for line in groups[i:i + 3]:
            words = re.findall(r"(\[\S*\]|\S+)", line[14:])
            assert len(words) <= 8
            for word in words:
                right = tasks.grade_divisor(word.strip("[]"), number)
                assert right == word.startswith("["), (number, word)


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    with pytest.raises(UserError, match="k-8 failed: train.py: --steps is 0, but must be at "):
        demo.train(tmp_path / "runs", (8,), ("--steps", "0"))


def test_the_same_divisors_are_counted_as_drawn():
    texts = {name: [["3", "3", "7", "x"]] for name in ("before", "k = 1", "k = 8")}
    curves = [demo.evaluate.Curve(name, "pass", (1, 2), torch.rand(5, 2).double(), tuple("abcde"))
              for name in texts]
    _, right = demo.draw(curves, texts).axes
    heights = [bar.get_height() for bar in right.patches]
    assert heights[:2] == [50, 25] and heights[len(demo.DIVISORS)] == 25  # 3, 7, other
