"""A Ray cluster of several nodes on this machine, started as an operator would: `ray start`.

Each node has an address of its own: one of loopback's, or, with a Network, one that only a
virtual wire leads to, which can be cut.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from model.faults.inject import is_gone, kill
from model.faults.network import Network
from model.faults.redis_server import Redis
from model.loadtest.joining import fresh_token
from model.serving.machine import WITH_PARENT, free_port, ray_folder

READY_WITHIN_S = 60
# Of the nodes in turn. Ray rewrites 127.0.0.1 itself to this machine's own address.
LOOPBACK = "127.0.0.{}1" if sys.platform == "linux" else "127.0.0.1"


class Nodes:
    """A head node and workers, each a raylet with its processes.

    `address` is what `model.serving --address` takes and `env` the environment it needs: who
    joins must know the cluster's token. `hosts` are the nodes' addresses and `commands` what
    starts each, the head's first. Ends with `stop`, with the `with` block, or with Python.
    """

    def __init__(
        self,
        head_cpus: int,
        *worker_cpus: int,
        network: Network | None = None,
        dashboard: bool = False,
        redis: Redis | None = None,
        **env: str,
    ) -> None:
        """Start the head, then the workers.

        head_cpus, worker_cpus: what replicas may reserve of each node. network: whose hosts the
        workers run on; the head stays here; default: all on loopback. dashboard: whether Ray's
        dashboard runs, which Ray's state API asks. redis: keeps what the head knows, for the one
        after it. env: environment variables to add. Raises RuntimeError when a node does not
        start.
        """
        self.folder = ray_folder()
        self._network = network
        self.address = f"{network.head if network else LOOPBACK.format(1)}:{free_port()}"
        self.env = fresh_token()
        quiet = {"TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        self._env = os.environ | self.env | quiet | env
        self.hosts: list[str] = []
        self.commands: list[str] = []
        self._started: list[psutil.Popen] = []
        self._starter = ThreadPoolExecutor(1)  # they end with the thread that starts them
        self._end = weakref.finalize(self, _end, self._started, self.folder)
        try:
            host, port = self.address.split(":")
            options = f"--head --port={port}"
            options += f" --include-dashboard={dashboard} --dashboard-port={free_port()}"
            if redis:
                options += f" --redis-password={redis.password}"
                self._env["RAY_REDIS_ADDRESS"] = redis.address
            self._head = (options, head_cpus, host)
            self._wait(self._start(0, *self._head))
            for number in [self._start_worker(cpus) for cpus in worker_cpus]:
                self._wait(number)
        except BaseException:
            self.stop()
            raise

    def add(self, cpus: int) -> str:
        """Add a worker node; returns the evidence, its number among the workers, from 1 on."""
        return f"worker node {self._wait(self._start_worker(cpus))} runs"

    def lose(self, number: int) -> str:
        """SIGKILL to all processes of a node, 0 being the head: the machine is gone.

        Returns the evidence, how many are gone; RuntimeError when there was none.
        """
        lost = []
        with contextlib.suppress(psutil.NoSuchProcess):
            lost = [*self._started[number].children(recursive=True), self._started[number]]
        alive = [process for process in lost if not is_gone(process)]
        return kill(alive, f"node {number}")

    def cut(self, number: int) -> str:
        """Cut the wire to a worker node, where there is a Network; returns the evidence."""
        return self._network.cut(number)

    def start_another_head(self) -> str:
        """Another head in place of the lost one, at the same address; returns the evidence."""
        (self.folder / "0" / "ray_current_cluster").unlink()  # another machine would not have it
        self._wait(self._start(0, *self._head))
        return "another head runs"

    def _start_worker(self, cpus: int) -> int:
        number = len(self._started)
        host, there = self._network.add() if self._network else (LOOPBACK.format(1 + number), [])
        return self._start(number, f"--address={self.address}", cpus, host, there)

    def _start(
        self, number: int, options: str, cpus: int, host: str, there: Sequence[str] = ()
    ) -> int:
        command = f"ray start {options} --num-cpus={cpus} --node-ip-address={host} --block"
        command += " --object-store-memory=100000000"
        ray, *words = command.split()
        # In one folder for all, nodes that start side by side would take each other's sockets.
        more = ["--temp-dir", self.folder / str(number), "--include-log-monitor=false"]
        with open(self._log(number), "w") as log:
            process = self._starter.submit(
                psutil.Popen,
                [*there, *WITH_PARENT, Path(sys.executable).with_name(ray), *words, *more],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ).result()
        for known, new in ((self._started, process), (self.hosts, host), (self.commands, command)):
            known[number : number + 1] = [new]
        return number

    def _wait(self, number: int) -> int:
        deadline = time.monotonic() + READY_WITHIN_S
        while "Ray runtime started" not in (said := self._log(number).read_text()):
            if self._started[number].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start failed: {said[-1000:]}")
            time.sleep(0.1)
        return number

    def _log(self, number: int) -> Path:
        return self.folder / f"start-{number}.log"

    def stop(self) -> None:
        """End all nodes and remove their files; calling it again does nothing."""
        self._end()

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _end(started: list[psutil.Popen], folder: Path) -> None:
    sessions, found = {process.pid for process in started}, list(started)
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) in sessions or str(folder) in " ".join(process.cmdline()):
                found.append(process)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)
