"""The promises as one table: `python -m model.faults`, and `--url` for any server's clients.

Each promise is tested by a fault, and the table says what became of it: on our server, with KServe
in front of the replicas and in each of them, and on stock RayModel (model.basics, with as many
requests at a replica as ours). With `--url` the half that needs clients only is done
to a server that runs already.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import requests

from model.faults import clients, promises
from model.faults.experiment import NotTested
from model.faults.outcome import Outcome
from model.faults.servers import HALVES, ours, stock
from model.loadtest.records import machine
from model.loadtest.server_process import ServerProcess
from model.loadtest.tables import print_row
from model.loadtest.workload import AnyResponse, Workload

# What a server that did not come back from a fault has its clients raise, and its commands.
BROKEN = (RuntimeError, requests.RequestException, psutil.Error, subprocess.TimeoutExpired)
Found = Outcome | Iterator[Outcome]
OF_CLIENTS = ("malformed", "slow_senders", "impatient", "overload")
OF_ANY: dict[str, Callable[[promises.Start], Found]] = {
    "killed": promises.killed,
    "mass_failure_4": lambda start: promises.mass_failure(start, 4),
    "mass_failure_8": lambda start: promises.mass_failure(start, 8),
    "poison": promises.poison,
    "stopped": promises.stopped,
}
# The stock program cannot pickle what gRPC brings, and has no command for an update, and no
# bound of memory: with as many bodies it takes all that the machine has.
OF_OURS: dict[str, Callable[[promises.Fragile], Found]] = {
    "stopped_over_grpc": promises.stopped_over_grpc,
    "large_bodies": promises.large_bodies,
    "failing_update": promises.failing_update,
}
IN_FRONT: dict[str, Callable[[promises.Fragile], Found]] = {"two_frontends": promises.two_frontends}
OF_PARTS = OF_ANY | OF_OURS | IN_FRONT
NAMES = (*OF_CLIENTS, *OF_PARTS)


class Kind(NamedTuple):
    """A column of the table: a kind of server."""

    title: str
    names: tuple[str, ...]  # of the promises that can be tested on it
    server: Callable[[], ServerProcess]  # with AlexNet
    start: promises.Start  # with FragileModel


KINDS = {
    "front": Kind("found", NAMES, partial(ours, *HALVES), promises.fragile),
    "ingress": Kind(
        "KServe in each replica",
        (*OF_CLIENTS, *OF_ANY, *OF_OURS),
        partial(ours, *HALVES, "--topology", "ingress"),
        promises.Fragile("ingress"),
    ),
    "stock": Kind("stock `RayModel`", (*OF_CLIENTS, *OF_ANY), stock, promises.stock_fragile),
}


def of_clients(name: str, url: str, work: Workload | AnyResponse) -> Iterator[Outcome]:
    """One of the promises to clients. url: of V1 predict. work: for those that send images."""
    if name in ("impatient", "overload") and isinstance(work, Workload):  # requests that take long
        work = Workload(work.images[:16], work.labels[:16], images_per_request=8)
    yield getattr(clients, name)(url, work)


def found(name: str, kind: Kind) -> list[Outcome]:
    """What became of a promise on a kind of server; nothing where it cannot be tested there."""
    return list(tried(name, _found(name, kind))) if name in kind.names else []


def _found(name: str, kind: Kind) -> Iterator[Outcome]:
    if name in OF_CLIENTS:
        with kind.server() as server:
            yield from of_clients(name, server.predict, Workload.drawn())
        return
    outcome = OF_PARTS[name](kind.start)
    yield from [outcome] if isinstance(outcome, Outcome) else outcome


def tried(name: str, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The outcomes as they come; one that says why, where a promise could not be tested, or where
    the server did not come back."""
    try:
        yield from outcomes
    except BROKEN as error:
        kept = None if isinstance(error, NotTested) else False
        said = str(error).strip() or type(error).__name__
        yield Outcome(name, "", "", {}, said.splitlines()[0], kept)


def rows(names: list[str], kinds: list[str]) -> Iterator[dict[str, str]]:
    """A row for each outcome: of the first kind in full, and beside it what the others found."""
    first, *others = (KINDS[kind] for kind in kinds)
    for name in names:
        outcomes = found(name, first)
        beside = {kind.title: found(name, kind) if outcomes else [] for kind in others}
        for i, outcome in enumerate(outcomes):
            cells = (
                (title, f"{its[i].verdict}: {its[i].found}" if i < len(its) else "")
                for title, its in beside.items()
            )
            yield outcome.row() | dict(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m model.faults", description=__doc__.split(":")[0]
    )
    listed = f"of {', '.join(NAMES)} (default: all)"
    parser.add_argument("names", nargs="*", metavar="PROMISE", help=listed)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of servers, in columns"
    )
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
        try:
            work = AnyResponse(json.loads(args.body.read_text())) if args.body else Workload.drawn()
        except (OSError, ValueError) as error:
            parser.error(f"--body: {error}")
        each = (tried(name, of_clients(name, url, work)) for name in names)
        found_rows = (outcome.row() for outcomes in each for outcome in outcomes)
    else:
        found_rows = rows(names, args.kinds)
    for i, row in enumerate(found_rows):
        print_row(row, header=i == 0)


if __name__ == "__main__":
    main()
