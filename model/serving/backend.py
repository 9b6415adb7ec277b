"""What stands behind a model in KServe's registry: a thread of this process, or replicas."""

from collections.abc import Sequence
from typing import Protocol

from kserve.model import InferenceVerb

from model.serving.config import CannotStart
from model.serving.protocol import Description, Request, Response


class Backend(Protocol):
    """Two classes fit: worker_thread.WorkerThread and replica_pool.ReplicaPool."""

    description: Description | None  # None before it is loaded

    @property
    def workers(self) -> int:
        """How many batches can be worked on at the same time."""

    def load(self) -> None:
        """Return once requests can be answered; raises what stands in the way."""

    async def predict_batch(
        self, requests: Sequence[Request], worker_index: int, backlog: int
    ) -> list[Response | Exception]:
        """For each request its response or its error.

        worker_index: of the worker that is to have the batch. backlog: instances that wait or are
        worked on for this model.
        """

    async def call(self, request: Request, verb: InferenceVerb) -> Response:
        """The response to one request, outside of any batch; raises its error."""

    async def healthy(self) -> bool:
        """Whether requests can be answered now."""

    def stop(self) -> None:
        """Serving ends."""


class Unavailable:
    """The backend of a model that could not be deployed: loading it says why."""

    description, workers = None, 1

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def load(self) -> None:
        """Raise CannotStart with the reason."""
        raise CannotStart(self._reason)

    async def predict_batch(
        self, requests: Sequence[Request], worker_index: int, backlog: int
    ) -> list[Response | Exception]:
        """Raise CannotStart with the reason."""
        raise CannotStart(self._reason)

    async def call(self, request: Request, verb: InferenceVerb) -> Response:
        """Raise CannotStart with the reason."""
        raise CannotStart(self._reason)

    async def healthy(self) -> bool:
        """Never."""
        return False

    def stop(self) -> None:
        """Nothing to do."""
