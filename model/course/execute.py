"""Executes every notebook twice in one kernel and keeps the first run's outputs: `make notebooks`.

`python -m model.course.execute [NOTEBOOK ...]`, for example 01_architecture.ipynb; default: all.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CELL_WITHIN_S = 300


def execute(path: Path) -> None:
    """Run a notebook top to bottom, then once more in the same kernel; keep the first outputs.

    Raises nbclient's CellExecutionError where a cell fails; the file is then left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=CELL_WITHIN_S, resources=folder)
    began = time.monotonic()
    with client.setup_kernel():
        _run_all(client)
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)
        client.nb = nbformat.from_dict(notebook)  # a copy: the outputs of run two are not kept
        _run_all(client)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run
    nbformat.write(notebook, path)


def _run_all(client: NotebookClient) -> None:
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)


def joined(outputs: list) -> list:
    """The same outputs, with the pieces of a stream in one."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = last_lines(output.text)
    return kept


def last_lines(text: str) -> str:
    """What a terminal shows: of a line that was written over, the last version."""
    return "\n".join(line.rstrip("\r").split("\r")[-1] for line in text.split("\n")).lstrip("\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in NOTEBOOKS.glob("0*.ipynb")):
        execute(NOTEBOOKS / name)
