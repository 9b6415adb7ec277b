"""What the test files share: the servers, the model in this process, traces, waiting."""

import glob
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadFileScheduling

from model.alexnet import shapes
from model.alexnet.model import AlexNetModel
from model.loadtest.server_process import ServerProcess
from model.serving.machine import free_port

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("test_notebooks.py", "test_exercises.py::test_on_a_live_server")
# Files whose tests share the servers of `plain` and `replicas` below.
SHARE_SERVERS = (
    "test_bad_grpc.py",
    "test_bad_rest.py",
    "test_limits.py",
    "test_security.py",
    "test_servers.py",
)
BOTH = pytest.mark.parametrize("server", ["plain", "replicas"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first: they take longest, and should not be what is left at the end."""
    items.sort(key=lambda item: not _whole_notebook(item.nodeid))


def _whole_notebook(nodeid: str) -> bool:
    return any(name in nodeid for name in NOTEBOOKS)


class Units(LoadFileScheduling):
    """What stays together in one process, where several run tests: a file, or one notebook.

    Files that share servers stay together too, so that these are started once.

    (xdist's marker for that, xdist_group, does nothing with pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        if _whole_notebook(nodeid):
            return nodeid
        file = super()._split_scope(nodeid)
        return "servers" if file.rpartition("/")[2] in SHARE_SERVERS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Units | None:
    """For `--dist loadfile`."""
    return Units(config, log) if config.getvalue("dist") == "loadfile" else None


def long(value: Any) -> Any:
    """A value of a parameter that make test-long tries, and make test does not."""
    return pytest.param(value, marks=pytest.mark.long, id=str(value))


def until(condition: Callable[[], object], seconds: float = 20) -> object:
    """Ask `condition` again and again until it says something true or the time is up."""
    end = time.monotonic() + seconds
    while not (said := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return said


def needs_tool(name: str) -> None:
    """Skip the test where the system lacks a tool; with REQUIRE_TOOLS=1 fail it."""
    if not shutil.which(name):
        outcome = pytest.fail if os.environ.get("REQUIRE_TOOLS") == "1" else pytest.skip
        outcome(f"this test needs {name}, which is not installed on this machine")


def needs_network() -> None:
    """Skip the test where no network of hosts can be made."""
    needs_tool("ip")
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True)
    if os.geteuid() != 0 or tried.returncode:
        pytest.skip("this test makes network namespaces, which takes root and CAP_SYS_ADMIN")


def run(module: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
    """Run a server that is to end by itself, on free ports unless argv names others."""
    ports = ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
    command = [sys.executable, "-m", module, *ports, *argv]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


class Traces:
    """What processes started with `env` in their environment leave behind on the machine.

    The mark in `env` goes down to every descendant, so that nobody else's Ray is taken for ours.
    """

    def __init__(self, folder: Path) -> None:
        self.env = {"TEST_MARK": secrets.token_hex(8), "TMPDIR": str(folder)}
        self._before = self._shared()

    def processes(self) -> list[psutil.Process]:
        """Every living process that carries the mark."""
        return [p for p in psutil.process_iter() if _environ(p).items() >= self.env.items()]

    def left(self) -> list[str]:
        """What is there now and does not go in 10 seconds: processes, files, shared memory."""
        left = self._now()
        until(lambda: not left.intersection_update(self._now()) and not left, 10)
        return sorted(left)

    def _now(self) -> set[str]:
        # torch makes an empty folder of its own, torchinductor_USER, when torchvision is imported.
        found = glob.glob(f"{self.env['TMPDIR']}/*")
        files = {file for file in found if not Path(file).name.startswith("torchinductor_")}
        files |= {name for name in self._shared() - self._before if not _in_use(name)}
        return files | {str(process) for process in self.processes()}

    @staticmethod
    def _shared() -> set[str]:
        return set(glob.glob("/dev/shm/*"))


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def _in_use(name: str) -> bool:
    """Whether a living process names the file or has it mapped: then it is not left behind.

    Mapped by whatever name: who makes a semaphore does so under another one, in glibc, and renames
    it; others may be some seconds later.
    """
    try:
        inode = str(os.stat(name).st_ino)
    except OSError:
        return False  # gone, so not left behind either
    for process in psutil.process_iter():
        try:
            if name in " ".join(process.cmdline()):
                return True
            mapped = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except (psutil.Error, OSError):
            continue
        if any("/dev/shm/" in line and line.split()[4] == inode for line in mapped):
            return True
    return False


@pytest.fixture
def traces() -> Iterator[Traces]:
    """Marks processes with `traces.env`; `traces.left()` is empty when nothing of them stays."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:  # short, for Ray's sockets
        yield Traces(Path(folder))


@pytest.fixture(scope="session")
def local() -> AlexNetModel:
    """The model in this process: the predictions that those of servers are compared with."""
    model = AlexNetModel("local")
    model.load()
    return model


@pytest.fixture(scope="session")
def plain() -> Iterator[ServerProcess]:
    """The server that holds the model in its own process, for all tests."""
    with ServerProcess("model.serving", "--in_process") as server:
        yield server


@pytest.fixture(scope="session")
def replicas() -> Iterator[ServerProcess]:
    """The server with two replicas, for all tests."""
    options = ["--num_replicas", "2", "--cpus_per_replica", "0.5"]
    with ServerProcess("model.serving", *options) as server:
        yield server


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> ServerProcess:
    """Either server, for tests marked BOTH."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    """64 different images, JPEG."""
    return [shapes.jpeg(shapes.LABELS[i % 12], i, width=300, height=260) for i in range(64)]
