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
from model.serving import http
from model.serving.admission import Admission
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


def test_a_slow_sender(monkeypatch):
    """408 when the body is not there in time, and the connection is closed."""
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.05)
    said = []

    async def receive() -> dict:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message: dict) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/models/m:predict", "headers": []}
    middleware = http.HttpMiddleware(None, Admission(["m"], 1), 1)
    asyncio.run(asyncio.wait_for(middleware(scope, receive, send), 2))
    assert said[0]["status"] == 408 and (b"connection", b"close") in said[0]["headers"]
    assert_plain(json.loads(said[1]["body"])["error"])


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
