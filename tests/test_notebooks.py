"""Every notebook runs from top to bottom, its exercises too, and leaves no process and no file."""

import ast
import copy
import inspect
import os
import re
import subprocess
import sys
import tempfile
import textwrap

import nbformat
import pytest

from notebooks import solutions
from tests.conftest import ROOT

BARELY_MEASURE = ("01_architecture", "03_ray_serve")
PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
NOTEBOOKS = [
    pytest.param(path, marks=() if path.stem in BARELY_MEASURE else pytest.mark.alone, id=path.stem)
    for path in PATHS
]
WRONG = {
    "scale_hello": "def scale_hello(replicas):\n    return hello  # two replicas, as before",
    "clients_needed": "def clients_needed(rate, latency):\n    return round(rate * latency)",
    "waited": "def waited(requests):\n    return sorted(a - sent for _, sent, a in requests)[18]",
    "batches": "def batches(waiting, free, largest):\n    return [min(waiting, largest)]",
    "low_latency": "def low_latency(cores):\n    return ['--num_replicas', '1']",
    "longest_gap": "def longest_gap(requests):\n    return max(t for t, _ in requests)",
    "bounded": "def bounded(rate, wait_s):\n    return ['--max_queued_requests', '100']",
    "replicas_needed": "def replicas_needed(rate, s, share):\n    return round(rate * s)",
    "container_cpus": "def container_cpus(replicas, cpus):\n    return int(replicas * cpus)",
}
# Exercises that are files: how the cell begins that writes it, and what makes a solution wrong.
FILES = {
    "sentiment": "%%writefile {folder}/sentiment.py",
    "three_steps": "%%writefile {folder}/my_server.py",
}
WRONG_FILES = {
    "sentiment": [("sum(", "len("), ("raise InvalidInput", "raise ValueError")],
    "three_steps": [("num_replicas=2", "num_replicas=1")],
}


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook(path, traces, tmp_path_factory):
    """Through nbmake, as `pytest --nbmake` would; the second twice over, in one kernel.

    After each exercise as it stands it is tried wrongly, then rightly, and its check tells so.
    """
    notebook = nbformat.read(path, as_version=4)
    names = exercises(notebook.cells)
    assert names, "every notebook has an exercise"
    notebook.cells = [tried for cell in notebook.cells for tried in attempts(cell)]
    if path.stem[:2] == "02":
        names, notebook.cells = 2 * names, notebook.cells + again(notebook.cells)
    file = tmp_path_factory.mktemp("notebook") / path.name
    nbformat.write(notebook, file)
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory(prefix="nb-", dir="/tmp") as logs:  # short, for Ray's sockets
        ran = subprocess.run(
            [*command, file],
            cwd=ROOT,
            env=os.environ | traces.env | {"RAY_TMPDIR": logs},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert ran.returncode == 0, ran.stdout
    executed = nbformat.read(file, as_version=4).cells
    told = [verdict(cell) for cell in executed if exercises([cell])]
    expected = [["not yet"] * len(solutions_of(name)) + ["right"] for name in names]
    assert told == sum(expected, [])
    assert traces.left() == []


def exercises(cells: list[nbformat.NotebookNode]) -> list[str]:
    """The names of the functions that the cells' checks take, in order."""
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    names = [*WRONG, *FILES]
    return [name for source in sources for name in names if f"check_{name}(" in source]


def verdict(cell: nbformat.NotebookNode) -> str:
    """What the check of an exercise says, up to the colon; it may say before that a server runs."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    return re.search(r"^(not yet|right):", text, re.MULTILINE)[1]


def solutions_of(name: str) -> list[str]:
    """Cells that solve an exercise: wrongly, once or more, and at last rightly."""
    source = inspect.getsource(getattr(solutions, name))
    if name in WRONG:
        return [WRONG[name], source]
    first = ast.parse(source).body[0].body[1].lineno - 1  # below the docstring stands the file
    file = textwrap.dedent("".join(source.splitlines(keepends=True)[first:]))
    wrong = [file.replace(*change) for change in WRONG_FILES[name]]
    assert file not in wrong, "a change finds nothing to change"
    return [f"{FILES[name]}\n{text}" for text in (*wrong, file)]


def attempts(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cell; where it checks an exercise, also wrong attempts and a right one, each checked."""
    found = [cell]
    for name in exercises([cell]):
        for attempt in solutions_of(name):
            check = copy.deepcopy(cell)
            check.id = nbformat.v4.new_code_cell().id
            found += [nbformat.v4.new_code_cell(attempt), check]
    return found


def again(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The same cells once more: "Run All", and again."""
    copies = copy.deepcopy(cells)
    for cell in copies:
        cell.id = f"again-{cell.id}"
    return copies


def test_every_solution_belongs_to_an_exercise():
    """No solution without its exercise, and none missing."""
    found = [name for path in PATHS for name in exercises(nbformat.read(path, as_version=4).cells)]
    written = [name for name, thing in vars(solutions).items() if inspect.isfunction(thing)]
    assert sorted(found) == sorted(written) == sorted([*WRONG, *FILES])
