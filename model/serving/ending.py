"""How a server ends: a signal asks for it, it drains if it was told to, a second one hurries it."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from kserve.logging import logger


class Ending:
    """What signals ask for: that the server ends, and, a second one or Ctrl-C, that it does now."""

    def __init__(self) -> None:
        self.asked, self._now = asyncio.Event(), asyncio.Event()

    def obey(self, number: int) -> None:
        """A signal has come."""
        if self.asked.is_set() or number == signal.SIGINT:
            self._now.set()
        self.asked.set()

    @property
    def hurried(self) -> bool:
        """Whether it is to end without a drain, or without the rest of it."""
        return self._now.is_set()

    async def drain(self, seconds: float) -> None:
        """Go on for a while with a readiness that is false, so that others stop sending first."""
        if seconds and self.asked.is_set() and not self.hurried:
            logger.info("Draining for %g seconds", seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), seconds)


@contextlib.contextmanager
def signals(obey: Callable[[int], None]) -> Iterator[None]:
    """In this block SIGTERM and SIGINT call `obey` with their number, again and again; after it
    nothing.

    What is left to do then is short, and must be done. (Handlers of the event loop itself would
    leave Python's default behind.)
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda which, _: loop.call_soon_threadsafe(obey, which))
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
