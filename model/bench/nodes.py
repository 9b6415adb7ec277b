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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from model.bench.server import WITH_PARENT
from model.options import free_port

READY_WITHIN_S = 60
# Of the nodes in turn. Ray takes 127.0.0.1 itself for a mistake, and this machine's own address.
LOOPBACK = "127.0.0.{}1" if sys.platform == "linux" else "127.0.0.1"


def fresh_token() -> dict[str, str]:
    """The environment of a cluster and of those who may join it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Network:
    """Hosts on a network of their own: namespaces of Linux, wired to a bridge. It takes root.

    Ends with `end` or the `with` block.
    """

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

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _ip(command: str) -> None:
    ran = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=10)
    if ran.returncode:
        raise OSError(f"ip {command}: {ran.stderr.strip()}")


class Redis:
    """A Redis server on loopback for the head's sake; ends with `stop` or the `with` block."""

    def __init__(self) -> None:
        """Raises FileNotFoundError where `redis-server` is missing."""
        if not (server := shutil.which("redis-server")):
            raise FileNotFoundError("redis-server is not installed (Debian's package has the name)")
        self.address, self.password = f"{LOOPBACK.format(0)}:{free_port()}", secrets.token_hex(16)
        host, port = self.address.split(":")
        self._process = psutil.Popen(
            [*WITH_PARENT, server, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        # By way of stdin: the password is in no command line, and nothing is written to disk.
        settings = f'bind {host}\nport {port}\nrequirepass {self.password}\nsave ""\n'
        self._process.stdin.write(settings.encode())
        self._process.stdin.close()

    def stop(self) -> None:
        """End it; what it kept is gone."""
        self._process.terminate()
        self._process.wait(10)

    def __enter__(self) -> "Redis":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Nodes:
    """A head node and workers, each a raylet with its processes.

    `address` is what `model.ray_server --address` takes and `env` the environment it needs: who
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
        """head_cpus, worker_cpus: what replicas may reserve of each node. env: added for Ray.

        network: whose hosts the workers run on; the head stays here. Default: all on loopback.
        dashboard: whether Ray's dashboard runs, which Ray's state API asks. redis: keeps what the
        head knows, for the one after it.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for its sockets
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

    def add(self, cpus: int) -> int:
        """Add a worker node; returns its number, from 1 on."""
        return self._wait(self._start_worker(cpus))

    def lose(self, number: int) -> None:
        """SIGKILL to all processes of a node, 0 being the head: the machine is gone."""
        lost = [*self._started[number].children(recursive=True), self._started[number]]
        for process in lost:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(lost, timeout=10)

    def cut(self, number: int) -> None:
        """Take away the wire to a worker node, where there is a Network."""
        self._network.cut(number)

    def start_head_again(self) -> None:
        """Another head in place of the lost one, at the same address."""
        (self.folder / "0" / "ray_current_cluster").unlink()  # another machine would not have it
        self._wait(self._start(0, *self._head))

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
