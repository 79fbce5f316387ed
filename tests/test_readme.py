"""Proof that README.md and docs/reference.md show what is there.

1. Their commands, flags, objectives, files and make targets exist; the README's code runs.
2. The table of columns is that of a run: every column is explained, and no other.
3. Every promise of "What a run survives" names tests that there are.
4. What must be read to understand the method is at most 550 lines, and as long as it says.

To write the line counts of the reading path into the README: python tests/test_readme.py
"""

import ast
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT

import rspo
import train
from lib import cli

README = (ROOT / "README.md").read_text()
BOTH = README + (ROOT / "docs/reference.md").read_text()
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train.py", "sample.py", "evaluate.py", "ablate.py")
BLOCKS = "\n".join(re.findall(r"^```\w*\n(.*?)^```", BOTH, flags=re.S | re.M))
COMMANDS = [line.split("#")[0].split() for line in BLOCKS.splitlines()
            if line.startswith("python ")]
# file: which parts of it are to be read (a section, functions, classes); none: all of it
READING_PATH = {"rspo.py": (), "train.py": ("the loop",), "sample.py": ("HFSampler",),
                "lib/policy.py": ("token_logprobs", "Learner")}


def section(title: str) -> str:
    return BOTH.split(f"\n## {title}")[1].split("\n## ")[0]


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


# ---------------------------------------------------------------- 1. what it names exists

@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_exists_with_its_flags(command):
    assert (ROOT / command[1]).is_file()
    assert flags_in(" ".join(command)) <= flags_in(help_of(command[1]))


def test_the_commands_of_every_script_are_shown():
    assert {command[1] for command in COMMANDS} >= set(SCRIPTS)


def test_every_flag_exists_and_their_number_is_right():
    assert flags_in(BOTH) <= set().union(*(flags_in(help_of(script)) for script in SCRIPTS))
    assert f"{len(cli.SETTINGS)} flags" in BOTH


def test_every_objective_is_named():
    assert {f"`{name}`" for name in rspo.OBJECTIVES} <= set(re.findall("`[a-z]+`", BOTH))


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", BLOCKS, flags=re.M))
def test_a_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
    named = re.findall(r"`([\w/.-]+/|[\w/]+\.(?:py|md|ipynb))[` ]", text)
    made = re.compile(r"runs/|step_|NAME")  # by a run
    assert [name for name in named if not made.match(name) and not (ROOT / name).exists()] == []


def test_the_lines_for_a_loop_of_ones_own_give_the_gradient_of_the_loss():
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert code.count("\n") <= 7
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, requires_grad=True)  # (prompts, n, tokens)
    mask = torch.tensor([[[1, 1, 0]] * 4, [[1, 1, 1]] * 4])
    place = {"torch": torch, "logprobs": logits.double(), "mask": mask}
    exec(code, place)
    got, logits.grad = logits.grad, None
    sums = (logits.double() * mask).sum(-1)
    rewards = place["rewards"]
    weights = torch.stack([rspo.pass_at_k_weights(row, 2) for row in rewards])
    (-(weights * sums).mean()).backward()  # mean over prompts of (1/n) sum_i W_i log pi(y_i)
    torch.testing.assert_close(got, logits.grad)


# ---------------------------------------------------------------- 2. columns

def test_every_column_of_a_run_is_explained_and_no_other(tmp_path):
    train.main(["--steps", "1", "--prompts", "2", "--n", "4", "--k", "2", "--limit", "4",
                "--eval-n", "4", "--run", str(tmp_path / "run")])
    [(_, row)] = cli.read_rows(tmp_path / "run/metrics.jsonl")
    rows = section("A run directory").split("| column of ")[1].splitlines()[2:]
    explained = [name for line in rows if line.startswith("|")
                 for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    assert sorted(explained) == sorted(row)


# ---------------------------------------------------------------- 3. promises

HELD_BY = re.findall(r'`(tests/\w+\.py)(?: -k (?:"([^"]+)"|(\w+)))?`',
                     section("What a run survives"))


def test_every_promise_names_its_tests():
    rows = re.findall(r"^\| .* \| (.*) \|$", section("What a run survives"), flags=re.M)[2:]
    assert len(rows) >= 10
    assert all("`tests/" in row for row in rows)


@pytest.mark.parametrize("file, words, word", HELD_BY)
def test_the_tests_of_a_promise_exist(file, words, word):
    tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), flags=re.M)
    assert tests
    for part in filter(None, (words or word).split(" or ")):
        assert any(part in name for name in tests), part


# ---------------------------------------------------------------- 4. the reading path

def lines_to_read(file: str) -> int:
    """Lines of the parts of a file that are on the reading path."""
    text, parts = (ROOT / file).read_text(), READING_PATH[file]
    if not parts:
        return text.count("\n")
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.parse(text).body
               if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for each in re.split(r"^# -{8} ", text, flags=re.M)[1:]:
        lengths[each.partition("\n")[0]] = each.count("\n")
    return sum(lengths[part] for part in parts)


def with_lines_to_read(text: str) -> str:
    """The README with the line counts of the reading path as they are now."""
    counts = {f"`{file}`": lines_to_read(file) for file in READING_PATH}
    for name, count in {**counts, "without `minimal.py`": sum(counts.values())}.items():
        row = re.compile(rf"^(\| {re.escape(name)}.* \| )\w+ \|$", flags=re.M)
        text = row.sub(rf"\g<1>{count} |", text, count=1)
    return text


def test_the_method_is_read_in_550_lines_in_the_order_that_is_given():
    rows = section("The files").split("\n| without")[0]
    first, *others = READING_PATH
    assert re.findall(r"^\| `([\w/.]+)`", rows, flags=re.M) == [first, "minimal.py", *others]
    assert sum(map(lines_to_read, READING_PATH)) <= 550
    assert README == with_lines_to_read(README), "run: python tests/test_readme.py"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_lines_to_read(README))
