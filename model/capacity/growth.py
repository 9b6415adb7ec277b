"""Does what is in front keep up with more replicas? `python -m model.capacity.growth`

Replicas of a model that sleeps instead of computing, so that many fit on a few cores: what they
could answer is known. What is measured is how much of it is answered, how evenly the replicas are
used, and the CPU time of a request in front of them, by the size of the batches.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence

from model.loadtest.generator import closed_loop
from model.loadtest.records import machine, part_of
from model.loadtest.server_process import ServerProcess
from model.loadtest.tables import print_row
from model.loadtest.workload import JsonWorkload

MODEL = "model.faults.fragile:FragileModel"  # its batch takes as long as its longest request
SLEEP_MS = 50
TOPOLOGIES = ("front", "ingress")


def measure(topology: str, replicas: int, batch: int, seconds: float = 5) -> dict:
    """Start a server with so many replicas, and load it with two full batches for each.

    batch: the largest, in requests. seconds: of the load. Returns a row of the table.
    """
    options = ["--num_replicas", str(replicas), "--cpus_per_replica", "0.05"]
    options += ["--max_batch_size", str(batch), "--topology", topology]
    options += ["--max_queued_requests", "4096"]
    body, right = {"instances": [{"ms": SLEEP_MS}]}, {"predictions": [SLEEP_MS]}
    work = JsonWorkload([body], [right])
    with ServerProcess("model.serving", MODEL, *options) as server:
        watch = {process.pid: part_of(process) for process in server.processes()}
        clients = 2 * replicas * batch
        how = {"warmup_s": 3, "watch": watch, "keep_headers": True}
        run = closed_loop(server.predict, work, clients, seconds, **how)
    shares = Counter(headers["x-worker"] for headers in run.headers)
    batches = {(headers["x-worker"], headers["x-started"]) for headers in run.headers}
    possible = 1000 * replicas * batch / SLEEP_MS
    answered = run.throughput or float("nan")
    row = {"topology": topology, "replicas": replicas, "largest batch": batch, "clients": clients}
    row |= {"could answer, a second": round(possible), "answered": round(run.throughput)}
    row["share"] = f"{run.throughput / possible:.2f}"
    row["requests in a batch"] = f"{len(run.headers) / max(1, len(batches)):.1f}"
    fewest = min(shares.values()) if len(shares) == replicas else 0
    row["least, most of a replica"] = f"{fewest}, {max(shares.values(), default=0)}"
    row["p99, ms"] = round(1000 * run.quantile(0.99))
    cpu = [1000 * run.cpu.get(part, 0.0) / answered for part in ("server", "ray", "replicas")]
    row["CPU ms a request: front, Ray, replicas"] = ", ".join(f"{value:.2g}" for value in cpu)
    row["cores of the clients"] = f"{run.client_cpu:.2f}"
    row["errors"] = sum(run.errors.values())
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each number of replicas, size of batches, and topology."""
    parser = argparse.ArgumentParser(
        prog="python -m model.capacity.growth", description=__doc__.split("? `")[0] + "?"
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="largest size")
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--seconds", type=float, default=5, help="of a load")
    args = parser.parse_args(argv)
    print(json.dumps(machine()))
    first = True
    for replicas in args.replicas:
        for batch in args.batches:
            for topology in args.topologies:
                print_row(measure(topology, replicas, batch, args.seconds), header=first)
                first = False


if __name__ == "__main__":
    main()
