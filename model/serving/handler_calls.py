"""Calls a model's handlers, so that whatever they raise or return ends no more than its request."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from model.serving.errors import logged


def attempt(function: Callable, *args: Any) -> Any:
    """What the function returns, or the exception that it raises."""
    try:
        return function(*args)
    except BaseException as error:
        return _ordinary(error)


async def awaited(handler: Callable, *args: Any) -> Any:
    """What a coroutine handler returns."""
    try:
        return await handler(*args)
    except Exception:
        raise
    except BaseException as error:
        if asyncio.current_task().cancelling():  # nobody waits for it any more
            raise
        raise _ordinary(error) from None


def checked(results: list) -> list:
    """The results of a handler, with its errors logged and what cannot be served as errors."""
    for i, result in enumerate(results):
        if isinstance(result, AsyncIterator):
            result = NotImplementedError("streamed responses are not supported here")
        results[i] = logged(result) if isinstance(result, Exception) else result
    return results


def _ordinary(error: BaseException) -> Exception:
    """An error of the model as one that ends its own request.

    sys.exit() would end the event loop, and so the server with all that is in flight; a panic in an
    extension written in Rust, or a cancellation, would leave the batch without a response.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, SystemExit):
        given = "" if error.code is None else error.code
        return RuntimeError(f"the model called sys.exit({given})")
    return RuntimeError(f"{type(error).__name__}: {error}")
