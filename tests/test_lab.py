"""`make lab` ends in a browser that shows the first notebook."""

import os
import re
import secrets
import subprocess
from pathlib import Path

import nbformat
import pytest
import requests

from model.serving.machine import free_port
from tests.browser import QUIET, browser
from tests.conftest import ROOT, until

pytestmark = pytest.mark.long

FIRST = ROOT / "notebooks/01_architecture.ipynb"


def test_the_browser_shows_the_first_notebook(tmp_path: Path) -> None:
    """The page that `make lab` opens holds the notebook's title, diagram and code."""
    program = browser()
    port, token = free_port(), secrets.token_hex(8)
    options = f"--no-browser --port {port} --IdentityProvider.token={token}"
    address = f"http://127.0.0.1:{port}/lab/tree/notebooks/{FIRST.name}?token={token}"
    cells = nbformat.read(FIRST, as_version=4).cells
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    code = next(cell.source for cell in cells if cell.cell_type == "code")
    log = tmp_path / "log"
    with log.open("w") as file:
        lab = subprocess.Popen(
            ["make", "lab", f"ARGS={options}"], cwd=ROOT, stdout=file, stderr=file, process_group=0
        )
    try:
        assert until(lambda: answers(f"http://127.0.0.1:{port}/api"), 60), log.read_text()
        page = subprocess.run(
            [program, *QUIET, f"--user-data-dir={tmp_path}/browser", "--virtual-time-budget=60000"]
            + ["--timeout=45000", "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
    finally:
        os.killpg(lab.pid, 15)
        lab.wait(30)
    for text in (title, "rayserve.svg", re.findall(r"\w+", code)[-1]):
        assert text in page, f"{text!r} is not on the page: {log.read_text()[-2000:]}"


def answers(url: str) -> bool:
    """Whether something answers at `url`."""
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False
