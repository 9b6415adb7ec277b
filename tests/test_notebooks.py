"""Every notebook runs from top to bottom, and leaves no process and no file behind."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT

BARELY_MEASURE = ("01_architecture", "03_ray_serve")
NOTEBOOKS = [
    pytest.param(path, marks=() if path.stem in BARELY_MEASURE else pytest.mark.alone, id=path.stem)
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook(path, traces, tmp_path_factory):
    """Through nbmake, as `pytest --nbmake` would; the second twice over, in one kernel."""
    notebook = twice(path, tmp_path_factory.mktemp("twice")) if path.stem[:2] == "02" else path
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", str(notebook)],
        cwd=ROOT,
        env=os.environ | traces.env | {"PYTHONPATH": str(path.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout
    assert traces.left() == []


def twice(path: Path, folder: Path) -> Path:
    """A copy of a notebook in which all its cells come once more: "Run All", and again."""
    notebook = nbformat.read(path, as_version=4)
    again = copy.deepcopy(notebook.cells)
    for cell in again:
        cell.id = f"again-{cell.id}"
    notebook.cells += again
    nbformat.write(notebook, folder / path.name)
    return folder / path.name
