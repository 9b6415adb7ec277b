"""A Ray cluster of several nodes on this machine, started as an operator would: `ray start`."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import psutil

from model.options import free_port

READY_WITHIN_S = 60


def fresh_token() -> dict[str, str]:
    """The environment of a cluster and of those who may join it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Nodes:
    """A head node and workers, each a raylet with its processes, all on loopback.

    `address` is what `model.ray_server --address` takes and `env` the environment it needs: who
    joins must know the cluster's token. Ends with `stop`, with the `with` block, or with Python.
    """

    def __init__(self, head_cpus: int, *worker_cpus: int, **env: str) -> None:
        """head_cpus, worker_cpus: what replicas may reserve of each node. env: added for Ray."""
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for its sockets
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.env = fresh_token()
        self._env = os.environ | self.env | env
        self._started: list[psutil.Popen] = []
        self._end = weakref.finalize(self, _end, self._started, self.folder)
        try:
            self._start(
                f"--head --port={port} --temp-dir={self.folder} --include-dashboard=false",
                head_cpus,
            )
            for cpus in worker_cpus:
                self.add(cpus)
        except BaseException:
            self.stop()
            raise

    def add(self, cpus: int) -> int:
        """Add a worker node; returns its number, from 1 on."""
        self._start(f"--address={self.address}", cpus)
        return len(self._started) - 1

    def _start(self, options: str, cpus: int) -> None:
        options += f" --num-cpus={cpus} --node-ip-address=127.0.0.1 --block --disable-usage-stats"
        options += " --object-store-memory=100000000"
        log = self.folder / f"start-{len(self._started)}.log"
        with open(log, "w") as file:
            ray = Path(sys.executable).with_name("ray")
            process = psutil.Popen(
                [ray, "start", *options.split()],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + READY_WITHIN_S
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start failed: {log.read_text()[-1000:]}")
            time.sleep(0.1)

    def raylet(self, number: int) -> psutil.Process:
        """The raylet of a node: 0 is the head's. With it ends all that runs on the node."""
        return next(
            process
            for process in self._started[number].children(recursive=True)
            if process.name() == "raylet"
        )

    def stop(self) -> None:
        """End all nodes and remove their files; calling it again does nothing."""
        self._end()

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _end(started: list[psutil.Popen], folder: Path) -> None:
    sessions = {process.pid for process in started}
    found = list(started)
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) in sessions or str(folder) in " ".join(process.cmdline()):
                found.append(process)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)
