"""Does what is in front keep up with more replicas? `python -m model.capacity.growth`

Replicas of a model that sleeps instead of computing, so that many fit on a few cores: what they
could answer is known. What is measured is how much of it is answered, how evenly the replicas are
used, and the CPU time of a request in front of them, by the size of the batches and the number of
frontends. With `--ms 0` the model costs nothing, and what is in front does as much as it can.
"""

import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from model.capacity.fitting import batches
from model.loadtest.generator import closed_loop
from model.loadtest.joining import another_frontend, fresh_token
from model.loadtest.records import PARTS, machine, part_of
from model.loadtest.run import Run
from model.loadtest.server_process import ServerProcess
from model.loadtest.tables import print_row
from model.loadtest.workload import JsonWorkload

MODEL = "model.faults.fragile:FragileModel"  # its batch takes as long as its longest request
TOPOLOGIES = ("front", "ingress")
FEWEST = 32  # clients, where the model takes no time: fewer would be the bottleneck themselves


def measure(
    topology: str,
    replicas: int,
    batch: int,
    seconds: float = 5,
    ms: float = 50,
    frontends: int = 1,
) -> dict:
    """Start a server with so many replicas, and load it with two full batches for each; where the
    model takes no time, with 32 clients at least.

    batch: the largest, in requests. seconds: of the load. ms: that the model sleeps for a batch.
    frontends: which share the replicas, and get equally many clients each. Returns a row of the
    table.
    """
    options = ["--num_replicas", str(replicas), "--max_batch_size", str(batch)]
    options += ["--max_queued_requests", "4096"]
    more = ["--cpus_per_replica", "0.05", "--topology", topology]
    with contextlib.ExitStack() as started:
        first = ServerProcess("model.serving", MODEL, *options, *more, **fresh_token())
        servers = [started.enter_context(first)]
        for _ in range(frontends - 1):
            servers.append(started.enter_context(another_frontend(first, *options)))
        clients = math.ceil(max(2 * replicas * batch, 0 if ms else FEWEST) / frontends)
        runs = _load(servers, clients, ms, seconds)
    headers = [each for run in runs for each in run.headers]
    shares = Counter(each["x-worker"] for each in headers)
    made = sum(len(batches(run)) for run in runs)
    possible = 1000 * replicas * batch / ms if ms else math.inf
    answered = sum(run.throughput for run in runs)
    row = {"topology": topology, "frontends": frontends, "replicas": replicas}
    row |= {"largest batch": batch, "clients": clients * frontends}
    row |= {"could answer, a second": f"{possible:.0f}" if ms else "", "answered": round(answered)}
    row["share"] = f"{answered / possible:.2f}" if ms else ""
    row["requests in a batch"] = f"{len(headers) / max(1, made):.1f}"
    fewest = min(shares.values()) if len(shares) == replicas else 0
    row["least, most of a replica"] = f"{fewest}, {max(shares.values(), default=0)}"
    slowest = 1000 * max(run.quantile(0.99) for run in runs)
    row["p99, ms"] = round(slowest) if math.isfinite(slowest) else slowest
    used = {part: sum(run.cpu.get(part, 0.0) for run in runs) for part in PARTS}
    cpu = [1000 * cores / (answered or math.nan) for cores in used.values()]
    row["CPU ms a request: front, Ray, replicas"] = ", ".join(f"{value:.2g}" for value in cpu)
    row["cores of the clients"] = f"{sum(run.client_cpu for run in runs):.2f}"
    row["errors"] = sum(sum(run.errors.values()) for run in runs)
    return row


def _load(servers: Sequence[ServerProcess], clients: int, ms: float, seconds: float) -> list[Run]:
    """Load all frontends at the same time, each with so many clients."""
    work = JsonWorkload([{"instances": [{"ms": ms}]}], [{"predictions": [ms]}])

    def load(server: ServerProcess) -> Run:
        watch = {process.pid: part_of(process) for process in server.processes()}
        how = {"warmup_s": 3, "watch": watch, "keep_headers": True}
        return closed_loop(server.predict, work, clients, seconds, **how)

    with ThreadPoolExecutor(len(servers)) as threads:
        return list(threads.map(load, servers))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each number of replicas, size of batches, topology, number of frontends."""
    parser = argparse.ArgumentParser(
        prog="python -m model.capacity.growth", description=__doc__.split("? `")[0] + "?"
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="largest size")
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument(
        "--frontends", type=int, nargs="+", default=[1], help="KServe processes in front"
    )
    parser.add_argument("--ms", type=float, default=50, help="that the model sleeps for a batch")
    parser.add_argument("--seconds", type=float, default=5, help="of a load")
    args = parser.parse_args(argv)
    print(json.dumps(machine()))
    cases = [
        (topology, replicas, batch, frontends)
        for replicas in args.replicas
        for batch in args.batches
        for topology in args.topologies
        for frontends in (args.frontends if topology == "front" else [1])
    ]
    for i, (topology, replicas, batch, frontends) in enumerate(cases):
        row = measure(topology, replicas, batch, args.seconds, args.ms, frontends)
        print_row(row, header=i == 0)


if __name__ == "__main__":
    main()
