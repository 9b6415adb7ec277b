"""A KServe model whose work is done by Ray Serve replicas: KServe's RayModel, mended."""

import asyncio
import copy
import importlib
import threading
import time
from typing import Any

import ray
from kserve import InferRequest
from kserve.errors import InvalidInput, ModelNotReady
from kserve.logging import logger
from kserve.model import InferenceVerb
from kserve.protocol.infer_type import to_http_parameters
from kserve.ray import RayModel
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

from model.batcher import GatheredModel, in_thread
from model.protocol import Answer, Images

WATCH_PERIOD_S = 0.5  # between two looks at the replicas
STALE_S = 5.0  # a look older than this no longer counts
LOAD_WITHIN_S = 60.0


class Replica:
    """A copy of a KServe model in a process of its own: what Ray Serve runs N times.

    It imports the model's class itself, so the server in front needs neither it nor torch.
    """

    def __init__(self, model_class: str, *, gather: dict | None = None, **made_with: Any) -> None:
        """model_class: `module:Class` of a kserve.Model. made_with: the class's own arguments.

        gather: GatheredModel's options, when requests are to be gathered here, in the replica.
        """
        module, name = model_class.split(":")
        self._model = getattr(importlib.import_module(module), name)(**made_with)
        self._model.load()
        self._in_thread = None
        if gather is not None:
            self._model = GatheredModel(self._model, **gather)

    async def __call__(
        self, body: dict | InferRequest, headers: dict[str, str], verb: InferenceVerb
    ) -> tuple[Any, dict[str, str]]:
        """Answer one request as KServe would in its own process: (response, headers)."""
        return await self._model(body, headers, verb)

    async def answer_all(self, batch: list[Images], place: int) -> list[Answer | InvalidInput]:
        """Answer a batch that was gathered in front, in a thread; the event loop stays free.

        place: for the router, ByPlace.
        """
        if self._in_thread is None:
            self._in_thread = in_thread(self._model)
        return await self._in_thread(batch)

    async def healthy(self) -> bool:
        """Whether the model is loaded."""
        return await self._model.healthy()

    def get_input_types(self) -> list[dict]:
        """The model's inputs."""
        return self._model.get_input_types()

    def get_output_types(self) -> list[dict]:
        """The model's outputs."""
        return self._model.get_output_types()


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


class ReplicatedModel(RayModel):
    """Stands in KServe's registry for a model and sends its requests to Ray Serve replicas.

    What it does that RayModel (kserve 0.21) leaves out:

    - the verb goes along, so `:explain` is not answered with a prediction;
    - `load` waits until a replica says it is ready and can be called again; errors come out;
    - `healthy` tells whether replicas run, from a watch in the background;
    - requests that came by gRPC reach the replicas too;
    - an error raised in a replica arrives as itself, without the remote traceback;
    - overload and lost replicas raise ModelNotReady (HTTP 503, gRPC UNAVAILABLE);
    - a request waits at most `timeout_s` and then raises TimeoutError (HTTP 504).

    The deployment loads its model in its constructor, as `Replica` does: Ray runs that once for
    every replica, the first ones and those it starts later.
    """

    def __init__(self, name: str, handle: DeploymentHandle, timeout_s: float = 60.0) -> None:
        """name: the model's name in KServe. handle: what `serve.run` returned."""
        super().__init__(name, handle)
        self.timeout_s = timeout_s
        self._running = 0  # replicas, when last looked
        self._looked = float("-inf")  # when that was, on the monotonic clock
        self._watch: threading.Thread | None = None
        self._stopped = threading.Event()

    def load(self) -> bool:
        """Wait until a replica answers that it is ready; then keep watching how many run.

        Called again it does nothing. Raises ModelNotReady when no replica is ready within a
        minute, or what a replica itself raises.
        """
        if self._watch is None:
            try:
                ready = self._handle.healthy.remote().result(timeout_s=LOAD_WITHIN_S)
            except TimeoutError:
                ready = False
            except Exception as error:
                raise self._translated(error) from None
            if not ready:
                raise ModelNotReady(self.name, "None of its replicas has loaded it.")
            self._look()
            self._stopped.clear()
            self._watch = threading.Thread(target=self._keep_looking, daemon=True)
            self._watch.start()
        self.ready = True
        return self.ready

    @property
    def replicas(self) -> int:
        """How many run, as the watch saw it last."""
        return self._running

    async def answer_all(self, batch: list[Images], place: int) -> list[Answer | InvalidInput]:
        """Have the replica in a place, of as many as run, answer a batch of requests."""
        return await self._answer(self._handle.answer_all, batch, place=place)

    async def healthy(self) -> bool:
        """Whether at least one replica runs: a state the watch keeps, not a call to Ray."""
        fresh = time.monotonic() - self._looked < STALE_S
        return self.ready and fresh and self._running > 0

    def stop(self) -> None:
        """End the watch; KServe calls this as it shuts down."""
        self._stopped.set()
        self._watch = None
        super().stop()

    async def __call__(
        self,
        body: dict | InferRequest,
        headers: dict[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> Any:
        """Send one request to a replica; returns its pair (response, response headers)."""
        return await self._answer(self._handle, _picklable(body), headers=headers, verb=verb)

    async def get_input_types(self) -> list[dict]:
        """The inputs as a replica states them."""
        return await self._answer(self._handle.get_input_types)

    async def get_output_types(self) -> list[dict]:
        """The outputs as a replica states them."""
        return await self._answer(self._handle.get_output_types)

    async def _answer(self, method: DeploymentHandle, *args: Any, **kwargs: Any) -> Any:
        """Call a replica's method; what nobody waits for any more is cancelled there too."""
        response = method.remote(*args, **kwargs)
        try:
            return await asyncio.wait_for(response, self.timeout_s)
        except asyncio.CancelledError:  # the client has gone
            response.cancel()
            raise
        except Exception as error:
            if isinstance(error, TimeoutError):
                response.cancel()
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> Exception:
        """What KServe can answer with, in place of what Ray raised."""
        if isinstance(error, RayTaskError):  # raised by the model, in the replica
            return error.cause
        if isinstance(error, TimeoutError):
            return TimeoutError(f"{self.name} gave no answer within {self.timeout_s:g} seconds.")
        if isinstance(error, BackPressureError):
            return ModelNotReady(self.name, "Its replicas are busy and the queue is full.")
        if isinstance(error, RayError | RayServeException):
            return ModelNotReady(self.name, "The replica at work on the request was lost.")
        return error

    def _keep_looking(self) -> None:
        seen = True
        while not self._stopped.wait(WATCH_PERIOD_S):
            try:
                self._look()
                seen = True
            except Exception as error:  # whatever it is, the watch goes on
                if seen:
                    logger.warning("cannot see the replicas of %s: %s", self.name, error)
                self._running, seen = 0, False

    def _look(self) -> None:
        """Ask Serve's controller how many replicas run."""
        if not ray.is_initialized():  # else `serve.status` would start a cluster
            raise RuntimeError("this process has left the Ray cluster")
        app = serve.status().applications.get(self._handle.app_name)
        deployment = app.deployments.get(self._handle.deployment_name) if app else None
        self._running = deployment.replica_states.get("RUNNING", 0) if deployment else 0
        self._looked = time.monotonic()


def _picklable(body: dict | InferRequest) -> dict | InferRequest:
    """The same request without the protobuf map that gRPC requests carry their parameters in."""
    if isinstance(body, InferRequest) and body.from_grpc:
        body = copy.copy(body)
        body.parameters = to_http_parameters(body.parameters or {})
    return body
