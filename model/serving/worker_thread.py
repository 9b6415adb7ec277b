"""Holds a model in this process and runs its batches in a thread beside the event loop."""

import asyncio
import inspect
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from kserve import Model
from kserve.model import InferenceVerb

from model.serving.config import ModelConfig
from model.serving.errors import portable
from model.serving.handler_calls import attempt, awaited, checked
from model.serving.model_class import make_model
from model.serving.protocol import Description, Request, Response


class WorkerThread:
    """The backend that needs no Ray: one model, one batch at a time, the event loop stays free.

    Handlers of the model that are plain functions run in the thread; those that are coroutines
    are awaited on the event loop, as KServe itself does it.
    """

    workers = 1

    def __init__(self, model: ModelConfig, threads: int) -> None:
        """model: what to load. threads: of numerical libraries (OMP_NUM_THREADS), which counts
        for those that are imported from now on."""
        self._config, self._threads = model, threads
        self._model: Model | None = None
        self.description: Description | None = None

    def load(self) -> None:
        """Make and load the model; called again it does nothing. Raises what the model raises."""
        if self._model is not None:
            return
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        model = make_model(self._config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"model {model.name}")
        self._began: dict[object, float] = {}  # when each step that is under way did
        self._id = secrets.token_hex(4)
        self._model, self.description = model, self._describe(model)
        handlers = [model.preprocess, model.predict, model.postprocess]
        handlers.append(getattr(model, "predict_batch", None))
        self._plain = not any(
            inspect.iscoroutinefunction(handler) and not _is_default(handler)
            for handler in handlers
        )

    def _describe(self, model: Model) -> Description:
        inputs, outputs = (
            self._thread.submit(asyncio.run, types()).result()
            if inspect.iscoroutinefunction(types)
            else types()
            for types in (model.get_input_types, model.get_output_types)
        )
        batched = callable(getattr(model, "predict_batch", None))
        idempotent = bool(getattr(model, "idempotent", True))
        return Description(inputs, outputs, batched, idempotent, self._config)

    def reload(self) -> None:
        """Call the model's `load` again, in the caller's thread, while it goes on serving.

        Where that raises, or leaves the model not ready, it is ready as it was before.
        """
        was_ready = self._model.ready
        try:
            self._model.load()
            if was_ready and not self._model.ready:
                raise RuntimeError("the model is not ready after load()")
        finally:
            self._model.ready = was_ready
        self._id = secrets.token_hex(4)

    def __getstate__(self) -> dict[str, Any]:
        """KServe's `--workers N` sends this object to N processes; each loads its own model."""
        return {"_config": self._config, "_threads": self._threads, "_model": None} | {
            "description": None
        }

    async def predict_batch(
        self, requests: Sequence[Request], worker_index: int = 0, backlog: int = 0
    ) -> list[Response | Exception]:
        """For each request its response or its error; a bad request fails by itself.

        worker_index, backlog: of no use here, where there is one worker.
        """
        return await self._run(requests, self._predict)

    async def call(self, request: Request, verb: InferenceVerb = InferenceVerb.PREDICT) -> Response:
        """The response to one request, outside of any batch; raises its error."""
        step = self._explain if verb is InferenceVerb.EXPLAIN else self._predict
        [result] = await self._run([request], step, hold=False)
        if isinstance(result, Exception):
            raise result
        return result

    async def healthy(self) -> bool:
        """Whether the model is loaded and says that it is well."""
        if self._model is None:
            return False
        healthy = self._model.healthy()
        return bool(await healthy if inspect.isawaitable(healthy) else healthy)

    def stalled_for(self) -> float:
        """Seconds since the step began that has been under way for longest; 0.0 when it is idle."""
        began = [*self._began.values()]
        return time.monotonic() - min(began) if began else 0.0

    async def check(self, watchdog_timeout_s: float) -> None:
        """Raise RuntimeError when a step of a batch takes longer, or the model is not healthy."""
        name, stalled_for = self._config.name, self.stalled_for()
        if stalled_for > watchdog_timeout_s:
            raise RuntimeError(f"{name}: a step of the batch has taken {stalled_for:.0f} s")
        if not await self.healthy():
            raise RuntimeError(f"{name}: the model says that it is not healthy")

    def stop(self) -> None:
        """Tell the model that serving ends."""
        if self._model is not None:
            self._model.stop()

    async def _run(
        self, requests: Sequence[Request], step: Callable, hold: bool = True
    ) -> list[Response | Exception]:
        """preprocess each, `step` all, postprocess each; a request that fails takes no next one.

        All in one visit to the thread where no handler is a coroutine: each way there and back
        waits until the other side lets go of Python's lock. hold: as for _until_done.
        """
        items = [_Item(request) for request in requests]
        if step == self._predict and self._plain:
            return await self._until_done(self._at_once, (items, step), hold)
        return await self._steps(items, step, partial(self._call, hold=hold))

    def _at_once(
        self, items: list["_Item"], step: Callable, stop: threading.Event
    ) -> list[Response | Exception]:
        """The steps one after the other; to be called in the thread."""

        async def call(handler: Callable, arguments: list[tuple]) -> list:
            return self._in_thread(handler, arguments, stop)

        return _result_of(self._steps(items, step, call))

    async def _steps(
        self, items: list["_Item"], step: Callable, call: "_Call"
    ) -> list[Response | Exception]:
        model, began = self._model, time.time()
        of_request = [(item.request.body, item.request.headers) for item in items]
        await _each(model.preprocess, items, of_request, call)
        for item in _good(items):
            item.value = attempt(model.validate, item.value)
        preprocessed = time.time()
        await step(items, call)
        finished = time.time()
        await self._each_value(model.postprocess, items, call)
        marks = {"x-worker": self._id, "x-started": f"{began:.6f}"}
        marks |= {"x-preprocessed": f"{preprocessed:.6f}", "x-finished": f"{finished:.6f}"}
        return [
            portable(item.value)
            if isinstance(item.value, Exception)
            else Response(item.value, item.response_headers | marks)
            for item in items
        ]

    async def _predict(self, items: list["_Item"], call: "_Call") -> None:
        """By predict_batch, or by predict for each where the model has no other."""
        if not self.description.has_predict_batch:
            await self._each_value(self._model.predict, items, call)
        elif good := _good(items):
            results = await self._as_batch([item.value for item in good], call)
            if isinstance(results, Exception) and len(good) > 1 and self.description.idempotent:
                # The input of one may have failed the others too: each by itself, then.
                results = [(await self._as_batch([item.value], call)) for item in good]
                results = [r if isinstance(r, Exception) else r[0] for r in results]
            elif isinstance(results, Exception):
                results = [results] * len(good)
            for item, result in zip(good, results, strict=True):
                item.value = result

    async def _as_batch(self, inputs: list, call: "_Call") -> list | Exception:
        """What predict_batch returns, or the exception that it raised."""
        [results] = await call(self._model.predict_batch, [(inputs,)])
        if isinstance(results, Exception):
            return results
        if not isinstance(results, list) or len(results) != len(inputs):
            what = len(results) if isinstance(results, list) else type(results).__name__
            wrong = "predict_batch must return a list with one result for each request, which is "
            wrong += f"{len(inputs)} here, not {what}"
            return RuntimeError(wrong)
        return checked(results)

    async def _explain(self, items: list["_Item"], call: "_Call") -> None:
        good = _good(items)
        arguments = [(item.value, item.request.headers) for item in good]
        await _each(self._model.explain, good, arguments, call)

    async def _each_value(self, handler: Callable, items: list["_Item"], call: "_Call") -> None:
        """Of predict and postprocess, which KServe gives headers of the response to if the model
        asked for them."""
        good = _good(items)
        with_headers = self._model.required_response_headers
        arguments = [
            (i.value, i.request.headers, *([i.response_headers] if with_headers else []))
            for i in good
        ]
        await _each(handler, good, arguments, call)

    async def _call(self, handler: Callable, arguments: list[tuple], hold: bool) -> list:
        """What the handler gives for each tuple of arguments; or the exception that it raised."""
        if not inspect.iscoroutinefunction(handler):
            return await self._until_done(self._in_thread, (handler, arguments), hold)
        step = object()
        self._began[step] = time.monotonic()
        try:
            waiting = (awaited(handler, *args) for args in arguments)
            return checked(await asyncio.gather(*waiting, return_exceptions=True))
        finally:
            del self._began[step]

    async def _until_done(self, work: Callable[..., list], arguments: tuple, hold: bool) -> list:
        """Call `work` in the thread. Where this is cancelled the thread stops before the next call
        of a handler.

        hold: the cancellation waits for that, as for a batch, in whose place the next one comes. A
        single request waits for no other's call: it may be a long one.
        """
        stop, held = threading.Event(), list(arguments)  # the executor keeps what it has not begun
        done = self._thread.submit(lambda: work(*held, stop))
        try:
            return await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            stop.set()
            if done.cancel():
                held.clear()
            elif hold:
                await asyncio.gather(asyncio.wrap_future(done), return_exceptions=True)
            raise

    def _in_thread(self, handler: Callable, arguments: list[tuple], stop: threading.Event) -> list:
        """As _call; raises _Stopped once `stop` is set."""
        results = []
        try:
            for args in arguments:
                if stop.is_set():
                    raise _Stopped
                self._began[self._thread] = time.monotonic()
                results.append(attempt(handler, *args))
        finally:
            self._began.pop(self._thread, None)
        return checked(results)


_Call = Callable[[Callable, list[tuple]], Awaitable[list]]


class _Stopped(Exception):
    """Nobody waits any more for what the thread works on."""


async def _each(
    handler: Callable, items: list["_Item"], arguments: list[tuple], call: _Call
) -> None:
    """Replace the value of each item by what the handler makes of its arguments."""
    if _is_default(handler):  # KServe's own, which return what they get
        results = [first for first, *_ in arguments]
    else:
        results = await call(handler, arguments)
    for item, result in zip(items, results, strict=True):
        item.value = result


def _result_of(coroutine: Coroutine) -> Any:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        return returned.value
    raise RuntimeError(f"{coroutine} waits for something")


def _is_default(handler: Callable) -> bool:
    """Whether it is kserve.Model's own preprocess or postprocess, which return what they get."""
    return getattr(handler, "__func__", None) in (Model.preprocess, Model.postprocess)


class _Item:
    """One request on its way through the model's handlers."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.value: Any = None  # what the last handler made of it, or the exception it raised
        self.response_headers: dict[str, str] = {}


def _good(items: list[_Item]) -> list[_Item]:
    """Those that have not failed."""
    return [item for item in items if not isinstance(item.value, Exception)]
