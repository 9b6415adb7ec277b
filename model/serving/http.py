"""The way in over HTTP: admits or rejects, reads the body within limits, adds headers."""

import asyncio
import json
import re
import secrets
import time

from model.serving.admission import FULL, RETRY_AFTER_S, Admission, AdmissionController

BODY_TIMEOUT_S = 30  # from a request's headers to the end of its body
PREDICTS = re.compile(r"/v1/models/([^/]+):predict|/v2/models/([^/]+)(?:/versions/[^/]+)?/infer")


class HttpMiddleware:
    """ASGI middleware around KServe's application.

    A request for predictions passes its model's admission control first. Of an admitted one the
    body is read whole, within limits of size and time, before KServe gets it. Each response says
    in `x-received` when its request arrived, in `x-request-id` the id that the client gave it, or
    else a fresh one, and with a 503 in `Retry-After` when to try again.
    """

    def __init__(self, app, admission: Admission, max_body_mb: float) -> None:
        """app: KServe's. max_body_mb: of a request, in units of 2**20 bytes."""
        self.app, self._admission, self._max_body_mb = app, admission, max_body_mb

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = _Exchange(scope, send)
        controller = self._controller(scope)
        if controller is None:
            return await self._read_and_pass(scope, receive, exchange)
        if controller.full:
            controller.reject()
            return await exchange.error(503, FULL)
        with controller.admitted() as request:
            try:
                await self._read_and_pass(scope, receive, exchange)
            finally:  # an unexpected error is answered with 500 and then raised
                request["outcome"] = _outcome(exchange.status)

    def _controller(self, scope) -> AdmissionController | None:
        """Of the model whose predictions are asked for; None for all other requests."""
        found = scope["method"] == "POST" and PREDICTS.fullmatch(scope["path"])
        return self._admission.of(found[1] or found[2]) if found else None

    async def _read_and_pass(self, scope, receive, exchange: "_Exchange") -> None:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await self._read(dict(scope["headers"]), receive)
        except _TooLarge:
            return await exchange.error(
                413,
                f"the body is larger than {self._max_body_mb:g} MB: send less, "
                "or start the server with a larger --max_body_mb",
            )
        except TimeoutError:
            late = f"the body did not arrive within {BODY_TIMEOUT_S} seconds: send less, or faster"
            return await exchange.error(408, late, close=True)
        if body is None:  # the client has closed the connection
            return None
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body():
            return messages.pop() if messages else await receive()

        await self.app(scope, receive_body, exchange.send)

    async def _read(self, headers: dict[bytes, bytes], receive) -> bytes | None:
        """The body, or None when the client went away before it was complete.

        A length that is too large is refused before any of it is read.
        """
        limit = self._max_body_mb * 2**20
        if int(headers.get(b"content-length", 0)) > limit:
            raise _TooLarge
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message["body"]
            more = message["more_body"]
            if len(body) > limit:
                raise _TooLarge
        return bytes(body)


class _Exchange:
    """One request's response: its status, once it is sent, and the headers that each one gets."""

    def __init__(self, scope, send) -> None:
        self._send, self.status = send, 0
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        number = given or secrets.token_hex(8).encode()
        if not given:
            others = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
            scope["headers"] = [*others, (b"x-request-id", number)]
        self._headers = [(b"x-received", f"{time.time():.6f}".encode()), (b"x-request-id", number)]

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *self._headers]
            if self.status == 503:
                message["headers"].append((b"retry-after", str(RETRY_AFTER_S).encode()))
        await self._send(message)

    async def error(self, status: int, sentence: str, close: bool = False) -> None:
        """Answer with an error in KServe's form."""
        body = json.dumps({"error": sentence}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close")] if close else []
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


class _TooLarge(Exception):
    """More arrives, or is announced, than is allowed."""


def _outcome(status: int) -> str:
    if status == 0:  # the client went away before all of its request was here
        return "abandoned"
    if status >= 500:
        return "rejected" if status == 503 else "failed"
    return "invalid" if status >= 400 else "answered"
