"""An experiment in which the load itself is what the server must bear."""

from model.faults.experiment import Experiment, Observation, run_experiment
from model.faults.observe import metrics
from model.loadtest.generator import closed_loop
from model.loadtest.run import REJECTED
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
