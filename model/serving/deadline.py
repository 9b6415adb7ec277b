"""Until when the client of a request waits, where it says so: by gRPC's deadline or by a header."""

import asyncio
import math
from contextvars import ContextVar

# What Envoy, and so Istio, tells the server behind it; any client may send it. In milliseconds.
HEADER = b"x-envoy-expected-rq-timeout-ms"

# On the event loop's clock, of the request that the current task is about.
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def set_deadline(seconds: float | None) -> None:
    """The client of this task's request waits for so long from now on; None: it does not say."""
    moment = None if seconds is None else asyncio.get_running_loop().time() + seconds
    _deadline.set(moment)


def deadline() -> float | None:
    """Of this task's request, on the event loop's clock."""
    return _deadline.get()


def seconds_in(header: bytes | None) -> float | None:
    """What the header says, in seconds. Raises ValueError unless it is a positive number."""
    if header is None:
        return None
    seconds = float(header) / 1000
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(header)
    return seconds
