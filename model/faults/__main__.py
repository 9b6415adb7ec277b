"""The promises as one table: `python -m model.faults`, and `--url` for any server's clients.

Each promise is tested by a fault, on our server and on KServe's RayModel as published
(model.basics, with as many requests at a replica as ours), and the table says of both what became
of it. With `--url` the half that needs clients only is done to a server that runs already.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from model.faults import clients, promises
from model.faults.outcome import Outcome
from model.faults.servers import HALVES, ours, stock
from model.loadtest.records import machine
from model.loadtest.tables import print_row
from model.loadtest.workload import JsonWorkload, Workload

Found = Outcome | Iterator[Outcome]
OF_CLIENTS = ("malformed", "slow_senders", "impatient", "overload")
OF_PARTS: dict[str, Callable[[promises.Start], Found]] = {
    "killed": promises.killed,
    "mass_failure_4": lambda start: promises.mass_failure(start, 4),
    "mass_failure_8": lambda start: promises.mass_failure(start, 8),
    "poison": promises.poison,
    "stopped": promises.stopped,
}
# The published program cannot pickle what gRPC brings, and has no command for an update, and no
# bound of memory: with as many bodies it takes all that the machine has.
ONLY_OURS: dict[str, Callable[[], Found]] = {
    "stopped_over_grpc": promises.stopped_over_grpc,
    "large_bodies": promises.large_bodies,
    "failing_update": promises.failing_update,
    "two_frontends": promises.two_frontends,
}
NAMES = (*OF_CLIENTS, *OF_PARTS, *ONLY_OURS)


def of_clients(name: str, url: str, work: Workload) -> Outcome:
    """One of the promises to clients. url: of V1 predict. work: for those that send images."""
    if name in ("impatient", "overload") and isinstance(work, Workload):  # requests that take long
        work = Workload(work.images[:16], work.labels[:16], images_per_request=8)
    return getattr(clients, name)(url, work)


def found(name: str, published: bool) -> list[Outcome]:
    """What became of a promise, on our server or on the published one."""
    if name in OF_CLIENTS:
        with stock() if published else ours(*HALVES) as server:
            return [of_clients(name, server.predict, Workload.drawn())]
    if name in OF_PARTS:
        outcome = OF_PARTS[name](promises.stock_fragile if published else promises.fragile)
    elif published:
        return []
    else:
        outcome = ONLY_OURS[name]()
    return [outcome] if isinstance(outcome, Outcome) else [*outcome]


def rows(names: list[str]) -> Iterator[dict[str, str]]:
    """A row for each outcome, ours beside the published server's."""
    for name in names:
        outcomes = found(name, published=False)
        try:
            others = found(name, published=True)
        except RuntimeError as error:  # it did not come back from a fault, say
            others = []
            there = {"RayModel as published": str(error).splitlines()[0], "kept there": "**no**"}
        for i, outcome in enumerate(outcomes):
            if i < len(others):
                kept = "yes" if others[i].kept else "**no**"
                there = {"RayModel as published": others[i].found, "kept there": kept}
            elif name in ONLY_OURS:
                there = {"RayModel as published": "", "kept there": ""}
            yield outcome.row() | there


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m model.faults", description=__doc__.split(":")[0]
    )
    listed = f"of {', '.join(NAMES)} (default: all)"
    parser.add_argument("names", nargs="*", metavar="PROMISE", help=listed)
    parser.add_argument("--url", help="http://HOST:PORT of a server that runs: only its clients")
    parser.add_argument("--model_name", default="custom-model", help="of that server")
    parser.add_argument("--body", type=Path, help="a V1 request for it, in JSON (default: images)")
    args = parser.parse_args()
    names = args.names or (OF_CLIENTS if args.url else NAMES)
    if unknown := set(names) - set(OF_CLIENTS if args.url else NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))} here; there are {listed}")
    print(json.dumps(machine()))
    if args.url:
        url = f"{args.url.rstrip('/')}/v1/models/{args.model_name}:predict"
        work = AnyResponse(args.body.read_text()) if args.body else Workload.drawn()
        found_rows = (of_clients(name, url, work).row() for name in names)
    else:
        found_rows = rows(names)
    for i, row in enumerate(found_rows):
        print_row(row, header=i == 0)


class AnyResponse(JsonWorkload):
    """One request, to which any response with status 200 is right."""

    def __init__(self, body: str) -> None:
        super().__init__([json.loads(body)], [None])

    def judge(self, request: int, body: bytes) -> tuple[str, float]:
        """It is right."""
        return "right", 0.0


if __name__ == "__main__":
    main()
