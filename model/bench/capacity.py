"""How many replicas, fronts and machines a load takes, by simulation, and what that costs.

    python -m model.bench.capacity --rate 100 1000 --p99_ms 500 --front_ms 1.5 --fixed_ms 8 \\
        --picture_ms 15

What the service times mean, and what is left out, is said in model/bench/simulation.py.
"""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from model.bench.load import Run
from model.bench.simulation import Outcome, Service, Setting, capacity, one_front

if TYPE_CHECKING:  # the command draws nothing
    from matplotlib.figure import Figure

BUSIEST = 0.8  # share of what a system can do that it is planned for
COMPARED = ("throughput", "p50_ms", "p95_ms")


def fit(records: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """(fixed_s, picture_s), neither below 0, by least squares.

    records: (pictures in the batch, seconds). ValueError: all batches are of one size.
    """
    pictures, seconds = np.array(list(records), float).T
    if len(set(pictures)) < 2:
        raise ValueError("measure batches of at least two sizes")
    slope, fixed = np.polyfit(pictures, seconds, 1)
    if slope < 0:
        return float(seconds.mean()), 0.0
    if fixed < 0:
        return 0.0, float(pictures @ seconds / (pictures @ pictures))
    return float(fixed), float(slope)


def measured(runs: Iterable[Run], least: int = 5) -> Service:
    """The service times that loads of a server have shown, which works in batches.

    runs: with kept headers of requests of one picture, and KServe's process watched as "front";
    with batches of at least two sizes, and one with no more clients than replicas, of which
    nobody waits. least: sizes of which fewer batches were seen do not count.
    """
    runs, seconds, fronts = list(runs), defaultdict(list), []
    for run in runs:
        batches = defaultdict(list)
        for h in run.headers:
            batches[h["x-worker"], h["x-started"]].append(float(h["x-finished"]))
        for (_, started), finished in batches.items():
            seconds[len(finished)].append(finished[0] - float(started))
        cpu_s = run.cpu["front"] * run.seconds
        fronts.append((len(run.headers) / len(batches), cpu_s / len(batches)))
    medians = {n: statistics.median(s) for n, s in sorted(seconds.items()) if len(s) >= least}
    spread = statistics.median(statistics.stdev(seconds[n]) / medians[n] for n in medians)
    call_s, front_s = fit(fronts)
    lone = min(runs, key=lambda run: run.under_way).headers
    ways = (h["done"] - h["sent"] - float(h["x-finished"]) + float(h["x-started"]) for h in lone)
    hop_s = max(0.0, statistics.median(ways) - front_s - call_s)
    return Service(
        front_s / 2, cv=spread, answer_s=front_s / 2, call_s=call_s, hop_s=hop_s, measured=medians
    )


@dataclass(frozen=True)
class Need:
    """What a load takes. A front and its replicas make a pod."""

    replicas: int
    fronts: int
    nodes: int | None  # None: it was not said how much a node holds
    used: float  # share of what the replicas can do with full batches
    outcome: Outcome


def needed(
    service: Service,
    rate: float,
    p99_s: float,
    size: int = 16,
    wait_s: float = 0.005,
    replicas_per_pod: int | None = None,
    replicas_per_node: int | None = None,
    cores_per_node: int | None = None,
    busiest: float = BUSIEST,
    requests: int = 20_000,
) -> Need:
    """The fewest fronts, and for these the fewest replicas, that keep p99 at `rate` a second.

    Neither gets more than the share `busiest` of what it can do; that is where the search begins.
    Of a replica it is counted with full batches: at less load it has smaller ones, and may be
    busy all the time with much left. Every front has equally many replicas; each, and each front,
    takes a core. p99 of `requests` is known to some percent. ValueError: p99 cannot be kept.
    """

    @cache  # the last is asked for again
    def outcome(fronts: int, each: int) -> Outcome:
        setting = Setting(fronts * each, size, wait_s, fronts=fronts, rate=rate)
        return one_front(service, setting, requests)

    def good(fronts: int, each: int) -> bool:
        found = outcome(fronts, each)
        return found.p99_ms <= 1e3 * p99_s and not found.refused

    def plenty(fronts: int) -> int:  # of replicas: hardly any request waits for one
        return math.ceil(2 * rate / fronts * service.taken_s(1)) + 4

    def replicas(fronts: int) -> int:
        least = rate / fronts * service.taken_s(size) / size / busiest
        return _least(math.ceil(least), lambda each: good(fronts, each))

    fronts = max(1, math.ceil(rate * service.front_cpu_s(size) / busiest))
    idle = outcome(64 * fronts, plenty(64 * fronts)).p99_ms
    if idle > 1e3 * p99_s:
        raise ValueError(f"p99 is {idle:.3g} ms even where nothing is busy: allow more than that")
    fronts = _least(fronts, lambda fronts: good(fronts, plenty(fronts)))
    each = replicas(fronts)
    while replicas_per_pod and each > replicas_per_pod:
        fronts = max(fronts + 1, math.ceil(fronts * each / replicas_per_pod))
        each = replicas(fronts)
    total = fronts * each
    nodes = [math.ceil(total / replicas_per_node)] if replicas_per_node else []
    nodes += [math.ceil((total + fronts) / cores_per_node)] if cores_per_node else []
    _, most = capacity(service, Setting(total, size, fronts=fronts, rate=rate))
    return Need(total, fronts, max(nodes, default=None), rate / most, outcome(fronts, each))


def _least(low: int, good: Callable[[int], bool]) -> int:
    """The smallest number from `low` on that is good, if all above it are, too.

    ValueError: none is found.
    """
    high, step = low, 1
    while not good(high):
        low, high, step = high + 1, high + step, 2 * step
        if step > 2**20:
            raise ValueError("p99 is not kept, however many there are: allow a little more")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return high


@dataclass(frozen=True)
class Machine:
    """A machine to rent: what was measured on all of it, and what it costs."""

    name: str
    pictures_s: float
    dollars_h: float

    @classmethod
    def read(cls, text: str) -> "Machine":
        """Of NAME:PICTURES_S:DOLLARS_H."""
        name, pictures, dollars = text.rsplit(":", 2)
        return cls(name, float(pictures), float(dollars))


def per_million(machine: Machine, utilisation: float = BUSIEST) -> float:
    """Dollars for a million pictures on a machine that does this share of what it can."""
    return machine.dollars_h / 3600 / (machine.pictures_s * utilisation) * 1e6


def validate(
    pairs: list[tuple[Setting, dict]], service: Service, requests: int = 20_000
) -> list[dict]:
    """For each record of results.measure a row: what was predicted, measured, and the error.

    The error is predicted / measured - 1, for throughput, p50 and p95.
    """
    rows = []
    for setting, record in pairs:
        found = one_front(service, setting, requests)
        clients = setting.clients and _counted(setting.clients, "client")
        load = clients or f"{setting.rate:g} a second"
        replicas = _counted(setting.replicas, "replica")
        row = {"setting": f"{replicas}, batches to {setting.size}, {load}"}
        for name in COMPARED:
            predicted, measured = getattr(found, name), record[name]
            row |= {f"{name}_predicted": predicted, f"{name}_measured": measured}
            row |= {f"{name}_error": predicted / measured - 1}
        rows.append(row)
    return rows


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' if count > 1 else ''}"


def extrapolate(
    service: Service,
    replicas: Iterable[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
    fronts: Iterable[int] = (1, 4, 16),
    size: int = 16,
    requests: int = 2_000,
) -> list[dict]:
    """For each number of fronts and replicas the throughput simulated, and both limits.

    As many clients ask as keep the replicas or the front busy all the time.
    """
    rows, replicas = [], list(replicas)
    way_s = service.alone_s(size)
    for n in fronts:
        for count in (count for count in replicas if count >= n):
            setting = Setting(count, size, fronts=n, limit=math.inf, clients=1)
            front, model = capacity(service, setting)
            asking = replace(setting, clients=math.ceil(2 * min(front, model) * way_s) + n)
            throughput = one_front(service, asking, requests).throughput
            row = {"fronts": n, "replicas": count, "throughput": throughput}
            rows.append(row | {"front_limit": front, "replica_limit": model})
    return rows


def figure(validation: list[dict], extrapolation: list[dict], title: str = "") -> "Figure":
    """How far predictions are off (rows of `validate`), and where the front is the limit (rows
    of `extrapolate`)."""
    import matplotlib.pyplot as plt

    from model.bench.plots import BLUE, GREY, LANES, MARKERS, ORANGE, STYLE  # brings KServe

    with plt.rc_context(STYLE):
        size = (11.5, max(4.4, 1.8 + 0.3 * len(validation)))
        drawn, (left, right) = plt.subplots(1, 2, figsize=size)
        for percent, alpha in ((20, 0.12), (10, 0.16)):
            left.axvspan(-percent, percent, color=GREY, alpha=alpha, lw=0)
        looks = {"throughput": (BLUE, "o", -0.13), "p95_ms": (ORANGE, "s", 0.13)}
        for name, (colour, marker, offset) in looks.items():
            errors = [100 * row[f"{name}_error"] for row in validation]
            places = [place + offset for place in range(len(errors))]
            label = name.removesuffix("_ms")
            left.plot(errors, places, marker, color=colour, ms=5, label=label)
        left.axvline(0, color=GREY, lw=1)
        widest = max([22.0, *(abs(100 * row[f"{n}_error"]) for row in validation for n in looks)])
        left.set_xlim(-1.1 * widest, 1.1 * widest)
        left.set_yticks(range(len(validation)), [row["setting"] for row in validation])
        left.set_ylim(len(validation) - 0.4, -0.6)
        left.tick_params(axis="y", length=0)
        left.set_xlabel("% of what was measured; shaded: 10 and 20")
        left.set_title("predicted less measured")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
        for i, n in enumerate(sorted({row["fronts"] for row in extrapolation})):
            mine = [row for row in extrapolation if row["fronts"] == n]
            x, y = ([row[name] for row in mine] for name in ("replicas", "throughput"))
            right.plot(x, y, color=LANES[i], marker=MARKERS[i], ms=5)
            right.axhline(mine[0]["front_limit"], color=LANES[i], ls=":", lw=1)
            text = f"{_counted(n, 'front')}: {mine[0]['front_limit']:,.0f}"
            right.text(1, mine[0]["front_limit"], text, va="bottom", color=LANES[i], fontsize=9)
        rows = sorted(extrapolation, key=lambda row: row["replicas"])
        x, y = ([row[name] for row in rows] for name in ("replicas", "replica_limit"))
        right.plot(x, y, color=GREY, ls="--", lw=1, zorder=1)
        right.text(x[-1], y[-1], "replicas alone ", ha="right", va="bottom", color=GREY, fontsize=9)
        right.set_xscale("log")
        right.set_yscale("log")
        right.xaxis.set_major_formatter("{x:,.0f}")
        right.yaxis.set_major_formatter("{x:,.0f}")
        right.set_xlabel("replicas; dotted: what the fronts take in full batches")
        right.set_title("requests a second, simulated")
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        drawn.tight_layout()
        plt.close(drawn)
    return drawn


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.bench.capacity", description="What a load takes, by simulation."
    )
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="requests a second")
    parser.add_argument("--p99_ms", type=float, required=True, help="to be kept")
    for name, what in (("front", "a request"), ("fixed", "a batch"), ("picture", "a picture")):
        parser.add_argument(f"--{name}_ms", type=float, required=True, help=f"for {what}")
    for name, what in (
        ("answer", "of the front, for an answer"),
        ("call", "of the front, to call a replica"),
        ("hop", "that a batch is on its way besides"),
    ):
        parser.add_argument(f"--{name}_ms", type=float, default=0.0, help=what)
    parser.add_argument("--cv", type=float, default=0.0, help="of a batch's time: deviation / mean")
    parser.add_argument("--max_batch_size", type=int, default=16, help="pictures")
    parser.add_argument("--batch_wait_ms", type=float, default=5.0)
    for name in ("replicas_per_pod", "replicas_per_node", "cores_per_node"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument(
        "--machine",
        type=Machine.read,
        action="append",
        default=[],
        metavar="NAME:PICTURES_S:DOLLARS_H",
        help="what it does, and costs, when all of it is used; can be given again",
    )
    args = parser.parse_args()
    parts = ("front", "fixed", "picture", "answer", "call", "hop")
    seconds = {f"{part}_s": getattr(args, f"{part}_ms") / 1e3 for part in parts}
    service = Service(**seconds, cv=args.cv)
    more = {"size": args.max_batch_size, "wait_s": args.batch_wait_ms / 1e3}
    for name in ("replicas_per_pod", "replicas_per_node", "cores_per_node"):
        more[name] = getattr(args, name)
    front, replica = capacity(service, Setting(1, args.max_batch_size, rate=1))
    print(f"At most, a second: a front {front:,.0f}, a replica {replica:,.1f} requests.")
    print(f"A front has enough to do with {front / replica:,.1f} replicas.\n")
    names = "requests/s,replicas,fronts,nodes,p99 ms,batch,used,replica busy,front busy"
    print("  ".join(names.split(",")))
    for rate in args.rate:
        try:
            need = needed(service, rate, args.p99_ms / 1e3, **more)
        except ValueError as error:
            parser.exit(1, f"{error}\n")
        out, nodes = need.outcome, "-" if need.nodes is None else f"{need.nodes:,}"
        cells = [f"{rate:,.0f}", f"{need.replicas:,}", f"{need.fronts:,}", nodes]
        cells += [f"{out.p99_ms:.0f}", f"{out.batch:.1f}", f"{need.used:.0%}"]
        cells += [f"{out.replicas_busy:.0%}", f"{out.front_busy:.0%}"]
        print("  ".join(c.rjust(len(n)) for c, n in zip(cells, names.split(","), strict=True)))
    for machine in args.machine:
        print(f"\n{machine.name}: {per_million(machine):.3g} dollars a million at {BUSIEST:.0%}")
        for rate in args.rate:
            count = math.ceil(rate / machine.pictures_s / BUSIEST)
            cost = per_million(machine, rate / machine.pictures_s / count)
            hourly = count * machine.dollars_h
            print(
                f"  {rate:,.0f}/s: {count:,} machines, {hourly:,.2f} an hour, {cost:.3g} a million"
            )


if __name__ == "__main__":
    _main()
