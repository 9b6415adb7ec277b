"""README, docs/ and the notebooks as they are committed: structure, links, names, outputs."""

import ast
import json
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from kserve.model_server import parser as kserve_parser

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SERVING = ROOT / "docs/serving.md"
PAGES = [README, ROOT / "deploy/README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, CHANGELOG, CONTRIBUTING, *NOTEBOOKS]
NAMING = pytest.mark.parametrize(
    "path", [*PAGES, CONTRIBUTING, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT))
)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    """The notebook's cells of a kind that are not empty."""
    found = nbformat.read(path, as_version=4).cells
    return [cell for cell in found if cell.cell_type == kind and cell.source.strip()]


def prose(path: Path) -> str:
    """A page, or the Markdown of a notebook."""
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
        assert not re.search(r"\b(?!127\.|0\.0\.0\.0)(\d{1,3}\.){3}\d{1,3}\b", text), text
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
        if not re.match(r"https?:|mailto:|attachment:|\.\./\.\./actions/", target):
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not heading or heading in anchors(prose(linked)), target
        badge = target.endswith("/badge.svg")
        assert not bang or badge or len(words) > 40, f"{target} has no alt text to speak of"
    assert "<img" not in text or all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))


def test_readme_leads_everywhere():
    """README links every notebook, every page of docs/, deploy/ and CHANGELOG, and is one page."""
    readme = prose(README)
    for path in [*NOTEBOOKS, *PAGES[1:], CHANGELOG, CONTRIBUTING]:
        assert f"]({path.relative_to(ROOT)}" in readme, path
    assert len(readme.split()) <= 900


# Names and words that were given up for those of the field; CHANGELOG has them in its tables.
GIVEN_UP = (
    r"GatheredModel|_seal|patient|_expected|_at_work|by_requests_here|ByPlace|most_inside|InThread|"
    r"made_with|stuck_s|idle_s|foretold|refusals|fronts|deeds?|rungs?|odd_pictures|PATIENT|PROMPT|"
    r"stock_server|answer_all|pictures?|request_log"
)


@pytest.mark.parametrize(
    "path",
    [*PAGES, *NOTEBOOKS, CONTRIBUTING, *sorted((ROOT / "model").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_words_that_were_given_up(path):
    """In prose, and as names in code."""
    text = path.read_text() if path.suffix != ".ipynb" else prose(path)
    if path.suffix == ".ipynb":
        text += "\n".join(cell.source for cell in cells(path, "code"))
    assert not re.findall(rf"\b(?:{GIVEN_UP})\b", text)


@EACH
def test_what_notebooks_import_exists(path):
    """Every module and name of ours, in programs that the notebook writes too."""
    for cell in cells(path, "code"):
        plain = re.sub(r"^[%!].*", "", cell.source, flags=re.M)
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "model":
                exec(ast.unparse(node), {})


@NAMING
def test_what_is_called_by_name_exists(path):
    """Modules that a page names or runs, metrics, targets of make."""
    text = prose(path)
    for module in re.findall(r"(?:`|_path: )((?:model|deploy|tests)(?:\.\w+)+)", text):
        parts = module.split(".")  # the last may be a name in the module
        files = [ROOT.joinpath(*parts[:n]) for n in (len(parts), len(parts) - 1) if n > 1]
        assert any(file.with_suffix(".py").exists() or file.is_dir() for file in files), module
    for module in re.findall(r"python -m ((?:model|deploy|tests)(?:\.\w+)+)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    sources = "".join(file.read_text() for file in (ROOT / "model").rglob("*.py"))
    for metric in re.findall(r"\binference_\w+", text):
        assert f'"{metric.removesuffix("_total")}"' in sources, metric
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z]+)\b", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("path", [README, SERVING], ids=lambda path: path.name)
def test_options_exist(path):
    """Every option of a page is one of `model.serving` or of its two commands beside it."""
    modules = ("model.serving", "model.serving.redeploy", "model.serving.frontend")
    known = {"--help"}.union(*(options(module) for module in modules))
    assert not set(re.findall(r"(?<![\w-])--[a-z]\w+", prose(path))) - known


@EACH
def test_options_in_notebooks_exist(path):
    """What the text calls an option of ours is one."""
    named = set(re.findall(r"`(--[a-z]\w+)(?![\w-])", prose(path)))
    assert not named - options("model.serving")


@cache
def options(module: str) -> set[str]:
    """What a program's help lists."""
    command = [sys.executable, "-m", module, "--help"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return set(re.findall(r"--\w+", listed.stdout))


def test_serving_lists_every_option_of_ours():
    """docs/serving.md leaves out none; KServe's own are KServe's to explain."""
    kserve = set(re.findall(r"--\w+", kserve_parser.format_help()))
    assert not options("model.serving") - kserve - set(re.findall(r"--\w+", prose(SERVING)))


def test_the_old_form_and_todays():
    """README shows today's three steps as `model/basics/ray_server.py` takes them."""
    steps = re.search(r"^Today .*?```python\n(.*?)```", prose(README), re.M | re.S).group(1)
    program = (ROOT / "model/basics/ray_server.py").read_text()
    steps = steps.replace('"custom-model"', "args.model_name").replace("Replica.", "deployment.")
    lines = [line.strip() for line in steps.splitlines() if not line.startswith("#")]
    assert not [line for line in lines if line not in program]
