"""uvicorn, KServe's HTTP server, with what it lacks: it waits for headers only so long, loses no
connection when it stops, and reads a certificate again that changes.
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator

import uvicorn
from kserve.protocol.rest.ssl_cert_refresher import SSLCertRefresher
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from model.serving.config import EndpointConfig
from model.serving.http import BODY_TIMEOUT_S

HEADERS_TIMEOUT_S = 20  # from a connection, or a request's first byte, to the end of its headers
MESSAGE_TIMEOUT_S = BODY_TIMEOUT_S + 5  # from there to its end, whether its body is read or refused
LAST_REQUEST_S = 0.5  # for a request that is on its way, on a connection without one


def uvicorn_config(app, endpoint: EndpointConfig, grace_s: float, **more) -> uvicorn.Config:
    """What uvicorn is to serve, and where.

    grace_s: how long requests in flight may still take once the server is told to end. more:
    further options of uvicorn's own.
    """
    key, certificate = endpoint.certificate or (None, None)
    return uvicorn.Config(
        app,
        host=endpoint.host,
        port=endpoint.http_port,
        log_config=None,  # KServe has set it up
        timeout_graceful_shutdown=math.ceil(grace_s),
        timeout_keep_alive=endpoint.keep_alive_s,
        ssl_keyfile=key,
        ssl_certfile=certificate,
        http=HttpProtocol,
        ws="none",  # else a client that asks for a WebSocket never gets an answer
        lifespan="off",
        loop="uvloop" if endpoint.event_loop == "uvloop" else "asyncio",  # of each of `workers`
        timeout_worker_healthcheck=60,  # a process that imports and loads does not answer yet
        **more,
    )


class HttpProtocol(HttpToolsProtocol):
    """One connection. One whose request does not arrive in time is cut; uvicorn would wait on."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait(HEADERS_TIMEOUT_S)

    def connection_lost(self, error: Exception | None) -> None:
        self._wait(None)
        super().connection_lost(error)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait(HEADERS_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # One behind another is not read before that is answered.
        self._wait(None if self.pipeline else MESSAGE_TIMEOUT_S)

    def on_message_complete(self) -> None:
        self._wait(None)
        super().on_message_complete()

    def shutdown(self) -> None:
        """Close the connection after its request, and after a while if there is none.

        uvicorn closes it at once then, which resets it when a request is on its way.
        """
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LAST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def _wait(self, seconds: float | None) -> None:
        """For what comes next, at most for so long; None: there is nothing to wait for."""
        if self._late is not None:
            self._late.cancel()
        self._late = None
        if seconds is not None:
            self._late = self.loop.call_later(seconds, self.transport.abort)


class HttpServer(uvicorn.Server):
    """uvicorn that leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.config.loaded:
            self.config.load()
        refresher = None
        if self.config.ssl is not None:
            refresher = SSLCertRefresher(
                ssl_context=self.config.ssl,
                key_path=str(self.config.ssl_keyfile),
                cert_path=str(self.config.ssl_certfile),
            )
        try:
            await super().serve(sockets)
        finally:
            if refresher is not None:
                refresher.stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take the connections that are made already, and no more; answer what is in flight."""
        made = [made for server in self.servers for s in server.sockets for made in _waiting(s)]
        for server in self.servers:
            server.close()
        await asyncio.gather(*map(self._take, made), return_exceptions=True)
        await super().shutdown(sockets)

    async def _take(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn makes it for a new connection."""
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _waiting(listening: socket.socket) -> list[socket.socket]:
    """The connections that a socket has not handed out yet; closing it would reset them."""
    connections = []
    with listening.dup() as also_listening, contextlib.suppress(BlockingIOError):
        also_listening.setblocking(False)
        while True:
            connections.append(also_listening.accept()[0])
    return connections
