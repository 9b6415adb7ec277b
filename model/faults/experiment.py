"""Loads a server, injects faults meanwhile, and counts what became of every request."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from model.faults.observe import metrics, retries
from model.loadtest.generator import closed_loop, open_loop
from model.loadtest.run import REFUSED, REJECTED, RIGHT, Run
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

CLIENTS = 16
AT_ONCE_S = 1.0  # a server that has no room says so within that


class NotTested(RuntimeError):
    """A fault did not happen as it was to, so that nothing is known of what it would have done."""


class Fault(NamedTuple):
    """What is to be done to a server under load."""

    at_s: float  # seconds after the load has begun
    name: str
    inject: Callable[[], str]  # does it, and returns the evidence that it had an effect


class Observation(NamedTuple):
    """What is to be looked at under load, and changes nothing."""

    at_s: float
    observe: Callable[[], object]


class Injected(NamedTuple):
    """A fault that was injected."""

    name: str
    began: float  # since 1970
    seconds: float  # that it took
    evidence: str


@dataclass
class Experiment:
    """What was done to a server under load, and what its clients saw."""

    name: str
    run: Run
    retried: int = 0  # requests that were retried on another replica, as the server counts
    answered_by_server: int = 0  # requests answered, as the server counts
    faults: list[Injected] = field(default_factory=list)
    ends: bool = False  # whether the server was to end
    facts: dict[str, float | str] = field(default_factory=dict)  # the evidence, what was measured

    @property
    def rejected(self) -> int:
        """Requests rejected with 503, or refused a connection by a server that was to end."""
        closed = self.run.errors.get(REFUSED, 0) if self.ends else 0
        return self.run.errors.get(REJECTED, 0) + closed

    @property
    def failed(self) -> int:
        """Requests that were neither answered nor rejected."""
        return sum(self.run.errors.values()) - self.rejected - self.run.wrong

    @property
    def given_up(self) -> int:
        """Requests that got their 503 after a wait: they had been admitted."""
        rejected = (s for s in self.run.samples if s.outcome == REJECTED)
        return sum(s.done - s.sent > AT_ONCE_S for s in rejected)

    @property
    def refused_before(self) -> int:
        """Requests that were refused a connection before the first fault, so without a reason."""
        first = min((fault.began for fault in self.faults), default=math.inf) - self.run.began
        return sum(s.outcome == REFUSED and s.done < first for s in self.run.samples)

    @property
    def answered(self) -> int:
        """Right responses."""
        return sum(sample.outcome == RIGHT for sample in self.run.samples)

    @property
    def longest_without_success_s(self) -> float:
        """The longest time without a right response to anybody, while the load ran.

        It may begin with the load, or last until its end, unless the server was to end before. What
        is answered after the load's end does not count. Infinite when nobody was answered.
        """
        end = self.run.seconds  # there is no warm-up
        right = (s.done for s in self.run.samples if s.outcome == RIGHT)
        done = sorted(moment for moment in right if moment <= end)
        if not done:
            return math.inf
        moments = [0.0, *done] if self.ends else [0.0, *done, end]
        return max(b - a for a, b in pairwise(moments))

    def latency_s(self, q: float, outcome: str = RIGHT) -> float:
        """The latency that a share `q` of the requests with that outcome stays within."""
        times = sorted(s.done - s.due for s in self.run.samples if s.outcome == outcome)
        return times[min(len(times) - 1, int(q * len(times)))] if times else math.nan

    def points(self) -> dict[str, list[tuple[float, float]]]:
        """What became of requests -> (when it was due, how long it took) of each, in seconds."""
        rejected = "rejected (503)"
        names = {RIGHT: "answered", REJECTED: rejected} | ({REFUSED: rejected} if self.ends else {})
        found = {"answered": [], rejected: [], "failed": []}
        for s in self.run.samples:
            found[names.get(s.outcome, "failed")].append((s.due, s.done - s.due))
        return found

    def row(self) -> dict:
        """Of a table of experiments."""
        return {
            "experiment": self.name,
            "sent": self.run.sent,
            "answered": self.answered,
            "rejected (503)": self.rejected,
            "failed": self.failed,
            "wrong": self.run.wrong,
            "retried": self.retried,
            "longest time without a success, s": round(self.longest_without_success_s, 2),
            "max latency, s": round(self.latency_s(1), 2),
        }


def run_experiment(
    server: ServerProcess,
    name: str,
    work: Workload,
    seconds: float,
    steps: Sequence[Fault | Observation] = (),
    *,
    clients: int = CLIENTS,
    rate: float | None = None,
    timeout_s: float = 90,
    keep_headers: bool = False,
    ends: bool = False,
) -> Experiment:
    """Load a server, in a closed loop or at a rate, and do each step at its time.

    steps: one begins when those before it are done, so that a busy machine may get to the last
    ones after the load only. timeout_s: how long a client waits for a response. ends: the server
    is gone afterwards, and its metrics with it.

    What a step raises is raised here, once the load is over. NotTested when a fault left no
    evidence that it had an effect, or when none was injected while the load ran.
    """
    before = metrics(server)
    with _Steps(steps) as injector:
        watch = {process.pid: process.name() for process in server.processes()[:1]}
        how = {"warmup_s": 0, "timeout_s": timeout_s, "watch": watch, "keep_headers": keep_headers}
        how["begins"] = injector.begin
        if rate is None:
            run = closed_loop(server.predict, work, clients, seconds, **how)
        else:
            run = open_loop(server.predict, work, rate, seconds, connections=512, **how)
    injected = injector.injected
    if injected and all(fault.began > run.began + seconds for fault in injected):
        raise NotTested(f"{name}: no fault was injected while the load ran")
    after = before if ends else metrics(server)
    counter = f"inference_requests_total {server.name} answered"
    found = Experiment(
        name,
        run,
        retries(after) - retries(before),
        round(after.get(counter, 0) - before.get(counter, 0)),
        injected,
        ends,
    )
    for (fault, evidence), times in Counter((f.name, f.evidence) for f in injected).items():
        key, said = f"evidence: {fault}", evidence if times == 1 else f"{evidence}, {times} times"
        found.facts[key] = f"{found.facts[key]}; {said}" if key in found.facts else said
    return found


class _Steps:
    """Does steps in a thread, from `begin` on; an exception in the `with` block ends them."""

    def __init__(self, steps: Sequence[Fault | Observation]) -> None:
        self.injected: list[Injected] = []
        self._steps = sorted(steps, key=lambda step: step.at_s)
        self._begun, self._broken_off = threading.Event(), threading.Event()
        self._failure = None
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        """The times of the steps count from now on."""
        self._begun.set()

    def _run(self) -> None:
        self._begun.wait()
        began = time.monotonic()
        for step in self._steps:
            if self._broken_off.wait(max(0.0, began + step.at_s - time.monotonic())):
                return
            try:
                self._do(step)
            except Exception as error:
                self._failure = error
                return

    def _do(self, step: Fault | Observation) -> None:
        if isinstance(step, Observation):
            step.observe()
            return
        when, began = time.time(), time.monotonic()
        evidence = step.inject()
        if not evidence or not isinstance(evidence, str):
            raise NotTested(f"the fault left no evidence that it had an effect: {step.name}")
        self.injected.append(Injected(step.name, when, time.monotonic() - began, evidence))

    def __enter__(self) -> "_Steps":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._broken_off.set()
            self.begin()
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure
