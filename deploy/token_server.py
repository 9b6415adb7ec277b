"""An example of authentication without a gateway: `model.serving` behind one token.

`MODEL_TOKEN=… python -m deploy.token_server --enable_grpc false`, and any option of
`python -m model.serving`. Requests need the header `Authorization: Bearer …`; without it they get
401. Probes and metrics need none. gRPC would need an interceptor of its own.
"""

import functools
import hmac
import json
import os
import re

from model.serving.lifecycle import run

OPEN = re.compile("/metrics|/v2/health/(live|ready)|/v2/models/[^/]+/ready")
BODY = json.dumps({"error": "send the token: Authorization: Bearer …"}).encode()
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"www-authenticate", b"Bearer"),
]


class Token:
    """ASGI middleware that passes on the requests that carry the token, and answers 401 to others.

    It is the outermost: a request without the token is answered from its headers alone, and takes
    no place that admission control counts.
    """

    def __init__(self, app, token: str) -> None:
        """app: the ASGI application to protect."""
        self.app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        protected = scope["type"] == "http" and not OPEN.fullmatch(scope["path"])
        if protected and not hmac.compare_digest(_authorization(scope), self._expected):
            await send({"type": "http.response.start", "status": 401, "headers": HEADERS})
            await send({"type": "http.response.body", "body": BODY})
        else:
            await self.app(scope, receive, send)


def _authorization(scope) -> bytes:
    return dict(scope["headers"]).get(b"authorization", b"")


def main() -> None:
    """Serve until SIGTERM or Ctrl-C. Raises CannotStart without a token, or with gRPC on."""
    from model.serving.cli import server_config
    from model.serving.config import CannotStart
    from model.serving.start import start

    token = os.environ.pop("MODEL_TOKEN", "")  # so that no child process inherits it
    if len(token) < 32:
        raise CannotStart("set MODEL_TOKEN to 32 characters or more: openssl rand -hex 32")
    config = server_config()
    if config.endpoint.grpc_port is not None:
        raise CannotStart("gRPC would be open to all: add --enable_grpc false")
    start(config, functools.partial(Token, token=token))


if __name__ == "__main__":
    run(main)
