"""What this machine offers a server: cores, free ports, folders; how long this process has run."""

import math
import socket
import tempfile
import time
from pathlib import Path

import psutil


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
    """A TCP port on loopback that is free now, chosen by the operating system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
