"""The simulation against measured loads: `python -m model.capacity.validation`.

Some loads of a real server tell its service times; with these, other loads are predicted and
measured. Then the same service times say how many replicas larger loads would take.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from model.capacity.extrapolation import extrapolate
from model.capacity.fitting import fit_service_times
from model.capacity.planning import needed, needed_in_each
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
CLIENTS, SHARES = (4, 16, 32), (0.3, 0.5, 0.7)  # of loads; the share is of the most it can do
FIT_CLIENTS, FIT_SIZES = (2, 6, 12, 24, 40), (2, 4, 8)  # of the loads that are fitted
MORE_CLIENTS, MORE_SHARES = (4, 8, 16, 32), (0.3, 0.4, 0.5, 0.7)
WITHIN = {"throughput": 0.1, "p95_ms": 0.2}  # a prediction is good that is off by no more
FIGURE = Path(__file__).parents[2] / "imgs" / "capacity.png"


def validate(
    server: ServerProcess,
    replicas: int,
    work: Workload,
    seconds: float = 3,
    in_each: bool = False,
    clients: Sequence[int] = CLIENTS,
    shares: Sequence[float] = SHARES,
) -> tuple[ServiceTimes, list[dict]]:
    """Fit service times to loads of a server, and predict others: (times, rows as `compare`).

    The times are those of a machine on which each process has a core of its own; the predictions
    are for this one, on which they share them. server: of model.serving, with so many replicas and
    no other load. seconds: of each load that is predicted. Those for the fit take half as long, but
    0.6 s at least; they are run before and after the others, as machines drift. in_each: KServe is
    in the replicas. clients, shares: the loads that are predicted; a share of the most requests a
    second that those for the fit came to.
    """
    known: list[Run] = []
    several: list[tuple[int, Run]] = []
    requests = {n: replace(work, images_per_request=n) for n in FIT_SIZES}
    place = {"frontends": replicas, "least_connections": True} if in_each else {}

    def learn() -> None:
        watch = {server.process.pid: "frontend"}
        if in_each:
            those = (p for p in server.processes() if records.part_of(p) == "replicas")
            watch = {process.pid: "frontend" for process in those}
        how = {"warmup_s": 0.5, "keep_headers": True, "watch": watch}
        long_s = max(seconds / 2, 0.6)
        known.extend(closed_loop(server.predict, work, n, long_s, **how) for n in FIT_CLIENTS)
        for n, more in requests.items():
            several.append((n, closed_loop(server.predict, more, replicas, long_s, **how)))

    learn()
    most = max(run.throughput for run in known)
    scenarios = [Scenario(replicas, clients=n, **place) for n in clients]
    rates = [max(1, round(share * most)) for share in shares]
    scenarios += [Scenario(replicas, rate=rate, **place) for rate in rates]
    pairs = []
    for scenario in scenarios:
        load = {"rate": scenario.rate} if scenario.rate else {"clients": scenario.clients}
        how = {"seconds": seconds, "warmup_s": 0.5} | load
        pairs.append((scenario, records.measure(server, "ours", work, **how)))
    learn()
    here = fit_service_times(known, several, in_each=in_each, by_clock=True)
    return fit_service_times(known, several, in_each=in_each), compare(pairs, here)


def compare(
    pairs: list[tuple[Scenario, dict]], times: ServiceTimes, requests: int = 20_000
) -> list[dict]:
    """For each record of records.measure a row: what was predicted, measured, and the error.

    The error is predicted / measured - 1, for throughput, p50, p95; nan if nothing was answered.
    The throughput measured at a rate is what it would be if just as many requests had come.
    front_cpu_s is the CPU time of a request of what is in front of the replicas.
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
            if name == "throughput" and scenario.rate:  # more or fewer came than that, by chance
                measured *= scenario.rate * record["seconds"] / max(1, record["requests"])
            row |= {f"{name}_predicted": predicted, f"{name}_measured": measured}
            row |= {f"{name}_error": predicted / measured - 1 if measured else math.nan}
        row["front_cpu_s"] = record["server_cpu"] / max(record["throughput"], 1e-9)
        rows.append(row)
    return rows


def repeated(repeats: Sequence[list[dict]]) -> Iterator[dict]:
    """For each load a row: how far predictions were off in repeats of `validate`, and how often
    little enough (WITHIN)."""
    for rows in zip(*repeats, strict=True):
        row = {"load": _between([each["scenario"].split(", ")[-1] for each in rows])}
        good = [True] * len(rows)
        for name, within in WITHIN.items():
            errors = [each[f"{name}_error"] for each in rows]
            good = [g and abs(error) <= within for g, error in zip(good, errors, strict=True)]
            known = [error for error in errors if not math.isnan(error)] or [math.nan]
            median, least, most = statistics.median(known), min(known), max(known)
            head = f"{name.removesuffix('_ms')} off by: median (least, most)"
            row[head] = f"{median:+.0%} ({least:+.0%}, {most:+.0%})"
        bounds = " and ".join(f"{within:.0%}" for within in WITHIN.values())
        yield row | {f"within {bounds}": f"{sum(good)} of {len(rows)}"}


def _between(loads: list[str]) -> str:
    """ "8 clients", "30 to 32 a second"."""
    numbers = sorted({int(load.split()[0]) for load in loads})
    what = loads[0].partition(" ")[2]
    return f"{numbers[0]} to {numbers[-1]} {what}" if numbers[1:] else loads[0]


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' if number > 1 else ''}"


def main() -> None:
    """Print the service times, predicted and measured loads, and what larger loads would take.

    Draws imgs/capacity.png for KServe in front. With repeats, prints how often predictions were
    good, and the rest of the last one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m model.capacity.validation", description="The simulation against a server."
    )
    parser.add_argument("--seconds", type=float, default=10, help="of a load")
    parser.add_argument("--topology", choices=("front", "ingress"), default="front")
    parser.add_argument("--repeats", type=int, default=1, help="of fit, loads and predictions")
    parser.add_argument("--file", type=Path, default=FIGURE, help="of the figure")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats is a number above 0")
    print(json.dumps(records.machine()))
    options = ("--num_replicas", "2", "--topology", args.topology)
    in_each = args.topology == "ingress"
    loads, repeats = {"clients": MORE_CLIENTS, "shares": MORE_SHARES}, []
    with ServerProcess("model.serving", *options) as server:
        for _ in range(args.repeats):
            times, rows = validate(server, 2, Workload.drawn(), args.seconds, in_each, **loads)
            repeats.append(rows)
    if args.repeats > 1:
        for i, row in enumerate(repeated(repeats)):
            print_row(row, header=i == 0)
    print(times)
    for i, row in enumerate(rows):
        shown = {name: f"{v:.3g}" if isinstance(v, float) else v for name, v in row.items()}
        print_row(shown, header=i == 0)
    if not in_each:
        larger = extrapolate(times)
        figure(rows, larger).savefig(args.file, dpi=110)
        for row in larger:
            if row["frontends"] == 1 and row["replicas"] in (1, 8, 64, 512):
                print({name: round(value) for name, value in row.items()})
    proxy_s = statistics.median(row["front_cpu_s"] for row in rows)
    for i, rate in enumerate((100, 1_000, 10_000, 100_000)):
        p99_s = 0.5 + times.alone_s()
        if in_each:
            need = needed_in_each(times, rate, p99_s, proxy_s)
        else:
            need = needed(times, rate, p99_s)
        row = {"requests a second": f"{rate:,}", "replicas": f"{need.replicas:,}"}
        row |= {"in front": f"{need.frontends:,}", "cores": f"{need.cores:,}"}
        row |= {"p99, ms": round(need.outcome.p99_ms)}
        print_row(row | {"images in a batch": round(need.outcome.batch, 1)}, i == 0)


if __name__ == "__main__":
    main()
