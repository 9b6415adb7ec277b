"""The project's files agree with each other: packages, imports, which part uses which, sizes."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
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
GROUPS = {"project": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
GROUPS = {group: [Requirement(line) for line in lines] for group, lines in GROUPS.items()}
DIRECT = [wanted for group in GROUPS.values() for wanted in group]
LINES = (ROOT / "requirements.txt").read_text().splitlines()

# Which folders may import which groups. `tools` are programs: nothing imports them.
MAY_IMPORT = {
    "model": ("project",),
    "notebooks": ("project",),
    "tests": ("project", "test"),
    "deploy": ("project", "test"),
}
USED_WITHOUT_IMPORT = {
    "jupyterlab": "make lab",
    "nbmake": "tests/test_notebooks.py runs it",
    "jsonschema": "a bound on what JupyterLab and kubernetes-validate bring",
    "ruff": "make lint",
    "import-linter": "make lint",
    "sphinx": "make site",
    "myst-nb": "make site",
    "furo": "make site",
    "sphinx-copybutton": "make site",
}


def sources(folder: str) -> list[Path]:
    """The modules and notebooks of a folder, without those of another environment."""
    paths = sorted((ROOT / folder).rglob("*.py")) + sorted((ROOT / folder).rglob("*.ipynb"))
    return [path for path in paths if "peers" not in path.parts and ".ipynb_ch" not in str(path)]


SOURCES = [path for folder in MAY_IMPORT for path in sources(folder)]


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
    """The top names of what a module or the code cells of a notebook import.

    Without the modules beside it and those that a notebook beside it writes with %%writefile.
    """
    text = path.read_text()
    own = {
        "model",
        "notebooks",
        "tests",
        "deploy",
        *(file.stem for file in path.parent.glob("*.py")),
    }
    for notebook in path.parent.glob("*.ipynb"):
        own |= set(re.findall(r"%%writefile .*?(\w+)\.py", notebook.read_text()))
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
    return {name.split(".")[0] for name in found} - own - sys.stdlib_module_names


distributions = cache(packages_distributions)  # it reads every installed package


def provided_by(name: str) -> set[str]:
    """The installed packages that bring the module `name`."""
    return {canonicalize_name(package) for package in distributions().get(name, [])}


def names(*groups: str) -> set[str]:
    """The packages that these groups of pyproject.toml name."""
    return {canonicalize_name(wanted.name) for group in groups for wanted in GROUPS[group]}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_in_a_group_of_its_folder(path: Path) -> None:
    """What is imported is Python's, the repository's, or named for that folder."""
    groups = MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    for name in imports(path):
        packages = provided_by(name)
        assert packages & names(*groups), f"{name} is of {packages}: not in {' or '.join(groups)}"


@pytest.mark.parametrize("group", GROUPS)
def test_no_group_names_what_nobody_needs(group: str) -> None:
    """Each package is imported by a folder that may use its group, or is in the short list."""
    folders = [folder for folder, groups in MAY_IMPORT.items() if group in groups]
    imported = {name for folder in folders for path in sources(folder) for name in imports(path)}
    used = {package for name in imported for package in provided_by(name)}
    assert not names(group) - used - set(USED_WITHOUT_IMPORT)


def test_each_package_is_in_one_group_only() -> None:
    """And nothing is in the short list that is in no group."""
    listed = [canonicalize_name(wanted.name) for wanted in DIRECT]
    assert len(listed) == len(set(listed))
    assert set(USED_WITHOUT_IMPORT) <= set(listed)


# Imports that the contracts of pyproject.toml forbid: the module of model/, what it must not
# import, and how the contract's name begins.
FORBIDDEN = [
    ("alexnet.images", "model.serving.batcher", "every part imports only parts below it"),
    ("serving.batcher", "model.alexnet.requests", "every part imports only parts below it"),
    ("alexnet.network", "model.basics.kserve_server", "every part imports only parts below it"),
    ("loadtest.client", "model.faults.experiment", "every part imports only parts below it"),
    ("faults.experiment", "model.capacity.planning", "every part imports only parts below it"),
    ("capacity.planning", "model.faults.experiment", "every part imports only parts below it"),
    ("loadtest.records", "model.course.processes", "every part imports only parts below it"),
    ("serving.admission", "model.serving.server", "no circles"),
    ("basics.kserve_server", "model.alexnet.images", "basics imports nothing"),
    ("basics.ray_server", "model.serving.machine", "basics imports nothing"),
    ("serving.batcher", "torch", "the serving layer knows nothing of images and torch"),
    ("serving.replica", "PIL", "the serving layer knows nothing of images and torch"),
    ("loadtest.generator", "model.serving.cli", "loadtest, faults and capacity start servers"),
    ("faults.experiment", "model.serving.admission", "loadtest, faults and capacity start servers"),
    ("capacity.planning", "model.serving.machine", "loadtest, faults and capacity start servers"),
    ("serving.machine", "model.serving.errors", "serving.machine can be imported without"),
    ("faults.experiments", "model.alexnet.images", "faults and capacity take what they send"),
    ("capacity.planning", "model.basics.ray_server", "faults and capacity take what they send"),
]


def lint_imports(folder: Path) -> str:
    """Run import-linter on `folder`; returns what it says of each broken contract, or nothing."""
    program = Path(sys.executable).with_name("lint-imports")
    command = [program, "--no-logo", "--no-cache"]
    linted = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    broken = linted.stdout.partition("Broken contracts")[2]
    assert linted.returncode == bool(broken), linted.stdout + linted.stderr
    return broken


def test_no_import_is_forbidden() -> None:
    """Which part of model/ imports which, as `make lint` checks it."""
    assert not lint_imports(ROOT)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of model/ to which all forbidden imports were added."""
    folder = tmp_path_factory.mktemp("forbidden")
    shutil.copytree(ROOT / "model", folder / "model", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for module, imported, _ in FORBIDDEN:
        with (folder / f"model/{module.replace('.', '/')}.py").open("r+") as file:
            file.read()  # a module that is not there is an error
            file.write(f"\n\nimport {imported}\n")
    return lint_imports(folder)


@pytest.mark.parametrize("module, imported, contract", FORBIDDEN)
def test_a_forbidden_import_is_found(
    broken: str, module: str, imported: str, contract: str
) -> None:
    """The contract that forbids it is broken, and names it."""
    about = re.search(rf"^{contract}.*\n-+\n+((?:.*\n)*?)(?=.+\n---|\Z)", broken, re.M)
    assert about, broken
    found = f"model.{module} -> {imported} (l." in about.group(1)
    assert found or contract == "no circles", about.group(1)


def test_no_large_file():
    """No file in git is larger than 10 MB, and together they stay under 30."""
    needs_tool("git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    assert max(sizes.values()) < 10e6 and sum(sizes.values()) < 30e6
