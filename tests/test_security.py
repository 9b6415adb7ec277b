"""Certificates, tokens, and what no server takes from strangers."""

import datetime
import ipaddress
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.bench import client
from model.bench.server import ServerProcess
from model.options import free_port
from tests.conftest import ROOT, run, until
from tests.samples import GOOD


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """Files of a certificate for 127.0.0.1 that we sign ourselves, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "server.crt", folder / "server.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


@pytest.mark.parametrize("module", ["model.kserve_server", "model.ray_server"])
def test_tls(module, certificate, tmp_path, local):
    """With a certificate HTTP and gRPC are encrypted, and neither is to be had in clear."""
    http, grpc_ = free_port(), free_port()
    command = [sys.executable, "-m", module, "--http_port", str(http), "--grpc_port", str(grpc_)]
    command += ["--ssl_certfile", str(certificate[0]), "--ssl_keyfile", str(certificate[1])]
    command += ["--num_replicas", "1"] if module == "model.ray_server" else []
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        assert until(lambda: "ready after" in (tmp_path / "log").read_text(), 60)
        url = f"https://127.0.0.1:{http}/v1/models/custom-model:predict"
        body, verify = client.v1_body([GOOD]), str(certificate[0])
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


def test_half_a_certificate(certificate):
    """A certificate without its key, or that is not there, is told in a sentence."""
    half = run("model.kserve_server", "--ssl_certfile", str(certificate[0]))
    assert half.returncode == 1 and "belong together" in half.stderr
    nowhere = run("model.kserve_server", "--ssl_certfile=a.crt", "--ssl_keyfile=a.key")
    assert nowhere.returncode == 1 and "a.crt cannot be read" in nowhere.stderr


def test_a_token_is_asked_for():
    """The example of a check of one's own: 401 without the token; probes need none."""
    token = "f0" * 32
    env = {"PYTHONPATH": str(ROOT)}
    assert "MODEL_TOKEN" in run("deploy.token_server", "--enable_grpc", "false", **env).stderr
    open_ = run("deploy.token_server", MODEL_TOKEN=token, **env)
    assert "open to all" in open_.stderr
    options = ("--enable_grpc", "false")
    with ServerProcess("deploy.token_server", *options, MODEL_TOKEN=token, **env) as server:
        body = client.v1_body([GOOD])
        for given, status in (
            (f"Bearer {token}", 200),
            ("Bearer no", 401),
            (token, 401),
            ("", 401),
        ):
            headers = {"Authorization": given}
            answer = requests.post(server.predict, json=body, headers=headers, timeout=30)
            assert answer.status_code == status
        assert json.loads(answer.text)["error"].startswith("send the token")
        assert requests.get(f"{server.url}/v2/health/live", timeout=10).status_code == 200
        assert token not in server.log.read_text()


def test_nobody_joins_a_cluster_without_its_token(replicas):
    """Who joins a Ray cluster can run code on it: also from this machine only with the token."""
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
