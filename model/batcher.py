"""Gathers requests that wait and has them answered as batches: in a thread, or by replicas."""

import argparse
import asyncio
import inspect
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kserve.errors import InvalidInput, ModelNotReady

from model import options
from model.metrics import BATCH, WAITING
from model.protocol import Answer, Images, PictureModel, Request


class Batcher:
    """Hands waiting items to workers as batches, whenever a worker is free.

    A batch is sealed only then, so it holds what came in meanwhile. The largest it gets is its
    worker's even share of all that is here, in work or waiting, so that no worker stands idle
    while another has too much. Before that many wait, and while more are to be expected (who got
    an answer is likely to ask again), a free worker waits for the next, at most `wait_s` each
    time. So a lone client never waits.
    """

    def __init__(
        self,
        work: Callable[[list, int], Awaitable[list]],
        workers: Callable[[], int] = lambda: 1,
        size: int = 16,
        wait_s: float = 0.005,
        length: Callable[[Any], int] = len,
    ) -> None:
        """work: takes the items of a batch, and the place of the worker that is to have it (from
        0 on); returns for each item its result or an exception.

        workers: how many there are now; each has one batch at a time. size: the most that the
        lengths of a batch's items may add up to; an item that is longer goes alone. length: of
        an item.
        """
        self._work, self._workers, self._length = work, workers, length
        self._size, self._wait_s = size, wait_s
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._at_work: dict[int, int] = {}  # the place of a worker -> the length of its batch
        self._tasks: set[asyncio.Task] = set()  # asyncio itself would not keep them
        self._expected = 0  # the length that is likely to wait soon
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, item: Any) -> Any:
        """The item's result; raises what the batch, or the item in it, came to."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._seal()
        return await future

    @property
    def waiting(self) -> int:
        """How many items wait for a worker."""
        return len(self._waiting)

    @property
    def here(self) -> int:
        """The length of all that waits or is in work."""
        return self._queued + sum(self._at_work.values())

    @property
    def _queued(self) -> int:
        """The length of what waits."""
        return sum(self._length(item) for item, _ in self._waiting)

    def _seal(self, patient: bool = True) -> None:
        """Give what waits to the workers that are free; not yet, if more is expected."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and (free := set(range(self._workers())) - self._at_work.keys()):
            here = max(self._queued, self._expected) + sum(self._at_work.values())
            share = min(self._size, math.ceil(here / self._workers()))
            if patient and self._queued < min(share, self._expected):
                self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._seal, False)
                return
            batch, length = [], 0
            while self._waiting and (
                not batch or length + self._length(self._waiting[0][0]) <= share
            ):
                item, future = self._waiting.popleft()
                if not future.done():  # else nobody waits for it any more
                    batch.append((item, future))
                    length += self._length(item)
            if batch:
                task = asyncio.ensure_future(self._answer(batch, length, min(free)))
                self._at_work[min(free)] = length
                self._expected -= length
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, batch: list[tuple[Any, asyncio.Future]], length: int, place: int):
        try:
            results = await self._work([item for item, _ in batch], place)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} answers to {len(batch)} requests")
        except Exception as error:
            results = [error] * len(batch)
        finally:  # whatever happened, or the worker would never get another batch
            del self._at_work[place]
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._expected = self._queued + length
        self._seal()


class GatheredModel(PictureModel):
    """Stands in KServe's registry for a model and has it answer requests in batches.

    Requests are read and answers written here, in KServe's process. The network's part is the
    model's `answer_all`: awaited, with what is known of the batch, where it is a coroutine; else
    called in a thread of its own.
    """

    def __init__(self, model: Any, timeout_s: float | None = None, **batching: Any) -> None:
        """model: loaded. timeout_s: the longest a request may take. batching: as for Batcher."""
        super().__init__(model.name)
        self.model, self.ready, self.timeout_s = model, model.ready, timeout_s
        # Made when first used: KServe's `--workers` sends this object to other processes.
        self._batching, self._batcher, self._in_thread = batching, None, None

    async def predict(
        self, payload: Request, headers: dict | None = None, response_headers: dict | None = None
    ) -> Answer:
        """Wait for a place in a batch and its answer, at most `timeout_s`."""
        if self._batcher is None:
            self._batcher = Batcher(self._answer_all, **self._batching, length=_pictures)
            WAITING.set_function(lambda: self._batcher.waiting)
        name = (headers or {}).get("x-request-id") or getattr(payload.infer, "id", None) or ""
        payload = payload._replace(id=name)
        try:
            answer = await asyncio.wait_for(self._batcher(payload), self.timeout_s)
        except TimeoutError:
            if not await self.model.healthy():
                raise ModelNotReady(self.name, "Nothing is there to answer.") from None
            limit = f"{self.timeout_s:g} seconds" if self.timeout_s else "its time"
            raise TimeoutError(f"{self.name} gave no answer within {limit}.") from None
        return answer._replace(request=payload)

    async def _answer_all(self, batch: list[Request], place: int) -> list[Answer | InvalidInput]:
        images = [request.images for request in batch]
        BATCH.observe(sum(map(len, images)))
        if inspect.iscoroutinefunction(self.model.answer_all):
            ids = [request.id for request in batch]
            return await self.model.answer_all(images, place, ids, self._batcher.here)
        if self._in_thread is None:
            self._in_thread = InThread(self.model)
        return await self._in_thread(images)

    def idle_s(self) -> float:
        """As InThread's, when the work is done in this process."""
        return self._in_thread.idle_s() if self._in_thread else 0.0

    async def healthy(self) -> bool:
        """Whether the model itself is."""
        return await self.model.healthy()

    def stop(self) -> None:
        """End the model; KServe calls this as it shuts down."""
        self.model.stop()


def _pictures(request: Request) -> int:
    return len(request.images)


class InThread:
    """Has a model answer batches in a thread of its own, one at a time; the caller's loop is free.

    The thread can be asked whether it is stuck.
    """

    def __init__(self, model: Any) -> None:
        """model: with `answer_all(batch)`, `use_threads()`, and `progressed`, when it last got on
        with its work, on the monotonic clock."""
        self._model, self._began = model, None
        self._thread = ThreadPoolExecutor(1, initializer=model.use_threads)

    async def __call__(self, batch: list[Images]) -> list[Answer | InvalidInput]:
        """For each request of the batch its answer or its error."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, batch)

    def _work(self, batch: list[Images]) -> list[Answer | InvalidInput]:
        self._began = time.monotonic()
        try:
            return self._model.answer_all(batch)
        finally:
            self._began = None

    def idle_s(self) -> float:
        """Seconds that the batch in work has made no progress; 0 when there is none."""
        began = self._began
        return time.monotonic() - max(began, self._model.progressed) if began else 0.0


def gathered(model: Any, args: argparse.Namespace) -> Any:
    """The model for KServe's registry as `--batching` wants it: itself, or a GatheredModel."""
    if args.batching != "server":
        return model
    if not hasattr(args, "num_replicas"):
        return GatheredModel(model, **options.batches(args))
    return GatheredModel(
        model,
        **options.batches(args),
        workers=lambda: max(1, model.replicas),
        timeout_s=args.request_timeout_s,
    )
