"""What is known of a request as it arrives: how large it is, and until when its client waits."""

import asyncio
import math
from contextvars import ContextVar

# What Envoy, and so Istio, tells the server behind it; any client may send it. In milliseconds.
TIMEOUT_HEADER = b"x-envoy-expected-rq-timeout-ms"

# Of the request that the current task is about: bytes, and a moment on the event loop's clock.
_size: ContextVar[int] = ContextVar("size", default=0)
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def arrived(size: int, timeout_s: float | None = None) -> None:
    """The request of this task is here.

    size: of its body, in bytes. timeout_s: how long its client waits from now on, by gRPC's
    deadline or by the header; None: it does not say.
    """
    _size.set(size)
    now = asyncio.get_running_loop().time()
    _deadline.set(None if timeout_s is None else now + timeout_s)


def deadline() -> float | None:
    """Of this task's request, on the event loop's clock."""
    return _deadline.get()


def body_size() -> int:
    """Of this task's request, in bytes; 0 where that is not known."""
    return _size.get()


def seconds_in(header: bytes | None) -> float | None:
    """What the header says, in seconds. Raises ValueError unless it is a positive number."""
    if header is None:
        return None
    seconds = float(header) / 1000
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(header)
    return seconds
