"""The simulation against measured loads: `python -m model.capacity.validation`.

Some loads of a real server tell its service times; with these, other loads are predicted and
measured. Then the same service times say how many replicas larger loads would take.
"""

import argparse
import json
import math
from pathlib import Path

from model.capacity.extrapolation import extrapolate
from model.capacity.fitting import fit_service_times
from model.capacity.planning import needed
from model.capacity.plots import figure
from model.capacity.scenario import Scenario, ServiceTimes
from model.capacity.simulation import one_frontend, simulate
from model.loadtest import records
from model.loadtest.generator import closed_loop
from model.loadtest.run import Run
from model.loadtest.server_process import ServerProcess
from model.loadtest.tables import print_row
from model.loadtest.workload import Workload

COMPARED = ("throughput", "p50_ms", "p95_ms")
FIGURE = Path(__file__).parents[2] / "imgs" / "capacity.png"


def validate(
    server: ServerProcess,
    replicas: int,
    work: Workload,
    seconds: float = 3,
    in_each: bool = False,
) -> tuple[ServiceTimes, list[dict]]:
    """Fit service times to loads of a server, and predict six others: (times, rows as `compare`).

    server: of model.serving, with so many replicas and no other load. seconds: of each load
    that is predicted. Those for the fit take half as long, but 0.6 s at least; they are run
    before and after the others, as machines drift. in_each: KServe is in the replicas.
    """
    known: list[Run] = []
    place = {"frontends": replicas, "least_connections": True} if in_each else {}

    def learn() -> None:
        watch = {server.process.pid: "frontend"}
        if in_each:
            those = (p for p in server.processes() if records.part_of(p) == "replicas")
            watch = {process.pid: "frontend" for process in those}
        how = {"warmup_s": 0.5, "keep_headers": True, "watch": watch}
        for clients in (2, 6, 12, 24, 40):
            known.append(closed_loop(server.predict, work, clients, max(seconds / 2, 0.6), **how))

    learn()
    most = max(run.throughput for run in known)
    scenarios = [Scenario(replicas, clients=n, **place) for n in (4, 16, 32)]
    rates = [max(1, round(share * most)) for share in (0.3, 0.5, 0.7)]
    scenarios += [Scenario(replicas, rate=rate, **place) for rate in rates]
    pairs = []
    for scenario in scenarios:
        load = {"rate": scenario.rate} if scenario.rate else {"clients": scenario.clients}
        how = {"seconds": seconds, "warmup_s": 0.5} | load
        pairs.append((scenario, records.measure(server, "ours", work, **how)))
    learn()
    times = fit_service_times(known, in_each=in_each)
    return times, compare(pairs, times)


def compare(
    pairs: list[tuple[Scenario, dict]], times: ServiceTimes, requests: int = 20_000
) -> list[dict]:
    """For each record of records.measure a row: what was predicted, measured, and the error.

    The error is predicted / measured - 1, for throughput, p50, p95; nan if nothing was answered.
    """
    rows = []
    for scenario, record in pairs:
        if scenario.least_connections:
            found = simulate(times, scenario, seconds=120)
        else:
            found = one_frontend(times, scenario, requests)
        clients = scenario.clients and _count(scenario.clients, "client")
        load = clients or f"{scenario.rate:g} a second"
        replicas = _count(scenario.replicas, "replica")
        row = {"scenario": f"{replicas}, batches to {scenario.max_batch_size}, {load}"}
        for name in COMPARED:
            predicted, measured = getattr(found, name), record[name]
            row |= {f"{name}_predicted": predicted, f"{name}_measured": measured}
            row |= {f"{name}_error": predicted / measured - 1 if measured else math.nan}
        rows.append(row)
    return rows


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' if number > 1 else ''}"


def main() -> None:
    """Print the service times, predicted and measured loads, and what larger loads would take.

    Draws imgs/capacity.png; with KServe in each replica it prints the loads, and that is all.
    """
    parser = argparse.ArgumentParser(
        prog="python -m model.capacity.validation", description="The simulation against a server."
    )
    parser.add_argument("--seconds", type=float, default=10, help="of a load")
    parser.add_argument("--topology", choices=("front", "ingress"), default="front")
    parser.add_argument("--file", type=Path, default=FIGURE, help="of the figure")
    args = parser.parse_args()
    print(json.dumps(records.machine()))
    options = ("--num_replicas", "2", "--topology", args.topology)
    in_each = args.topology == "ingress"
    with ServerProcess("model.serving", *options) as server:
        times, rows = validate(server, 2, Workload.drawn(), args.seconds, in_each)
    print(times)
    for i, row in enumerate(rows):
        shown = {name: f"{v:.3g}" if isinstance(v, float) else v for name, v in row.items()}
        print_row(shown, header=i == 0)
    if in_each:  # the replicas add up: HAProxy passes on more than they can do
        return
    larger = extrapolate(times)
    figure(rows, larger).savefig(args.file, dpi=110)
    for row in larger:
        if row["frontends"] == 1 and row["replicas"] in (1, 8, 64, 512):
            print({name: round(value) for name, value in row.items()})
    for i, rate in enumerate((100, 1_000, 10_000, 100_000)):
        need = needed(times, rate, 0.5 + times.alone_s())
        row = {"requests a second": f"{rate:,}", "replicas": f"{need.replicas:,}"}
        row |= {"frontends": need.frontends, "p99, ms": round(need.outcome.p99_ms)}
        print_row(row | {"images in a batch": round(need.outcome.batch, 1)}, i == 0)


if __name__ == "__main__":
    main()
