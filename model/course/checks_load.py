"""Checks of the exercises of notebook 4 that load a live server.

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
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

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


def _module(file: Path) -> ModuleType:
    """A learner's file, imported anew."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
