"""What KServe's registry holds for each model: hands requests to a backend, in batches."""

import asyncio
import math
import os
import time
import traceback
from typing import Any

from kserve import Model
from kserve.errors import ModelNotReady
from kserve.model import InferenceVerb

from model.serving.arrival import body_size, deadline
from model.serving.backend import Backend
from model.serving.batcher import Batcher
from model.serving.config import BatchingConfig, CannotStart
from model.serving.dispatch import load_rule
from model.serving.errors import reason, sentence
from model.serving.metrics import BATCH_SIZE, QUEUED, follow
from model.serving.protocol import Request, Response, count_instances, picklable

LONGEST_ID = 128  # characters
LARGEST_BATCH = 64 * 2**20  # bytes of bodies in one call: it is copied some times on its way


class BatchedModel(Model):
    """Stands in KServe's registry for a model of any kind; the work is the backend's.

    Requests wait here for a worker, at most `timeout_s` in all, and go out in batches where the
    model has `predict_batch`. The frontend knows nothing of what a body means.
    """

    def __init__(
        self, name: str, backend: Backend, batching: BatchingConfig, timeout_s: float
    ) -> None:
        """name: of the model. backend: not loaded yet. timeout_s: of a request, in all."""
        super().__init__(name, return_response_headers=True)
        self._backend, self._batching, self._timeout_s = backend, batching, timeout_s
        self._batcher: Batcher | None = None
        QUEUED.labels(name).set(0)
        self.failure: str | None = None  # why the model could not be loaded

    def load(self) -> bool:
        """Load the backend. On failure the model stays unready, and `failure` says why."""
        try:
            self._backend.load()
        except Exception as error:
            if not isinstance(error, CannotStart | ModelNotReady):
                traceback.print_exc()  # the model's author wants to see where
            self.failure = f"{self.name} cannot be loaded: {reason(error)}"
            return False
        self.failure, self.ready = None, True
        if self._batching.where != "off" and not self.has_predict_batch:
            print(f"{self.name} has no predict_batch: no batches are made for it", flush=True)
        return True

    def refuse(self, why: str) -> None:
        """Do not serve it, loaded as it is."""
        self.failure, self.ready = f"{self.name} is not served: {why}", False

    def __getstate__(self) -> dict[str, Any]:
        """KServe's `--workers N` sends this object to N processes; the batcher is made anew."""
        return self.__dict__ | {"_batcher": None, "ready": False}

    async def predict(
        self, payload: Any, headers: dict | None = None, response_headers: dict | None = None
    ) -> Any:
        """The body of the response; raises TimeoutError (504) or ModelNotReady (503)."""
        read = time.time()
        response = await self._in_time(self._answer(self._request(payload, headers)))
        if response_headers is not None:
            response_headers.update(response.headers, **{"x-read": f"{read:.6f}"})
        return response.body

    async def explain(self, payload: Any, headers: dict | None = None) -> Any:
        """The body of the explanation, if the model gives one."""
        request = self._request(payload, headers)
        return (await self._in_time(self._backend.call(request, InferenceVerb.EXPLAIN))).body

    async def healthy(self) -> bool:
        """Whether it is loaded and its backend can answer."""
        return self.ready and await self._backend.healthy()

    @property
    def has_predict_batch(self) -> bool:
        """Whether the loaded model can predict several requests in one call."""
        return bool(self._backend.description and self._backend.description.has_predict_batch)

    def get_input_types(self) -> list[dict]:
        """The inputs as the loaded model states them."""
        return self._backend.description.inputs if self._backend.description else []

    def get_output_types(self) -> list[dict]:
        """The outputs as the loaded model states them."""
        return self._backend.description.outputs if self._backend.description else []

    def stop(self) -> None:
        """Serving ends."""
        self._backend.stop()
        super().stop()

    def _request(self, payload: Any, headers: dict | None) -> Request:
        headers = dict(headers or {})
        number = headers.get("x-request-id") or getattr(payload, "id", None) or ""
        if len(number) > LONGEST_ID or not number.isprintable():  # it goes into logs
            number = sentence(number)[:LONGEST_ID]
        size = body_size()
        return Request(picklable(payload), headers, number, count_instances(payload, size), size)

    async def _answer(self, request: Request) -> Response:
        """By way of a batch where batches are made here and the model can take them."""
        if self._batching.where != "frontend" or not self.has_predict_batch:
            return await self._backend.call(request, InferenceVerb.PREDICT)
        if self._batcher is None:
            self._batcher = Batcher(
                self._predict_batch,
                workers=lambda: self._backend.workers,
                max_size=self._batching.max_size,
                wait_s=self._batching.wait_s,
                size=self._share_of_a_batch,
                rule=load_rule(self._batching.rule, os.getcwd()),
            )
            follow(QUEUED.labels(self.name), lambda: self._batcher.queued)
        return await self._batcher(request, deadline())

    def _share_of_a_batch(self, request: Request) -> int:
        """Its instances; more, where its body is so large that few of its kind fit into a call."""
        by_bytes = math.ceil(self._batching.max_size * request.size / LARGEST_BATCH)
        return max(request.instances, by_bytes)

    async def _predict_batch(
        self, batch: list[Request], worker_index: int, backlog: int
    ) -> list[Response | Exception]:
        BATCH_SIZE.labels(self.name).observe(sum(request.instances for request in batch))
        return await self._backend.predict_batch(batch, worker_index, backlog)

    async def _in_time(self, answer) -> Response:
        """The answer, within the server's time limit and the client's."""
        end = asyncio.get_running_loop().time() + self._timeout_s
        clients = deadline()
        try:
            async with asyncio.timeout_at(end if clients is None else min(end, clients)) as limit:
                return await answer
        except TimeoutError:
            if not limit.expired():  # the backend's or the batcher's own, which says why
                raise
            if not await self._backend.healthy():
                raise ModelNotReady(self.name, "Nothing is there to answer.") from None
            if clients is not None and clients < end:
                raise TimeoutError(f"{self.name} gave no response by the deadline.") from None
            raise TimeoutError(
                f"{self.name} gave no response within {self._timeout_s:g} seconds."
            ) from None
