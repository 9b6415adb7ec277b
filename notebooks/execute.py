"""Executes every notebook twice in one kernel and writes back the first run: `make notebooks`."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> None:
    """Run one notebook top to bottom, then once more in the same kernel; keep the first outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(HERE)}})
    started = time.monotonic()
    with client.setup_kernel():
        for again in (False, True):
            if again:
                client.nb = nbformat.from_dict(notebook)  # a copy: its outputs are not kept
            for index, cell in enumerate(client.nb.cells):
                client.execute_cell(cell, index)
            if not again:
                print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run
    nbformat.write(notebook, path)


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
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("0*.ipynb")):
        execute(HERE / name)
