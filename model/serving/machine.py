"""What this machine offers a server: cores, free ports, folders; how long this process has run."""

import contextlib
import math
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PORTS = range(20_000, 28_000)
BLOCKS = range(28_000, 32_608, 256)  # where each begins; what follows are ports of connections
_kept: list[socket.socket] = []  # until this process ends
# Before a command: Linux sends the process SIGTERM when the thread that started it ends. (A
# preexec_fn would fork this process, with the locks of its other threads as they happen to be.)
WITH_PARENT = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def cores() -> int:
    """The cores that this process may use; the limit of a container counts."""
    allowed = getattr(psutil.Process(), "cpu_affinity", list)()  # macOS has no affinity
    count = len(allowed) or psutil.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        limit = math.inf
    return min(count, limit)


def free_port() -> int:
    """A TCP port on loopback that is free now, and none that a connection will take.

    Systems give connections their ports from a range above these, and Ray's workers listen below
    them. So the port is still free when a server listens, seconds later. Raises OSError when
    there is none.
    """
    for port in secrets.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {PORTS[0]} to {PORTS[-1]} is free")


@contextlib.contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Free ports that nobody else finds free in this block, for servers that start in it.

    They can listen nevertheless: on Linux a port that is bound, and not listened on, can be bound
    again where both set SO_REUSEADDR, as servers do. Elsewhere the ports are free, and no more.
    """
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            held = stack.enter_context(bound_socket("127.0.0.1", free_port()))
            ports.append(held.getsockname()[1])
        if sys.platform != "linux":
            stack.close()
        yield ports


@contextlib.contextmanager
def held_block() -> Iterator[range]:
    """Ports for the parts of one server, which no other server has in this block of code.

    They may be taken by other programs. A port before them is bound to say whose they are. Raises
    OSError when each block has a server.
    """
    for first in secrets.SystemRandom().sample(BLOCKS, len(BLOCKS)):
        with socket.socket() as flag:
            try:
                flag.bind(("127.0.0.1", first))
            except OSError:
                continue
            yield range(first + 1, first + BLOCKS.step)
            return
    raise OSError(f"{len(BLOCKS)} servers have the ports from {BLOCKS.start} to {BLOCKS.stop}")


def hold_port(host: str, port: int) -> None:
    """Keep a port from those who look for a free one, as above, until a server listens on it: Ray,
    too, takes ports that are free.

    Raises OSError when it is taken, and OverflowError when there is no such port.
    """
    held = bound_socket(host, port)
    if sys.platform == "linux":
        _kept.append(held)
    else:
        held.close()


def bound_socket(host: str, port: int, shared: bool = False) -> socket.socket:
    """A TCP socket that has the port and does not listen yet. Raises OSError and OverflowError.

    shared: others of this kind may have the port, too. It says that it is TCP: else asyncio does
    not set TCP_NODELAY on what it accepts, and each response waits 40 ms for the client to
    acknowledge its headers.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except BaseException:
        held.close()
        raise
    return held


def ray_folder() -> Path:
    """A new folder for a Ray cluster's sockets and logs, whose owner removes it.

    It lies among the temporary files (TMPDIR), or in /tmp where that path is too long: with what
    Ray adds, a socket's path may have 104 characters at most.
    """
    short = len(tempfile.gettempdir()) <= 20
    return Path(tempfile.mkdtemp(prefix="ray-", dir=None if short else "/tmp"))


def process_age() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()
