"""How much may be retried at a time, over all requests for a model."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SHARE, LEAST = 0.2, 3  # of the calls under way; Envoy's defaults


class RetryBudget:
    """Of the calls under way at most a fifth may be retries; three always may.

    After Envoy's retry budget. Envoy drops a retry that is beyond it. Here it waits for its turn,
    within its own time limit, so that what was admitted is not lost when many replicas are.
    """

    def __init__(self) -> None:
        self.active = self.retries = 0
        self._waiting: deque[asyncio.Future] = deque()

    @asynccontextmanager
    async def call(self, retry: bool, until: float) -> AsyncIterator[None]:
        """A call under way in this block; a retry begins when there is room for it.

        until: on the event loop's clock, how long it waits for that; then TimeoutError.
        """
        self.active += 1
        try:
            if retry:
                await self._turn(until)
            try:
                yield
            finally:
                self.retries -= retry
        finally:
            self.active -= 1
            self._let_in()

    async def _turn(self, until: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._let_in()
        try:
            async with asyncio.timeout_at(until):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it was given a turn and cannot take it
                self.retries -= 1
            raise

    def _let_in(self) -> None:
        while self._waiting and self.retries < max(LEAST, int(SHARE * self.active)):
            turn = self._waiting.popleft()
            if not turn.done():  # else it has given up
                self.retries += 1
                turn.set_result(None)
