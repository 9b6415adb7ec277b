"""Service times from what was measured."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from model.capacity.scenario import ServiceTimes
from model.loadtest.run import Run


def fit(records: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """(fixed_s, image_s), neither below 0, by least squares.

    records: (images in the batch, seconds). Raises ValueError when all batches are of one size.
    """
    measured = list(records)
    if len({images for images, _ in measured}) < 2:
        raise ValueError("measure batches of at least two sizes")
    images, seconds = np.array(measured, float).T
    slope, fixed = np.polyfit(images, seconds, 1)
    if slope < 0:
        return max(0.0, float(seconds.mean())), 0.0
    if fixed < 0:
        return 0.0, max(0.0, float(images @ seconds / (images @ images)))
    return float(fixed), float(slope)


class Batch(NamedTuple):
    """As a replica worked on it; moments are seconds since 1970."""

    worker: str
    started: float
    finished: float
    requests: int


def batches(run: Run) -> list[Batch]:
    """Those of a run with kept headers, in the order in which they were begun."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for h in run.headers:
        found[h["x-worker"], h["x-started"]].append(h["x-finished"])
    made = (Batch(w, float(at), float(ends[0]), len(ends)) for (w, at), ends in found.items())
    return sorted(made, key=lambda batch: batch.started)


def turnaround(runs: Iterable[Run], least: int = 5) -> tuple[float, float]:
    """(fixed_s, request_s): from the end of a replica's batch to the start of its next one, where
    nothing but the clients is waited for: responses go out, the next requests come in.

    That is by the clock, so longer than the CPU times of the same work where processes wait for
    cores. runs: closed loops; those in which requests wait for a replica are left out. least: sizes
    of which fewer batches were seen do not count. ValueError where too little is left.
    """
    waits = defaultdict(list)
    for run in runs:
        made, last = batches(run), {}
        together = len({batch.worker for batch in made}) * len(run.headers) / max(1, len(made))
        if run.in_flight > 1.05 * together:
            continue
        for batch in made:
            if batch.worker in last:
                waits[batch.requests].append(batch.started - last[batch.worker])
            last[batch.worker] = batch.finished
    return fit((n, statistics.median(s)) for n, s in waits.items() if len(s) >= least)


def fit_service_times(
    runs: Iterable[Run],
    several: Iterable[tuple[int, Run]] = (),
    least: int = 5,
    in_each: bool = False,
    by_clock: bool = False,
) -> ServiceTimes:
    """The service times of a server of model.serving, which works in batches, from loads of it.

    runs: with kept headers of requests of one image, and KServe's process watched as "frontend";
    with batches of at least two sizes, and one with no more clients than replicas, none of which
    waits. Runs in which nothing was answered do not count. several: (images, run) with so many in
    each request, of which the replicas' times count: so that every size is measured (where a
    library takes another algorithm from some size on, what lies between two sizes says little).
    least: nor do sizes count of which fewer batches were seen. in_each: KServe is in the replicas'
    processes, which are those watched; its CPU time is then a part of each batch's, as both have
    the same core. by_clock: what KServe does takes as long as `turnaround` says, where its CPU time
    would be less: for predictions of this machine, whose processes share cores; without it, for a
    machine on which each has its own. ValueError where too little is left: measure for longer.
    """
    runs, seconds, frontends = [run for run in runs if run.headers], defaultdict(list), []
    for images, run in (*((1, run) for run in runs), *several):
        made = batches(run)
        for batch in made:
            seconds[images * batch.requests].append(batch.finished - batch.started)
        if images == 1:
            model_s = sum(batch.finished - batch.started for batch in made) if in_each else 0.0
            cpu_s = run.cpu["frontend"] * run.seconds - model_s
            frontends.append((len(run.headers) / len(made), cpu_s / len(made)))
    medians = {n: statistics.median(s) for n, s in sorted(seconds.items()) if len(s) >= least}
    if not medians:
        raise ValueError(f"no size of batches was seen {least} times: measure for longer")
    spread = statistics.median(statistics.stdev(seconds[n]) / medians[n] for n in medians)
    call_s, frontend_s = fit(frontends)
    lone = min(runs, key=lambda run: run.in_flight).headers
    ways = (h["done"] - h["sent"] - float(h["x-finished"]) + float(h["x-started"]) for h in lone)
    hop_s = max(0.0, statistics.median(ways) - frontend_s - call_s)
    if by_clock:
        fixed_s, request_s = turnaround(runs, least)
        longer = request_s / frontend_s if frontend_s else 1.0
        call_s = 0.0 if in_each else min(fixed_s, longer * call_s)
        frontend_s, hop_s = request_s, fixed_s - call_s
    if in_each:
        whole = {n: s + call_s + n * frontend_s for n, s in medians.items()}
        return ServiceTimes(0.0, cv=spread, hop_s=hop_s, measured=whole)
    return ServiceTimes(
        frontend_s / 2,
        cv=spread,
        response_s=frontend_s / 2,
        call_s=call_s,
        hop_s=hop_s,
        measured=medians,
    )
