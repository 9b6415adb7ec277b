"""What Ray runs for us: replicas of a model, who of them gets a batch, how many there are to be."""

import asyncio
import importlib
import logging
import os
import time
from typing import Any

from kserve import InferRequest
from kserve.model import InferenceVerb
from ray.serve._private import replica as serve_replica
from ray.serve.request_router import RequestRouter

from model import STAY_ON_LOOPBACK
from model.batcher import GatheredModel, InThread
from model.protocol import Answer, Images

FRESH_S = 2.0  # what the last batch said about the queue is forgotten after this
logger = logging.getLogger("ray.serve")  # in a replica it writes to the replica's log file


class Replica:
    """A copy of a KServe model in a process of its own: what Ray Serve runs N times.

    It imports the model's class itself, so the server in front needs neither it nor torch.
    """

    def __init__(
        self,
        model_class: str,
        *,
        gather: dict | None = None,
        stuck_s: float | None = None,
        **made_with: Any,
    ) -> None:
        """model_class: `module:Class` of a kserve.Model. made_with: the class's own arguments.

        gather: GatheredModel's options, when requests are to be gathered here, in the replica.
        stuck_s: a batch that makes no progress for so long has the replica replaced.
        """
        if os.environ.items() >= STAY_ON_LOOPBACK.items():
            _listen_on_loopback()
        module, name = model_class.split(":")
        self._model = self._loaded = getattr(importlib.import_module(module), name)(**made_with)
        self._loaded.load()
        self._in_thread, self._stuck_s = None, stuck_s
        self._here, self._told, self._batches = 0, float("-inf"), 0
        self._asked: float | None = None
        if gather is not None:
            self._model = self._in_thread = GatheredModel(self._loaded, **gather)

    async def __call__(
        self, body: dict | InferRequest, headers: dict[str, str], verb: InferenceVerb
    ) -> tuple[Any, dict[str, str]]:
        """Answer one request as KServe would in its own process: (response, headers)."""
        logger.info("request %s", (headers or {}).get("x-request-id", ""))
        return await self._model(body, headers, verb)

    async def answer_all(
        self, batch: list[Images], place: int, ids: list[str], here: int
    ) -> list[Answer | Exception]:
        """Answer a batch that was gathered in front, in a thread; the event loop stays free.

        place: for the router, ByPlace. ids: of the requests, for the log. here: pictures in front,
        waiting or in work, for autoscaling.
        """
        if self._in_thread is None:
            self._in_thread = InThread(self._loaded)
        self._here, self._told = here, time.monotonic()
        logger.info("requests %s", ", ".join(ids))
        self._batches += 1
        try:
            return await self._in_thread(batch)
        finally:
            self._batches -= 1

    def check_health(self) -> None:
        """Ray asks this again and again; who raises three times is replaced."""
        idle_s = self._in_thread.idle_s() if self._in_thread else 0.0
        if self._stuck_s and idle_s > self._stuck_s:
            raise RuntimeError(f"the batch in work has made no progress for {idle_s:.0f} s")

    async def reconfigure(self, config: dict) -> None:
        """Load the model again when the deployment's `user_config` asks for it; requests go on.

        config: {"loaded": a moment}; a later one than before asks for it. Ray calls this also
        once the replica is made.
        """
        when = config["loaded"]
        if self._asked is not None and when > self._asked:
            await asyncio.get_running_loop().run_in_executor(None, self._loaded.load)
        self._asked = max(when, self._asked or when)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray's controller hands to `by_requests_here`."""
        fresh = self._batches or time.monotonic() - self._told < FRESH_S
        return {"here": self._here if fresh else 0}

    async def healthy(self) -> bool:
        """Whether the model is loaded."""
        return await self._model.healthy()

    def get_input_types(self) -> list[dict]:
        """The model's inputs."""
        return self._model.get_input_types()

    def get_output_types(self) -> list[dict]:
        """The model's outputs."""
        return self._model.get_output_types()


def _listen_on_loopback() -> None:
    """Keep off the network what Ray Serve opens in each replica, a port for other deployments.

    Nobody uses it here, and Serve (2.60) listens on all addresses.
    """
    add_port = serve_replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    serve_replica.add_port_to_grpc_server = on_loopback


class ByPlace(RequestRouter):
    """Sends a batch to the replica in the place it is meant for; other calls to the least loaded.

    The batcher knows which replica is free. Ray's own router would have to guess: it counts a
    call as under way until some time after its result is there.
    """

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Groups of replicas in order; of a group Ray takes the one with the shortest queue."""
        place = pending_request.kwargs.get("place") if pending_request else None
        if place is None or not candidate_replicas:
            return [candidate_replicas]
        in_order = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        return [[in_order[place % len(in_order)]]]


def by_requests_here(context):
    """Ray's autoscaling policy for requests that wait in KServe's process, where Ray sees none.

    Returns how many replicas there should be, and nothing to remember.
    """
    here = (context.aggregated_metrics or {}).get("here", {})
    return max(here.values(), default=0) / context.config.get_target_ongoing_requests(), {}
