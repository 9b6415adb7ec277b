"""Our HTTP server in the test's own process, where it can be looked into and stopped at will."""

import asyncio

from model.serving.config import EndpointConfig
from model.serving.http_server import HttpServer, uvicorn_config


async def started(app, endpoint: EndpointConfig, grace_s: float) -> tuple[HttpServer, asyncio.Task]:
    """A server of an ASGI application that listens, and the task that ends when it has ended."""
    server = HttpServer(uvicorn_config(app, endpoint, grace_s=grace_s))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    return server, serving
