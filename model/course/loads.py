"""Reads results of load tests: rates, where a request's time went, what an operator sees."""

import statistics
from collections.abc import Iterable
from itertools import pairwise

# A part of a request's time -> from one moment to the next: the client's own (sent, done), or
# what a server of model.serving tells in its headers.
PARTS = {
    "until the server takes it in": ("sent", "x-received"),
    "until it is read": ("x-received", "x-read"),
    "until its batch begins": ("x-read", "x-started"),
    "preprocessing the batch": ("x-started", "x-preprocessed"),
    "forward pass": ("x-preprocessed", "x-finished"),
    "response's way back": ("x-finished", "done"),
}


def parts(headers: list[dict]) -> dict[str, float]:
    """Where the time of requests went: the mean milliseconds of each part.

    headers: of loadtest.run.Run.headers, from a server of model.serving; at least one.
    """
    return {
        part: 1000 * statistics.mean(float(h[end]) - float(h[begin]) for h in headers)
        for part, (begin, end) in PARTS.items()
    }


def rate(records: Iterable[dict], variant: str, clients: int = 32) -> float:
    """Requests a second of a variant: the median of its runs with so many clients.

    Raises statistics.StatisticsError where there is none.
    """
    runs = [r for r in records if (r["variant"], r["clients"]) == (variant, clients)]
    return statistics.median(run["throughput"] for run in runs)


def operator_sees(snapshots: list[tuple[float, dict]]) -> dict[str, list[tuple[float, float]]]:
    """What a server did over the seconds, from its metrics alone.

    snapshots: of faults.observe.snapshots, (seconds since 1970, metrics).
    Returns for each quantity its points (seconds since the first snapshot, value).
    """
    arrived, replicas, in_flight, batch = [], [], [], []
    for (before, old), (now, new) in pairwise(snapshots):
        at = now - snapshots[0][0]
        waiting = _total(new, "inference_requests_in_flight")
        came = _growth(old, new, "inference_requests_total")
        came += waiting - _total(old, "inference_requests_in_flight")
        arrived.append((at, came / (now - before)))
        replicas.append((at, _total(new, "inference_replicas")))
        in_flight.append((at, waiting))
        if batches := _growth(old, new, "inference_batch_size_count"):
            batch.append((at, _growth(old, new, "inference_batch_size_sum") / batches))
    return {
        "requests a second": arrived,
        "replicas": replicas,
        "requests in flight": in_flight,
        "mean size of a batch": batch,
    }


def _total(metrics: dict[str, float], name: str) -> float:
    """The sum of a metric over all its labels."""
    return sum(value for key, value in metrics.items() if key.split()[0] == name)


def _growth(old: dict[str, float], new: dict[str, float], name: str) -> float:
    return _total(new, name) - _total(old, name)
