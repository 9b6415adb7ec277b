"""How requests are refused, over HTTP and gRPC: an honest status and one plain sentence."""

import asyncio

import grpc
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from google.protobuf.message import DecodeError
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.logging import logger
from kserve.model_server import app
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from starlette.exceptions import HTTPException

from model.gate import HttpGate

BODY_WITHIN_S = 30  # from a request's headers to the end of its body
LONGEST_SENTENCE = 300


class Forbidden(Exception):
    """What is asked for is off."""


ERRORS = {  # what is raised: the status over HTTP, and over gRPC
    InvalidInput: (400, grpc.StatusCode.INVALID_ARGUMENT),
    Forbidden: (403, grpc.StatusCode.PERMISSION_DENIED),
    ModelNotFound: (404, grpc.StatusCode.NOT_FOUND),
    NotImplementedError: (501, grpc.StatusCode.UNIMPLEMENTED),
    ModelNotReady: (503, grpc.StatusCode.UNAVAILABLE),
    TimeoutError: (504, grpc.StatusCode.DEADLINE_EXCEEDED),
}


def sentence(error: object) -> str:
    """An error as one line of bounded length, whatever the client had in the request."""
    line = " ".join(str(error).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    if len(line) > LONGEST_SENTENCE:
        line = f"{line[: LONGEST_SENTENCE // 2]} ... {line[-LONGEST_SENTENCE // 2 :]}"
    return line


def first(errors: list[dict]) -> str:
    """Where and what the first of pydantic's errors is."""
    return ".".join(str(part) for part in errors[0]["loc"]) + f": {errors[0]['msg']}"


async def _known(_: Request, error: Exception) -> JSONResponse:
    status, _ = next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)
    logger.error("refused: %s", sentence(error))  # KServe's handlers log a traceback
    return JSONResponse({"error": sentence(error)}, status)


async def _malformed(_: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"error": sentence(first(error.errors()))}, 400)


async def _no_such_path(_: Request, error: HTTPException) -> JSONResponse:
    where = " (GET /openapi.json lists the paths)" if error.status_code in (404, 405) else ""
    return JSONResponse({"error": f"{error.detail}{where}"}, error.status_code, error.headers)


def application(max_body_mb: float):
    """KServe's application, as uvicorn is to run it: called in each process that does."""
    for kind in ERRORS:
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_such_path)
    return HttpGate(WholeBody(app, max_body_mb))


class WholeBody:
    """ASGI middleware: hands a request on when its body is here; refuses one too large or slow."""

    def __init__(self, app, max_body_mb: float) -> None:
        self.app, self.max_body_mb = app, max_body_mb

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_WITHIN_S):
                body = await self._read(dict(scope["headers"]), receive)
        except _TooLarge:
            error = (
                f"the body is larger than {self.max_body_mb:g} MB: send fewer or smaller "
                "pictures, or start the server with a larger --max_body_mb"
            )
            return await JSONResponse({"error": error}, 413)(scope, receive, send)
        except TimeoutError:
            error = f"the body was not here in {BODY_WITHIN_S} seconds: send less, or faster"
            close = {"connection": "close"}
            return await JSONResponse({"error": error}, 408, close)(scope, receive, send)
        except _Gone:
            return None
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def from_here():
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, from_here, send)

    async def _read(self, headers: dict[bytes, bytes], receive) -> bytes:
        """The body; a length that is too large is refused before any of it is read."""
        most = self.max_body_mb * 2**20
        if int(headers.get(b"content-length", 0)) > most:
            raise _TooLarge
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message["body"]
            more = message["more_body"]
            if len(body) > most:
                raise _TooLarge
        return bytes(body)


class _TooLarge(Exception):
    """More comes, or is announced, than may."""


class _Gone(Exception):
    """The client has closed the connection."""


class ClosedRepository(ModelRepositoryExtension):
    """KServe's repository API when it is off: no caller can take the model away from the others."""

    async def load(self, model_name: str) -> None:
        """Refuse."""
        raise Forbidden("loading is off: start the server with --repository_api on")

    async def unload(self, model_name: str) -> None:
        """Refuse."""
        raise Forbidden("unloading is off: start the server with --repository_api on")


class StatusInterceptor(ExceptionToStatusInterceptor):
    """Gives every error its gRPC status, with one plain sentence."""

    async def intercept_service(self, continuation, handler_call_details):
        """Bytes that are no message are handed on as an error (gRPC itself: UNKNOWN)."""
        handler = await super().intercept_service(continuation, handler_call_details)
        if handler is None:  # there is no such method
            return None
        read = handler.request_deserializer

        def read_or_error(data: bytes):
            try:
                return read(data)
            except DecodeError as error:
                return error

        return handler._replace(request_deserializer=read_or_error)

    async def intercept(self, method, request_or_iterator, context, method_name):
        """Answer a call, unless it is one of those errors."""
        if isinstance(request_or_iterator, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence(request_or_iterator))
        return await super().intercept(method, request_or_iterator, context, method_name)

    async def handle_exception(self, ex, request_or_iterator, context, method_name):
        """KServe's logs a traceback and reads `.reason`, which ModelNotReady and others lack."""
        for kind in type(ex).__mro__:
            if kind in ERRORS:
                logger.error("refused: %s", sentence(ex))
                await context.abort(ERRORS[kind][1], sentence(ex))
        await super().handle_exception(ex, request_or_iterator, context, method_name)
