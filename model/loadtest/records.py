"""Records of load tests: one flat dictionary a run, in JSON Lines files."""

import contextlib
import json
import math
import platform
import re
import time
from collections.abc import Iterable
from concurrent.futures import wait
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import requests

from model.loadtest.generator import closed_loop, loading, open_loop
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload
from model.serving.machine import cores

PARTS = ("server", "ray", "replicas")  # of a server, whose CPU time is told apart; see part_of


def measure(
    server: ServerProcess, variant: str, work: Workload, seconds: float = 10, **how
) -> dict:
    """Load the server with `clients=` or at `rate=`; return a flat record of what was measured.

    variant: its name in the record. how: as for the two loops. CPU is in cores, memory in bytes.
    """
    loop = open_loop if "rate" in how else closed_loop
    watch = {process.pid: part_of(process) for process in server.processes()}
    run = loop(_address(server, work), work, seconds=seconds, watch=watch, **how)
    command = " ".join(server.process.cmdline()[2:])
    return {
        "variant": variant,
        "settings": re.sub(r" --(http|grpc)_port \d+", "", command),
        **machine(),
        "kind": loop.__name__,
        "clients": how.get("clients"),
        "rate": how.get("rate"),
        "seconds": seconds,
        "requests": run.requests,
        "sent": run.sent,
        "errors": sum(run.errors.values()),
        "error_kinds": ", ".join(f"{kind}: {count}" for kind, count in run.errors.items()),
        "wrong": run.wrong,
        "throughput": run.throughput,
        "throughput_by_share": run.throughput_by_share(),
        **{f"p{percent}_ms": run.quantile(percent / 100) * 1e3 for percent in (50, 95, 99)},
        "mean_ms": 1e3 * float(np.mean(run.latencies)) if run.latencies else math.nan,
        "p95_from_sent_ms": run.quantile(0.95, from_sent=True) * 1e3,
        "in_flight": run.in_flight,
        "littles_law": run.littles_law(),
        "distance": run.distance if work.reference else None,
        "client_cpu": run.client_cpu,
        **{f"{group}_cpu": run.cpu.get(group, 0.0) for group in PARTS},
        "memory": server.memory(),
    }


def health_checks(
    server: ServerProcess, work: Workload, clients: int, seconds: float = 3.0
) -> dict[str, float]:
    """Latency of health checks, 50 a second at most, while clients load the server: p50 and p99.

    They are sent within the load's window: after its warm-up, before its end, each when the last
    one is answered, as a kubelet does; so a stall counts once. Raises requests.RequestException
    when one fails.
    """
    times: list[float] = []
    url, warmup_s = _address(server, work), 1.0
    with (
        requests.Session() as session,
        loading(url, work, clients, seconds, warmup_s=warmup_s) as busy,
    ):
        wait([busy], warmup_s)
        end = time.perf_counter() + seconds
        while not busy.done() and (sent := time.perf_counter()) < end:
            response = session.get(f"{server.url}/v2/models/{server.name}/ready", timeout=60)
            response.raise_for_status()
            times.append(time.perf_counter() - sent)
            time.sleep(0.02)
        busy.result()
    return {f"health_p{p}_ms": 1000 * float(np.percentile(times, p)) for p in (50, 99)}


def _address(server: ServerProcess, work: Workload) -> str:
    return server.infer if work.v2 else server.predict


def part_of(process: psutil.Process) -> str:
    """Which part of a server the process is: a replica, the rest of Ray, or KServe."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return "ended"
    if command.startswith("ray::ServeReplica"):
        return "replicas"
    return "ray" if command.startswith("ray::") or "site-packages/ray/" in command else "server"


def machine() -> dict:
    """What numbers depend on, and nothing that tells whose machine it is."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # only Linux on a PC has that line
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    gigabytes = round(psutil.virtual_memory().total / 1e9, 1)
    packages = {name: version(name) for name in ("kserve", "ray", "torch", "torchvision")}
    what = {"cpu": cpu, "cores": cores(), "memory_gb": gigabytes}
    return what | {"python": platform.python_version()} | packages


def append(path: Path | str, records: Iterable[dict]) -> None:
    """Add records to a JSON Lines file, and make it if need be."""
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path | str) -> list[dict]:
    """All records of a JSON Lines file, in order."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
