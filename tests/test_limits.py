"""What a server takes at most, and what it lets nobody do: the options that set it."""

import asyncio
import json
import socket
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import requests
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.loadtest import client
from model.loadtest.bodies import v1_body
from model.loadtest.server_process import ServerProcess
from model.serving import http, http_server
from model.serving.admission import Admission
from model.serving.config import EndpointConfig, LimitsConfig
from model.serving.http_server import HttpServer, uvicorn_config
from model.serving.machine import free_port
from model.serving.metrics import REQUESTS
from model.serving.receiving import Receiving
from tests.conftest import BOTH, long
from tests.malformed_images import encoded
from tests.samples import GOOD
from tests.ways import assert_answers, assert_equal, assert_plain, v2_grpc

MB = 2**20


@pytest.fixture(scope="module", params=["--in_process", long("--num_replicas=1")])
def narrow(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server that takes 1 MB and 400,000 pixels, and loads and unloads what it is told to."""
    options = ["--max_body_mb", "1", "--set", "max_pixels=400000", "--repository_api", "on"]
    with ServerProcess("model.serving", request.param, *options) as server:
        yield server


def begin(server: ServerProcess, header: str, body: bytes) -> tuple[int, dict]:
    """The response to a V1 request of which only the beginning is sent: its status and JSON."""
    host, port = server.url.removeprefix("http://").split(":")
    path = server.predict.removeprefix(server.url)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n{header}\r\n\r\n".encode() + body)
        response = b""
        while not response.endswith(b"}"):
            response += connection.recv(10_000)
    status, body = response.split(b"\r\n", 1)[0].split()[1], response.split(b"\r\n\r\n", 1)[1]
    return int(status), json.loads(body)


@pytest.mark.parametrize("size", [MB + 1, 10**12])
def test_a_length_that_is_too_large(narrow, size):
    """413 before any of the body is sent, with a sentence that names the option."""
    status, response = begin(narrow, f"content-length: {size}", b"")
    assert status == 413 and "1 MB" in response["error"] and "--max_body_mb" in response["error"]
    assert_plain(response["error"])
    assert_answers(narrow)


def test_chunks_without_end(narrow):
    """413 as soon as they are too many, though the body goes on."""
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    status, response = begin(narrow, "transfer-encoding: chunked", chunk * 17)
    assert status == 413 and "--max_body_mb" in response["error"]
    assert_answers(narrow)


def test_a_client_that_sends_it_all_reads_413_and_goes_on(narrow):
    """The connection stays good for the next request."""
    good = json.dumps(v1_body([GOOD])).encode()
    with requests.Session() as session:
        assert session.post(narrow.predict, bytes(20 * MB)).status_code == 413
        assert session.post(narrow.predict, good.ljust(MB)).status_code == 200  # exactly 1 MB
        assert session.post(narrow.predict, good.ljust(MB + 1)).status_code == 413


def test_a_refused_body_is_not_read_for_ever():
    """A client that goes on sending after its 413, byte by byte, is cut off in the end."""

    async def main():
        middleware = around(None, Admission(["m"], 1), LimitsConfig(max_body_mb=1))
        endpoint = EndpointConfig(http_port=free_port())
        server = HttpServer(uvicorn_config(middleware, endpoint, grace_s=1))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.http_port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n")
        assert b" 413 " in await reader.readline()
        cut = asyncio.ensure_future(reader.read())
        while not cut.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
        writer.close()
        server.should_exit = True
        await serving

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, "MESSAGE_TIMEOUT_S", 0.3)
        asyncio.run(asyncio.wait_for(main(), 20))


def test_the_same_limit_over_grpc(narrow):
    """RESOURCE_EXHAUSTED, which is gRPC's own status."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        v2_grpc(narrow, [GOOD + bytes(MB)])
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert v2_grpc(narrow, [GOOD + bytes(MB // 2)])[0][0]["label"] == "red star"


@BOTH
def test_grpc_takes_as_much_as_rest(server, local):
    """More than KServe's 8 MB in one message: the images of many a request."""
    large = [GOOD + bytes(9 * MB)]
    assert_equal(v2_grpc(server, large), local.classify([GOOD]))
    assert_equal(client.v1(server, large), local.classify([GOOD]))


def test_pixels(narrow):
    """An image of as many is predicted, one row more is refused, with the limit."""
    for height, status in ((625, 200), (626, 400)):
        image = encoded(np.zeros((height, 640), np.uint8), "PNG")
        response = requests.post(narrow.predict, json=v1_body([image]))
        assert response.status_code == status
    assert "400,000 pixels" in response.json()["error"]


class Connection:
    """What uvicorn gives an application for one request: it receives what the test sends."""

    def __init__(self, path: str = "/v1/models/m:predict", **headers: str) -> None:
        named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": named}
        self.messages: asyncio.Queue = asyncio.Queue()
        self.said: list[dict] = []

    def sends(self, body: bytes, more: bool = False) -> None:
        """A piece of the body."""
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def closes(self) -> None:
        """The client goes away."""
        self.messages.put_nowait({"type": "http.disconnect"})

    async def send(self, message: dict) -> None:
        """What the server says."""
        self.said.append(message)

    def through(self, middleware: http.HttpMiddleware) -> asyncio.Task:
        """The request's way through the middleware."""
        return asyncio.ensure_future(middleware(self.scope, self.messages.get, self.send))

    @property
    def status(self) -> int:
        """Of the response; 0 while there is none."""
        return self.said[0]["status"] if self.said else 0


def around(app, admission: Admission, limits: LimitsConfig) -> http.HttpMiddleware:
    """The middleware around an application."""
    receiving = Receiving(int(limits.max_body_memory_mb * 2**20))
    return http.HttpMiddleware(app, admission, receiving, limits)


def counted(outcome: str) -> float:
    """How many requests for the model `m` came to that."""
    return REQUESTS.labels("m", outcome)._value.get()


def test_a_slow_sender(monkeypatch):
    """408 when the body is not there in time, and the connection is closed; no place was taken."""
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.05)

    async def main():
        admission = Admission(["m"], 1)
        middleware = around(None, admission, LimitsConfig())
        slow = Connection()
        slow.sends(b"{", more=True)
        task = slow.through(middleware)
        await asyncio.sleep(0.02)
        assert admission.of("m").in_flight == 0
        await task
        assert slow.status == 408 and (b"connection", b"close") in slow.said[0]["headers"]
        assert_plain(json.loads(slow.said[1]["body"])["error"])

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_client_that_goes_away_is_worked_for_no_longer():
    """The application is cancelled, the place is free, and the request counts as abandoned."""

    async def main():
        cancelled = []

        async def app(scope, receive, send):
            await receive()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        admission, before = Admission(["m"], 1), counted("abandoned")
        client = Connection()
        client.sends(b"{}")
        task = client.through(around(app, admission, LimitsConfig()))
        await asyncio.sleep(0.01)
        assert admission.of("m").in_flight == 1
        client.closes()
        await task
        assert cancelled and client.said == [] and admission.of("m").in_flight == 0
        assert counted("abandoned") == before + 1

    asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/m:predict",
        "/v1/models/m:predict\n",  # %0A, with which Starlette finds the same endpoint
        "/v1/models/m:explain",
        "/v2/models/m/infer",
        "/v2/models/m/versions/1/infer\n",
    ],
)
def test_whatever_runs_a_model_takes_a_place(path):
    """Where there is none it is rejected."""

    async def main():
        async def app(scope, receive, send):
            await asyncio.sleep(60)

        admission = Admission(["m"], 1)
        middleware = around(app, admission, LimitsConfig())
        first, second = Connection(path), Connection(path)
        for each in (first, second):
            each.sends(b"{}")
        task = first.through(middleware)
        await asyncio.sleep(0.01)
        assert admission.of("m").in_flight == 1
        await second.through(middleware)
        assert second.status == 503
        task.cancel()

    asyncio.run(asyncio.wait_for(main(), 5))


def test_what_the_server_itself_cancels_is_not_answered():
    """It counts as failed, since nobody has got a response."""

    async def main():
        async def app(scope, receive, send):
            await asyncio.sleep(60)

        before = counted("answered"), counted("failed")
        client = Connection()
        client.sends(b"{}")
        task = client.through(around(app, Admission(["m"], 1), LimitsConfig()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (counted("answered"), counted("failed")) == (before[0], before[1] + 1)

    asyncio.run(asyncio.wait_for(main(), 5))


def test_bodies_share_a_bound_and_the_slowest_gives_way():
    """It gets 503; a quick one is answered meanwhile, and the bytes are given back."""

    async def main():
        async def app(scope, receive, send):
            body = (await receive())["body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"%d" % len(body)})

        middleware = around(app, Admission(["m"], 9), LimitsConfig(max_body_memory_mb=1))
        slow, slower, quick = Connection(), Connection(), Connection()
        for each in (slow, slower):
            each.sends(bytes(400 * 1024), more=True)
        tasks = [slow.through(middleware), slower.through(middleware)]
        await asyncio.sleep(0.01)
        quick.sends(bytes(500 * 1024))
        await quick.through(middleware)
        assert quick.status == 200 and quick.said[-1]["body"] == b"512000"
        await tasks[0]
        assert slow.status == 503 and (b"connection", b"close") in slow.said[0]["headers"]
        slower.sends(b"!")
        await tasks[1]
        assert slower.status == 200 and middleware._receiving.total == 0

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_body_that_gives_way_counts_no_longer():
    """Not for what comes in the same moment: it is not refused as well, and no other gives way."""

    async def main():
        receiving = Receiving(1000)

        async def slow():
            with receiving.body() as body:
                body.grew(400)
                await asyncio.sleep(60)

        arriving = [asyncio.ensure_future(slow()) for _ in range(2)]
        await asyncio.sleep(0)
        with receiving.body() as large, receiving.body() as small:
            large.complete()
            large.grew(500)
            assert receiving.total == 900
            small.grew(50)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [each.cancelled() for each in arriving] == [True, False]
        assert receiving.total == 400
        arriving[1].cancel()

    asyncio.run(main())


@pytest.mark.parametrize("said", ["soon", "-5", "nan", "inf"])
def test_a_deadline_that_is_none(said):
    """400, and the header's name."""

    async def main():
        client = Connection(x_envoy_expected_rq_timeout_ms=said)
        client.sends(b"{}")
        await client.through(around(None, Admission(["m"], 1), LimitsConfig()))
        assert client.status == 400
        assert "x-envoy-expected-rq-timeout-ms" in json.loads(client.said[1]["body"])["error"]

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_deadline_over_http(narrow):
    """Where the time that the client gives is too short, 504; where it is not, the response."""
    for milliseconds, status in (("1", 504), ("60000", 200)):
        headers = {"x-envoy-expected-rq-timeout-ms": milliseconds}
        response = requests.post(narrow.predict, json=v1_body([GOOD]), headers=headers)
        assert response.status_code == status, response.text
    assert_answers(narrow)


@pytest.mark.parametrize("status", [503, 429])
def test_a_full_queue_says_when_to_come_back(status, monkeypatch):
    """In the status chosen; the seconds come from the queue and the rate, and are spread."""

    async def main():
        admission = Admission(["m"], 20)
        controller, now = admission.of("m"), [100.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        for _ in range(10):  # two a second, while there is something to answer
            with controller.admitted() as request:
                now[0] += 0.5
                request["outcome"] = "answered"
            now[0] += 600
        controller.in_flight, controller._busy_since = 20, now[0]
        middleware = around(None, admission, LimitsConfig(overload_status=status))
        told, before = [], counted("rejected")
        for _ in range(50):
            client = Connection()
            await client.through(middleware)
            assert client.status == status
            told += [int(v) for k, v in client.said[0]["headers"] if k == b"retry-after"]
        assert min(told) >= 9 and max(told) <= 20 and len(set(told)) > 3 and len(told) == 50
        assert counted("rejected") == before + 50

    asyncio.run(main())


def repository(server: ServerProcess, what: str, name: str) -> requests.Response:
    """Ask for the model to be loaded or unloaded, over REST."""
    return requests.post(f"{server.url}/v2/repository/models/{name}/{what}")


@BOTH
@pytest.mark.parametrize("what", ["load", "unload"])
def test_nobody_unloads_the_model(server, what):
    """403 and PERMISSION_DENIED, with a sentence that names the option; the model stays."""
    response = repository(server, what, server.name)
    assert response.status_code == 403 and "--repository_api on" in response.json()["error"]
    assert_plain(response.json()["error"])
    kind = f"RepositoryModel{what.title()}"
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as refusal:
        ask = getattr(GRPCInferenceServiceStub(channel), kind)
        ask(getattr(pb, f"{kind}Request")(model_name=server.name), timeout=10)
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "--repository_api on" in refusal.value.details()
    assert_answers(server)


def test_unloading_when_it_is_on(narrow):
    """As KServe does it. The last test here: the model is gone."""
    assert repository(narrow, "unload", "nobody").status_code == 404
    assert repository(narrow, "load", narrow.name).json() == {"name": narrow.name, "load": True}
    assert repository(narrow, "unload", narrow.name).json() == {"name": narrow.name, "unload": True}
    assert requests.post(narrow.predict, json=v1_body([GOOD])).status_code == 404
