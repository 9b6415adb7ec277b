"""Every exercise accepts its solution, and tells a wrong one so, in the notebook itself."""

import copy
import inspect
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks import solutions

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
WRONG = {
    "scale_hello": "def scale_hello(replicas):\n    return hello  # two replicas, as before",
    "my_v2_body": "def my_v2_body(pictures):\n    return {'inputs': []}",
    "busy_at_once": "def busy_at_once(spans):\n    return len(spans)",
    "clients_needed": "def clients_needed(rate, latency):\n    return round(rate * latency)",
    "waited": "def waited(requests):\n    return sorted(a - sent for _, sent, a in requests)[18]",
    "batches": "def batches(waiting, free, largest):\n    return [min(waiting, largest)]",
    "low_latency": "def low_latency(cores):\n    return ['--num_replicas', '1']",
    "longest_gap": "def longest_gap(requests):\n    return max(t for t, _ in requests)",
    "bounded": "def bounded(rate, wait_s):\n    return ['--max_queued_requests', '100']",
    "replicas_needed": "def replicas_needed(rate, s, share):\n    return round(rate * s)",
    "container_cpus": "def container_cpus(replicas, cpus):\n    return int(replicas * cpus)",
    "four_replicas": "def four_replicas():\n    return ['--num_replicas', '4', '--threads', '2']",
}


def exercises(notebook: nbformat.NotebookNode) -> list[str]:
    """The names of the functions that the notebook's checks take."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [name for name in WRONG if any(f"lesson.check_{name}(" in source for source in cells)]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0*.ipynb")), ids=lambda path: path.stem)
def test_solutions_pass_and_wrong_ones_are_told(path: Path) -> None:
    """The cells an exercise needs, then for each: wrong, check, right, check."""
    notebook = nbformat.read(path, as_version=4)
    names, cells = exercises(notebook), []
    assert names, "every notebook has an exercise"
    for cell in notebook.cells:
        source = cell.source if cell.cell_type == "code" else ""
        if "exercise-setup" in cell.metadata.get("tags", []):
            cells.append(cell)
        for name in names:
            if f"lesson.check_{name}(" in source:
                right = inspect.getsource(getattr(solutions, name))
                for attempt in (WRONG[name], right):
                    cells += [nbformat.v4.new_code_cell(attempt), copy.deepcopy(cell)]
    notebook.cells = cells
    NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    said = [cell.outputs[0].text for cell in notebook.cells if "lesson.check_" in cell.source]
    assert [text.split(":")[0] for text in said] == ["not yet", "right"] * len(names), said


def test_every_solution_belongs_to_an_exercise() -> None:
    """No solution without its exercise, and none missing."""
    found = [
        name
        for path in NOTEBOOKS.glob("0*.ipynb")
        for name in exercises(nbformat.read(path, as_version=4))
    ]
    written = [name for name, thing in vars(solutions).items() if inspect.isfunction(thing)]
    assert sorted(found) == sorted(written) == sorted(WRONG)
