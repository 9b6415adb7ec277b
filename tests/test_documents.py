"""README and the notebooks as they are committed: structure, links, outputs."""

import json
import re
import socket
from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
DOCUMENTS = [ROOT / "README.md", ROOT / "deploy/README.md", *NOTEBOOKS]


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    """The notebook's cells of a kind that are not empty."""
    found = nbformat.read(path, as_version=4).cells
    return [cell for cell in found if cell.cell_type == kind and cell.source.strip()]


def prose(path: Path) -> str:
    """README, or the Markdown of a notebook."""
    if path.suffix == ".md":
        return path.read_text()
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


@EACH
def test_notebooks_open_and_close_alike(path):
    """A title and a promise, time, aims, needs, a picture; at the end the same sections."""
    text = re.sub(r"```.*?```", "", prose(path), flags=re.S)
    assert len(re.findall(r"^# \w", text, re.M)) == 1 and text.startswith("# ")
    parts = [r"^# .+\n\n[A-Z].+\n\n", r"\*\*Time:?\*\*", r"\*\*You will be able to:?\*\*"]
    parts += [r"\*\*You need:?\*\*", r"!\[", r"\*\*Predict", r"^#+ What we have seen"]
    parts += [r"^#+ In practice", r"^#+ On your own", r"^#+ Clean up"]
    if path != NOTEBOOKS[0]:
        parts.insert(5, r"(<details>.*){2}")
    if path != NOTEBOOKS[-1]:
        parts.append(r"Next: \[")
    assert re.search(".*?".join(parts), text, re.M | re.S | re.I), "a part is missing or misplaced"
    aims = re.search(r"able to:?\*\*\n(.*?)\n\n", text, re.S | re.I).group(1)
    assert 3 <= len(re.findall(r"^- ", aims, re.M)) <= 5


@EACH
def test_cells_are_short_and_portable(path):
    """At most 30 lines; no waiting blindly, installing, literal port or absolute path."""
    for cell in cells(path, "code"):
        assert len(cell.source.splitlines()) <= 30, cell.source
        assert not re.search(r"\bsleep\(|[!%]\s*pip\b", cell.source), cell.source
        assert not re.search(r"(:|port\W{1,6})\d{4,5}\b", cell.source), cell.source
        assert not re.search(r"""["'](/(?!v[12]/)\w+/|~/|[A-Z]:\\)""", cell.source), cell.source


@EACH
def test_predictions_and_exercises_are_left_to_the_reader(path):
    """Each guess is None as shipped, and there is an exercise with its check."""
    code = "\n".join(cell.source for cell in cells(path, "code"))
    assert set(re.findall(r"^my_guess\w* = (\S+)", code, re.M)) == {"None"}
    assert re.search(r"\bcheck_\w+\(", code)


@EACH
def test_notebooks_are_committed_executed(path):
    """Every code cell was run, in order, without an error or a warning."""
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@EACH
def test_outputs_tell_nothing_of_the_machine(path):
    """No host name, path, process id or address of the machine they were made on."""
    for cell in cells(path, "code"):
        shown = [output.get("text", output.get("data", "")) for output in cell.outputs]
        text = re.sub(r'"image/\w+": "[^"]*"', "", json.dumps(shown))
        assert not re.search(r"/(home|root|work|Users|tmp|usr)/|\bpid\W{0,3}\d", text), text
        assert not re.search(r"\b(?!127\.)(\d{1,3}\.){3}\d{1,3}\b", text), text
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b(?<!localhost)", text), text


def anchors(text: str) -> set[str]:
    """The addresses of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures(path):
    """What is linked is there, and each picture says in words what it shows."""
    text = prose(path)
    for bang, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:|attachment:", target):
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not heading or heading in anchors(prose(linked)), target
        assert not bang or len(words) > 40, f"{target} has no alt text to speak of"
    assert "<img" not in text or all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))


def test_readme_names_every_notebook():
    """And, in turn, what it calls by name exists."""
    readme = prose(ROOT / "README.md")
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
    readme += prose(ROOT / "deploy/README.md")
    for module in re.findall(r"python -m ((?:model|deploy)(?:\.\w+)+)", readme):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
