"""What Ray Serve puts around the HTTP server of a replica, and of its fallback, as HOOK tells it.

The fallback is the process to which HAProxy sends requests while there is no replica: Ray's own
HTTP proxy, which waits for one.
"""

import os

from starlette.middleware import Middleware
from starlette.responses import JSONResponse

HOOK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares"}
FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
FALLBACK_BYTES = "SERVING_FALLBACK_BYTES"  # over HTTP: of one body there, and of all of them
HEADER = b"x-request-disconnect-disabled"
NO_ROOM = "no replica is there, and no more requests can wait for one: try again"
TOO_LARGE = "the body is larger than --max_body_mb: send less"


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    largest, most = map(int, os.environ.get(FALLBACK_BYTES, "0 0").split())
    port = int(os.environ.get(FALLBACK_PORT, -1))
    return [Middleware(AroundRay, fallback=port, largest=largest, most=most)]


class AroundRay:
    """ASGI middleware around what Ray Serve itself does with a request.

    **In a replica** Ray Serve would read the body whole, and as fast as it comes, before the
    replica's application asks for it: its limits of time and memory would limit nothing. With a
    header it hands over the connection, and the application reads, and hears when the client goes
    away. **In the fallback** there is no such application. Ray Serve reads, and notices clients
    that leave; here the bodies that it holds are bounded.
    """

    def __init__(self, app, fallback: int, largest: int, most: int) -> None:
        """app: Ray Serve's. fallback: the port of the fallback, where one body may have `largest`
        bytes, and all together `most`."""
        self._app, self._fallback, self._largest, self._most = app, fallback, largest, most
        self._held = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (scope.get("server") or ("", 0))[1] == self._fallback:
            await self._bounded(scope, receive, send)
        else:
            scope["headers"].append((HEADER, b"?1"))  # of several the last one counts
            await self._app(scope, receive, send)

    async def _bounded(self, scope, receive, send) -> None:
        """A request at the fallback; of one that does not say its length, anything may come."""
        headers = dict(scope["headers"])
        size = int(headers.get(b"content-length", 0))
        if size > self._largest:
            return await _refusal(413, TOO_LARGE)(scope, receive, send)
        if self._held + size > self._most or b"transfer-encoding" in headers:
            return await _refusal(503, NO_ROOM, {"retry-after": "1"})(scope, receive, send)
        self._held += size
        try:
            await self._app(scope, receive, send)
        finally:
            self._held -= size


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in KServe's form. What is left of the request is not read."""
    return JSONResponse({"error": sentence}, status, {"connection": "close"} | (headers or {}))
