"""Proof that the lesson runs from top to bottom, and that what it shows is what it computes.

Cells tagged "varies" train a model or show it: their figures differ between machines. Of all
others the stored text must be the computed one. A cell that draws has its picture, stored and
computed. To run the lesson and keep the new outputs: python tests/test_walkthrough.py
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "walkthrough.ipynb"
DRAWS = re.compile(r"plt\.(figure|subplots)|demo\.draw\(")


def run(notebook) -> None:
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell) -> str:
    """Text outputs of a code cell."""
    found = [output.get("text") or output.get("data", {}).get("text/plain", "")
             for output in cell.outputs]
    return "".join(text for text in found if not text.startswith("<Figure"))


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def complaints(cell) -> list:
    return [output.text for output in cell.outputs if output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(LESSON, as_version=4)


@pytest.fixture(scope="module")
def fresh():
    notebook = nbformat.read(LESSON, as_version=4)
    run(notebook)
    return notebook


def test_the_lesson_runs_and_shows_what_it_computes(stored, fresh):
    for before, after in zip(code(stored), code(fresh)):
        assert bool(before.outputs) == bool(after.outputs), before.source
        assert complaints(before) == complaints(after) == []
        if "varies" not in before.metadata.get("tags", ()):
            assert text_of(before) == text_of(after)


def test_every_cell_that_draws_has_its_picture_stored_and_computed(stored, fresh):
    assert sum(bool(DRAWS.search(cell.source)) for cell in code(stored)) >= 5
    for notebook in (stored, fresh):
        for cell in code(notebook):
            assert pictures(cell) == bool(DRAWS.search(cell.source)), cell.source


def test_the_lesson_defines_no_algorithm_and_hides_its_solutions(stored):
    lines = [line for cell in code(stored) for line in cell.source.splitlines()]
    assert not any(line.startswith(("def ", "class ")) for line in lines)
    exercises = [cell.source for cell in stored.cells if "**Exercise" in cell.source]
    assert len(exercises) >= 4
    assert sum("<details>" in text for text in exercises) >= 4


def test_no_line_of_the_lesson_is_over_100_columns(stored):
    wide = [line for cell in stored.cells for line in cell.source.splitlines() if len(line) > 100]
    assert not wide


if __name__ == "__main__":
    notebook = nbformat.read(LESSON, as_version=4)
    run(notebook)
    nbformat.write(notebook, LESSON)
