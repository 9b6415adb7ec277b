"""The way in over HTTP: reads the body within limits, admits or rejects, adds headers."""

import asyncio
import json
import re
import secrets
import time

from model.serving.admission import FULL, Admission, AdmissionController
from model.serving.arrival import TIMEOUT_HEADER, arrived, seconds_in
from model.serving.config import LimitsConfig
from model.serving.metrics import OPEN
from model.serving.receiving import TOO_MUCH, Receiving

BODY_TIMEOUT_S = 30  # from a request's headers to the end of its body
# What runs a model. As for Starlette's routes, a last line feed (%0A) changes nothing.
RUNS = re.compile(
    r"(?:/v1/models/([^/]+):(?:predict|explain)|/v2/models/([^/]+)(?:/versions/[^/]+)?/infer)\n?"
)


class HttpMiddleware:
    """ASGI middleware around KServe's application.

    The body of each request is read whole, within limits of size, time and memory. A request that
    runs a model then passes its admission control and takes a place; where there is none,
    it is rejected before its body is read. KServe gets what was admitted, and is cancelled when the
    client goes away. Each response says in `x-received` when its request arrived, in `x-request-id`
    the id that the client gave it, or else a fresh one, and when it is rejected in `Retry-After`
    when to try again.
    """

    def __init__(
        self,
        app,
        admission: Admission,
        receiving: Receiving,
        limits: LimitsConfig,
        request_ids: bool = True,
    ) -> None:
        """app: KServe's. receiving: that of gRPC too. limits: of which those on bodies count.
        request_ids: whether responses get them here (Ray Serve does it, too)."""
        self.app, self._admission, self._limits = app, admission, limits
        self._request_ids = request_ids
        self._receiving = receiving

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with OPEN.track_inprogress():
            await self._exchange(scope, receive, send)

    async def _exchange(self, scope, receive, send) -> None:
        """One request and its response."""
        controller = self._controller(scope)
        exchange = _Exchange(scope, send, controller, self._admission, self._request_ids)
        try:
            if controller is not None and controller.full:
                raise _Refused(self._limits.overload_status, FULL)
            with self._receiving.body() as arriving:
                body = await self._read(dict(scope["headers"]), receive, arriving)
                await self._answer(scope, body, receive, exchange)
        except _Refused as refused:
            if controller is not None:
                controller.count(_outcome(refused.status))
            await exchange.error(refused)
        except _Gone:
            if controller is not None:
                controller.count("abandoned")

    def _controller(self, scope) -> AdmissionController | None:
        """Of the model that the request runs; None for all other requests."""
        found = scope["method"] == "POST" and RUNS.fullmatch(scope["path"])
        return self._admission.of(found[1] or found[2]) if found else None

    async def _read(self, headers: dict[bytes, bytes], receive, arriving) -> bytes:
        """The body. A length that is too large is refused before any of it is read."""
        limit = int(self._limits.max_body_mb * 2**20)
        if int(headers.get(b"content-length", 0)) > limit:
            raise self._too_large()
        chunks, more = [], True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    chunks.append(message["body"])
                    more = message["more_body"]
                    arriving.grew(len(message["body"]))
                    if arriving.gave_way:
                        raise _Refused(503, TOO_MUCH, close=True)
                    if arriving.size > limit:
                        raise self._too_large()
        except TimeoutError:
            late = f"the body did not arrive within {BODY_TIMEOUT_S} seconds: send less, or faster"
            raise _Refused(408, late, close=True) from None
        except asyncio.CancelledError:
            if not arriving.gave_way:
                raise
            asyncio.current_task().uncancel()
            raise _Refused(503, TOO_MUCH, close=True) from None
        arriving.complete()
        try:
            arrived(arriving.size, seconds_in(headers.get(TIMEOUT_HEADER)))
        except ValueError:
            wrong = f"{TIMEOUT_HEADER.decode()} is not a number of milliseconds"
            raise _Refused(400, wrong) from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> "_Refused":
        most = f"the body is larger than {self._limits.max_body_mb:g} MB"
        return _Refused(413, f"{most}: send less, or start the server with a larger --max_body_mb")

    async def _answer(self, scope, body: bytes, receive, exchange: "_Exchange") -> None:
        """Have KServe answer, with a place in the admission control where there is one."""
        controller = exchange.controller
        if controller is None:
            return await self._until_gone(scope, body, receive, exchange)
        if controller.full:
            raise _Refused(self._limits.overload_status, FULL)
        with controller.admitted() as request:
            try:
                await self._until_gone(scope, body, receive, exchange)
            finally:  # an unexpected error is answered with 500 and then raised
                request["outcome"] = "abandoned" if exchange.gone else _outcome(exchange.status)

    async def _until_gone(self, scope, body: bytes, receive, exchange: "_Exchange") -> None:
        """Run KServe's application; cancel it when the client closes the connection."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        task = asyncio.current_task()

        async def receive_body():
            return messages.pop() if messages else await receive()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not exchange.complete:  # else it is the server that says that all is done
                exchange.gone = True
                task.cancel()

        watching = asyncio.ensure_future(watch())
        try:
            await self.app(scope, receive_body, exchange.send)
        except asyncio.CancelledError:
            if not exchange.gone:
                raise
            task.uncancel()
        finally:
            watching.cancel()


class _Exchange:
    """One request's response: its status, once it is sent, and the headers that each one gets."""

    def __init__(
        self,
        scope,
        send,
        controller: AdmissionController | None,
        admission: Admission,
        with_id: bool,
    ) -> None:
        """controller: of the model that the request runs, if it runs one."""
        self._send, self.controller, self._admission = send, controller, admission
        self.status, self.complete, self.gone, self.close = 0, False, False, False
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        number = given or secrets.token_hex(8).encode()
        if not given:
            others = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
            scope["headers"] = [*others, (b"x-request-id", number)]
        self._headers = [(b"x-received", f"{time.time():.6f}".encode())]
        if with_id:
            self._headers.append((b"x-request-id", number))

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *self._headers]
            if self._admission.draining or self.close:
                message["headers"].append((b"connection", b"close"))
            if self.status in (429, 503):
                seconds = self.controller.retry_after_s() if self.controller else 1
                message["headers"].append((b"retry-after", b"%d" % seconds))
        else:
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def error(self, refused: "_Refused") -> None:
        """Answer with an error in KServe's form."""
        body = json.dumps({"error": refused.sentence}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self.close = refused.close
        await self.send(
            {"type": "http.response.start", "status": refused.status, "headers": headers}
        )
        await self.send({"type": "http.response.body", "body": body})


class _Refused(Exception):
    """What a request gets that does not reach KServe."""

    def __init__(self, status: int, sentence: str, close: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.close = status, sentence, close


class _Gone(Exception):
    """The client has closed the connection before its body was complete."""


def _outcome(status: int) -> str:
    """0: there was no response."""
    if status >= 500 or not status:
        return "rejected" if status == 503 else "failed"
    if status == 429:
        return "rejected"
    return "invalid" if status >= 400 else "answered"
