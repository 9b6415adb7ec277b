"""Admits requests while there is room and rejects the rest at once; counts what became of each."""

import math
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from model.serving.metrics import ADMISSION_LIMIT, IN_FLIGHT, REQUESTS

FULL = "The server is busy and its queue is full: try again later."
COUNTED = 200  # of the last responses, to tell how many there are in a second
LONGEST_RETRY_S = 60  # that a client is told to wait


class AdmissionController:
    """Counts the requests for predictions of one model in flight; above the limit none is admitted.

    A request is rejected before its body is read: a server that first reads what it cannot take
    spends on rejections what it should spend on responses.
    """

    def __init__(self, model_name: str, limit: int) -> None:
        """model_name: for the metrics. limit: how many may be in flight."""
        self._name, self.limit, self.in_flight = model_name, limit, 0
        self._answered: deque[float] = deque(maxlen=COUNTED)  # when, on the clock of _busy_s
        self._busy_before, self._busy_since = 0.0, 0.0
        self._shown = IN_FLIGHT.labels(model_name)
        ADMISSION_LIMIT.labels(model_name).set(limit)

    @property
    def full(self) -> bool:
        """Whether the next request is to be rejected."""
        return self.in_flight >= self.limit

    def count(self, outcome: str) -> None:
        """Count a request that was not admitted, or had not arrived: what became of it."""
        REQUESTS.labels(self._name, outcome).inc()

    def retry_after_s(self) -> int:
        """In how many seconds a client that was rejected should try again, at least 1.

        When as many are answered as are in flight now, at the rate of the last responses (of the
        time in which there was something to answer); and up to twice that, at random, so that those
        rejected together do not return together.
        """
        rate = 0.0
        if len(self._answered) > 1:
            rate = len(self._answered) / max(1e-3, self._busy_s() - self._answered[0])
        seconds = self.in_flight / rate if rate else 1.0
        return math.ceil(min(LONGEST_RETRY_S / 2, max(0.5, seconds)) * random.uniform(1, 2))

    def _busy_s(self) -> float:
        """For how long there has been a request in flight, so far."""
        return self._busy_before + (time.monotonic() - self._busy_since if self.in_flight else 0.0)

    @contextmanager
    def admitted(self) -> Iterator[dict[str, str]]:
        """One request in flight; its `outcome`, in the dictionary yielded, is set by the caller."""
        request = {"outcome": "abandoned"}
        if not self.in_flight:
            self._busy_since = time.monotonic()
        self.in_flight += 1
        self._shown.set(self.in_flight)
        try:
            yield request
        finally:
            busy_s = self._busy_s()
            if request["outcome"] == "answered":
                self._answered.append(busy_s)
            self.in_flight -= 1
            self._shown.set(self.in_flight)
            if not self.in_flight:
                self._busy_before = busy_s
            self.count(request["outcome"])


class Admission:
    """The controllers of all models of a server."""

    def __init__(self, model_names: Iterable[str], limit: int) -> None:
        """limit: of each model."""
        self._controllers = {name: AdmissionController(name, limit) for name in model_names}
        self.draining = False  # whether the server is about to end: it is not ready, and goes on

    def of(self, model_name: str) -> AdmissionController | None:
        """The controller of a model; None for one that is not served here."""
        return self._controllers.get(model_name)

    @property
    def all_full(self) -> bool:
        """Whether a request is to be rejected whatever its model is."""
        return all(controller.full for controller in self._controllers.values())

    def retry_after_s(self) -> int:
        """In how many seconds there may be room for a request whose model is not known yet."""
        return min(controller.retry_after_s() for controller in self._controllers.values())

    def reject_unread(self) -> None:
        """Count a request that was rejected before its model was known.

        With one model it was for that one; with several it is counted without a name.
        """
        [*names] = self._controllers
        REQUESTS.labels(names[0] if len(names) == 1 else "", "rejected").inc()
