"""The project's files agree with each other: packages, imports, sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.conftest import ROOT, needs_tool

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
LINES = (ROOT / "requirements.txt").read_text().splitlines()
SOURCES = sorted(
    p for name in ("model", "notebooks", "deploy") for p in (ROOT / name).rglob("*.py")
)
SOURCES += sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = [path for path in SOURCES if path.parent.name != "peers"]  # of another environment


def test_every_package_is_pinned():
    """One exact version a line, for all platforms: no option, no index, no local version."""
    for line in LINES:
        (pin,) = Requirement(line).specifier
        assert pin.operator == "==" and "+" not in pin.version and "*" not in pin.version, line
        assert not Requirement(line).url and not line.startswith("-"), line


def test_cuda_packages_are_not_pinned():
    """A CPU torch asks for none of them, and would download them if the pins named them."""
    names = [canonicalize_name(Requirement(line).name) for line in LINES]
    assert not [name for name in names if re.match(r"nvidia-|cuda-|triton", name)]


@pytest.mark.parametrize("wanted", DIRECT, ids=lambda wanted: wanted.name)
def test_the_pins_fit_the_direct_dependencies(wanted):
    """Every direct dependency is pinned, within what pyproject.toml allows."""
    pins = [Requirement(line) for line in LINES]
    name = canonicalize_name(wanted.name)
    versions = [next(iter(p.specifier)).version for p in pins if canonicalize_name(p.name) == name]
    assert versions and all(wanted.specifier.contains(version) for version in versions)


def test_conda_installs_the_same():
    """environment.yml: the same Pythons as pyproject.toml, and pip with the same pins."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [part for part in environment["dependencies"] if isinstance(part, str)]
    (python,) = [part.removeprefix("python") for part in conda if part.startswith("python")]
    assert SpecifierSet(python) == SpecifierSet(PROJECT["requires-python"])
    assert len(conda) == 2 and "pip" in conda
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt", "-e ."]}


def imports(path: Path) -> set[str]:
    """The top names of what a module or the code cells of a notebook import."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        text = "\n".join(line for line in code.splitlines() if not re.match(r"\s*[%!?]", line))
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_a_direct_dependency(path):
    """What model/ and notebooks/ import is Python's, the repository's, or in pyproject.toml."""
    ours = {"model", "deploy", *(beside.stem for beside in (ROOT / "notebooks").glob("*.py"))}
    direct = {canonicalize_name(wanted.name) for wanted in DIRECT}
    providers = packages_distributions()
    for name in imports(path) - ours - sys.stdlib_module_names:
        provided_by = {canonicalize_name(dist) for dist in providers.get(name, [])}
        assert provided_by & direct, f"{name} comes from {provided_by}: name it in pyproject.toml"


def test_no_large_file():
    """No file in git is larger than 10 MB, and together they stay under 30."""
    needs_tool("git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    assert max(sizes.values()) < 10e6 and sum(sizes.values()) < 30e6
