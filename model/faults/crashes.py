"""Experiments in which a process or a node crashes, hangs, slows down or gets SIGTERM."""

import math
import threading

import numpy as np

from model.faults import inject
from model.faults.experiment import Experiment, Fault, run_experiment
from model.faults.nodes import Nodes
from model.faults.observe import snapshots, wait_for_replicas
from model.faults.servers import HALVES
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload


def killed(
    server: ServerProcess, work: Workload, seconds: float = 60, every_s: float = 10
) -> Experiment:
    """One of the replicas is killed, again and again."""
    times = [every_s / 2 + i * every_s for i in range(int(seconds / every_s))]
    faults = [Fault(at, "a replica killed", lambda: inject.kill_one(server)) for at in times]
    name = f"one of 2 replicas killed, {len(faults)} times"
    experiment = run_experiment(server, name, work, seconds, faults)
    kills = [fault.began - experiment.run.began for fault in experiment.faults]
    around = [
        s.done - s.due
        for s in experiment.run.samples
        if any(s.due < kill + 1 and s.done > kill for kill in kills)
    ]
    experiment.facts["p99 of the requests around a kill, s"] = float(np.quantile(around, 0.99))
    wait_for_replicas(server, 2)
    return experiment


def all_killed(server: ServerProcess, work: Workload, seconds: float = 30) -> Experiment:
    """All replicas are killed at once, as the only one would be: none can answer."""
    fault = Fault(2.0, "all killed", lambda: inject.kill_all(server))
    name = "all replicas killed at once, 20 requests a second"
    with snapshots(server) as seen:
        experiment = run_experiment(server, name, work, seconds, [fault], rate=20)
        wait_for_replicas(server, 2)
    when = experiment.faults[0].began
    down = next((t for t, state in seen if t > when and state["model ready"] != "200"), math.inf)
    up = next((t for t, state in seen if t > down and state["model ready"] == "200"), math.inf)
    experiment.facts["not ready after, s"] = down - when
    experiment.facts["ready again after, s"] = up - when
    experiment.facts["liveness"] = ", ".join(sorted({state["live"] for _, state in seen}))
    return experiment


def stuck(server: ServerProcess, work: Workload, seconds: float = 40) -> Experiment:
    """A replica is stopped: it lives, and answers nothing ever again."""
    fault = Fault(2.0, "a replica stopped", lambda: inject.stop_one(server))
    experiment = run_experiment(server, "one of 2 replicas stuck forever", work, seconds, [fault])
    wait_for_replicas(server, 2)
    return experiment


def slow(server: ServerProcess, work: Workload, seconds: float = 20) -> Experiment:
    """A replica gets a third of the time that it would take."""
    over = threading.Event()
    ender = threading.Timer(seconds - 1, over.set)
    ender.start()
    fault = Fault(1.0, "slowed down", lambda: inject.slow_down(server, over))
    experiment = run_experiment(server, "one of 2 replicas slow", work, seconds, [fault])
    ender.join()
    return experiment


def controller(server: ServerProcess, work: Workload, seconds: float = 20) -> Experiment:
    """Serve's controller is killed; Ray starts it again."""
    name = "the controller killed"
    fault = Fault(2.0, name, lambda: inject.kill_helper(server, "ray::ServeCon"))
    experiment = run_experiment(server, "Serve's controller killed", work, seconds, [fault])
    wait_for_replicas(server, 2)
    return experiment


def ended(server: ServerProcess, work: Workload, seconds: float = 5) -> Experiment:
    """The server gets SIGTERM; what is in flight is answered."""
    fault = Fault(seconds / 2, "SIGTERM", lambda: inject.terminate(server))
    name = "the server ended (SIGTERM)"
    experiment = run_experiment(server, name, work, seconds, [fault], ends=True)
    experiment.facts["its process was gone after, s"] = experiment.faults[0].seconds
    return experiment


def node(work: Workload, seconds: float = 30) -> Experiment:
    """A worker node is lost with the replica on it."""
    with Nodes(1, 1) as nodes:
        join = ("--address", nodes.address, *HALVES)
        with ServerProcess("model.serving", *join, **nodes.env) as server:
            fault = Fault(3.0, "a node lost", lambda: nodes.lose(1))
            experiment = run_experiment(server, "one of 2 nodes lost", work, seconds, [fault])
            wait_for_replicas(server, 2)
    return experiment
