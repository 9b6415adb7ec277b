"""What Ray Serve puts around the HTTP server of a replica, as the variable HOOK tells it.

Ray Serve itself reads a request's body whole, and as fast as it comes, before the replica's
application asks for it: its limits of time and memory would limit nothing. With the header below it
hands over the connection, and the application reads, and hears when the client goes away.
"""

from starlette.middleware import Middleware

HOOK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares"}
HEADER = b"x-request-disconnect-disabled"


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(HandOver)]


class HandOver:
    """ASGI middleware that sets the header, whatever the client sent."""

    def __init__(self, app) -> None:
        """app: Ray Serve's."""
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            scope["headers"].append((HEADER, b"?1"))  # of several the last one counts
        await self._app(scope, receive, send)
