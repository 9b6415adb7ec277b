"""Bounds the memory that request bodies take, while they arrive and while they are worked on."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from model.serving.metrics import BODY_BYTES, follow

TOO_MUCH = "The server holds as much of requests' bodies as it may: try again later."


class Receiving:
    """Counts the bytes of all bodies in the server, from their first byte to the response.

    Above the limit the body that has been arriving for longest gives way: so slow senders, however
    many, keep nobody out. Only what has arrived counts, not what is announced.
    """

    def __init__(self, limit: int) -> None:
        """limit: in bytes."""
        self.limit, self.total = limit, 0
        self._arriving: OrderedDict[_Body, None] = OrderedDict()  # oldest first
        follow(BODY_BYTES, lambda: self.total)

    @contextmanager
    def body(self) -> Iterator["_Body"]:
        """One request's body, which arrives in the current task; it counts until the block ends."""
        body = _Body(self)
        self._arriving[body] = None
        try:
            yield body
        finally:
            self._arriving.pop(body, None)
            self.total -= body.size

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more fit, if all bodies that arrive give way."""
        return self.total - sum(body.size for body in self._arriving) + size <= self.limit

    def make_room(self) -> None:
        """Have bodies give way until the rest is within the limit; those of which nothing has
        arrived yet would free nothing."""
        excess = self.total - self.limit
        if excess <= 0:
            return
        for body in [body for body in self._arriving if body.size]:
            del self._arriving[body]
            excess -= body.size
            body.give_way()
            if excess <= 0:
                return


class _Body:
    def __init__(self, receiving: Receiving) -> None:
        self._receiving, self._task = receiving, asyncio.current_task()
        self.size, self.gave_way = 0, False

    def grew(self, size: int) -> None:
        """So many bytes more are here."""
        self.size += size
        self._receiving.total += size
        self._receiving.make_room()

    def complete(self) -> None:
        """All of it is here: it no longer gives way."""
        self._receiving._arriving.pop(self, None)

    def give_way(self) -> None:
        """End its request: where it waits for more, its task is cancelled. It counts no longer."""
        self.gave_way = True
        self._receiving.total -= self.size
        self.size = 0
        if self._task is not asyncio.current_task():
            self._task.cancel()
