"""Every notebook runs from top to bottom, and leaves no process and no file behind."""

import os
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, traces):
    """Once, through nbmake, as `pytest --nbmake` would."""
    command = [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, str(path)],
        cwd=ROOT,
        env=os.environ | traces.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
    assert traces.left() == []


@pytest.mark.parametrize("path", NOTEBOOKS[2:3], ids=lambda path: path.stem)
def test_a_second_run_in_the_same_kernel(path, traces, monkeypatch):
    """ "Run All", and again: the second run works as the first did."""
    for name, value in traces.env.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += nbformat.from_dict(notebook).cells
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": path.parent}}).execute()
    assert traces.left() == []
