"""What a server tells at `/metrics` beside KServe's own times of preprocess, predict, postprocess.

It is counted in KServe's process, also when replicas do the work. (Where replicas gather batches
themselves, nothing is known here of their batches and of what waits there.)

Several processes that serve the same models count in files, where prometheus_client adds them up
(its multiprocess mode: PROMETHEUS_MULTIPROC_DIR names the folder).
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SUM = {"multiprocess_mode": "livesum"}  # of the processes that run
_functions: list[tuple[Gauge, Callable[[], float]]] = []

REQUESTS = Counter(
    "inference_requests",
    "Requests for predictions, each counted once, by what became of it",
    ["model", "outcome"],  # answered, invalid (4xx), rejected (503, 429), failed, abandoned
)
RETRIES = Counter(
    "inference_retries", "Requests sent to another replica, by the reason", ["model", "reason"]
)
IN_FLIGHT = Gauge(
    "inference_requests_in_flight", "Requests admitted and not yet answered", ["model"], **SUM
)
OPEN = Gauge(
    "inference_http_requests_open", "Requests over HTTP that arrive or are worked on", **SUM
)
ADMISSION_LIMIT = Gauge(
    "inference_admission_limit",
    "Requests that may be in flight; more are rejected",
    ["model"],
    **SUM,
)
BODY_BYTES = Gauge(
    "inference_body_bytes",
    "Bytes of request bodies that arrive or are worked on",
    **SUM,
)
QUEUED = Gauge(
    "inference_requests_queued", "Requests in flight that wait for a worker", ["model"], **SUM
)
REPLICAS = Gauge("inference_replicas", "Replicas that run", ["model"], **SUM)
BATCH_SIZE = Histogram(
    "inference_batch_size",
    "Instances in a batch",
    ["model"],
    buckets=[1, 2, 4, 8, 12, 16, 32, 64],
)


def follow(gauge: Gauge, value: Callable[[], float]) -> None:
    """Have a gauge show what a function returns; among several processes, at the last `refresh`."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        _functions.append((gauge, value))
    else:
        gauge.set_function(value)


def of_all(folder: Path) -> CollectorRegistry:
    """What all processes together have counted in a folder."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    return registry


def forget_the_dead(folder: Path) -> None:
    """Processes that have ended no longer add to gauges."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not psutil.pid_exists(pid):
            with contextlib.suppress(FileNotFoundError):
                mark_process_dead(pid, str(folder))


def is_busy(folder: Path) -> bool:
    """Whether a process that counts in a folder has a request that it has not answered."""
    forget_the_dead(folder)
    names = {metric.name for gauge in (OPEN, IN_FLIGHT) for metric in gauge.describe()}
    found = (family for family in of_all(folder).collect() if family.name in names)
    return any(sample.value for family in found for sample in family.samples)


def refresh() -> None:
    """Write what the gauges of this process follow where the other processes can see it."""
    for gauge, value in _functions:
        gauge.set(value())
