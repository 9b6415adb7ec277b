"""More clients than a server admits: those that retry when `Retry-After` says so, and those that
retry at once. `python -m model.faults.retry_after` draws imgs/retry_after.png.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from model.faults.observe import metrics
from model.loadtest.generator import closed_loop
from model.loadtest.load import AS_TOLD, AT_ONCE
from model.loadtest.plots import BLUE, ORANGE, STYLE
from model.loadtest.records import machine
from model.loadtest.run import RIGHT, Run
from model.loadtest.server_process import ServerProcess
from model.loadtest.summary import interleaved
from model.loadtest.tables import print_row
from model.loadtest.workload import Workload

FIGURE = Path(__file__).parents[2] / "imgs" / "retry_after.png"
OPTIONS = ("--num_replicas", "2", "--max_queued_requests", "16")
CLIENTS, PATIENCE_S = 192, 60
LOOKS = {AS_TOLD: BLUE, AT_ONCE: ORANGE}


def compare(
    server: ServerProcess,
    work: Workload,
    seconds: float = 20,
    rounds: int = 3,
    clients: int = CLIENTS,
) -> dict[str, list[Run]]:
    """Load a server with clients of each kind in turn: the runs of each, by kind.

    server: of model.serving, which admits fewer requests than there are clients. seconds: of a run.
    Raises RuntimeError when none was rejected.
    """
    watch = {server.process.pid: "frontend"}
    found: dict[str, list[Run]] = {kind: [] for kind in LOOKS}
    for _, kind in interleaved(list(found), rounds):
        how = {"warmup_s": 3, "timeout_s": PATIENCE_S, "retry": kind, "watch": watch}
        run = closed_loop(server.predict, work, clients, seconds, **how)
        if not run.retries:
            raise RuntimeError("no request was rejected: the server admits all clients")
        if not run.latencies:
            raise RuntimeError("no request was answered: measure for longer")
        found[kind].append(run)
    return found


def rows(found: dict[str, list[Run]]) -> list[dict]:
    """A row for each kind: medians of its runs; latency is from a request's first attempt on."""
    table = []
    for kind, runs in found.items():
        row = {"clients retry": kind, "answered a second": _median(r.throughput for r in runs)}
        row["attempts for an answer"] = _median(map(_attempts, runs))
        row |= {f"p{p}, s": _median(run.quantile(p / 100) for run in runs) for p in (50, 95, 99)}
        row["cores of KServe's process"] = _median(run.cpu["frontend"] for run in runs)
        row["cores of the clients"] = _median(run.client_cpu for run in runs)
        row["without an answer"] = sum(sum(run.errors.values()) for run in runs)
        table.append(row)
    return table


def figure(found: dict[str, list[Run]], title: str) -> Figure:
    """Answers a second, attempts for an answer, and how long until an answer came."""
    with plt.rc_context(STYLE):
        drawn, (left, middle, right) = plt.subplots(
            1, 3, figsize=(10, 3.6), gridspec_kw={"width_ratios": (1, 1, 1.7)}
        )
        for place, (kind, runs) in enumerate(found.items()):
            values = [run.throughput for run in runs]
            for axes, mine in ((left, values), (middle, [*map(_attempts, runs)])):
                height = statistics.median(mine)
                spread = [[height - min(mine)], [max(mine) - height]]
                axes.bar(place, height, 0.6, color=LOOKS[kind], yerr=spread, ecolor="black")
                axes.text(place, max(mine), f"{height:.3g}", ha="center", va="bottom", fontsize=9)
            latencies = np.sort(np.concatenate([run.latencies for run in runs]))
            share = np.arange(1, len(latencies) + 1) / len(latencies)
            right.plot(latencies, share, color=LOOKS[kind], label=kind)
        for axes, name in ((left, "answers a second"), (middle, "attempts for an answer")):
            axes.set_xticks(range(len(found)), list(found))
            axes.set_title(name)
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        right.set_title("share answered within so many seconds")
        right.set_xscale("log")
        right.set_ylim(0, 1.02)
        right.set_xlabel("seconds, from the first attempt")
        right.legend(frameon=False, title="clients retry", loc="lower right")
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        drawn.tight_layout()
        plt.close(drawn)
    return drawn


def _attempts(run: Run) -> float:
    """For each request that was answered."""
    return (run.sent + run.retries) / sum(sample.outcome == RIGHT for sample in run.samples)


def _median(values) -> float:
    return round(statistics.median(values), 3)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both kinds in turn, print a table and draw the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m model.faults.retry_after", description=__doc__.split("`python")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="of both (default: 3)")
    parser.add_argument("--seconds", type=float, default=20, help="of a run (default: 20)")
    parser.add_argument("--file", type=Path, default=FIGURE, help="of the figure")
    args = parser.parse_args(argv)
    print(json.dumps(machine()))
    with ServerProcess("model.serving", *OPTIONS) as server:
        limit = metrics(server)[f"inference_admission_limit {server.name}"]
        found = compare(server, Workload.drawn(), args.seconds, args.rounds)
    for i, row in enumerate(rows(found)):
        print_row(row, header=i == 0)
    title = f"{CLIENTS} clients of a server that admits {limit:.0f} requests"
    figure(found, title).savefig(args.file, dpi=110)


if __name__ == "__main__":
    main()
