"""Checks that the course can run on this machine, in under a minute: `make check`.

It prints a line for each point, with what to do where one is not as it should be, and ends with
status 1 if the course cannot run.
"""

import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil
import requests

from model.alexnet import shapes
from model.loadtest import client
from model.loadtest.server_process import ServerProcess
from model.serving.machine import cores

GB = 1e9
PORTS = {8080: "--http_port", 8081: "--grpc_port"}  # KServe's own; the notebooks take free ones


class Point(NamedTuple):
    """What was looked at, what was found, and what to do where that is not enough."""

    name: str
    found: str
    advice: str = ""  # empty: it is as it should be
    needed: bool = True  # False: the course runs without


def machine() -> Iterator[Point]:
    """Python, cores, memory and disk."""
    python = sys.version.split()[0]
    right = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Point("Python", python, "" if right else "make .venv with Python 3.11 to 3.13")
    packages = ", ".join(f"{name} {version(name)}" for name in ("kserve", "ray", "torch"))
    yield Point("packages", packages)
    few = "" if cores() > 1 else "two are needed to see anything happen in parallel"
    yield Point("cores", str(cores()), few, needed=False)
    free = psutil.virtual_memory().available / GB
    yield Point(
        "free memory", f"{free:.1f} GB", "" if free > 4 else "4 GB are needed: close others"
    )
    for name, folder in {
        "shared memory": "/dev/shm",
        "temporary files": tempfile.gettempdir(),
    }.items():
        if Path(folder).is_dir():
            free = shutil.disk_usage(folder).free / GB
            advice = (
                "" if free > 0.5 else f"0.5 GB are needed in {folder}; for a container: --shm-size"
            )
            yield Point(name, f"{free:.1f} GB free", advice)


def ports() -> Iterator[Point]:
    """Whether KServe's own ports are free, for servers that are started by hand."""
    for port, option in PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        advice = f"give servers that you start by hand another one: {option}" if taken else ""
        yield Point(f"port {port}", "taken" if taken else "free", advice, needed=False)


def server() -> Iterator[Point]:
    """A server with one replica: when it is ready, whether its prediction is right, how it ends."""
    name = "a server with one replica"
    try:
        with ServerProcess("model.serving", "--num_replicas", "1") as started:
            seconds = started.seconds_to_ready
            advice = "" if seconds < 40 else "notebooks will take long; is the machine busy?"
            yield Point(name, f"ready after {seconds:.0f} s", advice, needed=False)
            [[best, *_]] = client.v1(started, [shapes.jpeg("red star", seed=5)])
            wrong = "" if best["label"] == "red star" else "run `make clean`, then `make check`"
            yield Point("its prediction for a red star", best["label"], wrong)
    except (RuntimeError, requests.RequestException) as error:
        advice = "see docs/troubleshooting.md"
        yield Point(name, str(error).strip().splitlines()[-1], advice)


def main() -> int:
    """Print all points; returns the exit status."""
    began, able = time.monotonic(), True
    for check in (machine, ports, server):
        for point in check():
            state = "ok" if not point.advice else "NOT ENOUGH" if point.needed else "note"
            print(f"{state:>10}  {point.name}: {point.found}")
            if point.advice:
                print(f"{'':>10}  -> {point.advice}", flush=True)
            able = able and not (point.advice and point.needed)
    verdict = "the course can run here" if able else "the course cannot run here yet"
    print(f"check: {verdict} ({time.monotonic() - began:.0f} s)")
    return 0 if able else 1


if __name__ == "__main__":
    sys.exit(main())
