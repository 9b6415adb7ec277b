"""An example of a check of one's own: the plain server behind a token.

`MODEL_TOKEN=… python -m deploy.token_server --enable_grpc false`. Who does not send the token, as
`Authorization: Bearer …`, gets 401; probes and metrics need none. gRPC would need its own check.
"""

import hmac
import os
import re
import sys

from kserve.model_server import app, args
from starlette.responses import JSONResponse

from model import kserve_server, options

OPEN = re.compile("/metrics|/v2/health/(live|ready)|/v2/models/[^/]+/ready")


class Token:
    """ASGI middleware: lets those requests through that carry the token."""

    def __init__(self, app, token: str) -> None:
        self.app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        """Hand the request on, or answer 401."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        wanted = scope["type"] == "http" and not OPEN.fullmatch(scope["path"])
        answer = self.app
        if wanted and not hmac.compare_digest(given, self._expected):
            error = {"error": "send the token: Authorization: Bearer …"}
            answer = JSONResponse(error, 401, {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; the options are those of model.kserve_server."""
    token = os.environ.pop("MODEL_TOKEN", "")
    if len(token) < 32:
        sys.exit("set MODEL_TOKEN to a token of 32 characters or more: openssl rand -hex 32")
    if args.enable_grpc:
        sys.exit("gRPC would be open to all: add --enable_grpc false")
    app.add_middleware(Token, token=token)
    kserve_server.main()


if __name__ == "__main__":
    options.run(main)
