"""Every notebook runs from top to bottom as it is committed, and leaves no process and no file."""

import copy
import os
import subprocess
import sys
import tempfile

import nbformat
import pytest

from tests.conftest import ROOT

PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook(path, traces, tmp_path_factory):
    """Through nbmake, as `pytest --nbmake` would, at the shorter length of model.course.length."""
    run(nbformat.read(path, as_version=4), traces, tmp_path_factory.mktemp("notebook"))


@pytest.mark.long
def test_once_more_in_the_same_kernel(traces, tmp_path_factory):
    """ "Run All", and again. (`make notebooks` does that with all notebooks, whole.)"""
    notebook = nbformat.read(ROOT / "notebooks" / "02_kserve_model.ipynb", as_version=4)
    cells = without(notebook.cells, "large = ", "import shutil")  # what takes long
    notebook.cells = cells + again(cells)
    run(notebook, traces, tmp_path_factory.mktemp("notebook"))


def run(notebook: nbformat.NotebookNode, traces, folder) -> nbformat.NotebookNode:
    """Execute a notebook: no cell fails, and nothing of it stays. Returns it executed."""
    file = folder / "notebook.ipynb"
    nbformat.write(notebook, file)
    ran = execute(file, traces.env)
    assert ran.returncode == 0, ran.stdout
    assert traces.left() == []
    return nbformat.read(file, as_version=4)


def execute(file, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a notebook's file through nbmake and keep its outputs in it."""
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory(prefix="nb-", dir="/tmp") as logs:  # short, for Ray's sockets
        return subprocess.run(
            [*command, file],
            cwd=ROOT,
            env=os.environ | env | {"RAY_TMPDIR": logs, "COURSE_LENGTH": "short"},
            capture_output=True,
            text=True,
            timeout=600,
        )


def without(
    cells: list[nbformat.NotebookNode], first: str, end: str | None
) -> list[nbformat.NotebookNode]:
    """Cells without those from the only one that begins so, up to the only one that begins so.

    end: None is to the last.
    """

    def begin(source: str) -> int:
        [place] = [
            i for i, c in enumerate(cells) if c.cell_type == "code" and c.source.startswith(source)
        ]
        return place

    return cells[: begin(first)] + (cells[begin(end) :] if end else [])


def again(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The same cells once more: "Run All", and again."""
    copies = copy.deepcopy(cells)
    for cell in copies:
        cell.id = f"again-{cell.id}"
    return copies
