"""Admits requests while there is room and rejects the rest at once; counts what became of each."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from model.serving.metrics import ADMISSION_LIMIT, IN_FLIGHT, REQUESTS

RETRY_AFTER_S = 1  # what a client that got 503 is told to wait
FULL = "The server is busy and its queue is full: try again later."


class AdmissionController:
    """Counts the requests for predictions of one model in flight; above the limit none is admitted.

    A request is rejected before its body is read: a server that first reads what it cannot take
    spends on rejections what it should spend on responses.
    """

    def __init__(self, model_name: str, limit: int) -> None:
        """model_name: for the metrics. limit: how many may be in flight."""
        self._name, self.limit, self.in_flight = model_name, limit, 0
        IN_FLIGHT.labels(model_name).set_function(lambda: self.in_flight)
        ADMISSION_LIMIT.labels(model_name).set(limit)

    @property
    def full(self) -> bool:
        """Whether the next request is to be rejected."""
        return self.in_flight >= self.limit

    def reject(self) -> None:
        """Count a request that was rejected."""
        REQUESTS.labels(self._name, "rejected").inc()

    @contextmanager
    def admitted(self) -> Iterator[dict[str, str]]:
        """One request in flight; its `outcome`, in the dictionary yielded, is set by the caller."""
        request = {"outcome": "abandoned"}
        self.in_flight += 1
        try:
            yield request
        finally:
            self.in_flight -= 1
            REQUESTS.labels(self._name, request["outcome"]).inc()


class Admission:
    """The controllers of all models of a server."""

    def __init__(self, model_names: Iterable[str], limit: int) -> None:
        """limit: of each model."""
        self._controllers = {name: AdmissionController(name, limit) for name in model_names}

    def of(self, model_name: str) -> AdmissionController | None:
        """The controller of a model; None for one that is not served here."""
        return self._controllers.get(model_name)

    @property
    def all_full(self) -> bool:
        """Whether a request is to be rejected whatever its model is."""
        return all(controller.full for controller in self._controllers.values())

    def reject_unread(self) -> None:
        """Count a request that was rejected before its model was known.

        With one model it was for that one; with several it is counted without a name.
        """
        [*names] = self._controllers
        REQUESTS.labels(names[0] if len(names) == 1 else "", "rejected").inc()
