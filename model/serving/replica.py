"""What Ray Serve runs N times for each model: a WorkerThread, and what Ray asks of a replica."""

import logging
import pickle
import time
from collections import Counter
from typing import Any

from kserve.model import InferenceVerb

from model.serving.batcher import Batcher
from model.serving.config import BatchingConfig, CannotStart, ModelConfig
from model.serving.dispatch import load_rule
from model.serving.errors import reason
from model.serving.protocol import Description, Response, pickled
from model.serving.updates import Updates
from model.serving.upstream_ray import listen_on_loopback
from model.serving.worker_thread import WorkerThread

FRESH_S = 2.0  # what the last batch said about the backlog is forgotten after this
logger = logging.getLogger("ray.serve")  # in a replica it writes to the replica's log file


class Replica(WorkerThread):
    """A process with a copy of a model. It imports the model's class itself, so that the frontend
    needs neither the class nor its packages.

    Requests and responses travel pickled, so that whatever a model returns is read or refused
    here.
    """

    def __init__(
        self,
        model: ModelConfig,
        threads: int = 1,
        batching: BatchingConfig | None = None,
        watchdog_timeout_s: float = 60.0,
    ) -> None:
        """model, threads: as for WorkerThread. batching: where it says `replica`, requests are
        gathered here. watchdog_timeout_s: a step of a batch that takes longer has Ray replace the
        replica.

        The model is loaded here, since Ray runs this once for every replica, also for those that
        it starts later. Raises CannotStart, whose sentence is the last line of what Ray logs.
        """
        listen_on_loopback()
        super().__init__(model, threads)
        try:
            self.load()
        except Exception as error:
            raise CannotStart(reason(error)) from error
        self._watchdog_timeout_s = watchdog_timeout_s
        self._backlogs: dict[str, tuple[int, float]] = {}  # frontend -> its backlog, and when
        self._batches: Counter[str] = Counter()  # frontend -> its batches
        self._updates = Updates()
        self._batcher: Batcher | None = None
        if batching is not None and batching.where == "replica":
            self._batcher = Batcher(
                lambda batch, *_: WorkerThread.predict_batch(self, batch),
                max_size=batching.max_size,
                wait_s=batching.wait_s,
                size=lambda request: request.instances,
                rule=load_rule(batching.rule, model.folder),
            )

    def describe(self) -> Description:
        """What the frontend needs to know of the model."""
        return self.description

    async def ping(self, worker_index: int) -> None:
        """It is alive. worker_index: for the router."""

    async def predict_batch(
        self,
        requests: bytes,
        worker_index: int,
        backlog: int,
        frontend: str = "",
        shared: bool = False,
    ) -> tuple[bytes, bool]:
        """The pickled responses or errors of a pickled batch that was gathered in the frontend; and
        whether a batch of somebody else was here, too.

        worker_index, shared: for the router. backlog: instances in that frontend that wait or are
        worked on, for autoscaling.
        """
        batch = pickle.loads(requests)
        logger.info("requests %s", ", ".join(request.id for request in batch))
        self._backlogs[frontend] = backlog, time.monotonic()
        self._batches[frontend] += 1
        others = self._batches.total() > self._batches[frontend]
        try:
            return _pickled(await super().predict_batch(batch)), others
        finally:
            self._batches[frontend] -= 1

    async def call(
        self,
        request: bytes,
        verb: InferenceVerb = InferenceVerb.PREDICT,
        worker_index: int | None = None,
    ) -> bytes:
        """The pickled response or error to one pickled request; by way of a batch of this replica
        where it makes batches. worker_index: for the router."""
        [request] = pickle.loads(request)
        logger.info("requests %s", request.id)
        try:
            if self._batcher is not None and verb is InferenceVerb.PREDICT:
                return _pickled([await self._batcher(request)])
            return _pickled([await super().call(request, verb)])
        except Exception as error:
            return _pickled([error])

    async def check_health(self) -> None:
        """Ray asks this again and again; a replica that raises three times is replaced."""
        await self.check(self._watchdog_timeout_s)

    async def reconfigure(self, config: dict) -> None:
        """As Updates.obey; requests go on."""
        await self._updates.obey(config, self.reload)

    def deployed(self) -> str:
        """The configuration with which its application was deployed last, as text."""
        return self._updates.deployed

    def reload_failure(self) -> str | None:
        """Why the model could not be loaded again when this was asked for last."""
        return self._updates.failure

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray's controller hands to routing.scale_by_backlog: the backlog of each frontend."""
        now = time.monotonic()
        self._backlogs = {
            frontend: (backlog, seen)
            for frontend, (backlog, seen) in self._backlogs.items()
            if self._batches[frontend] or now - seen < FRESH_S
        }
        found = {f"backlog {name}": backlog for name, (backlog, _) in self._backlogs.items()}
        return found or {"backlog": 0}


def _pickled(results: list[Response | Exception]) -> bytes:
    """The results; one that cannot be pickled is an error of its own request."""
    try:
        return pickled(results)
    except Exception:
        return pickled([_checked(result) for result in results])


def _checked(result: Any) -> Any:
    try:
        pickled(result)
    except Exception as error:
        return RuntimeError(f"the response cannot leave the replica: {error}")
    return result
