"""The HTTP server itself: clients that send or read nothing, or too much, and its end."""

import asyncio
import contextlib
import errno
import socket
import ssl
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest

from model.serving import http_server
from model.serving.config import EndpointConfig
from model.serving.http_server import MAX_HEAD, HttpProtocol, HttpServer
from model.serving.machine import free_port
from tests.certificates import write_certificate
from tests.in_process import started

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
SOON_S = 10  # for what would take longer, or never happen, without what is tested
LARGE = 30 * 2**20  # a response: more than the sockets of both sides take


async def length(_scope, receive, send) -> None:
    """An ASGI application that says how long the body was."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    await answer(send, b"%d." % size)


async def refusal(_scope, _receive, send) -> None:
    """An ASGI application that reads no body."""
    await answer(send, b"no.", 503)


async def large(_scope, _receive, send) -> None:
    """An ASGI application whose response is large."""
    await answer(send, bytes(LARGE))


async def answer(send, body: bytes, status: int = 200) -> None:
    """The response of an ASGI application."""
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(app, grace_s: float = 1, **more) -> AsyncIterator[HttpServer]:
    """The server of an application, which is told to end in the end and does. more: of the
    endpoint."""
    endpoint = EndpointConfig(http_port=free_port(), **more)
    async with asyncio.timeout(SOON_S):
        server, task = await started(app, endpoint, grace_s)
        yield server
        server.should_exit = True
        await task


def connected(server: HttpServer) -> socket.socket:
    """A client's connection, which takes little that it does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((server.config.host, server.config.port))
    client.setblocking(False)
    return client


@contextlib.asynccontextmanager
async def streams(server: HttpServer) -> AsyncIterator[tuple]:
    """What reads from a client's connection, and what writes to it."""
    reader, writer = await asyncio.open_connection(server.config.host, server.config.port)
    yield reader, writer
    writer.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` says something true."""
    while not condition():
        await asyncio.sleep(0.01)


async def the_protocol(server: HttpServer) -> HttpProtocol:
    """Of the server's only connection."""
    await until(lambda: server.server_state.connections)
    (protocol,) = server.server_state.connections
    return protocol


async def sent_without_end(reader, writer, begin: bytes) -> bytes:
    """What a client reads that sends `begin` and then the letter a until it is cut off."""
    writer.write(begin)
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            writer.write(b"a" * MAX_HEAD)
            await writer.drain()
            await asyncio.sleep(0)
        return await reader.read()
    return b""


@pytest.mark.parametrize(
    "begin",
    [
        GET[:-2] + b"x: ",
        GET[:-2] + b"x",
        b"GET /",
        GET + GET[:-2] + b"x: ",
        CHUNKED + b"1\r\na\r\n0\r\nx: ",
    ],
    ids=["a value", "a name", "a path", "the second request", "a trailer"],
)
def test_a_head_without_end(begin):
    """It is not read on; uvicorn would keep it all."""

    async def main():
        async with serving(length) as server, streams(server) as (reader, writer):
            answered = await sent_without_end(reader, writer, begin)
            assert answered.count(b" 200 ") == (begin[:40].count(b"GET") > 1 and bool(answered))
            await until(lambda: not server.server_state.connections)

    asyncio.run(main())


def test_a_head_that_is_too_large():
    """It gets 431, if it is there to be read, and the connection ends."""

    async def main():
        async with serving(length) as server, streams(server) as (reader, writer):
            writer.write(GET[:-2])
            protocol = await the_protocol(server)
            await until(lambda: protocol.scope)
            writer.write(b"x: " + b"a" * MAX_HEAD)
            assert (await reader.read()).startswith(b"HTTP/1.1 431 ")

    asyncio.run(main())


def test_what_is_no_head_does_not_count():
    """Bodies of any kind and size, and requests one behind another."""
    size = 10 * MAX_HEAD
    chunk = b"%x\r\n" % size + bytes(size) + b"\r\n"
    whole = POST + b"content-length: %d\r\n\r\n" % size + bytes(size)
    chunks = CHUNKED + 2 * chunk + b"0\r\nx: a trailer\r\n\r\n"
    small = CHUNKED + 5000 * b"5\r\nhello\r\n" + b"0\r\n\r\n"

    async def main():
        async with serving(length) as server, streams(server) as (reader, writer):
            for request, expected in ((whole, size), (chunks, 2 * size), (small, 25_000)):
                for _ in range(2):
                    writer.write(request + GET)
                    for expect in (expected, 0):
                        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
                        assert await reader.readuntil(b".") == b"%d." % expect

    asyncio.run(main())


def test_the_end_of_a_body_does_not_count_with_the_next_head():
    """Though both come in one piece, and the rest of the head comes later."""
    rest = b"x" * 3 * MAX_HEAD

    async def main():
        async with serving(length) as server, streams(server) as (reader, writer):
            writer.write(POST + b"content-length: %d\r\n\r\n" % (1 + len(rest)) + b"x")
            protocol = await the_protocol(server)
            await until(lambda: protocol.cycle)
            # As a transport would that has read as much at once.
            protocol.data_received(rest + GET[:10])
            assert await reader.readuntil(b".")
            protocol.data_received(GET[10:])
            assert b" 200 " in await reader.readuntil(b"0.")

    asyncio.run(main())


@pytest.mark.parametrize("event_loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("then", ["it stays", "it is idle", "connection: close", "half closed"])
def test_a_client_that_does_not_read(monkeypatch, event_loop, then):
    """It is cut off, whatever the connection waits for meanwhile."""
    uvloop = pytest.importorskip("uvloop")
    monkeypatch.setattr(http_server, "UNREAD_S", 0.2)
    made = uvloop.new_event_loop if event_loop == "uvloop" else asyncio.new_event_loop

    async def main():
        keep_alive_s = 600 if then in ("it stays", "half closed") else 1
        async with serving(large, keep_alive_s=keep_alive_s) as server:
            with connected(server) as client:
                protocol = await the_protocol(server)
                if then != "it stays":  # as if little was left: uvicorn is not told of that
                    protocol.transport.set_write_buffer_limits(2 * LARGE)
                header = b"connection: close\r\n" if then == "connection: close" else b""
                client.sendall(GET[:-2] + header + b"\r\n")
                await until(lambda: protocol.cycle and protocol.cycle.response_complete)
                if then == "half closed":
                    client.shutdown(socket.SHUT_WR)
                await until(lambda: not server.server_state.connections)

    with asyncio.Runner(loop_factory=made) as runner:
        runner.run(main())


def test_a_client_that_does_not_read_does_not_hold_up_the_end(monkeypatch):
    """It is waited for less then."""
    monkeypatch.setattr(http_server, "UNREAD_AT_END_S", 0.2)

    async def main():
        async with serving(large, grace_s=60) as server:
            client = connected(server)
            client.sendall(GET)
            protocol = await the_protocol(server)
            await until(lambda: protocol.cycle and protocol.cycle.response_complete)
        client.close()

    asyncio.run(main())


class Transport:
    """What is left to send on a connection; it is less each time somebody looks."""

    def __init__(self, *left: int) -> None:
        self.left, self.cut, self.closing = list(left), False, False

    def get_write_buffer_size(self) -> int:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.cut = True


@pytest.mark.parametrize("left, cut", [((90, 80, 80, 70, 70), True), ((90, 80, 80, 0), False)])
def test_a_client_that_reads_slowly(monkeypatch, left, cut):
    """It is not cut off as long as it reads anything."""
    monkeypatch.setattr(http_server, "UNREAD_S", 0)

    async def main():
        async with serving(length) as server, streams(server):
            protocol = await the_protocol(server)
            transport, real = Transport(*left), protocol.transport
            protocol.transport = transport
            protocol.pause_writing()
            await until(lambda: len(transport.left) == 1)
            await asyncio.sleep(0.05)
            assert transport.cut == cut
            transport.cut = False
            protocol.pause_writing()
            protocol.resume_writing()
            await asyncio.sleep(0.05)
            assert not transport.cut
            protocol.transport = real

    asyncio.run(main())


@pytest.mark.parametrize(
    "request_, then",
    [
        (POST + b"content-length: 4\r\n\r\n", b"body"),
        (POST + b"content-length: 5\r\n\r\n", b"body"),
        (GET, b"\r\n"),
        (GET + POST + b"content-length: 4\r\n\r\n", b"body"),
    ],
    ids=["a refused body", "a part of one", "an empty line", "a body behind a request"],
)
def test_a_client_that_sends_no_more_after_its_response(monkeypatch, request_, then):
    """It is cut off as any other that sends nothing."""
    monkeypatch.setattr(http_server, "MESSAGE_TIMEOUT_S", 1)

    async def main():
        async with serving(refusal, keep_alive_s=1) as server, streams(server) as (reader, writer):
            writer.write(request_)
            for _ in range(request_.count(b"HTTP")):
                await reader.readuntil(b"no.")
            writer.write(then)
            assert await reader.read() == b""

    asyncio.run(main())


def test_a_body_behind_a_request_that_never_ends(monkeypatch):
    """It is refused, and not read for ever."""
    monkeypatch.setattr(http_server, "MESSAGE_TIMEOUT_S", 0.3)

    async def main():
        async with serving(refusal) as server, streams(server) as (reader, writer):
            writer.write(GET + POST + b"content-length: 100000\r\n\r\n")
            for _ in range(2):
                await reader.readuntil(b"no.")
            cut = asyncio.ensure_future(reader.read())
            while not cut.done():
                writer.write(b"x")
                await asyncio.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                cut.result()

    asyncio.run(main())


def test_a_refused_body_and_the_next_request_in_one():
    """The timer between requests does not end a request."""

    async def slow(scope, receive, send) -> None:
        if scope["method"] == "GET":
            await asyncio.sleep(1.5)
        await refusal(scope, receive, send)

    async def main():
        async with (
            serving(slow, keep_alive_s=1) as server,
            streams(server) as (reader, writer),
        ):
            writer.write(POST + b"content-length: 4\r\n\r\n")
            await reader.readuntil(b"no.")
            writer.write(b"body" + GET)
            await reader.readuntil(b"no.")

    asyncio.run(main())


def test_an_end_without_file_descriptors(monkeypatch):
    """What is in flight is answered all the same."""

    def none_left(_socket):
        raise OSError(errno.EMFILE, "too many open files")

    async def slow(scope, receive, send) -> None:
        await go.wait()
        await length(scope, receive, send)

    go = asyncio.Event()

    async def main():
        async with serving(slow) as server, streams(server) as (reader, writer):
            writer.write(GET)
            await until(lambda: server.server_state.tasks)
            monkeypatch.setattr(TransportSocket, "dup", none_left)
            ending = asyncio.create_task(server.shutdown())
            await asyncio.sleep(0.05)
            go.set()
            assert b" 200 " in await reader.readline()
            await ending

    asyncio.run(main())


@pytest.mark.parametrize("last", [errno.EAGAIN, errno.EMFILE])
def test_connections_that_cannot_be_taken(last):
    """Those before and behind one that has gone are, until there are no more to be had."""
    said = ["first", OSError(errno.ECONNABORTED, ""), "second", OSError(last, "")]

    def accept():
        if isinstance(each := said.pop(0), OSError):
            raise each
        return each, "address"

    listening = SimpleNamespace(accept=accept, setblocking=lambda _: None)
    of_it = SimpleNamespace(dup=lambda: contextlib.nullcontext(listening))
    assert http_server._waiting(of_it) == ["first", "second"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_client_slow_to_agree_on_tls_does_not_hold_up_the_end(tmp_path, taken):
    """Not before the others are told, nor after."""
    certificate = tuple(str(path) for path in write_certificate(tmp_path))

    async def main():
        async with serving(length, grace_s=60, certificate=certificate[::-1]) as server:
            with connected(server):
                if taken:
                    await asyncio.sleep(0.05)
                await server.shutdown()
                server.should_exit = True

    asyncio.run(main())


@pytest.mark.parametrize("taken", [False, True])
def test_a_client_that_agrees_on_tls_late_is_told_too(monkeypatch, tmp_path, taken):
    """Where the end waits for others anyhow."""
    monkeypatch.setattr(http_server, "LAST_REQUEST_S", 0.1)
    certificate = tuple(str(path) for path in write_certificate(tmp_path))
    trusting = ssl.create_default_context(cafile=certificate[0])

    async def slow(scope, receive, send) -> None:
        await go.wait()
        await length(scope, receive, send)

    go = asyncio.Event()

    async def main():
        async with serving(slow, grace_s=60, certificate=certificate[::-1]) as server:
            address = {"host": server.config.host, "port": server.config.port}
            reader, writer = await asyncio.open_connection(**address, ssl=trusting)
            writer.write(GET)
            await until(lambda: server.server_state.tasks)
            late = connected(server)
            if taken:
                await asyncio.sleep(0.05)
            ending = asyncio.create_task(server.shutdown())
            await asyncio.sleep(0.5)
            server_hostname = server.config.host
            of_late = await asyncio.open_connection(
                sock=late, ssl=trusting, server_hostname=server_hostname
            )
            assert await of_late[0].read() == b""
            go.set()
            assert b" 200 " in await reader.readline()
            await ending
            writer.close()

    asyncio.run(main())
