"""Records of load tests: one flat dictionary a run, in JSON Lines files, and their summary."""

import contextlib
import json
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import requests

from model.bench import load
from model.bench.server import ServerProcess
from model.options import cores


def measure(
    server: ServerProcess, variant: str, work: load.Workload, seconds: float = 10, **how
) -> dict:
    """Load the server with `clients=` or at `rate=`; return a flat record of what came out.

    variant: its name in the record. how: as for the two loops. CPU is in cores, memory in bytes.
    """
    loop = load.open_loop if "rate" in how else load.closed_loop
    watch = {process.pid: _group(process) for process in server.processes()}
    run = loop(server.predict, work, seconds=seconds, watch=watch, **how)
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
        **{f"p{percent}_ms": run.quantile(percent / 100) * 1e3 for percent in (50, 95, 99)},
        "p95_from_sent_ms": run.quantile(0.95, from_sent=True) * 1e3,
        "under_way": run.under_way,
        "littles_law": run.littles_law(),
        "distance": run.distance if work.reference else None,
        "client_cpu": run.client_cpu,
        **{f"{group}_cpu": run.cpu.get(group, 0.0) for group in ("server", "replicas", "ray")},
        "memory": server.memory(),
    }


def health_checks(
    server: ServerProcess, work: load.Workload, clients: int, seconds: float = 3.0
) -> dict[str, float]:
    """Latency of health checks, 50 a second at most, while clients load the server: p50 and p99."""
    times: list[float] = []
    with ThreadPoolExecutor(1) as thread, requests.Session() as session:
        busy = thread.submit(load.closed_loop, server.predict, work, clients, seconds, warmup_s=1)
        while not busy.done():
            asked = time.perf_counter()
            session.get(f"{server.url}/v2/models/{server.name}/ready", timeout=60)
            times.append(time.perf_counter() - asked)
            time.sleep(0.02)
        busy.result()
    return {f"health_p{p}_ms": 1000 * float(np.percentile(times, p)) for p in (50, 99)}


def medians(records: Iterable[dict]) -> list[dict]:
    """For each variant the median of every number in its records."""
    groups = defaultdict(list)
    for record in records:
        groups[record["variant"]].append(record)
    return [
        {
            name: statistics.median(run[name] for run in runs)
            if isinstance(value, int | float)
            else value
            for name, value in runs[0].items()
        }
        for runs in groups.values()
    ]


def _group(process: psutil.Process) -> str:
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


def summary(
    records: Iterable[dict], key: Sequence[str] = ("variant", "kind", "clients", "rate")
) -> list[dict]:
    """A row for all records that agree in `key`: medians, each with its `_low` and `_high`."""
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in key)].append(record)
    rows = []
    for values, runs in groups.items():
        row = dict(zip(key, values, strict=True)) | {"runs": len(runs)}
        row |= {name: sum(run[name] for run in runs) for name in ("requests", "errors", "wrong")}
        for name in ("throughput", "p50_ms", "p95_ms", "p99_ms", "p95_from_sent_ms"):
            measured = [run[name] for run in runs]
            row[name] = float(np.median(measured))
            row[f"{name}_low"], row[f"{name}_high"] = interval(measured)
        rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median: where it might be, had we measured again."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def interleaved(variants: Sequence, rounds: int) -> Iterator[tuple[int, object]]:
    """(round, variant) in the order A B C, C B A, ...: the machine's drift meets all alike."""
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            yield number, variant
