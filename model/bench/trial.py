"""Loads a server, does something to it meanwhile, and counts what became of every request."""

import contextlib
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from model.bench.load import REFUSED, RIGHT, Run, Workload, closed_loop, open_loop
from model.bench.server import ServerProcess

TURNED_AWAY = "HTTP 503"
CLIENTS = 16
WHOLE_WITHIN_S = 60

# When, in seconds after the load's process was started; its name; what to do.
Deed = tuple[float, str, Callable[[], object]]


@dataclass
class Trial:
    """What was done to a server under load, and what its clients saw."""

    what: str
    run: Run
    again: int = 0  # requests that were sent to another replica
    counted: int = 0  # requests that the server's own metrics say were answered
    deeds: list[tuple[float, str]] = field(default_factory=list)  # when begun, and what
    seconds: list[float] = field(default_factory=list)  # that each deed took
    ends: bool = False  # whether the server was to end
    facts: dict[str, float | str] = field(default_factory=dict)  # what else was measured

    @property
    def refused(self) -> int:
        """Requests told to come again, or that found the door closed of a server that ended."""
        closed = self.run.errors.get(REFUSED, 0) if self.ends else 0
        return self.run.errors.get(TURNED_AWAY, 0) + closed

    @property
    def failed(self) -> int:
        """Requests that were neither answered nor refused."""
        return sum(self.run.errors.values()) - self.refused - self.run.wrong

    @property
    def answered(self) -> int:
        """Right answers."""
        return sum(sample.outcome == RIGHT for sample in self.run.samples)

    @property
    def gap_s(self) -> float:
        """The longest time without a right answer to anybody."""
        done = sorted(s.done for s in self.run.samples if s.outcome == RIGHT)
        return max((b - a for a, b in zip(done, done[1:], strict=False)), default=math.inf)

    def latency_s(self, q: float, outcome: str = RIGHT) -> float:
        """The latency that a share `q` of the requests with that outcome keeps."""
        times = sorted(s.done - s.due for s in self.run.samples if s.outcome == outcome)
        return times[min(len(times) - 1, int(q * len(times)))] if times else math.nan

    def points(self) -> dict[str, list[tuple[float, float]]]:
        """What became of requests -> (when it was due, how long it took) of each, in seconds."""
        again = "told to come again"
        fates = {RIGHT: "answered", TURNED_AWAY: again} | ({REFUSED: again} if self.ends else {})
        found = {"answered": [], again: [], "failed": []}
        for s in self.run.samples:
            found[fates.get(s.outcome, "failed")].append((s.due, s.done - s.due))
        return found

    def row(self) -> dict:
        """For the table."""
        return {
            "what was done": self.what,
            "sent": self.run.sent,
            "answered": self.answered,
            "refused": self.refused,
            "failed": self.failed,
            "wrong": self.run.wrong,
            "sent again": self.again,
            "longest gap, s": round(self.gap_s, 2),
            "slowest, s": round(self.latency_s(1), 2),
        }


# -- what a server tells -----------------------------------------------------------------------


def metrics(server: ServerProcess) -> dict[str, float]:
    """What a server tells of its requests: name, with its labels' values after it -> number."""
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith(("inference_", "request_predict"))
        for sample in family.samples
    }


def again(told: dict[str, float]) -> int:
    """Of metrics: requests that were sent to another replica."""
    return round(sum(v for k, v in told.items() if k.startswith("inference_retries_total")))


HEALTH = {
    "live": "/v2/health/live",
    "server ready": "/v2/health/ready",
    "model ready": "/v2/models/{}/ready",
}


def health(server: ServerProcess) -> dict[str, str]:
    """What a kubelet would see: the status of each probe, within its second."""
    found = {}
    for name, path in HEALTH.items():
        try:
            answer = requests.get(server.url + path.format(server.name), timeout=1)
            found[name] = str(answer.status_code)
        except requests.Timeout:
            found[name] = "timeout"
        except requests.ConnectionError:
            found[name] = "refused"
    return found


@contextlib.contextmanager
def watched(
    server: ServerProcess, ask: Callable[[ServerProcess], dict] = health, every: float = 0.05
) -> Iterator[list[tuple[float, dict]]]:
    """Asks a server for its health, or its metrics, all the while.

    Yields the growing list of (when, since 1970; what was told).
    """
    told: list[tuple[float, dict]] = []
    over, failures = threading.Event(), []

    def watch() -> None:
        while not over.wait(every):
            try:
                told.append((time.time(), ask(server)))
            except requests.RequestException as error:  # the next answer may come
                failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join()
    if failures and not told:
        raise failures[0]


def replicas(server: ServerProcess) -> list[psutil.Process]:
    """The processes of its replicas, on whatever node of this machine."""
    token = server.process.environ().get("RAY_AUTH_TOKEN")
    everywhere = server.processes() if token is None else psutil.process_iter()
    return [p for p in everywhere if _is_replica(p, token)]


def _is_replica(process: psutil.Process, token: str | None) -> bool:
    try:
        if not " ".join(process.cmdline()).startswith("ray::ServeReplica"):
            return False
        return token is None or process.environ().get("RAY_AUTH_TOKEN") == token
    except psutil.Error:
        return False


def whole(server: ServerProcess, count: int) -> None:
    """Wait until `count` replicas run; RuntimeError after a minute."""
    began = time.monotonic()
    while metrics(server)["inference_replicas"] != count or health(server)["model ready"] != "200":
        if time.monotonic() - began > WHOLE_WITHIN_S:
            raise RuntimeError(f"there are no {count} replicas after {WHOLE_WITHIN_S} s")
        time.sleep(0.1)


# -- loads during which something happens ------------------------------------------------------


def under(
    server: ServerProcess,
    what: str,
    work: Workload,
    seconds: float,
    deeds: Sequence[Deed] = (),
    clients: int = CLIENTS,
    rate: float | None = None,
    patience_s: float = 90,
    ends: bool = False,
) -> Trial:
    """Load a server, closed loop or at a rate, and do each deed at its time, or when those before
    it are done; a busy machine may get to the last ones after the load only.

    patience_s: how long a client waits for its answer. ends: the server is gone afterwards, and
    its metrics with it. What a deed raises is raised here, once the load is over.
    """
    before, done, took = metrics(server), [], []

    def do() -> None:
        began = time.monotonic()
        for at, name, deed in deeds:
            if broken_off.wait(max(0.0, began + at - time.monotonic())):
                return
            done.append((time.time(), name))
            began_deed = time.monotonic()
            try:
                deed()
                took.append(time.monotonic() - began_deed)
            except Exception as error:
                failures.append(error)
                return

    broken_off, failures = threading.Event(), []
    thread = threading.Thread(target=do)
    thread.start()
    try:
        watch = {process.pid: process.name() for process in server.processes()[:1]}
        how = {"warmup_s": 0, "timeout_s": patience_s, "watch": watch}
        if rate is None:
            run = closed_loop(server.predict, work, clients, seconds, **how)
        else:
            run = open_loop(server.predict, work, rate, seconds, connections=512, **how)
    except BaseException:
        broken_off.set()
        raise
    finally:
        thread.join()
    if failures:
        raise failures[0]
    after = before if ends else metrics(server)
    name = "inference_requests_total answered"
    counted = 0 if ends else after.get(name, 0) - before.get(name, 0)
    return Trial(what, run, again(after) - again(before), round(counted), done, took, ends)


def kill_one(server: ServerProcess, number: int = signal.SIGKILL) -> psutil.Process:
    """Send a signal to one of its replicas, drawn by chance."""
    there = replicas(server)
    if not there:
        raise RuntimeError("there is no replica to send a signal to")
    victim = random.choice(there)
    victim.send_signal(number)
    return victim


def kill_all(server: ServerProcess) -> None:
    """SIGKILL to all its replicas."""
    for process in replicas(server):
        process.kill()


def kill_helper(server: ServerProcess, name: str) -> None:
    """SIGKILL to the process of Ray or Serve with that name."""
    for process in server.processes():
        if name in " ".join(process.cmdline())[:200]:
            process.kill()


def redeploy(server: ServerProcess, *options: str) -> None:
    """`python -m model.redeploy` for a server that was started with a token of ours."""
    address = re.search(r"Ray at (\S+),", server.log.read_text())[1]
    command = [sys.executable, "-m", "model.redeploy", "--address", address, *options]
    env = server.process.environ()  # with the token that lets others join its cluster
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        raise RuntimeError(f"model.redeploy failed: {ran.stderr[-1000:]}")
