"""Gathers what waits into batches and hands them to workers: pure asyncio, for any kind of item."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from model.serving.dispatch import Rule, Waiting, even_share


class Batcher:
    """Hands waiting items to workers as batches, whenever a worker is free.

    A batch is made only then, so it holds what arrived meanwhile. How large it is, and whether the
    worker waits for the next item first, is for a rule to say. `even_share` gives a worker its even
    share of the backlog, so that none is idle while another has too much; it waits only while more
    items are predicted to arrive (a client that got a response is likely to send its next request),
    at most `wait_s` each time. So a lone client never waits.
    """

    def __init__(
        self,
        work: Callable[[list, int, int], Awaitable[list]],
        workers: Callable[[], int] = lambda: 1,
        max_size: int = 16,
        wait_s: float = 0.005,
        size: Callable[[Any], int] = len,
        rule: Rule = even_share,
    ) -> None:
        """Make a batcher; it belongs to the event loop in which it is first called.

        work: takes the items of a batch, the index of the worker that is to have it (from 0 on),
        and the backlog; returns for each item its result or an exception. workers: how many there
        are now; each has one batch at a time. max_size: what the sizes of a batch's items may add
        up to; a larger item goes alone. wait_s: seconds without an arrival, after which a worker
        waits no longer. size: of an item. rule: see model.serving.dispatch.
        """
        self._work, self._workers, self._size, self._rule = work, workers, size, rule
        self._max_size, self._wait_s = max_size, wait_s
        self._queue: deque[tuple[Any, int, asyncio.Future]] = deque()
        self._queued_size = 0
        self._in_flight: dict[int, int] = {}  # worker index -> size of its batch
        self._tasks: set[asyncio.Task] = set()  # asyncio itself would not keep them
        self._predicted_arrivals = 0  # the size that waits or arrives soon, as expected
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, item: Any) -> Any:
        """The item's result; raises what its batch, or the item in it, came to."""
        future = asyncio.get_running_loop().create_future()
        size = self._size(item)
        self._queue.append((item, size, future))
        self._queued_size += size
        self._dispatch()
        return await future

    @property
    def queued(self) -> int:
        """How many items wait for a worker."""
        return len(self._queue)

    @property
    def backlog(self) -> int:
        """The size of everything that waits or is worked on."""
        return self._queued_size + sum(self._in_flight.values())

    def _dispatch(self, waited: bool = False) -> None:
        """Give what waits to the workers that are free, as the rule says."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and (free := set(range(self._workers())) - self._in_flight.keys()):
            try:
                share = self._share(waited)
            except Exception as error:
                return self._fail(error)
            if share < 1 and not waited:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._wait_s, self._dispatch, True)
                return
            batch, size = self._take(share if share > 0 else self._max_size)
            if batch:
                worker_index = min(free)
                self._in_flight[worker_index] = size
                self._predicted_arrivals -= size
                task = asyncio.ensure_future(self._run(batch, size, worker_index))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _share(self, waited: bool) -> int:
        """How much a free worker gets now."""
        waiting = Waiting(
            queued=self._queued_size,
            expected=max(self._queued_size, self._predicted_arrivals),
            in_flight=sum(self._in_flight.values()),
            workers=self._workers(),
            max_size=self._max_size,
            waited=waited,
        )
        return min(int(self._rule(waiting)), self._max_size)

    def _fail(self, error: Exception) -> None:
        """The rule raised: whoever waits gets its error, or would wait for ever."""
        for _, _, future in self._queue:
            if not future.done():
                future.set_exception(error)
        self._queue.clear()
        self._queued_size = 0

    def _take(self, share: int) -> tuple[list[tuple[Any, asyncio.Future]], int]:
        """Remove the items of the next batch from the queue: they, and their size."""
        batch, total = [], 0
        while self._queue and (not batch or total + self._queue[0][1] <= share):
            item, size, future = self._queue.popleft()
            self._queued_size -= size
            if not future.done():  # else nobody waits for it any more
                batch.append((item, future))
                total += size
        return batch, total

    async def _run(
        self, batch: list[tuple[Any, asyncio.Future]], size: int, worker_index: int
    ) -> None:
        try:
            results = await self._work([item for item, _ in batch], worker_index, self.backlog)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} requests")
        except Exception as error:
            results = [error] * len(batch)
        finally:  # whatever happened, or the worker would never get another batch
            del self._in_flight[worker_index]
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._predicted_arrivals = self._queued_size + size
        self._dispatch()
