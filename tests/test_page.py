"""Proof that the page of answers shows what was said, and that nothing on it can run.

1. Whatever models and data say comes back as text, and adds no tag and no attribute.
2. Groups, counts and weights are right, for every spelling of --k.
3. train.py and evaluate.py write it, with the same problems on both sides.
"""

import json
import re
import warnings
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch

import evaluate
import rspo
import train
from lib import page, tasks

OURS = {"html", "meta", "style", "title", "h1", "h2", "h3", "p", "section", "div", "article",
        "small", "header", "span", "details", "summary", "b", "i", "code", "pre"}
HOSTILE = [
    "<script>alert(1)</script>", "</pre></details></style><img src=x onerror=alert(1)>",
    '"onmouseover="alert(1)', "' onclick='alert(1)", "javascript:alert(1)", "&lt;b&gt; &amp;",
    "<!-- ", "]]>", "\u2028\u2029 \u202e", "\N{COMBINING ACUTE ACCENT}" * 99, "<a href=//x.y>z</a>",
    "\\boxed{<script>alert(2)</script>}", "</title><meta http-equiv=refresh content='0;//x.y'>"]


class Reader(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts = Counter(), set(), [["", ""]]  # [[tag, text]]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes |= set(attributes)
        self.texts.append([tag, ""])

    def handle_endtag(self, tag):
        self.texts.append(["", ""])

    def handle_data(self, data):
        self.texts[-1][1] += data

    def of(self, tag):
        return [text for each, text in self.texts if each == tag]


def answer(text, reward=0.0, finished=True):
    return {"text": text, "reward": reward, "finished": finished}


def row(answers, name="p", problem="6:", gold="6", task="divisor"):
    return {"id": name, "problem": problem, "answer": gold, "task": task, "answers": answers}


def written(tmp_path, *sides, k="2", title="run"):
    """The page of sides, each of rows."""
    path = tmp_path / "page.html"
    page.write(path, title, k, [(f"side {i}", rows) for i, rows in enumerate(sides)])
    return Reader(path)


# ---------------------------------------------------------------- 1. nothing can run

@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(tmp_path, text):
    path = tmp_path / "page.html"
    page.write(path, text, "1", [(text, [row([answer(text)], text, text, text, "math")])])
    found = Reader(path)
    assert set(found.tags) <= OURS and found.tags["meta"] == 3 and found.tags["style"] == 1
    assert {name for name, _ in found.attributes} <= {
        "class", "charset", "lang", "name", "content", "http-equiv"}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert found.of("pre") == ["\n" + text]  # its first line end belongs to the tag
    assert [found.of(tag)[0] for tag in ("h1", "h2", "code")] == [text] * 3
    assert found.of("h3")[0] == f"{text} "


def test_the_page_of_a_long_answer_is_small_and_shows_its_end(tmp_path):
    long = "x<" * 500_000 + "the end"
    found = written(tmp_path, [row([answer(long), answer(long)], task="math")], k="1")
    assert (tmp_path / "page.html").stat().st_size < 20_000
    assert found.of("pre") == ["\n" + long[-2000:]]
    assert "2 \u00d7 the last 2,000 characters" in found.of("small")
    assert f"{len(long):,}" in found.of("span")


def test_half_a_character_does_not_stop_it(tmp_path):
    assert written(tmp_path, [row([answer("a\ud800b")])], k="1").of("pre") == ["\na\ufffdb"]


# ---------------------------------------------------------------- 2. what it says

def lines(found):
    """(mark, answer, times, reward, weight, length) of each line, in order."""
    marks, numbers = found.of("b"), [x for x in found.of("span") if re.match("[0-9]", x)]
    said = [text for tag, text in found.texts if tag == "i" or tag == "code"]
    assert len(numbers) == 4 * len(marks)
    return list(zip(marks, said[1:], *(numbers[i::4] for i in range(4))))  # [0]: the gold one


def test_answers_are_grouped_by_what_they_say_in_the_end(tmp_path):
    found = written(tmp_path, [row(task="math", gold="1 2", answers=[
        answer("so \\boxed{7}"), answer("thus \\boxed{1 2}", 1.0), answer("\\boxed{12}", 1.0),
        answer("no box at  all"), answer("half of \\boxed{12}", finished=False), answer(""),
        answer("\\boxed{12}", 0.0)])], k="1")
    assert lines(found) == [
        ("\u2713", "12", "2", "1", "1", "13"), ("\u2717", "7", "1", "0", "0", "12"),
        ("\u2717", "no box at all", "1", "0", "0", "14"),
        ("\u2717", "cut off", "1", "0", "0", "18"),
        ("\u2717", "nothing", "1", "0", "0", "0"), ("\u2717", "12", "1", "0", "0", "10")]
    assert "2 of 7 right, 6 different, 1 cut off" in found.of("small")


@pytest.mark.parametrize("k, ks", [("1", [1]), ("3", [3]), ("99", [6]), ("1,4", [1, 4]),
                                   ("1,99", [1, 6]), ("8:2", [2]), ("harmonic", ["harmonic"])])
@pytest.mark.filterwarnings("error:n = ")
def test_weights_are_those_of_the_method(tmp_path, k, ks):
    rewards = [0.0, 1.0, 0.25, 1.0, 0.0, 0.5]
    found = written(tmp_path, [row([answer(f"{i}", r) for i, r in enumerate(rewards)])], k=k)
    with warnings.catch_warnings(action="ignore"):
        weights = torch.stack([rspo.max_at_k_weights(rewards, each) for each in ks]).mean(0)
    assert [(line[3], line[4]) for line in lines(found)] == [
        (f"{reward:.3g}", f"{weight:.3g}") for reward, weight in zip(rewards, weights.tolist())]
    assert [line[0] for line in lines(found)] == list("\u2717\u2713~\u2713\u2717~")


def test_each_side_shows_the_same_problems_by_their_ids(tmp_path):
    rows = [row([answer(f"first {i}")], str(i), f"problem {i}") for i in range(50)]
    others = [row([answer(f"second {i}")], str(i), f"problem {i}") for i in range(48)][::-1]
    found = written(tmp_path, rows, others, k="1")
    chosen = [f"{i}" for i in range(0, 50, 3)]
    assert found.of("h2") == [f"problem {i}" for i in chosen]
    assert found.of("pre") == [f"\n{side} {i}" for i in chosen for side in ("first", "second")
                               if side == "first" or int(i) < 48]


def test_there_may_be_nothing_to_show(tmp_path):
    assert written(tmp_path, [], []).of("h2") == []


# ---------------------------------------------------------------- 3. who writes it

def texts_of(found):
    """Each text, as often as is written above it."""
    times = [int(text.split()[0]) for text in found.of("small") if "\u00d7" in text]
    texts = [text[1:] for text in found.of("pre")]
    return sorted(text for text, count in zip(texts, times, strict=True) for _ in range(count))


def texts_in(*paths):
    """Those of samples files, or of a run's evaluations."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    rows = [each for row in rows for each in row.get("samples", [row])]
    return sorted(each["text"] for row in rows for each in row["answers"])


def test_a_run_and_its_evaluation_leave_the_page(tmp_path, monkeypatch, capsys):
    for name in ("plot", "plot_history"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)
    folder = tmp_path / "run"
    train.main([*"--prompts 2 --n 4 --k 2 --limit 10 --eval-n 8 --steps 1 --run".split(),
                str(folder)])
    assert f"look at {folder}/samples.html" in capsys.readouterr().out
    found = Reader(folder / "samples.html")
    held_out = tasks.load_problems("divisor:test", 10)
    assert found.of("h2") == [p.question for p in held_out[::2]]
    assert found.of("h3") == ["before ", "after 1 steps "] * 5
    assert texts_of(found) == texts_in(folder / "evals.jsonl")
    for line in (folder / "evals.jsonl").read_text().splitlines():
        for row in json.loads(line)["samples"]:
            for each in row["answers"]:
                right = tasks.grade_divisor(each["text"], row["answer"]) * each["finished"]
                assert each["reward"] == right
    assert len(texts_of(found)) == 5 * 2 * 8

    figure = tmp_path / "new" / "x.png"
    evaluate.main(["--model", "toy", str(folder), "--n", "4", "--limit", "3", "--out", str(figure)])
    assert "answers to read (.html)" in capsys.readouterr().out.splitlines()[-1]
    found = Reader(figure.with_suffix(".html"))
    assert found.of("h2") == [p.question for p in tasks.load_problems("divisor:test", 3)]
    assert found.of("h3") == ["toy ", "RSPO k = 2, step 1 of 1 "] * 3
    assert texts_of(found) == texts_in(*figure.with_suffix("").iterdir())
