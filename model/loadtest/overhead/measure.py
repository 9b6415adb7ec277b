"""Loads a model that costs nothing, and others that cost little, by every way to it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from model.loadtest import records
from model.loadtest.configurations import Configuration, peer_python
from model.loadtest.pays.measure import MODEL
from model.loadtest.workload import JsonWorkload

RECORDS = Path(__file__).parents[3] / "imgs" / "overhead.jsonl"  # of `make overhead`
PAYS, PEERS = "model.loadtest.pays", "model.loadtest.peers"
TIMED = "--model timed --workers 2"
BY_GRPC = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
PLAIN, IN_FRONT, INGRESS = "plain KServe", "KServe in front (ours)", "KServe in each replica (ours)"
STOCK = "stock RayModel"
WAYS = {  # each with two processes that hold the model, but where one is all: in process
    PLAIN: Configuration(f"{PAYS}.plain_server"),
    STOCK: Configuration(f"{PAYS}.ray_server"),
    "RayModel, by gRPC": Configuration(f"{PAYS}.ray_server", env=BY_GRPC),
    "Ray Serve, Python proxy": Configuration(
        f"{PEERS}.ray_serve_server", f"{TIMED} --max_batch_size 1 --python_proxy"
    ),
    "Ray Serve, HAProxy": Configuration(f"{PEERS}.ray_serve_server", f"{TIMED} --max_batch_size 1"),
    "in process (ours)": Configuration("model.serving", f"{MODEL} --in_process"),
    "in process, 2 workers (ours)": Configuration(
        "model.serving", f"{MODEL} --in_process --workers 2"
    ),
    IN_FRONT: Configuration("model.serving", f"{MODEL} --num_replicas 2"),
    INGRESS: Configuration("model.serving", f"{MODEL} --num_replicas 2 --topology ingress"),
    "LitServe": Configuration(
        f"{PEERS}.litserve_server",
        f"{TIMED} --max_batch_size 16 --batch_wait_ms 0",
        python=peer_python("litserve"),
    ),
    "FastAPI": Configuration(f"{PEERS}.fastapi_server", TIMED),
}
SMALL = 100  # bytes of a body
CLIENTS = (1, 8, 32, 128)
LOADS = [(ms, SMALL, clients) for ms in (0, 0.3, 3) for clients in CLIENTS]
LOADS += [(30, SMALL, clients) for clients in CLIENTS[:-1]]
LOADS += [(0, size, clients) for size in (100_000, 1_000_000) for clients in CLIENTS]


def measure(
    name: str,
    loads: Iterable[tuple[float, int, int]] = LOADS,
    seconds: float = 1.5,
    progress: Callable[[], object] = lambda: None,
) -> list[dict]:
    """Start a server of WAYS, load it, stop it.

    loads: (ms of the model, bytes of a body, clients). seconds: of each load, after half as many
    for warming up; more where one process takes longer for a request of each client. progress: is
    called after each. Returns records of records.measure, with ms, bytes, and the CPU time of a
    request in milliseconds: of the server in front, of Ray beside the replicas, of the replicas.
    """
    found = []
    with WAYS[name].start() as server:
        for ms, size, clients in loads:
            work = workload(ms, size)
            window = max(seconds, clients * ms / 1000)
            how = {"clients": clients, "seconds": window, "warmup_s": window / 2}
            record = records.measure(server, name, work, **how)
            rate = max(record["throughput"], 1e-9)
            cpu = {f"{g}_cpu_ms": 1000 * record[f"{g}_cpu"] / rate for g in records.PARTS}
            found.append(record | {"ms": ms, "bytes": size} | cpu)
            progress()
    return found


def workload(ms: float, size: int) -> JsonWorkload:
    """Requests to TimedModel, filled up to so many bytes."""
    request = {"instances": [{"ms": ms, "shared": 0.0}], "filling": ""}
    [body] = JsonWorkload([request], [None]).bodies
    request["filling"] = "x" * max(0, size - len(body))
    return JsonWorkload([request], [{"predictions": [ms]}])
