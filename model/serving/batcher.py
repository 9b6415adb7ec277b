"""Gathers what waits into batches and hands them to workers: pure asyncio, for any kind of item."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any

from model.serving.dispatch import Rule, Waiting, even_share

OVERLOAD_S = 2.0  # after a client gave up, so long the newest requests go first
LONG_S = 5.0  # but those who have waited for longer, whose clients are not of that kind
REMEMBERED = 8  # batches, of whose durations the shortest counts
FRESH_S = 10.0  # and no longer: else deadlines that were once too short would be so for ever
LOOK_AGAIN_S = 0.5  # while items wait: there may be more workers than before


class Batcher:
    """Hands waiting items to workers as batches, whenever a worker is free.

    A batch is made only then, so it holds what arrived meanwhile. How large it is, and whether the
    worker waits for the next item first, is for a rule to say. `even_share` gives a worker its even
    share of the backlog, so that none is idle while another has too much; it waits only while more
    items are predicted to arrive (a client that got a response is likely to send its next request),
    at most `wait_s` each time. So a lone client never waits.

    Whoever gives up (is cancelled) leaves the queue at once, and a batch in which nobody waits any
    more is cancelled. An item whose deadline cannot be met is not begun. Items go in the order in
    which they came, until clients give up: then, for a while, the newest go first, for whom there
    is still time ("adaptive LIFO": B. Maurer, Fail at Scale, ACM Queue 13-8, 2015). The oldest
    would be given up while they are worked on, and so everybody's. But whoever has waited for some
    seconds is not passed over: else a few clients that give up would have the others wait for as
    long as there is a queue.

    A batch that most of its clients did not wait for was too large: the next ones hold half of it,
    and each one that they do wait for lets them hold one more, until nobody gives up any more
    (Clipper finds so what a latency allows: D. Crankshaw et al., NSDI 2017).
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
        self._most = max_size  # what a batch may hold now: less while clients give up
        self._queue: OrderedDict[asyncio.Future, _Entry] = OrderedDict()  # oldest first
        self._queued_size = 0
        self._in_flight: dict[int, _Batch] = {}  # by worker index
        self._predicted_arrivals = 0  # the size that waits or arrives soon, as expected
        self._timer: asyncio.TimerHandle | None = None
        self._looks_again = False
        self._newest_first_until = float("-inf")
        self._durations: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # (when, how long)

    async def __call__(self, item: Any, deadline: float | None = None) -> Any:
        """The item's result; raises what its batch, or the item in it, came to.

        deadline: on the event loop's clock; TimeoutError as soon as it cannot be met.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        entry = _Entry(item, self._size(item), future, loop.time(), deadline)
        if self._too_late(entry, loop.time()):
            raise TooLate
        self._queue[future] = entry
        self._queued_size += entry.size
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            self._give_up(entry)
            raise

    @property
    def queued(self) -> int:
        """How many items wait for a worker."""
        return len(self._queue)

    @property
    def backlog(self) -> int:
        """The size of everything that waits or is worked on."""
        return self._queued_size + sum(batch.size for batch in self._in_flight.values())

    def _give_up(self, entry: "_Entry") -> None:
        """Nobody waits for the item any more, wherever it is."""
        self._newest_first_until = asyncio.get_running_loop().time() + OVERLOAD_S
        if self._queue.pop(entry.future, None):
            self._queued_size -= entry.size
            return
        for batch in self._in_flight.values():
            if all(other.future.done() for other in batch.entries):
                batch.task.cancel()

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
            if entries := self._take(share if share > 0 else self._most):
                batch = _Batch(entries)
                self._predicted_arrivals -= batch.size
                self._in_flight[min(free)] = batch
                batch.task = asyncio.ensure_future(self._run(batch, min(free)))
        if self._queue and not self._looks_again:
            self._looks_again = True
            asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        """Workers that came meanwhile need not wait until one of the others has ended its batch."""
        self._looks_again = False
        if self._timer is None:
            self._dispatch()

    def _share(self, waited: bool) -> int:
        """How much a free worker gets now."""
        if not self._clients_give_up():
            self._most = self._max_size
        waiting = Waiting(
            queued=self._queued_size,
            expected=max(self._queued_size, self._predicted_arrivals),
            in_flight=sum(batch.size for batch in self._in_flight.values()),
            workers=self._workers(),
            max_size=self._most,
            waited=waited,
        )
        return min(int(self._rule(waiting)), self._most)

    def _take(self, share: int) -> list["_Entry"]:
        """Remove the items of the next batch from the queue; those that are too late fail."""
        now = asyncio.get_running_loop().time()
        give_up = self._clients_give_up()
        taken, total = [], 0
        while self._queue:
            oldest = next(iter(self._queue.values()))
            newest_first = give_up and now - oldest.since < LONG_S
            future, entry = self._queue.popitem(last=newest_first)
            if future.done():  # cancelled a moment ago: _give_up is about to be called for it
                self._queued_size -= entry.size
                continue
            if taken and total + entry.size > share:
                self._queue[future] = entry
                self._queue.move_to_end(future, last=newest_first)
                break
            self._queued_size -= entry.size
            if self._too_late(entry, now):
                future.set_exception(TooLate())
            else:
                taken.append(entry)
                total += entry.size
        return taken

    def _clients_give_up(self) -> bool:
        """Whether one has of late."""
        return asyncio.get_running_loop().time() < self._newest_first_until

    def _too_late(self, entry: "_Entry", now: float) -> bool:
        """Whether its deadline passes before any batch of late could have been done."""
        if entry.deadline is None:
            return False
        fresh = (took for when, took in self._durations if now - when < FRESH_S)
        return entry.deadline < now + min(fresh, default=0.0)

    def _fail(self, error: Exception) -> None:
        """The rule raised: whoever waits gets its error, or would wait forever."""
        for future in self._queue:
            if not future.done():
                future.set_exception(error)
        self._queue.clear()
        self._queued_size = 0

    async def _run(self, batch: "_Batch", worker_index: int) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        results: list = []
        try:
            items = [entry.item for entry in batch.entries]
            results = await self._work(items, worker_index, self.backlog)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} requests")
            self._durations.append((loop.time(), loop.time() - began))
        except asyncio.CancelledError:  # nobody waits for it any more
            results = [RuntimeError("the batch was cancelled")] * len(batch.entries)
        except Exception as error:
            results = [error] * len(batch.entries)
        finally:  # whatever happened, or the worker would never get another batch
            del self._in_flight[worker_index]
        self._learn(batch)
        for entry, result in zip(batch.entries, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)
        self._predicted_arrivals = self._queued_size + batch.size
        self._dispatch()

    def _learn(self, batch: "_Batch") -> None:
        """How large the next batches may be, from how many of its clients waited for this one."""
        gone = sum(entry.future.done() for entry in batch.entries)
        if not gone:
            self._most = min(self._max_size, self._most + 1)
        elif gone > len(batch.entries) / 2 and len(batch.entries) > 1:
            self._most = max(1, batch.size // 2)


class TooLate(TimeoutError):
    """A deadline that cannot be met."""

    def __init__(self) -> None:
        super().__init__("The request was not begun: it could not be answered by its deadline.")


class _Entry:
    """One item, and who waits for it."""

    __slots__ = ("deadline", "future", "item", "since", "size")

    def __init__(
        self, item: Any, size: int, future: asyncio.Future, since: float, deadline: float | None
    ) -> None:
        """since: when it came, on the event loop's clock."""
        self.item, self.size, self.future = item, size, future
        self.since, self.deadline = since, deadline


class _Batch:
    """What one worker works on. The task is kept here, as asyncio itself would not keep it."""

    task: asyncio.Task

    def __init__(self, entries: list[_Entry]) -> None:
        self.entries, self.size = entries, sum(entry.size for entry in entries)
