"""uvicorn, KServe's HTTP server, with what it lacks: it waits for a client only so long, and reads
only so much of a request's head, loses no connection when it stops, and reads a certificate again
that changes.
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
UNREAD_S = 30  # for a client to read some of what is left to send to it
UNREAD_AT_END_S = 3  # once the server has been told to end
MAX_HEAD = 64 * 1024  # bytes of a request's head, or of the trailers behind its body
NO_HEAD = -math.inf  # with which bytes that are in neither are counted
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


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
    """One connection. It is cut where a request does not arrive in time, or its head does not end,
    or nobody reads the response; uvicorn would wait on.
    """

    _late: asyncio.TimerHandle | None = None  # for the client to send
    _unread: asyncio.TimerHandle | None = None  # for it to read
    _head: float = NO_HEAD  # bytes so far of a head or of trailers that go on
    _ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait(HEADERS_TIMEOUT_S)
        if getattr(self.server_state, "ending", False):  # there is none in a process of --workers
            self.shutdown()

    def connection_lost(self, error: Exception | None) -> None:
        self._wait(None)
        self._stop_looking()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._head += len(data)  # a head that begins in `data` starts again from 0
        super().data_received(data)
        if self._head > MAX_HEAD:
            self._refuse_head()
        elif self._late is None and self.cycle.response_complete:
            self._wait_on()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._wait(HEADERS_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head = NO_HEAD
        # One behind another is not read before that is answered.
        self._wait(None if self.pipeline else MESSAGE_TIMEOUT_S)

    def on_chunk_header(self) -> None:
        self._head = 0  # trailers follow, unless `on_body` does

    def on_body(self, body: bytes) -> None:
        self._head = NO_HEAD
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head = NO_HEAD
        self._wait(None)
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn leaves it where there is a response already

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._look()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._look()

    def eof_received(self) -> None:
        self.loop.call_soon(self._look)  # asyncio closes the connection when this returns

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_looking()

    def shutdown(self) -> None:
        """Close the connection after its request, and after a while if there is none.

        uvicorn closes it at once then, which resets it when a request is on its way.
        """
        self._ending = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LAST_REQUEST_S, self._end)
            self._look()
        else:
            self._end()

    def _end(self) -> None:
        super().shutdown()
        self._look()

    def _wait(self, seconds: float | None) -> None:
        """For what comes next, at most for so long; None: there is nothing to wait for."""
        if self._late is not None:
            self._late.cancel()
        self._late = None
        if seconds is not None:
            self._late = self.loop.call_later(seconds, self.transport.abort)

    def _wait_on(self) -> None:
        """For the rest of a request that is answered already, or else for the next one.

        uvicorn waits with no limit once something has come after a response that is no request.
        """
        if self.cycle.more_body:
            self._wait(MESSAGE_TIMEOUT_S)
        elif self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _refuse_head(self) -> None:
        """431, unless that would be read as another request's response, or as a second one."""
        cycle = self.cycle
        if cycle is not None and (cycle.more_body or not cycle.response_complete):
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def _look(self) -> None:
        """See that the client goes on reading what is left to send; else cut the connection.

        This is for when the application can send no more before, or the connection is to be closed:
        what is left does not grow then. (Over TLS what is encrypted already does not count; asyncio
        has a limit of its own for a close there.)
        """
        self._stop_looking()
        left = self.transport.get_write_buffer_size()
        if left and (self.flow.write_paused or self.transport.is_closing()):
            seconds = UNREAD_AT_END_S if self._ending else UNREAD_S
            self._unread = self.loop.call_later(seconds, self._look_again, left)

    def _look_again(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._look()
        else:
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


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
        """Take the connections that are made already, and no more; answer what is in flight.

        Not for long is a client waited for that is slow to agree on TLS, before the others are
        told; it is when it has agreed.
        """
        self.server_state.ending = True
        made = [made for server in self.servers for s in server.sockets for made in _waiting(s)]
        for server in self.servers:
            server.close()
        taking = [asyncio.create_task(self._take(connection)) for connection in made]
        if taking:
            await asyncio.wait(taking, timeout=LAST_REQUEST_S)
        await super().shutdown(sockets)
        for task in taking:
            task.cancel()

    async def _take(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the client does not agree on TLS
            await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn makes it for a new connection."""
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _waiting(listening: socket.socket) -> list[socket.socket]:
    """The connections that a socket has not handed out yet; closing it would reset them.

    Those that can be had: there are no more, as a rule, or no more file descriptors.
    """
    connections = []
    with contextlib.suppress(OSError), listening.dup() as also_listening:
        also_listening.setblocking(False)
        while True:
            with contextlib.suppress(ConnectionAbortedError):  # that one has gone
                connections.append(also_listening.accept()[0])
    return connections
