"""Certificates, tokens, and who may join a server's Ray cluster."""

import asyncio
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import requests
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.loadtest.bodies import v1_body
from model.loadtest.server_process import ServerProcess
from model.serving.config import EndpointConfig
from model.serving.machine import free_port
from tests.certificates import write_certificate
from tests.conftest import ROOT, long, run, until
from tests.in_process import started
from tests.samples import GOOD


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """The files of a self-signed certificate for 127.0.0.1 and of its key."""
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("option", ["--in_process", long("--num_replicas=1")])
def test_tls(option, certificate, tmp_path):
    """With a certificate, HTTP and gRPC are encrypted, and neither is available unencrypted."""
    http, grpc_ = free_port(), free_port()
    command = [sys.executable, "-m", "model.serving", option]
    command += ["--http_port", str(http), "--grpc_port", str(grpc_)]
    command += ["--ssl_certfile", str(certificate[0]), "--ssl_keyfile", str(certificate[1])]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        assert until(lambda: "ready after" in (tmp_path / "log").read_text(), 60)
        url = f"https://127.0.0.1:{http}/v1/models/custom-model:predict"
        body, verify = v1_body([GOOD]), str(certificate[0])
        predictions = requests.post(url, json=body, verify=verify, timeout=30).json()["predictions"]
        assert predictions[0][0]["label"] == "red star"
        with pytest.raises(requests.exceptions.SSLError):
            requests.post(url, json=body, timeout=30)  # the certificate is not one of an authority
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{http}/v2/health/live", timeout=30)
        trusted = grpc.ssl_channel_credentials(certificate[0].read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{grpc_}", trusted) as channel:
            live = GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=30)
        assert live.live
        with grpc.insecure_channel(f"127.0.0.1:{grpc_}") as channel, pytest.raises(grpc.RpcError):
            GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=5)
    finally:
        server.terminate()
        server.wait(30)


def test_handshakes_that_never_end(certificate, monkeypatch):
    """A hundred connections that say nothing: others are answered, and they are closed in time.

    asyncio gives a handshake 60 seconds; here, one.
    """
    monkeypatch.setattr("asyncio.constants.SSL_HANDSHAKE_TIMEOUT", 1)
    endpoint = EndpointConfig(http_port=free_port(), certificate=(certificate[1], certificate[0]))
    trusting = ssl.create_default_context(cafile=certificate[0])
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    async def hello(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    async def main() -> bytes:
        server, serving = await started(hello, endpoint, grace_s=1)
        address = endpoint.host, endpoint.http_port
        silent = [await asyncio.open_connection(*address) for _ in range(100)]
        reader, writer = await asyncio.open_connection(*address, ssl=trusting)
        writer.write(request)
        answer = await reader.read()
        async with asyncio.timeout(30):
            assert [await reader.read() for reader, _ in silent] == [b""] * 100
        for _, writer in silent:
            writer.close()
        server.should_exit = True
        await serving
        return answer

    assert asyncio.run(main()).startswith(b"HTTP/1.1 200")


def test_half_a_certificate(certificate):
    """A certificate without its key, or that cannot be read, ends the start with a sentence."""
    half = run("model.serving", "--in_process", "--ssl_certfile", str(certificate[0]))
    assert half.returncode == 1 and "belong together" in half.stderr
    files = ("--ssl_certfile=a.crt", "--ssl_keyfile=a.key")
    nowhere = run("model.serving", "--in_process", *files)
    assert nowhere.returncode == 1 and "a.crt cannot be read" in nowhere.stderr


TOKEN = "f0" * 32
TOKEN_SERVER = ("deploy.token_server", "--in_process", "--enable_grpc", "false")


@pytest.fixture(scope="module")
def token_server() -> Iterator[ServerProcess]:
    """The example of authentication, with a token."""
    with ServerProcess(*TOKEN_SERVER, MODEL_TOKEN=TOKEN, PYTHONPATH=str(ROOT)) as server:
        yield server


def test_a_token_is_required(token_server):
    """401 without the right one, also for the repository's API; probes and metrics need none."""
    for given, status in ((f"Bearer {TOKEN}", 200), ("Bearer no", 401), (TOKEN, 401), ("", 401)):
        headers = {"Authorization": given}
        body = v1_body([GOOD])
        response = requests.post(token_server.predict, json=body, headers=headers, timeout=30)
        assert response.status_code == status
    assert response.json()["error"].startswith("send the token")
    assert response.headers["www-authenticate"] == "Bearer"
    for path, status in {
        "/v2/health/live": 200,
        "/v2/health/ready": 200,
        "/v2/models/custom-model/ready": 200,
        "/metrics": 200,
        "/v2/models/custom-model": 401,
        "/v1/models": 401,
        "/openapi.json": 401,
        "/v2/health/live/": 401,
        "//v2/health/live": 401,
    }.items():
        response = requests.get(token_server.url + path, timeout=10, allow_redirects=False)
        assert response.status_code == status, path
    assert TOKEN not in token_server.log.read_text()


@pytest.mark.parametrize("length", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
def test_the_token_is_checked_before_the_body_is_read(token_server, length):
    """A client with a wrong token that withholds its body has its 401 at once."""
    host, port = token_server.url.removeprefix("http://").split(":")
    path = token_server.predict.removeprefix(token_server.url)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer no\r\n{length}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_token_server_checks_every_request_or_does_not_start():
    """With KServe in each replica requests would not pass it."""
    options = ("--enable_grpc", "false", "--topology", "ingress")
    ended = run("deploy.token_server", *options, MODEL_TOKEN=TOKEN)
    assert ended.returncode == 1 and "requests do not pass this process" in ended.stderr


def test_a_token_server_without_a_token_does_not_start():
    """Nor one whose gRPC would be open."""
    env = {"PYTHONPATH": str(ROOT)}
    without = run(*TOKEN_SERVER, **env)
    assert without.returncode == 1 and "MODEL_TOKEN" in without.stderr
    open_ = run(*TOKEN_SERVER[:2], MODEL_TOKEN=TOKEN, **env)
    assert open_.returncode == 1 and "gRPC would be open to all" in open_.stderr


@pytest.mark.long
def test_nobody_joins_a_cluster_without_its_token(replicas):
    """Whoever joins a Ray cluster can run code on it: even on this machine it takes the token."""
    address = re.search(r"Ray at (\S+),", replicas.log.read_text())[1]
    join = f"import ray; ray.init({address!r}); print(ray.get(ray.put('inside')))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    clean["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    token = replicas.process.environ().get("RAY_AUTH_TOKEN", "ab" * 32)
    wrong = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token[::-1]}
    outside = [
        subprocess.Popen(
            [sys.executable, "-c", join],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in (clean, wrong)
    ]
    for process in outside:
        out, err = process.communicate(timeout=90)
        assert process.returncode != 0 and "inside" not in out
        assert "uthenticat" in err
