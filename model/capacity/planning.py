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
from functools import cache

from model.capacity.scenario import Outcome, Scenario, ServiceTimes, capacity
from model.capacity.simulation import one_frontend

UTILISATION = 0.8  # share of what a system can do that it is planned for


@dataclass(frozen=True)
class Need:
    """What a load takes. A frontend and its replicas make a pod."""

    replicas: int
    frontends: int
    nodes: int | None  # None: it was not said how much a node holds
    used: float  # share of what the replicas can do with full batches
    outcome: Outcome


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
    `shared_replicas`.) Each replica, and each frontend, takes a core.

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
        found = outcome(frontends, each)
        return found.p99_ms <= 1e3 * p99_s and not found.rejected

    def plenty(frontends: int) -> int:  # of replicas: hardly any request waits for one
        return math.ceil(2 * rate / frontends * times.occupied_s(1)) + 4

    def replicas(frontends: int) -> int:
        full_s = times.occupied_s(max_batch_size)
        least = rate / frontends * full_s / max_batch_size / utilisation
        return _least(math.ceil(least), lambda each: good(frontends, each))

    frontends = max(1, math.ceil(rate * times.frontend_cpu_s(max_batch_size) / utilisation))
    idle = outcome(64 * frontends, plenty(64 * frontends)).p99_ms
    if idle > 1e3 * p99_s:
        raise ValueError(f"p99 is {idle:.3g} ms even where nothing is busy: allow more than that")
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
    for name in ("replicas_per_pod", "replicas_per_node", "cores_per_node"):
        more[name] = getattr(args, name)
    frontend, replica = capacity(times, Scenario(1, args.max_batch_size, rate=1))
    print(f"At most, a second: a frontend {frontend:,.0f}, a replica {replica:,.1f} requests.")
    print(f"A frontend has enough to do with {frontend / replica:,.1f} replicas.\n")
    heads = "requests/s,replicas,frontends,nodes,p99 ms,batch,used,replica busy,frontend busy"
    print("  ".join(heads.split(",")))
    for rate in args.rate:
        try:
            need = needed(times, rate, args.p99_ms / 1e3, **more)
        except ValueError as error:
            parser.exit(1, f"{error}\n")
        out, nodes = need.outcome, "-" if need.nodes is None else f"{need.nodes:,}"
        cells = [f"{rate:,.0f}", f"{need.replicas:,}", f"{need.frontends:,}", nodes]
        cells += [f"{out.p99_ms:.0f}", f"{out.batch:.1f}", f"{need.used:.0%}"]
        cells += [f"{out.replicas_busy:.0%}", f"{out.frontends_busy:.0%}"]
        print("  ".join(c.rjust(len(n)) for c, n in zip(cells, heads.split(","), strict=True)))
    for machine in args.machine:
        _print_costs(machine, args.rate)


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
