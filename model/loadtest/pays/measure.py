"""Loads models of different cost on servers of different kinds."""

from collections.abc import Callable, Sequence
from pathlib import Path

from model.loadtest import records
from model.loadtest.configurations import Configuration
from model.loadtest.workload import JsonWorkload

RECORDS = Path(__file__).parents[3] / "imgs" / "pays.jsonl"  # what `make pays` measured last
HERE = "model.loadtest.pays"
MODEL = f"{HERE}.timed_model:TimedModel"
IN_EACH = "model.serving, KServe in each of two replicas"
# From the simplest to the one with most parts.
SERVERS = {
    "plain KServe": Configuration(f"{HERE}.plain_server"),
    "a thread, with batches": Configuration("model.serving", f"{MODEL} --in_process"),
    "two KServe workers": Configuration(f"{HERE}.plain_server", "--workers 2"),
    "stock RayModel, two replicas": Configuration(f"{HERE}.ray_server"),
    "model.serving, two replicas": Configuration("model.serving", f"{MODEL} --num_replicas 2"),
    IN_EACH: Configuration("model.serving", f"{MODEL} --num_replicas 2 --topology ingress"),
}
MODELS = [(ms, shared) for shared in (0.0, 0.8) for ms in (0.3, 3, 30, 200)]
CLIENTS = (1, 8, 32)


def measure(
    name: str,
    models: Sequence[tuple[float, float]] = MODELS,
    clients: Sequence[int] = CLIENTS,
    least_s: float = 1.0,
    progress: Callable[[], object] = lambda: None,
) -> list[dict]:
    """Start a server of SERVERS, load each model on it with each number of clients, stop it.

    models: (ms, shared) as TimedModel has them. least_s: of a load; one lasts longer where the
    plain server takes longer to serve each client once, and is preceded by as long a warm-up.
    progress: is called after each load. Returns records of records.measure, with ms, shared and
    seconds_to_ready. Their throughput is Run.throughput_by_share: the windows hold few batches.
    """
    found = []
    with SERVERS[name].start() as server:
        for ms, shared in models:
            request = {"instances": [{"ms": ms, "shared": shared}]}
            work = JsonWorkload([request], [{"predictions": [ms]}])
            for count in clients:
                once_s = count * ms / 1000
                how = {"seconds": max(least_s, once_s), "warmup_s": max(0.3 * least_s, once_s)}
                record = records.measure(server, name, work, clients=count, **how)
                about = {"ms": ms, "shared": shared, "seconds_to_ready": server.seconds_to_ready}
                about["throughput"] = record["throughput_by_share"]
                found.append(record | about)
                progress()
    return found
