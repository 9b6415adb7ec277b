"""A Ray cluster of several nodes on this machine, started as an operator would: `ray start`.

Each node has an address of its own: one of loopback's, or, with a Network, one that only a
virtual wire leads to, which can be cut.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import psutil

from model.bench.server import end_with_parent
from model.options import free_port

READY_WITHIN_S = 60
# Of the nodes in turn. Ray takes 127.0.0.1 itself for a mistake, and this machine's own address.
LOOPBACK = "127.0.0.{}1" if sys.platform == "linux" else "127.0.0.1"


def fresh_token() -> dict[str, str]:
    """The environment of a cluster and of those who may join it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Network:
    """Hosts on a network of their own: namespaces of Linux, wired to a bridge. It takes root."""

    def __init__(self) -> None:
        """Raises OSError where the tool `ip` is missing or does not succeed."""
        number = os.getpid() % 250
        self.bridge, self._subnet = f"ray-br{number}", f"10.213.{number}"
        self.head, self._hosts = f"{self._subnet}.1", 0
        _ip(f"link add {self.bridge} type bridge")
        _ip(f"addr add {self.head}/24 dev {self.bridge}")
        _ip(f"link set {self.bridge} up")

    def add(self) -> tuple[str, list[str]]:
        """Add a host; returns its address, and what to put before a command to run it there."""
        self._hosts += 1
        wire, host = f"{self.bridge}-{self._hosts}", self._host(self._hosts)
        address = f"{self._subnet}.{self._hosts + 1}"
        _ip(f"netns add {host}")
        _ip(f"link add {wire} type veth peer name eth0 netns {host}")
        _ip(f"link set {wire} master {self.bridge}")
        _ip(f"link set {wire} up")
        for command in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
            _ip(f"-n {host} {command}")
        return address, ["ip", "netns", "exec", host]

    def cut(self, number: int) -> None:
        """Take away the wire of a host, numbered from 1 on: nothing comes, and nobody is told."""
        _ip(f"link set {self.bridge}-{number} down")

    def sent(self) -> int:
        """Bytes that went over all wires so far."""
        counters = psutil.net_io_counters(pernic=True)
        return sum(
            n.bytes_sent for name, n in counters.items() if name.startswith(self.bridge + "-")
        )

    def _host(self, number: int) -> str:
        return f"{self.bridge}-host{number}"

    def end(self) -> None:
        """Remove the hosts, whose processes have ended, and the bridge."""
        for number in range(1, self._hosts + 1):
            _ip(f"link del {self.bridge}-{number}")
            _ip(f"netns del {self._host(number)}")
        _ip(f"link del {self.bridge}")


def _ip(command: str) -> None:
    ran = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=10)
    if ran.returncode:
        raise OSError(f"ip {command}: {ran.stderr.strip()}")


class Nodes:
    """A head node and workers, each a raylet with its processes.

    `address` is what `model.ray_server --address` takes and `env` the environment it needs: who
    joins must know the cluster's token. Ends with `stop`, with the `with` block, or with Python.
    """

    def __init__(
        self,
        head_cpus: int,
        *worker_cpus: int,
        network: Network | None = None,
        dashboard: bool = False,
        **env: str,
    ) -> None:
        """head_cpus, worker_cpus: what replicas may reserve of each node. env: added for Ray.

        network: whose hosts the workers run on; the head stays here. Default: all on loopback.
        dashboard: whether Ray's dashboard runs, which Ray's state API asks.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for its sockets
        self._network = network
        self.address = f"{network.head if network else LOOPBACK.format(1)}:{free_port()}"
        self.env = fresh_token()
        self._env = os.environ | self.env | {"TMPDIR": str(self.folder)} | env
        self._started: list[psutil.Popen] = []  # the head's first
        self._end = weakref.finalize(self, _end, self._started, self.folder)
        try:
            host, port = self.address.split(":")
            options = f"--head --port={port} --temp-dir={self.folder}"
            options += f" --include-dashboard={dashboard} --dashboard-port={free_port()}"
            self._start(options, head_cpus, host)
            for cpus in worker_cpus:
                self.add(cpus)
        except BaseException:
            self.stop()
            raise

    def add(self, cpus: int) -> int:
        """Add a worker node; returns its number, from 1 on."""
        number = len(self._started)
        host, there = self._network.add() if self._network else (LOOPBACK.format(1 + number), [])
        self._start(f"--address={self.address}", cpus, host, there)
        return number

    def _start(self, options: str, cpus: int, host: str, there: Sequence[str] = ()) -> None:
        options += f" --num-cpus={cpus} --node-ip-address={host} --block --disable-usage-stats"
        options += " --object-store-memory=100000000"
        linux = sys.platform == "linux"
        log = self.folder / f"start-{len(self._started)}.log"
        with open(log, "w") as file:
            ray = Path(sys.executable).with_name("ray")
            process = psutil.Popen(
                [*there, ray, "start", *options.split()],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Only the head: a worker may be started by a thread that ends before it.
                preexec_fn=end_with_parent if linux and "--head" in options else None,
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
