"""Checks of the exercises of notebooks 4 and 5 that load a live server.

Each prints "right: …" or "not yet: …".
"""

import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from model.faults.observe import metrics
from model.loadtest import records
from model.loadtest.server_process import ServerProcess
from model.loadtest.summary import interleaved
from model.loadtest.workload import Workload
from model.serving.dispatch import Waiting

CLIENTS = 4
PATIENCE_S = 30

# A client: gets a URL, a body and when to stop; returns (sent, answered) of each of its requests.
Client = Callable[[str, bytes, float], list[tuple[float, float]] | None]


def check_client(client: Client, server: ServerProcess, seconds: float = 2) -> None:
    """Notebook 4: do four clients each wait for a response before they send again?

    The times that they report are compared with what the server counted meanwhile.
    """
    before, until = _predictions(server), time.monotonic() + seconds
    reports = _at_once(client, server.predict, until)
    if isinstance(reports, str):
        return print(f"not yet: {reports}")
    times = [pair for report in reports for pair in report]
    counted = _predictions(server) - before
    if len(times) != counted:
        return print(
            f"not yet: your clients report {len(times)} requests; the server counted {counted:.0f}"
        )
    if min(report[-1][1] for report in reports) < until:
        return print("not yet: a client stopped before its time was up")
    busy = sum(answered - sent for sent, answered in times)
    if busy < 0.5 * sum(report[-1][1] - report[0][0] for report in reports):
        return print("not yet: take the second time when the response has been read")
    p50 = 1000 * statistics.median(answered - sent for sent, answered in times)
    print(f"right: {CLIENTS} clients, {len(times)} requests, as many as the server counted;")
    print(f"{len(times) / seconds:.0f} requests a second, p50 {p50:.0f} ms")


def _at_once(client: Client, url: str, until: float) -> list[list[tuple[float, float]]] | str:
    """What the clients report, each in a thread of its own; or what is wrong, in words."""
    reports: list[list | Exception | None] = [None] * CLIENTS

    def run(number: int, body: bytes) -> None:
        try:
            reports[number] = client(url, body, until)
        except Exception as error:  # a learner's mistake is told, wherever it was made
            reports[number] = error

    threads = [
        threading.Thread(target=run, args=each, daemon=True)
        for each in enumerate(Workload.drawn(CLIENTS).bodies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, until + PATIENCE_S - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        return f"a client still runs {PATIENCE_S} s after its time was up"
    for report in reports:
        if isinstance(report, Exception):
            return f"client raises {type(report).__name__}: {report}"
    if not all(reports):
        return "client returns nothing"
    return reports


def _predictions(server: ServerProcess) -> float:
    """How many predictions KServe has counted since the server started."""
    name = "request_predict_seconds_count"
    return sum(value for key, value in metrics(server).items() if key.split()[0] == name)


def check_ongoing(folder: Path, clients: int = 24) -> bool:
    """Notebook 4: may the replicas of `my_server.py` hold as many requests as there are clients?

    Returns whether they may.
    """
    try:
        mine = _module(folder / "my_server.py").Mine
        held = mine.num_replicas * mine.max_ongoing_requests
    except Exception as error:
        missing = f"my_server.py raises {type(error).__name__}: {error}"
    else:
        missing = ""
        if mine.num_replicas != 2:
            missing = f"compare two replicas with two, not with {mine.num_replicas}"
        elif held < clients:
            missing = f"{clients} clients, and the replicas may hold {held} requests"
    right = "right: the replicas may hold as many requests as there are clients"
    print(f"not yet: {missing}" if missing else right)
    return not missing


# Notebook 5: what a rule that never waits and takes all that is queued returns, or more than that.
GREEDY = {
    Waiting(queued=5, expected=5, in_flight=0, workers=2, max_size=16, waited=False): 5,
    Waiting(queued=1, expected=9, in_flight=8, workers=2, max_size=16, waited=False): 1,
    Waiting(queued=40, expected=40, in_flight=16, workers=4, max_size=16, waited=False): 16,
}


def check_dispatch_rule(folder: Path, rounds: int = 3, seconds: float = 1.5) -> list[dict]:
    """Notebook 5: does `my_rule` of my_rule.py send all that is queued, in a real server?

    The server that has it and one with even_share are loaded in turn, `rounds` times, with 8 and
    with 32 clients for so many seconds. Returns the records of that; none where the rule is not
    right.
    """
    try:
        rule = _module(folder / "my_rule.py").my_rule
        for waiting, expected in GREEDY.items():
            found = rule(waiting)
            if not isinstance(found, int) or found < expected:
                print(f"not yet: {waiting} gives {found!r}, not {expected}")
                return []
        with (
            ServerProcess(
                "model.serving", "--dispatch_rule", "my_rule:my_rule", folder=folder
            ) as a,
            ServerProcess("model.serving") as b,
        ):
            found = _in_turn({"my_rule": a, "even_share": b}, rounds, seconds)
    except Exception as error:
        print(f"not yet: my_rule.py raises {type(error).__name__}: {error}")
        return []
    if errors := sum(record["errors"] for record in found):
        print(f"not yet: {errors} requests failed: {found[0]['error_kinds']}")
        return []
    print("right: it is in a server now, and every response was right")
    return found


def _in_turn(servers: dict[str, ServerProcess], rounds: int, seconds: float) -> list[dict]:
    """Each server loaded with 8 and with 32 clients, in turn."""
    work = Workload.drawn()
    return [
        records.measure(servers[name], name, work, seconds, clients=clients, warmup_s=seconds / 3)
        for _, name in interleaved(list(servers), rounds)
        for clients in (8, 32)
    ]


def _module(file: Path) -> ModuleType:
    """A learner's file, imported anew."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
