"""Lets requests in while there is room and refuses the rest at once, over HTTP and gRPC alike."""

import json
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from model.metrics import INSIDE, LIMIT, REQUESTS

RETRY_AFTER_S = 1  # what a client that got 503 is told to wait
FULL = "The server is busy and its queue is full: try again later."
ID = b"x-request-id"
OUTCOMES = {  # of a call that raised; all others failed
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.NOT_FOUND: "invalid",
    grpc.StatusCode.UNAVAILABLE: "refused",
}


class Gate:
    """Counts the requests for predictions that are inside; above `limit` none is let in.

    Who is refused is told so before the body is read: a server that first reads what it cannot
    take spends on refusals what it should spend on answers. It also counts what became of each.
    """

    def __init__(self) -> None:
        self.inside, self.limit = 0, math.inf
        INSIDE.set_function(lambda: self.inside)
        LIMIT.set_function(lambda: self.limit)

    def is_full(self) -> bool:
        """Whether the next request is refused; it is counted then."""
        if self.inside < self.limit:
            return False
        REQUESTS.labels("refused").inc()
        return True

    @contextmanager
    def entered(self) -> Iterator[dict[str, str]]:
        """One request's stay; its `outcome`, in the dictionary yielded, is set by the caller."""
        request = {"outcome": "abandoned"}
        self.inside += 1
        try:
            yield request
        finally:
            self.inside -= 1
            REQUESTS.labels(request["outcome"]).inc()


gate = Gate()  # of this process


class HttpGate:
    """ASGI middleware: the gate, and headers that each request and answer gets.

    An answer says in `x-received` when its request came in, in `x-request-id` the id that the
    client gave it, or else a fresh one, and on a 503 in `Retry-After` when to come again.
    """

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = [(b"x-received", f"{time.time():.6f}".encode())]
        given = next((value for name, value in scope["headers"] if name == ID), None)
        headers.append((ID, given or secrets.token_hex(8).encode()))
        if given is None:
            scope["headers"] = [*scope["headers"], headers[-1]]
        status = 0

        async def send_with_headers(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
                if status == 503:
                    message["headers"].append((b"retry-after", str(RETRY_AFTER_S).encode()))
            await send(message)

        if not _asks_for_predictions(scope):
            return await self.app(scope, receive, send_with_headers)
        if gate.is_full():
            return await _refuse(send_with_headers)
        with gate.entered() as request:
            try:
                await self.app(scope, receive, send_with_headers)
            finally:  # an unexpected error is answered with 500 and then raised
                request["outcome"] = _outcome(status)


def _asks_for_predictions(scope) -> bool:
    return scope["method"] == "POST" and scope["path"].endswith((":predict", "/infer"))


def _outcome(status: int) -> str:
    if status == 0:  # the client went away before all of its request was here
        return "abandoned"
    if status >= 500:
        return "refused" if status == 503 else "failed"
    return "invalid" if status >= 400 else "answered"


async def _refuse(send) -> None:
    body = json.dumps({"error": FULL}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class GrpcGate(grpc.aio.ServerInterceptor):
    """The gate for gRPC's ModelInfer: UNAVAILABLE when it is full."""

    async def intercept_service(self, continuation, details):
        """The handler of a call, with the gate before it; a refused message is not even parsed."""
        handler = await continuation(details)
        if handler is None or not details.method.endswith("/ModelInfer"):
            return handler
        if gate.is_full():
            return grpc.unary_unary_rpc_method_handler(_refuse_call)

        async def infer(request, context):
            if gate.is_full():  # others have come in while the message came
                await context.abort(grpc.StatusCode.UNAVAILABLE, FULL)
            with gate.entered() as counted:
                try:
                    answer = await handler.unary_unary(request, context)
                except grpc.aio.AbortError:
                    counted["outcome"] = OUTCOMES.get(context.code(), "failed")
                    raise
                counted["outcome"] = "answered"
                return answer

        return grpc.unary_unary_rpc_method_handler(
            infer, handler.request_deserializer, handler.response_serializer
        )


async def _refuse_call(request: bytes, context) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, FULL)
