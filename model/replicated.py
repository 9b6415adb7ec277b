"""A KServe model whose work is done by Ray Serve replicas: KServe's RayModel, mended."""

import asyncio
import copy
import threading
import time
from typing import Any

from kserve import InferRequest
from kserve.errors import InvalidInput, ModelNotReady
from kserve.logging import logger
from kserve.model import InferenceVerb
from kserve.protocol.infer_type import to_http_parameters
from kserve.ray import RayModel
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from model.metrics import REPLICAS, RETRIES
from model.protocol import Answer, Images

WATCH_PERIOD_S = 0.3  # between two looks at the replicas
STALE_S = 5.0  # a look older than this no longer counts
# UPDATING: it loads again; RECOVERING: the controller was started again and asks who is there.
SERVING = ("RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")
PING_WITHIN_S = 0.5  # a kubelet's probe gives up after a second
PAUSE_S = 0.1  # before a request is sent again
ATTEMPTS = 3  # at most so many replicas get a request, one after the other
LOAD_WITHIN_S = 60.0


class ReplicatedModel(RayModel):
    """Stands in KServe's registry for a model and sends its requests to Ray Serve replicas.

    What it does that RayModel (kserve 0.21) leaves out:

    - the verb goes along, so `:explain` is not answered with a prediction;
    - `load` waits until a replica says it is ready and can be called again; errors come out;
    - `healthy` tells whether replicas run, from a watch in the background; while Ray's head is
      away, whether they answer;
    - requests that came by gRPC reach the replicas too;
    - an error raised in a replica arrives as itself, without the remote traceback;
    - what a lost or stuck replica leaves undone is sent to another one;
    - overload, and replicas lost again and again, raise ModelNotReady (HTTP 503, gRPC UNAVAILABLE);
    - a request waits at most `timeout_s` and then raises TimeoutError (HTTP 504).

    Sending it again is safe because a prediction changes nothing. A request that itself kills the
    replicas that get it is given up after three, with those in its batch. While no replica runs,
    requests that are in already wait for one; new ones are told to come again.

    The deployment loads its model in its constructor, as `Replica` does: Ray runs that once for
    every replica, the first ones and those it starts later.
    """

    def __init__(
        self,
        name: str,
        handle: DeploymentHandle,
        timeout_s: float = 60.0,
        attempt_s: float | None = None,
    ) -> None:
        """name: the model's name in KServe. handle: what `serve.run` returned.

        timeout_s: of a request. attempt_s: how much of that one replica gets; default: a third.
        """
        super().__init__(name, handle)
        self.timeout_s, self.attempt_s = timeout_s, attempt_s or timeout_s / ATTEMPTS
        self._running = 0  # replicas, when last looked
        self._looked = float("-inf")  # when that was, on the monotonic clock
        self._answered = float("-inf")  # when a replica answered last
        self._watch: threading.Thread | None = None
        self._look_now, self._stopped = threading.Event(), False
        REPLICAS.set_function(lambda: self._running)

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
            self._stopped = False
            self._watch = threading.Thread(target=self._keep_looking, daemon=True)
            self._watch.start()
        self.ready = True
        return self.ready

    @property
    def replicas(self) -> int:
        """How many run, as the watch saw it last."""
        return self._running

    async def answer_all(
        self, batch: list[Images], place: int, ids: list[str], here: int
    ) -> list[Answer | InvalidInput]:
        """Have the replica in a place, of as many as run, answer a batch of requests.

        ids, here: as for Replica.answer_all.
        """
        call = self._handle.answer_all
        return await self._answer(call, ids, batch, place=place, ids=ids, here=here)

    async def healthy(self) -> bool:
        """Whether at least one replica runs: a state the watch keeps, not a call to Ray.

        When Serve's controller has told nothing of late, its node being lost, say, replicas that
        answer are enough; one is asked if none has of late.
        """
        if not self.ready or self._running == 0:
            return False
        if time.monotonic() - max(self._looked, self._answered) < STALE_S:
            return True
        try:
            return await asyncio.wait_for(self._handle.healthy.remote(), PING_WITHIN_S)
        except Exception:  # whatever it is, it is no answer
            return False

    def stop(self) -> None:
        """End the watch; KServe calls this as it shuts down."""
        watch, self._stopped, self._watch = self._watch, True, None
        self._look_now.set()
        if watch:  # so that no look is under way as Ray ends
            watch.join(STALE_S)
        super().stop()

    async def __call__(
        self,
        body: dict | InferRequest,
        headers: dict[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> Any:
        """Send one request to a replica; returns its pair (response, response headers)."""
        ids = [(headers or {}).get("x-request-id", "")]
        return await self._answer(self._handle, ids, _picklable(body), headers=headers, verb=verb)

    async def get_input_types(self) -> list[dict]:
        """The inputs as a replica states them."""
        return await self._answer(self._handle.get_input_types, [""])

    async def get_output_types(self) -> list[dict]:
        """The outputs as a replica states them."""
        return await self._answer(self._handle.get_output_types, [""])

    async def _answer(
        self, method: DeploymentHandle, requests: list[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Call a replica's method, and another's where one is lost or takes too long.

        requests: the ids of those that the call is for. A call that is given up, or that nobody
        waits for any more, is cancelled in the replica too.
        """
        deadline, attempt = time.monotonic() + self.timeout_s, 0
        while True:
            left = deadline - time.monotonic()
            try:
                response = method.remote(*args, **kwargs)
                answer = await asyncio.wait_for(response, min(left, self.attempt_s))
                self._answered = time.monotonic()
                return answer
            except asyncio.CancelledError:  # the client has gone
                response.cancel()
                raise
            except Exception as error:
                if isinstance(error, TimeoutError) and not isinstance(error, RayTaskError):
                    response.cancel()
                # The model's own errors are RayTaskErrors, whatever else they are.
                lost = isinstance(error, RayActorError | TimeoutError)
                if not lost or isinstance(error, RayTaskError):
                    raise self._translated(error) from None
                # While no replica runs the call waits in vain, and no attempt is made.
                attempt += 1 if self._running or isinstance(error, RayActorError) else 0
                if attempt == ATTEMPTS or time.monotonic() > deadline:
                    raise self._translated(error) from None
                RETRIES.labels(type(error).__name__).inc(len(requests))
                logger.warning("sent again (%s): %s", type(error).__name__, ", ".join(requests))
            self._look_now.set()
            await asyncio.sleep(PAUSE_S)
            if "place" in kwargs:
                kwargs["place"] += 1  # not to the one that is stuck

    def _translated(self, error: Exception) -> Exception:
        """What KServe can answer with, in place of what Ray raised."""
        if isinstance(error, RayTaskError):  # raised by the model, in the replica
            return error.cause
        if isinstance(error, TimeoutError) and not self._running:
            return ModelNotReady(self.name, "None of its replicas runs.")
        if isinstance(error, TimeoutError):
            limit = min(self.timeout_s, ATTEMPTS * self.attempt_s)
            return TimeoutError(f"{self.name} gave no answer within {limit:g} seconds.")
        if isinstance(error, BackPressureError):
            return ModelNotReady(self.name, "Its replicas are busy and the queue is full.")
        if isinstance(error, RayError | RayServeException):
            return ModelNotReady(self.name, "The replica at work on the request was lost.")
        return error

    def _keep_looking(self) -> None:
        seen = True
        while not self._stopped:
            if self._look_now.wait(WATCH_PERIOD_S):
                self._look_now.clear()
            try:
                self._look()
                seen = True
            except Exception as error:  # whatever it is, the watch goes on
                if seen and not self._stopped:
                    logger.warning("cannot see the replicas of %s: %s", self.name, error)
                seen = False

    def _look(self) -> None:
        """Ask Serve's controller how many replicas run."""
        app = serve.status().applications.get(self._handle.app_name)
        deployment = app.deployments.get(self._handle.deployment_name) if app else None
        states = deployment.replica_states if deployment else {}
        self._running = sum(states.get(state, 0) for state in SERVING)
        self._looked = time.monotonic()


def _picklable(body: dict | InferRequest) -> dict | InferRequest:
    """The same request without the protobuf map that gRPC requests carry their parameters in."""
    if isinstance(body, InferRequest) and body.from_grpc:
        body = copy.copy(body)
        body.parameters = to_http_parameters(body.parameters or {})
    return body
