"""The backend of Ray Serve replicas: what KServe's RayModel leaves out, added."""

import asyncio
import pickle
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
from kserve.errors import InferenceError, ModelNotReady
from kserve.logging import logger
from kserve.model import InferenceVerb
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from model.serving.config import LimitsConfig
from model.serving.metrics import REPLICAS, RETRIES
from model.serving.protocol import Description, Request, Response
from model.serving.retries import RetryBudget
from model.serving.upstream_ray import over_grpc

WATCH_PERIOD_S = 0.3  # between two looks at the replicas
STALE_S = 5.0  # a look older than this no longer counts
# UPDATING: it loads again; RECOVERING: the controller was started again and asks who is there.
SERVING = ("RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")
PING_TIMEOUT_S = 0.5  # a kubelet's probe gives up after a second
RETRY_PAUSE_S = 0.1
LAST_PAUSE_S = 1.0  # before the last attempt: until whatever takes the replicas away is over
SHARED_S = 10.0  # for so long after a batch of another frontend was met, there may be more
ATTEMPTS = 3  # at most so many replicas get a request, one after the other
LOAD_TIMEOUT_S = 60.0
DESCRIBE_TIMEOUT_S = 2.0


class ReplicaPool:
    """Sends requests to the replicas of one model.

    What it does that RayModel (kserve 0.21) leaves out:

    - the verb goes along, so `:explain` is not answered with a prediction;
    - `load` waits until a replica has described its model; errors come out;
    - `healthy` tells whether replicas run, from a watch in the background; while Ray's head is
      away, whether they answer;
    - an error raised in a replica arrives as itself, without the remote traceback;
    - what is in flight on a crashed or stuck replica is retried on another one, unless the model
      says that it is not idempotent;
    - overload, and replicas lost again and again, raise ModelNotReady (HTTP 503, gRPC UNAVAILABLE);
    - a request waits at most for its timeout and then raises TimeoutError (HTTP 504).

    A request that itself crashes the replicas that get it is given up after three. Those in its
    batch are not: once two replicas were lost, each is sent by itself. Retries have a budget, so
    that they do not become a storm. While no replica runs, requests that are in flight already wait
    for one.
    """

    def __init__(self, name: str, handle: DeploymentHandle, limits: LimitsConfig) -> None:
        """name: the model's. handle: of a deployment of Replica. limits: of which the timeouts of
        a request and of an attempt count here."""
        self._name, self._limits = name, limits
        self._handle, self._by_reference = over_grpc(handle), handle
        self.description: Description | None = None
        self._budget = RetryBudget()
        self._frontend = secrets.token_hex(4)  # this one, among those that share the replicas
        self._others_seen = float("-inf")  # when another frontend's batch was met, monotonic
        self._deployed: float | None = None  # when the application was, as last looked
        self._described: float | None = None  # of which deployment `description` is
        self._running = 0  # replicas, when last looked
        self._looked = float("-inf")  # when that was, on the monotonic clock
        self._answered = float("-inf")  # when a replica answered last
        self._watch: threading.Thread | None = None
        self._look_now, self._stopped = threading.Event(), False
        REPLICAS.labels(name).set_function(lambda: self._running)

    def load(self) -> None:
        """Wait until a replica describes its model; then keep watching how many run.

        Called again it does nothing. Raises ModelNotReady when none is there within a minute.
        """
        if self._watch is not None:
            return
        try:
            self.description = self._describe(LOAD_TIMEOUT_S)
        except TimeoutError:
            raise ModelNotReady(self._name, "None of its replicas has loaded it.") from None
        except Exception as error:
            raise self._translated(error) from None
        self._look()
        self._described = self._deployed  # no update has been seen since
        self._stopped = False
        self._watch = threading.Thread(target=self._keep_looking, daemon=True)
        self._watch.start()

    @property
    def workers(self) -> int:
        """How many replicas run, as the watch saw it last; 1 if none does."""
        return max(1, self._running)

    async def predict_batch(
        self, requests: Sequence[Request], worker_index: int, backlog: int
    ) -> list[Response | Exception]:
        """Have the replica with that index, of as many as run, answer a batch in one call."""
        now = time.monotonic()
        more = {"worker_index": worker_index, "backlog": backlog, "frontend": self._frontend}
        more["shared"] = now - self._others_seen < SHARED_S
        return await self._send("predict_batch", requests, **more)

    async def call(self, request: Request, verb: InferenceVerb) -> Response:
        """Have the least busy replica answer one request."""
        [result] = await self._send("call", [request], verb=verb)
        if isinstance(result, Exception):
            raise result
        return result

    async def healthy(self) -> bool:
        """Whether at least one replica runs: a state the watch keeps, not a call to Ray.

        When Serve's controller has not been heard of lately, its node being lost, say, replicas
        that answer are enough; one is asked if none has answered lately.
        """
        if self._watch is None or self._running == 0:
            return False
        if time.monotonic() - max(self._looked, self._answered) < STALE_S:
            return True
        try:
            await asyncio.wait_for(self._handle.describe.remote(), PING_TIMEOUT_S)
        except Exception:  # whatever it is, it is no answer
            return False
        return True

    def stop(self) -> None:
        """End the watch."""
        watch, self._stopped, self._watch = self._watch, True, None
        self._look_now.set()
        if watch:  # so that no look is under way as Ray ends
            watch.join(STALE_S)

    async def _send(
        self,
        method: str,
        requests: Sequence[Request],
        attempts: int = 0,
        deadline: float | None = None,
        **more: Any,
    ) -> list:
        """Call a replica's method, and another's where one is lost or takes too long.

        attempts: that were made before. deadline: on the event loop's clock.
        """
        now = asyncio.get_running_loop().time
        deadline = deadline or now() + self._limits.request_timeout_s
        # gRPC refuses large responses too, and then the call has been made: it is made again.
        handle = self._handle if self.description.idempotent else self._by_reference
        any_crashed = False
        while True:
            try:
                async with self._budget.call(attempts > 0, deadline):
                    limit = min(deadline - now(), self._limits.per_attempt_timeout_s)
                    return await self._attempt(handle, method, requests, limit, **more)
            except Exception as error:
                if _too_large(error) and handle is self._handle:
                    handle = self._by_reference
                    continue
                if not _lost(error) or not self.description.idempotent:
                    raise self._translated(error) from None
                # While no replica runs the call waits in vain, and no attempt is made.
                crashed = not isinstance(error, TimeoutError)
                made = crashed or self._running > 0
                attempts += made
                if attempts >= ATTEMPTS or now() > deadline:
                    raise self._translated(error, attempts, len(requests)) from None
                if made:
                    reason = type(error).__name__
                    RETRIES.labels(self._name, reason).inc(len(requests))
                    logger.warning("retried (%s): %s", reason, ", ".join(r.id for r in requests))
                any_crashed = any_crashed or crashed
            self._look_now.set()
            if crashed and attempts == ATTEMPTS - 1:
                await asyncio.sleep(LAST_PAUSE_S)
            if any_crashed and attempts == ATTEMPTS - 1 and len(requests) > 1:
                return [await self._alone(method, r, attempts, deadline, more) for r in requests]
            await asyncio.sleep(RETRY_PAUSE_S)
            worker_index = more.get("worker_index", 0) + 1  # not the one that is stuck
            if crashed:
                worker_index = await self._alive(worker_index, deadline)
            more["worker_index"] = worker_index

    async def _attempt(
        self, handle: DeploymentHandle, method: str, requests: Sequence[Request], limit, **more: Any
    ) -> list:
        """One call of a replica's method, for at most `limit` seconds.

        A call that is given up, or that nobody waits for any more, is cancelled in the replica too.
        """
        payload = pickle.dumps(list(requests), pickle.HIGHEST_PROTOCOL)
        response = getattr(handle, method).remote(payload, **more)
        try:
            answer = await asyncio.wait_for(response, limit)
        except asyncio.CancelledError:  # the client has gone
            response.cancel()
            raise
        except TimeoutError as error:
            if not isinstance(error, RayTaskError):
                response.cancel()
            raise
        self._answered = time.monotonic()
        if method == "predict_batch":
            answer, others = answer
            if others:  # from now on replicas are asked how busy they are
                self._others_seen = self._answered
        return pickle.loads(answer)

    async def _alone(
        self, method: str, request: Request, attempts: int, deadline: float, more: dict[str, Any]
    ) -> Response | Exception:
        """The last attempt of a request whose batch has crashed replicas before: one of them may
        have done that, and takes nobody else with it now."""
        index = await self._alive(more.get("worker_index", 0) + 1, deadline)
        more = more | {"worker_index": index}
        try:
            [result] = await self._send(method, [request], attempts, deadline, **more)
        except Exception as error:
            return error
        return result

    async def _alive(self, worker_index: int, deadline: float) -> int:
        """The index of a replica that answers, from this one on; at the deadline any.

        Several replicas may be lost together, and only who is sent to one of them learns that. So
        none of a request's attempts is spent on a replica that is dead already.
        """
        now = asyncio.get_running_loop().time
        while now() < deadline:
            try:
                await asyncio.wait_for(
                    self._handle.ping.remote(worker_index=worker_index), PING_TIMEOUT_S
                )
                break
            except Exception:  # whatever it is, it is no answer
                worker_index += 1
                await asyncio.sleep(RETRY_PAUSE_S)
        return worker_index

    def _translated(self, error: Exception, attempts: int = 0, requests: int = 0) -> Exception:
        """What KServe can answer with, in place of what Ray raised.

        attempts: that were made. requests: that were in the last of them.
        """
        if isinstance(error, RayTaskError):  # raised in the replica, not by the model
            return RuntimeError(str(error.cause))
        if isinstance(error, TimeoutError) and not self._running:
            return ModelNotReady(self._name, "None of its replicas runs.")
        if isinstance(error, TimeoutError):
            each = self._limits.per_attempt_timeout_s
            if attempts == ATTEMPTS and ATTEMPTS * each < self._limits.request_timeout_s:
                limit = f"in {ATTEMPTS} attempts of {each:g} seconds"
            elif not self.description.idempotent:
                limit = f"within {min(each, self._limits.request_timeout_s):g} seconds"
            else:
                limit = f"within {self._limits.request_timeout_s:g} seconds"
            return TimeoutError(f"{self._name} gave no response {limit}.")
        if isinstance(error, BackPressureError):
            return ModelNotReady(self._name, "Its replicas are busy and the queue is full.")
        if isinstance(error, RayActorError) and attempts >= ATTEMPTS and requests == 1:
            # Not a 503, after which it would be retried, and crash the next ones.
            return InferenceError(f"Given up after {attempts} attempts, in which replicas crashed.")
        if _lost(error) and not self.description.idempotent:
            # Nor here: what may have been done would be done again.
            return InferenceError(
                "The replica at work on the request was lost. The request may have been done; its "
                "model is not idempotent, so it was not sent to another one."
            )
        if isinstance(error, RayError | RayServeException | grpc.RpcError):
            return ModelNotReady(self._name, "The replica at work on the request was lost.")
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
                    logger.warning("cannot see the replicas of %s: %s", self._name, error)
                seen = False

    def _look(self) -> None:
        """Ask Serve's controller how many replicas run."""
        app = serve.status().applications.get(self._handle.app_name)
        deployment = app.deployments.get(self._handle.deployment_name) if app else None
        states = deployment.replica_states if deployment else {}
        self._running = sum(states.get(state, 0) for state in SERVING)
        self._looked = time.monotonic()
        self._deployed = app.last_deployed_time_s if app else self._deployed
        if self._watch is not None and self._deployed != self._described and self._running:
            self._describe_again(app.status == "RUNNING")

    def _describe(self, timeout_s: float) -> Description:
        """What a replica says of its model."""
        return Description(*self._by_reference.describe.remote().result(timeout_s=timeout_s))

    def _describe_again(self, done: bool) -> None:
        """After an update the model may say something else of itself.

        done: whether the update is. Until then replicas of both versions answer, and a request may
        be retried only where both say so.
        """
        now = self._describe(DESCRIBE_TIMEOUT_S)
        if done:
            self.description, self._described = now, self._deployed
        elif not now.idempotent:
            self.description = self.description._replace(idempotent=False)


def _lost(error: Exception) -> bool:
    """Whether the replica, or the way to it, was lost; what a replica raised is a RayTaskError."""
    if isinstance(error, RayTaskError):
        return False
    return isinstance(error, RayActorError | TimeoutError | grpc.RpcError)


def _too_large(error: Exception) -> bool:
    """Whether gRPC refused a message, which Ray's object store would take."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
