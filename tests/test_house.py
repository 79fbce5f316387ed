"""Proof that the house keeps its own rules (shared/design.md), so that it can still be read.

1. The loop fits on one screen and holds no `try`; no function of the product is over 60 lines.
2. No line of Python in the repository is over 100 columns, the mean of the product is 55 or less.
3. Nothing imports upwards: each room knows only the rooms below it.
4. A run has at most 28 flags, and each script's --help fits 80 columns.
"""

import ast
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

from lib import cli

LIBRARY = {"lib.cli", "lib.marker", "lib.tasks", "lib.policy", "lib.run", "lib.page"}
MAY_IMPORT = {
    "rspo": set(),
    "minimal": set(),
    "bandit": {"rspo"},
    "lib.cli": set(),
    "lib.marker": set(),
    "lib.tasks": {"lib.cli", "lib.marker"},
    "lib.policy": {"rspo", "lib.cli"},
    "lib.run": {"lib.cli", "lib.policy"},
    "lib.page": {"rspo", "lib.tasks"},
    "sample": LIBRARY | {"rspo"},
    "evaluate": LIBRARY | {"rspo", "sample"},
    "train": LIBRARY | {"rspo", "sample", "evaluate"},
    "ablate": LIBRARY | {"rspo", "sample", "evaluate", "train"},
}


def python_files():
    """Every Python file but those of environments and of what runs leave."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            yield from [path] if path.suffix == ".py" else path.rglob("*.py")


def rooms():
    """Name and syntax tree of each module of the product."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]:
        if path.name != "__init__.py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name, ast.parse(path.read_text())


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def lines_of(node) -> int:
    return node.end_lineno - node.lineno + 1


def imported(tree, ours) -> set[str]:
    """Our modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which room it is of"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & ours


def test_the_loop_fits_on_one_screen_and_holds_no_try():
    tree = dict(rooms())["train"]
    [loop] = [node for node in functions(tree) if node.name == "train"]
    assert lines_of(loop) <= 48
    assert not any(isinstance(node, ast.Try | ast.TryStar) for node in ast.walk(loop))


def test_nothing_comes_between_a_step_of_the_policy_and_its_number():
    """What is raised there would be saved under the number of the step before."""
    found = dict(rooms())
    body = lambda name, function: "\n".join(
        ast.unparse(line) for node in functions(found[name]) if node.name == function
        for line in node.body)
    assert re.search(r"stats = learner\.update\(.*\)\n +run\.step \+= 1\n", body("train", "train"))
    assert re.search(r"self\.optimizer\.step\(\)\nreturn ", body("lib.policy", "update"))


def test_no_function_of_the_product_is_over_60_lines():
    long = [(name, node.name, lines_of(node)) for name, tree in rooms()
            for node in functions(tree) if lines_of(node) > 60]
    assert not long


def test_no_line_of_python_is_over_100_columns():
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in python_files()
            for number, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 100]
    assert not wide


def test_the_product_is_written_in_short_lines():
    """Lines are saved by deleting and merging, not by packing."""
    lines = [line for name, _ in rooms()
             for line in (ROOT / f"{name.replace('.', '/')}.py").read_text().split("\n")]
    assert statistics.fmean(len(line) for line in lines if line.strip()) <= 55


def test_nothing_imports_upwards():
    found = dict(rooms())
    assert found.keys() <= MAY_IMPORT.keys(), "a new room: say what it may import"
    for name, tree in found.items():
        assert imported(tree, found.keys()) <= MAY_IMPORT[name], name


def test_a_run_has_at_most_28_flags():
    assert len(cli.SETTINGS) <= 28


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "ablate.py"])
def test_help_fits_80_columns_and_shows_how_to_begin(script):
    command = [sys.executable, ROOT / script, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"python {script}" in shown
    assert [line for line in shown.splitlines() if len(line) > 80] == []
