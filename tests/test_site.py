"""`make site` builds every page without a warning, and its links lead somewhere."""

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from tests.browser import QUIET, browser
from tests.conftest import ROOT
from tests.test_notebooks import PATHS

pytestmark = pytest.mark.long


class Page(HTMLParser):
    """The ids of a page, and what it links or embeds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            if value and (tag, name) in {("a", "href"), ("img", "src")}:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built from this checkout."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        ["make", "site", f"SITE={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return folder / "html"


def test_every_source_has_its_page(site):
    """README, the notebooks, docs, deploy; with a search, and with a page that leads to each."""
    sources = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md"]
    sources += [str(f.relative_to(ROOT)) for f in (ROOT / "docs").glob("*.md")]
    sources += [str(f.relative_to(ROOT)) for f in (ROOT / "notebooks").glob("*.ipynb")]
    start = (site / "README.html").read_text()
    for source in sources:
        page = Path(source).with_suffix(".html")
        assert (site / page).exists(), source
        assert str(page) in start or source == "README.md", f"no way to {source}"
    assert (site / "search.html").exists() and (site / "searchindex.js").exists()


def test_links_lead_somewhere(site):
    """Files and headings on the site itself; what is elsewhere cannot be asked from here."""
    pages = {f: Page(f.read_text()) for f in site.rglob("*.html") if "_static" not in f.parts}
    for file, page in pages.items():
        for target in page.targets:
            if re.match(r"https?:|mailto:|data:|javascript:", target):
                continue
            path, _, heading = unquote(unescape(target)).partition("#")
            linked = (file.parent / path.partition("?")[0]).resolve() if path else file
            assert linked.exists(), f"{file.relative_to(site)}: {target}"
            if heading and linked in pages:
                assert heading in pages[linked].ids, f"{file.relative_to(site)}: {target}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_tables_that_notebooks_print_are_tables(site, path):
    """And not lines of bars."""
    text = [o["data"].get("text/markdown", "") for o in outputs(path) if "data" in o]
    tables = sum(len(re.findall(r"^\|(?:-+\|)+$", printed, re.M)) for printed in text)
    page = (site / "notebooks" / f"{path.stem}.html").read_text()
    assert page.count("<table") >= tables > 0


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    """Of all cells of a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    return [output for cell in cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("page", ["README.html", "notebooks/08_your_own_model.html"])
def test_a_browser_shows_it(site, page, tmp_path):
    """The title, the list of notebooks, and a picture that was loaded."""
    shot = tmp_path / "shot.png"
    command = [browser(), *QUIET, f"--user-data-dir={tmp_path}/browser", "--timeout=20000"]
    shown = subprocess.run(
        [*command, "--window-size=1280,2000", f"--screenshot={shot}", (site / page).as_uri()],
        capture_output=True,
        timeout=120,
    )
    assert shot.stat().st_size > 50_000, shown.stderr.decode()[-1000:]
    text = subprocess.run(
        [*command, "--dump-dom", (site / page).as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    title = re.search(r"<h1>(.*?)<a", text, re.S).group(1)
    assert title in ("Parallel inference with KServe and Ray Serve", "Serve a model of your own")
    assert "Measure latency and throughput" in text
    shutil.rmtree(tmp_path / "browser", ignore_errors=True)
