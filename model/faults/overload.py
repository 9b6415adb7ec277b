"""Experiments in which the load itself is what the server must bear: too much, and for long."""

import contextlib
import math

import numpy as np
import psutil

from model.faults.experiment import REJECTED, Experiment, Observation, run_experiment
from model.faults.observe import metrics, snapshots
from model.loadtest.generator import closed_loop
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload


def overload(server: ServerProcess, work: Workload, seconds: float = 60) -> Experiment:
    """Three times as many requests arrive as can be answered, of 8 images each.

    So large, they cost much to answer and little to send and to reject. seconds: or as many as it
    takes to fill the queue four times. RuntimeError when none was rejected.
    """
    limit = metrics(server)[f"inference_admission_limit {server.name}"]
    eight = Workload(work.images[:16], work.labels[:16], images_per_request=8)
    calm = max(2.0, seconds / 10)
    capacity = closed_loop(server.predict, eight, 8, calm, warmup_s=1).throughput
    seconds = max(seconds, 2 * limit / capacity)
    before = run_experiment(server, "", work, calm, clients=1).latency_s(0.5)
    memory: list[int] = []
    looks = [Observation(seconds * at, lambda: memory.append(server.memory())) for at in (0.4, 0.9)]
    name = "3 times the load that it can bear"
    experiment = run_experiment(server, name, eight, seconds, looks, rate=3 * capacity)
    if not experiment.rejected:
        raise RuntimeError("the server was not overloaded: no request was rejected")
    after = run_experiment(server, "", work, calm, clients=1).latency_s(0.5)
    experiment.facts |= {
        "evidence: overload": f"requests rejected: {experiment.rejected}",
        "arrivals a second": 3 * capacity,
        "responses a second, before": capacity,
        "responses a second": experiment.run.throughput,
        "rejected after, ms (median)": 1000 * experiment.latency_s(0.5, REJECTED),
        "answered within, s (p99)": experiment.latency_s(0.99),
        "the queue's length in seconds of work": limit / experiment.run.throughput,
        "memory in the middle, GB": memory[0] / 1e9,
        "memory at the end, GB": memory[-1] / 1e9,
        "one client alone, before, ms": 1000 * before,
        "one client alone, after, ms": 1000 * after,
        "cores used by the generator": experiment.run.client_cpu,
        "cores used by KServe's process": sum(experiment.run.cpu.values()),
    }
    return experiment


def soak(server: ServerProcess, work: Workload, minutes: float = 30) -> Experiment:
    """70 % of what it can do, for half an hour: memory and open files of every process."""
    capacity = run_experiment(server, "", work, 10).run.throughput

    def sizes(_: ServerProcess) -> dict[psutil.Process, tuple[float, int]]:
        found = {}
        for process in server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[process] = process.memory_full_info().uss / 1e6, process.num_fds()
        return found

    with snapshots(server, sizes, every_s=10) as seen:
        name = f"{minutes:g} minutes at 70 % of what it can do"
        experiment = run_experiment(server, name, work, minutes * 60, rate=0.7 * capacity)
    settled = experiment.run.began + minutes * 60 / 6  # caches and pools fill first
    seen = [(when, found) for when, found in seen if when > settled]
    hours = np.array([(when - settled) / 3600 for when, _ in seen])
    lasting = [p for p in server.processes() if all(p in found for _, found in seen)]
    for number, process in enumerate(lasting):
        memory, files = np.array([found[process] for _, found in seen], float).T
        slope, half = _slope(hours, memory)
        experiment.facts[f"{number} {process.name()}"] = (
            f"{memory[-1]:.0f} MB, {slope:+.1f} ± {half:.1f} MB an hour; open files "
            f"{files[0]:.0f} at first, {files[-1]:.0f} at last, {files.max():.0f} at most"
        )
    return experiment


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a straight line through the points, and half of its 95 % interval."""
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), 1.96 * math.sqrt(covariance[0, 0])
