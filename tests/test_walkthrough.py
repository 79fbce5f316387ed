"""Proof that the lesson runs from top to bottom, and that what it shows is what it computes.

Cells tagged "varies" train a model (here for ten steps) or show it: what they show differs between
machines. Of all others the stored text and picture must be the computed ones. A cell that draws has
its picture, stored and computed. To run the lesson in full and keep the new outputs:
python tests/test_walkthrough.py
"""

import re
from base64 import b64decode
from io import BytesIO

import nbformat
import numpy
import pytest
from conftest import ROOT
from matplotlib.image import imread
from nbclient import NotebookClient
from test_house import python_files

LESSON = ROOT / "walkthrough.ipynb"
DRAWS = re.compile(r"figures\.\w+\(|draw\w*\(")
TRAINS = 'demo.train(Path("runs/lesson"))'
SAME = 0.005  # mean difference of a colour, from 0 to 1; that to a white picture is over 3 times it


def run(notebook) -> None:
    NotebookClient(notebook, timeout=1800, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell) -> str:
    """Text outputs of a code cell."""
    found = [output.get("text") or output.get("data", {}).get("text/plain", "")
             for output in cell.outputs]
    return "".join(text for text in found if not text.startswith("<Figure"))


def pictures(cell) -> list:
    """Colours (height, width, 3) of each picture, 1 = white."""
    found = [output.data.get("image/png") for output in cell.outputs if "data" in output]
    return [imread(BytesIO(b64decode(png)))[..., :3] for png in found if png]


def varies(cell) -> bool:
    return "varies" in cell.metadata.get("tags", ())


def complaints(cell) -> list:
    return [output.text for output in cell.outputs if output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(LESSON, as_version=4)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    notebook = nbformat.read(LESSON, as_version=4)
    [cell] = [cell for cell in code(notebook) if cell.source == f"runs = {TRAINS}"]
    folder, flags = tmp_path_factory.mktemp("lesson") / "runs", "--limit 100 --steps 10"
    cell.source = f"runs = demo.train(Path({str(folder)!r}), flags={flags.split()})"
    run(notebook)
    return notebook


def test_the_lesson_runs_and_shows_what_it_computes(stored, fresh):
    for before, after in zip(code(stored), code(fresh)):
        assert bool(before.outputs) == bool(after.outputs), before.source
        assert complaints(before) == complaints(after) == []
        if not varies(before):
            assert text_of(before) == text_of(after)


def test_every_cell_that_draws_has_its_picture_stored_and_computed(stored, fresh):
    assert sum(bool(DRAWS.search(cell.source)) for cell in code(stored)) >= 8
    for notebook in (stored, fresh):
        for cell in code(notebook):
            found = pictures(cell)
            assert len(found) == bool(DRAWS.search(cell.source)), cell.source
            assert all((1 - picture).mean() > 3 * SAME for picture in found), cell.source


def test_the_stored_pictures_are_the_computed_ones(stored, fresh):
    for before, after in zip(code(stored), code(fresh)):
        for old, new in zip(pictures(before), pictures(after)):
            if varies(before):
                assert new.shape == pytest.approx(old.shape, rel=0.05), before.source
            else:
                assert new.shape == old.shape, before.source
                assert numpy.abs(new - old).mean() < SAME, before.source


def test_no_file_of_the_project_switches_the_backend_of_a_notebook():
    switch = re.compile(r"pyplot|matplotlib\.use|switch_backend")
    files = [path for path in python_files() if path.parent.name != "tests"]
    assert len(files) > 10 and [path for path in files if switch.search(path.read_text())] == []


def test_the_minutes_of_the_sections_are_those_of_the_table_and_of_the_readme(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (\d\. .*) \((\d+) minutes\)$", text, flags=re.M)
    rows = re.findall(r"^\| (\d\.) .* \| (\d+) \|.* \|$", text, flags=re.M)
    assert [(title[:2], minutes) for title, minutes in headings] == rows and len(rows) == 8
    total = sum(int(minutes) for _, minutes in rows)
    assert f"In {total} minutes" in text
    assert f"{total} minutes in class" in (ROOT / "README.md").read_text()


def test_every_file_that_the_lesson_links_exists(stored):
    for cell in stored.cells:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", cell.source):
            assert (ROOT / link).is_file(), link


def test_the_cells_are_short_and_their_tables_fit_a_page_of_1366_pixels(stored):
    for cell in code(stored):
        assert cell.source.count("\n") < 8, cell.source
        assert max(map(len, text_of(cell).split("\n"))) <= 100, cell.source


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
