"""Experiments in which an operator, or autoscaling, changes a server under load."""

import math
import time
from collections.abc import Iterator

from model.faults import inject
from model.faults.experiment import Experiment, Fault, run_experiment
from model.faults.observe import metrics, snapshots, wait_for_replicas, workers
from model.faults.servers import HALVES, OTHER
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload


def changed(
    server: ServerProcess,
    work: Workload,
    name: str,
    count: int,
    *options: str,
    seconds: float = 15,
) -> Experiment:
    """The server is redeployed with other options and so many replicas."""
    options = (*HALVES, "--num_replicas", str(count), *options)
    fault = Fault(1.0, name or "redeployed", lambda: inject.change(server, *options))
    experiment = run_experiment(server, name, work, seconds, [fault])
    experiment.facts["the change was done after, s"] = experiment.faults[0].seconds
    wait_for_replicas(server, count)
    return experiment


def reloaded(
    server: ServerProcess, work: Workload, *options: str, seconds: float = 15
) -> Experiment:
    """Both replicas load their weights again, in the same processes.

    options: that the replicas have. The evidence is in the responses: each load of a model has an
    id of its own. RuntimeError when no new one is seen within a minute.
    """

    def reload() -> str:
        inject.redeploy(server, *HALVES, *options, "--reload")
        return "the command succeeded"

    name = "weights loaded again"
    fault = Fault(1.0, name, reload)
    experiment = run_experiment(server, name, work, seconds, [fault], keep_headers=True)
    when = experiment.faults[0].began - experiment.run.began
    before = {s.headers.get("x-worker") for s in experiment.run.samples if s.done < when}
    deadline = time.monotonic() + inject.CHANGED_WITHIN_S
    while not (new := workers(server, work, 1).keys() - before):
        if time.monotonic() > deadline:
            raise RuntimeError("no response came from weights that were loaded again")
    experiment.facts[f"evidence: {name}"] = f"models loaded again: {len(new)}"
    experiment.facts["the change was done after, s"] = experiment.faults[0].seconds
    wait_for_replicas(server, 2)
    return experiment


def changes(server: ServerProcess, work: Workload) -> Iterator[Experiment]:
    """More replicas, fewer, a new version, weights loaded again."""
    yield changed(server, work, "3 replicas in place of 2", 3)
    yield changed(server, work, "2 replicas in place of 3", 2)
    yield changed(server, work, "another version, replica by replica", 2, *OTHER)
    yield reloaded(server, work, *OTHER)


def scaled(
    server: ServerProcess, work: Workload, seconds: float = 25, delay_s: float = 3
) -> Experiment:
    """The load rises and falls, and the number of replicas with it.

    delay_s: for which the load must ask for another number. RuntimeError when that did not change.
    """
    auto = ["--num_replicas", "auto", "--max_replicas", "2", "--cpus_per_replica", "0.5"]
    auto += ["--upscale_delay_s", str(delay_s), "--downscale_delay_s", str(delay_s)]
    inject.redeploy(server, *auto, *OTHER)
    wait_for_replicas(server, 1)
    with snapshots(server, metrics, 0.2) as seen:
        low = run_experiment(server, "", work, 3, clients=1)
        name = "autoscaling from 1 to 2 replicas and back, 32 clients"
        experiment = run_experiment(server, name, work, seconds, clients=32)
        fell = time.time()
        last = run_experiment(server, "", work, delay_s + 8, clients=1)
        wait_for_replicas(server, 1)
    counts = [(when, values[f"inference_replicas {server.name}"]) for when, values in seen]
    up = next((t for t, n in counts if n == 2), math.inf)
    down = next((t for t, n in counts if t > up and n == 1), math.inf)
    if math.inf in (up, down):
        raise RuntimeError("the number of replicas did not follow the load")
    experiment.facts["evidence: the load"] = "replicas: 1, then 2, then 1"
    experiment.facts["2 replicas serve after, s"] = up - experiment.run.began
    experiment.facts["1 replica after, s"] = down - fell
    experiment.facts["lost before and after"] = sum(
        run.failed + run.rejected for run in (low, last)
    )
    return experiment
