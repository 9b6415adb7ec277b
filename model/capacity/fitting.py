"""Service times from what was measured."""

import statistics
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from model.capacity.scenario import ServiceTimes
from model.loadtest.run import Run


def fit(records: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """(fixed_s, image_s), neither below 0, by least squares.

    records: (images in the batch, seconds). Raises ValueError when all batches are of one size.
    """
    images, seconds = np.array(list(records), float).T
    if len(set(images)) < 2:
        raise ValueError("measure batches of at least two sizes")
    slope, fixed = np.polyfit(images, seconds, 1)
    if slope < 0:
        return max(0.0, float(seconds.mean())), 0.0
    if fixed < 0:
        return 0.0, max(0.0, float(images @ seconds / (images @ images)))
    return float(fixed), float(slope)


def fit_service_times(runs: Iterable[Run], least: int = 5, in_each: bool = False) -> ServiceTimes:
    """The service times of a server of model.serving, which works in batches, from loads of it.

    runs: with kept headers of requests of one image, and KServe's process watched as "frontend";
    with batches of at least two sizes, and one with no more clients than replicas, none of which
    waits. Runs in which nothing was answered do not count. least: nor do sizes of which fewer
    batches were seen. in_each: KServe is in the replicas' processes, which are those watched; its
    CPU time is then a part of each batch's, as both have the same core. Raises ValueError where too
    little is left: measure for longer.
    """
    runs, seconds, frontends = [run for run in runs if run.headers], defaultdict(list), []
    for run in runs:
        batches = defaultdict(list)
        for h in run.headers:
            batches[h["x-worker"], h["x-started"]].append(float(h["x-finished"]))
        model_s = 0.0
        for (_, started), finished in batches.items():
            took = finished[0] - float(started)
            seconds[len(finished)].append(took)
            model_s += took
        cpu_s = run.cpu["frontend"] * run.seconds - (model_s if in_each else 0.0)
        frontends.append((len(run.headers) / len(batches), cpu_s / len(batches)))
    medians = {n: statistics.median(s) for n, s in sorted(seconds.items()) if len(s) >= least}
    if not medians:
        raise ValueError(f"no size of batches was seen {least} times: measure for longer")
    spread = statistics.median(statistics.stdev(seconds[n]) / medians[n] for n in medians)
    call_s, frontend_s = fit(frontends)
    lone = min(runs, key=lambda run: run.in_flight).headers
    ways = (h["done"] - h["sent"] - float(h["x-finished"]) + float(h["x-started"]) for h in lone)
    hop_s = max(0.0, statistics.median(ways) - frontend_s - call_s)
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
