"""How many replicas, frontends and nodes a load takes, by simulation, and what that costs.

    python -m model.capacity.planning --rate 100 1000 --p99_ms 500 --frontend_ms 1.5 \\
        --fixed_ms 8 --image_ms 15

What the service times mean is said in model/capacity/scenario.py, what is left out in
model/capacity/simulation.py.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from model.capacity.scenario import Outcome, Scenario, ServiceTimes, capacity
from model.capacity.simulation import long_enough, one_frontend
from model.loadtest.tables import print_row

UTILISATION = 0.8  # share of what a system can do that it is planned for
REPLICAS_PER_POD = 15  # behind an HAProxy: on a machine with 16 cores
PROXY_MS = 0.25  # CPU of HAProxy for an image of 86 kB as V1 JSON, on a core of an Intel Xeon


@dataclass(frozen=True)
class Need:
    """What a load takes. What is in front and its replicas make a pod."""

    replicas: int
    frontends: int  # or HAProxies, where KServe is in each replica
    nodes: int | None  # None: it was not said how much a node holds
    used: float  # share of what the replicas can do with full batches
    outcome: Outcome

    @property
    def cores(self) -> int:
        """Each replica takes one, and so does each of what is in front."""
        return self.replicas + self.frontends


def needed(
    times: ServiceTimes,
    rate: float,
    p99_s: float,
    max_batch_size: int = 16,
    batch_wait_s: float = 0.005,
    replicas_per_pod: int | None = None,
    replicas_per_node: int | None = None,
    cores_per_node: int | None = None,
    utilisation: float = UTILISATION,
    requests: int = 20_000,
) -> Need:
    """The fewest frontends, and for these the fewest replicas, that keep p99 at `rate` a second.

    The topology is that of an InferenceService: pods, each a frontend with equally many replicas
    of its own. (The frontends of a RayService share all replicas: simulate that with a Scenario's
    `shared_replicas`.)

    Neither gets more than the share `utilisation` of what it can do; that is where the search
    begins. Of a replica it is counted with full batches: at less load it has smaller ones, and may
    be busy all the time with much left. p99 of `requests` is known to some percent. Raises
    ValueError when p99 cannot be kept.
    """

    @cache  # the last is asked for again
    def outcome(frontends: int, each: int) -> Outcome:
        scenario = Scenario(
            frontends * each, max_batch_size, batch_wait_s, frontends=frontends, rate=rate
        )
        return one_frontend(times, scenario, requests)

    def good(frontends: int, each: int) -> bool:
        return _keeps(outcome(frontends, each), p99_s)

    def plenty(frontends: int) -> int:  # of replicas: hardly any request waits for one
        return math.ceil(2 * rate / frontends * times.occupied_s(1)) + 4

    def replicas(frontends: int) -> int:
        full_s = times.occupied_s(max_batch_size)
        least = rate / frontends * full_s / max_batch_size / utilisation
        return _least(math.ceil(least), lambda each: good(frontends, each))

    frontends = max(1, math.ceil(rate * times.frontend_cpu_s(max_batch_size) / utilisation))
    _check_idle(outcome(64 * frontends, plenty(64 * frontends)), p99_s)
    frontends = _least(frontends, lambda frontends: good(frontends, plenty(frontends)))
    each = replicas(frontends)
    while replicas_per_pod and each > replicas_per_pod:
        frontends = max(frontends + 1, math.ceil(frontends * each / replicas_per_pod))
        each = replicas(frontends)
    total = frontends * each
    nodes = [math.ceil(total / replicas_per_node)] if replicas_per_node else []
    nodes += [math.ceil((total + frontends) / cores_per_node)] if cores_per_node else []
    _, most = capacity(times, Scenario(total, max_batch_size, frontends=frontends, rate=rate))
    used, found = rate / most, outcome(frontends, each)
    return Need(total, frontends, max(nodes, default=None), used, found)


def needed_in_each(
    times: ServiceTimes,
    rate: float,
    p99_s: float,
    proxy_s: float,
    max_batch_size: int = 16,
    batch_wait_s: float = 0.005,
    replicas_per_pod: int = REPLICAS_PER_POD,
    utilisation: float = UTILISATION,
    requests: int = 20_000,
) -> Need:
    """As `needed`, with KServe in each replica: pods of an HAProxy and so many replicas.

    times: of a server of this topology (see `in_each_replica`). proxy_s: CPU of HAProxy for a
    request, which it sends to the replica with the fewest in flight. A pod has fewer replicas where
    the load does not take all. Raises ValueError when p99 cannot be kept.
    """

    @cache
    def outcome(pods: int, each: int) -> Outcome:
        place = {"frontends": each, "least_connections": True, "rate": rate / pods}
        scenario = Scenario(each, max_batch_size, batch_wait_s, **place)
        return long_enough(times, scenario, requests)

    def good(pods: int, each: int) -> bool:
        return _keeps(outcome(pods, each), p99_s)

    least = rate * times.occupied_s(max_batch_size) / max_batch_size / utilisation
    pods = math.ceil(max(least / replicas_per_pod, rate * proxy_s / utilisation))
    _check_idle(outcome(64 * pods, replicas_per_pod), p99_s)
    pods = _least(pods, lambda pods: good(pods, replicas_per_pod))
    each = min(replicas_per_pod, max(1, math.ceil(least / pods)))
    each = _least(each, lambda each: good(pods, each))
    _, most = capacity(times, Scenario(pods * each, max_batch_size, rate=rate))
    return Need(pods * each, pods, None, rate / most, outcome(pods, each))


def in_each_replica(times: ServiceTimes) -> ServiceTimes:
    """The same work where KServe is in each replica: what a frontend did, the replica does too.

    times: of a server with KServe in front. Its call of a replica, and the way there and back, are
    left out. Raises ValueError for a table of measured times, which is that of one topology.
    """
    if times.measured:
        raise ValueError("give fixed_s and image_s: a table of times is that of one topology")
    image_s = times.image_s + times.frontend_s + times.response_s
    return ServiceTimes(0.0, times.fixed_s, image_s, times.cv)


def _keeps(found: Outcome, p99_s: float) -> bool:
    return found.p99_ms <= 1e3 * p99_s and not found.rejected


def _check_idle(found: Outcome, p99_s: float) -> None:
    """Refuse a p99 that not even a system keeps in which nothing is busy."""
    if found.p99_ms > 1e3 * p99_s:
        raise ValueError(
            f"p99 is {found.p99_ms:.3g} ms even where nothing is busy: allow more than that"
        )


def _least(low: int, good: Callable[[int], bool]) -> int:
    """The smallest number from `low` on that is good, if all above it are, too.

    Raises ValueError when none is found.
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
    images_s: float
    dollars_h: float

    @classmethod
    def read(cls, text: str) -> "Machine":
        """From NAME:IMAGES_S:DOLLARS_H."""
        name, images, dollars = text.rsplit(":", 2)
        return cls(name, float(images), float(dollars))


def per_million(machine: Machine, utilisation: float = UTILISATION) -> float:
    """Dollars for a million images on a machine that does this share of what it can."""
    return machine.dollars_h / 3600 / (machine.images_s * utilisation) * 1e6


def main() -> None:
    """Print upper bounds, a row for each rate, and what each machine costs."""
    parser = argparse.ArgumentParser(
        prog="python -m model.capacity.planning", description="What a load takes, by simulation."
    )
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="requests a second")
    parser.add_argument("--p99_ms", type=float, required=True, help="to be kept")
    for name, what in (("frontend", "a request"), ("fixed", "a batch"), ("image", "an image")):
        parser.add_argument(f"--{name}_ms", type=float, required=True, help=f"for {what}")
    for name, what in (
        ("response", "of the frontend, for a response"),
        ("call", "of the frontend, to call a replica"),
        ("hop", "of a batch, on its way to the replica and back"),
    ):
        parser.add_argument(f"--{name}_ms", type=float, default=0.0, help=what)
    parser.add_argument("--topology", choices=("front", "ingress"), default="front")
    parser.add_argument(
        "--proxy_ms",
        type=float,
        default=PROXY_MS,
        help="of HAProxy, for a request (ingress)",
    )
    parser.add_argument("--core_dollars_h", type=float, help="what a core costs an hour")
    parser.add_argument("--cv", type=float, default=0.0, help="of a batch's time: deviation / mean")
    parser.add_argument("--max_batch_size", type=int, default=16, help="images")
    parser.add_argument("--batch_wait_ms", type=float, default=5.0)
    for name in ("replicas_per_pod", "replicas_per_node", "cores_per_node"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument(
        "--machine",
        type=Machine.read,
        action="append",
        default=[],
        metavar="NAME:IMAGES_S:DOLLARS_H",
        help="what it does, and costs, when all of it is used; can be given again",
    )
    args = parser.parse_args()
    parts = ("frontend", "fixed", "image", "response", "call", "hop")
    seconds = {f"{part}_s": getattr(args, f"{part}_ms") / 1e3 for part in parts}
    times = ServiceTimes(**seconds, cv=args.cv)
    more = {"max_batch_size": args.max_batch_size, "batch_wait_s": args.batch_wait_ms / 1e3}
    if args.topology == "ingress":
        if args.replicas_per_node or args.cores_per_node or args.proxy_ms <= 0:
            parser.error(
                "with --topology ingress a pod is a node: give --proxy_ms above 0, and "
                "--replicas_per_pod in place of --replicas_per_node, --cores_per_node"
            )
        times = in_each_replica(times)
        more["replicas_per_pod"] = args.replicas_per_pod or REPLICAS_PER_POD
        plan, in_front = partial(needed_in_each, proxy_s=args.proxy_ms / 1e3), "an HAProxy"
        front = 1e3 / args.proxy_ms
    else:
        for name in ("replicas_per_pod", "replicas_per_node", "cores_per_node"):
            more[name] = getattr(args, name)
        plan, in_front = needed, "a frontend"
        front, _ = capacity(times, Scenario(1, args.max_batch_size, rate=1))
    _, replica = capacity(times, Scenario(1, args.max_batch_size, rate=1))
    print(f"At most, a second: {in_front} {front:,.0f}, a replica {replica:,.1f} requests.")
    print(f"So {in_front} has enough to do with {front / replica:,.1f} replicas.\n")
    for i, rate in enumerate(args.rate):
        try:
            need = plan(times, rate, args.p99_ms / 1e3, **more)
        except ValueError as error:
            parser.exit(1, f"{error}\n")
        print_row(_row(rate, need, args.core_dollars_h), header=i == 0)
    for machine in args.machine:
        _print_costs(machine, args.rate)


def _row(rate: float, need: Need, core_dollars_h: float | None) -> dict[str, str]:
    """Of the table; core_dollars_h: what a core costs an hour, if that is known."""
    out = need.outcome
    row = {"requests/s": f"{rate:,.0f}", "replicas": f"{need.replicas:,}"}
    row |= {"in front": f"{need.frontends:,}", "cores": f"{need.cores:,}"}
    if need.nodes is not None:
        row["nodes"] = f"{need.nodes:,}"
    row |= {"p99, ms": f"{out.p99_ms:.0f}", "images in a batch": f"{out.batch:.1f}"}
    row |= {"used": f"{need.used:.0%}", "replicas busy": f"{out.replicas_busy:.0%}"}
    if core_dollars_h is not None:
        hourly = need.cores * core_dollars_h
        row |= {"dollars an hour": f"{hourly:,.2f}"}
        row |= {"dollars a million": f"{hourly / 3600 / rate * 1e6:.3g}"}
    return row


def _print_costs(machine: Machine, rates: list[float]) -> None:
    a_million = per_million(machine)
    print(f"\n{machine.name}: {a_million:.3g} dollars a million images at {UTILISATION:.0%}")
    for rate in rates:
        count = math.ceil(rate / machine.images_s / UTILISATION)
        cost = per_million(machine, rate / machine.images_s / count)
        hourly = count * machine.dollars_h
        print(f"  {rate:,.0f}/s: {count:,} machines, {hourly:,.2f} an hour, {cost:.3g} a million")


if __name__ == "__main__":
    main()
