"""What a load test measured: the samples of single requests, and the run as a whole."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Outcomes of a request; "HTTP <status>", "timed out" and others are there besides.
RIGHT, REFUSED, LOST, UNSENT = "right", "connection refused", "connection lost", "never sent"
REJECTED = "HTTP 503"
WRONG = ("wrong label", "not the reference's label", "wrong response")


class Sample(NamedTuple):
    """One request. Times are seconds since the load began."""

    due: float  # when it was to be sent; in a closed loop, when its client was free
    sent: float  # when its client turned to it; connecting, where that is needed, comes after
    done: float  # when its response was read, or given up
    outcome: str  # RIGHT, or the kind of error
    headers: dict[str, str]  # the response's x-…, with keep_headers


@dataclass
class Run:
    """What one load measured; all times in seconds.

    The window is what follows the warm-up, whose requests only prepare. A closed loop counts the
    requests done within it: some began before it, as many go on after it, so that Little's law
    holds. An open loop counts those due within it, however late they are done: otherwise the
    slowest would drop out. Errors are counted over the whole run, warm-up and end included.
    """

    seconds: float  # length of the window
    requests: int  # counted, whatever became of them
    sent: int  # in the whole run
    errors: dict[str, int]  # kind -> how many in the whole run; none is left out
    wrong: int  # of the errors, those that are responses with a wrong label
    throughput: float  # right responses a second, done within the window
    latencies: list[float] = field(repr=False)  # from due to done, of the right ones counted
    # The same requests from sent to done. In an open loop that is the wrong way: while the server
    # stalls, requests that wait for a connection are not sent yet, so that a stall seems to concern
    # only as many requests as there are connections (coordinated omission).
    latencies_from_sent: list[float] = field(repr=False)
    in_flight: float  # requests sent and not done: mean over the window, by counting
    expected_in_flight: float  # the same by Little's law: rate of requests x mean time of each
    distance: float  # the largest from the reference in the whole run
    client_cpu: float  # cores that the load generator used in the window
    cpu: dict[str, float]  # the same of each group of processes watched
    began: float  # since 1970
    samples: list[Sample] = field(repr=False)  # of the whole run, in the order they were done
    # With keep_headers, of the right responses counted: x-…, and `sent` and `done`, since 1970.
    headers: list[dict] = field(repr=False)
    retries: int = 0  # of requests that had been rejected
    warmup_s: float = 0.0  # before the window

    def quantile(self, q: float, from_sent: bool = False) -> float:
        """The latency that a share `q` of the right responses stays within; nan if there are none.

        from_sent: of the latencies from sent to done, in place of those from due to done.
        """
        latencies = self.latencies_from_sent if from_sent else self.latencies
        return float(np.quantile(latencies, q)) if latencies else math.nan

    def throughput_by_share(self) -> float:
        """Right responses a second, each counted by the share of its time that is in the window.

        For windows that hold few batches, where counting what is done within them is off by up to
        a batch at either end.
        """
        begin, end = self.warmup_s, self.warmup_s + self.seconds
        right = (s for s in self.samples if s.outcome == RIGHT and s.done > s.sent)
        shares = ((min(s.done, end) - max(s.sent, begin)) / (s.done - s.sent) for s in right)
        return sum(max(0.0, share) for share in shares) / self.seconds

    def littles_law(self) -> float:
        """Requests in flight, counted / expected: near 1, or the load was not steady."""
        return self.in_flight / self.expected_in_flight if self.expected_in_flight else math.nan
