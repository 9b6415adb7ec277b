"""gRPC beside the processes of `--workers`: it ends with them, and they do not run without it."""

import asyncio
import contextlib
import errno
import pickle
import signal
import socket
import sys
from collections.abc import Iterator

import pytest
from kserve.model_repository import ModelRepository
from uvicorn.supervisors import Multiprocess

from model.serving import server
from model.serving.admission import Admission
from model.serving.application import Application
from model.serving.config import EndpointConfig, ModelConfig, ServerConfig
from model.serving.dataplane import ClosedRepository, StrictDataPlane
from model.serving.machine import free_port
from model.serving.receiving import Receiving
from tests.conftest import until

LOCAL = "127.0.0.1"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Those of the tests are as they were, after uvicorn has set its own."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((LOCAL, port)) == 0


def serve(monkeypatch, run, grpc_port: int) -> None:
    """Two workers, which are `run` instead of processes, and gRPC beside them."""
    registry, admission = ModelRepository(), Admission(["m"], 1)
    plane, repository = StrictDataPlane(registry, admission), ClosedRepository(registry)
    application = Application(None, plane, repository, admission, Receiving(1))
    monkeypatch.setattr(server, "create_application", lambda *_: application)
    monkeypatch.setattr(Multiprocess, "run", run)
    endpoint = EndpointConfig(LOCAL, free_port(), grpc_port, workers=2)
    config = ServerConfig((ModelConfig("m"),), endpoint=endpoint)
    server._serve_with_workers([], config, None)


def test_grpc_ends_while_the_workers_end(monkeypatch):
    """As soon as they are told to, not after all that they still answer."""
    port, seen = free_port(), []

    def run(workers: Multiprocess) -> None:
        seen.append(until(lambda: listens(port)))
        workers.terminate_all()
        seen.append(until(lambda: not listens(port), 5))

    serve(monkeypatch, run, port)
    assert seen == [True, True]


def test_without_grpc_there_are_no_workers(monkeypatch):
    """Where it cannot start, the server does not either, and says why."""
    started = []
    with socket.create_server((LOCAL, 0)) as somebody, pytest.raises(RuntimeError, match="bind"):
        serve(monkeypatch, lambda workers: started.append(workers), somebody.getsockname()[1])
    assert not started


def sockets_of_two(workers: Multiprocess) -> list[socket.socket]:
    """What each of two processes gets."""
    return [pickle.loads(pickle.dumps(workers.sockets))[0] for _ in range(2)]


def test_responses_of_a_worker_are_not_held_back(monkeypatch):
    """What asyncio accepts there has TCP_NODELAY. Without it a response waits 40 ms for the client
    to acknowledge its headers; CI saw that as batches of 7, 1 and 1 of 8 clients."""
    seen = []

    async def accept(listener: socket.socket) -> None:
        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()

    def run(workers: Multiprocess) -> None:
        first, second = sockets_of_two(workers)
        with second:
            asyncio.run(accept(first))

    serve(monkeypatch, run, free_port())
    assert seen == [1]


def accepted(listener: socket.socket) -> int:
    """How many connections wait there."""
    number = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            number += 1
    return number


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one gets all")
def test_connections_are_shared_out(monkeypatch):
    """None of two workers gets all of fifty; and the process that starts them takes none."""
    taken = []

    def run(workers: Multiprocess) -> None:
        with contextlib.ExitStack() as stack:
            both = [stack.enter_context(each) for each in sockets_of_two(workers)]
            for each in both:
                each.listen(50)
                each.setblocking(False)
            address = both[0].getsockname()
            for _ in range(50):
                stack.enter_context(socket.create_connection(address))
            taken.extend(accepted(each) for each in both)
        with socket.socket() as client:
            taken.append(client.connect_ex(address))

    serve(monkeypatch, run, free_port())
    first, second, refused = taken
    assert first + second == 50 and first and second and refused == errno.ECONNREFUSED
