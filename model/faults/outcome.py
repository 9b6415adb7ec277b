"""What became of a promise, as a row of the table of promises."""

import bisect
import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from model.faults.experiment import Experiment, NotTested
from model.loadtest.run import RIGHT, Run

RECOVERED = 1.2  # times the latency before the fault
WINDOW_S = 1.0


@dataclass
class Outcome:
    """What became of one promise under one fault."""

    promise: str
    fault: str
    evidence: str  # that the fault happened
    requests: dict[str, int]  # outcome -> how many, of the clients that count
    found: str  # what was measured, in words
    kept: bool | None  # None: not tested
    facts: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, str]:
        """Of the table."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.requests.items())
        return {
            "promise": self.promise,
            "fault": self.fault,
            "evidence": self.evidence,
            "requests": counts,
            "found": self.found,
            "kept": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return {True: "yes", False: "**no**", None: "not tested"}[self.kept]


def nothing_lost(promise: str, experiment: Experiment, may_reject: bool = False) -> Outcome:
    """Kept where no request failed or was answered wrongly.

    may_reject: a 503 at once is no loss, nor is a connection refused by a server that ends. A 503
    after a wait is one, and a connection refused before the fault. Raises NotTested where there was
    no fault, or where it lasted longer than the load.
    """
    run, faults = experiment.run, experiment.faults
    if not faults:
        raise NotTested("no fault was injected: load for longer")
    last = max(fault.began + fault.seconds for fault in faults)
    if not experiment.ends and last > run.began + run.seconds:
        raise NotTested(
            f"the fault lasted longer than the load: load for more than {run.seconds} s"
        )
    turned_away = experiment.rejected
    if may_reject:
        turned_away = experiment.given_up + experiment.refused_before
    lost = experiment.failed + turned_away
    found, seconds = f"{lost} of {run.sent} lost", recovery_s(experiment)
    if not experiment.ends:
        found += (
            f"; latency as before after {seconds:.1f} s"
            if math.isfinite(seconds)
            else "; latency not as before while it was measured"
        )
    return Outcome(
        promise=promise,
        fault=experiment.name,
        evidence="; ".join(fault.evidence for fault in faults),
        requests=by_outcome(run),
        found=found,
        kept=lost == run.wrong == 0,
        facts={"recovery_s": seconds, "lost": lost},
    )


def recovery_s(experiment: Experiment) -> float:
    """Seconds from a fault until the median latency is within 1.2 times that before the first one.

    The median is over what came to an end within a second; what was not answered counts as
    infinitely long. Of several faults the longest time is told. nan where nothing was answered
    before, infinite where latency was not as before when the next fault came, or the end.
    """
    run = experiment.run
    moments = sorted(fault.began - run.began for fault in experiment.faults)
    ended = sorted(
        (s.done, s.done - s.due if s.outcome == RIGHT else math.inf) for s in run.samples
    )
    before = [latency for done, latency in ended if moments and done < moments[0]]
    if not before or not math.isfinite(bound := RECOVERED * statistics.median(before)):
        return math.nan
    return max(
        _slow_s([(done - begin, latency) for done, latency in ended if begin <= done < end], bound)
        for begin, end in pairwise([*moments, math.inf])
    )


def _slow_s(ended: list[tuple[float, float]], bound: float) -> float:
    """How long the median latency of a second stays above the bound; infinite where to the end.

    ended: (when, in seconds from the fault on; latency), in order.
    """
    window, latencies = deque(), []
    slow_until = 0.0
    for done, latency in ended:
        window.append((done, latency))
        bisect.insort(latencies, latency)
        while window[0][0] <= done - WINDOW_S:
            latencies.pop(bisect.bisect_left(latencies, window.popleft()[1]))
        if latencies[(len(latencies) - 1) // 2] > bound:
            slow_until = done
    return math.inf if not ended or slow_until >= ended[-1][0] else slow_until


def by_outcome(run: Run) -> dict[str, int]:
    """How many requests came to what."""
    return {"answered": sum(sample.outcome == RIGHT for sample in run.samples)} | run.errors
