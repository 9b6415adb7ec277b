"""What became of a promise, as a row of the table of promises."""

import math
import statistics
from dataclasses import dataclass, field

from model.faults.experiment import Experiment
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
    kept: bool
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
            "kept": "yes" if self.kept else "**no**",
        }


def nothing_lost(promise: str, experiment: Experiment, rejected: bool = False) -> Outcome:
    """Kept where no request failed or was answered wrongly. rejected: or rejected."""
    seconds = recovery_s(experiment)
    lost = experiment.failed + (0 if rejected else experiment.rejected)
    found = f"{lost} of {experiment.run.sent} lost"
    if math.isfinite(seconds):
        found += f"; latency as before after {seconds:.1f} s"
    return Outcome(
        promise=promise,
        fault=experiment.name,
        evidence="; ".join(fault.evidence for fault in experiment.faults),
        requests=by_outcome(experiment.run),
        found=found,
        kept=lost == experiment.run.wrong == 0,
        facts={"recovery_s": seconds, "lost": lost},
    )


def recovery_s(experiment: Experiment) -> float:
    """Seconds from the first fault until the median latency is within 1.2 times that before it.

    The median is that of the requests answered in a second. nan where nothing was answered before
    the fault, infinite where latency does not come back.
    """
    if not experiment.faults:
        return math.nan
    when = experiment.faults[0].began - experiment.run.began
    right = sorted((s.done, s.done - s.due) for s in experiment.run.samples if s.outcome == RIGHT)
    before = [latency for done, latency in right if done < when]
    after = [(done, latency) for done, latency in right if done >= when]
    if not before:
        return math.nan
    bound, slow_until = RECOVERED * statistics.median(before), 0.0
    for done, _ in after:
        window = [latency for at, latency in after if done - WINDOW_S < at <= done]
        if statistics.median(window) > bound:
            slow_until = done - when
    if not after or slow_until >= after[-1][0] - when:
        return math.inf
    return slow_until


def by_outcome(run: Run) -> dict[str, int]:
    """How many requests came to what."""
    return {"answered": sum(sample.outcome == RIGHT for sample in run.samples)} | run.errors
