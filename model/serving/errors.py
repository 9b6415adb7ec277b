"""How requests are refused, over HTTP and gRPC: an honest status and one plain sentence."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from grpc import StatusCode
from kserve.errors import (
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    UnsupportedProtocol,
)
from kserve.logging import logger
from starlette.exceptions import HTTPException

MAX_SENTENCE = 300  # characters


class Forbidden(Exception):
    """What is asked for is off."""


ERRORS = {  # what is raised: the status over HTTP, and over gRPC
    InvalidInput: (400, StatusCode.INVALID_ARGUMENT),
    Forbidden: (403, StatusCode.PERMISSION_DENIED),
    ModelNotFound: (404, StatusCode.NOT_FOUND),
    NotImplementedError: (501, StatusCode.UNIMPLEMENTED),
    UnsupportedProtocol: (501, StatusCode.UNIMPLEMENTED),
    ModelNotReady: (503, StatusCode.UNAVAILABLE),
    TimeoutError: (504, StatusCode.DEADLINE_EXCEEDED),
    InferenceError: (500, StatusCode.INTERNAL),
}


def statuses(error: BaseException) -> tuple[int, StatusCode] | None:
    """The two statuses of an error of this table, or of a class derived from one; else None."""
    return next((ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS), None)


def sentence(error: object) -> str:
    """An error as one line of bounded length, whatever the client had in the request."""
    line = " ".join(str(error).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    if len(line) > MAX_SENTENCE:
        line = f"{line[: MAX_SENTENCE // 2]} ... {line[-MAX_SENTENCE // 2 :]}"
    return line


def first_of(errors: list[dict]) -> str:
    """Where and what the first of pydantic's errors is."""
    return ".".join(str(part) for part in errors[0]["loc"]) + f": {errors[0]['msg']}"


def logged(error: Exception) -> Exception:
    """The same error; one that a model was not expected to raise is logged with its traceback."""
    if statuses(error) is None and not isinstance(error, HTTPException):
        logger.error("the model raised:", exc_info=error)
    return error


def log_refusal(error: Exception) -> None:
    """A line in the log: what the client did wrong is no error of the server."""
    status = statuses(error)[0]
    logger.log(logging.ERROR if status >= 500 else logging.INFO, "refused: %s", sentence(error))


def portable(error: Exception) -> Exception:
    """The error as any process can read it, with no class of the model's own modules in it."""
    if isinstance(error, HTTPException):
        return HTTPException(error.status_code, error.detail)
    kind = next((kind for kind in type(error).__mro__ if kind in ERRORS), None)
    if kind is None:
        return InferenceError(f"{type(error).__name__}: {error}")
    copy = kind(str(error))
    copy.reason = copy.error_msg = str(error)  # some of KServe's make a sentence of a name
    return copy


def reason(error: Exception) -> str:
    """Why something failed, in one line; with the kind of error unless its text is a sentence."""
    text = " ".join(str(error).split()) or "no reason given"
    plain = isinstance(error, RuntimeError | ValueError)
    return text if plain else f"{type(error).__name__}: {text}"


def add_handlers(app: FastAPI) -> None:
    """Have the application answer each of these errors with its status and a sentence.

    KServe's own handlers log a traceback for each, and know fewer.
    """
    for kind in ERRORS:
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)


async def _known(_: Request, error: Exception) -> JSONResponse:
    log_refusal(error)
    return JSONResponse({"error": sentence(error)}, statuses(error)[0])


async def _malformed(_: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"error": sentence(first_of(error.errors()))}, 400)


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    where = " (GET /openapi.json lists the paths)" if error.status_code in (404, 405) else ""
    return JSONResponse({"error": f"{error.detail}{where}"}, error.status_code, error.headers)
