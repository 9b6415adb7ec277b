"""README's first success works as it stands: its file, its command, its request, its response."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from model.serving.machine import free_port
from tests.conftest import ROOT, Traces, needs_tool, until

SECTION = re.search(r"^## First success.*?(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", SECTION.group(), re.M | re.S)
(_, CODE), (_, COMMAND), (_, CURL), (_, RESPONSE) = BLOCKS
FILE = re.search(r"as `(\w+\.py)`", SECTION.group()).group(1)


def test_the_blocks_are_what_this_test_takes_them_for() -> None:
    """A file of at most 15 lines, one command, one request, its response."""
    assert [language for language, _ in BLOCKS] == ["python", "sh", "sh", "json"]
    assert len(CODE.splitlines()) <= 15
    assert len(COMMAND.splitlines()) == 1 and COMMAND.startswith("python -m model.serving ")
    assert CURL.startswith("curl ")


def on_free_ports(command: str, curl: str) -> tuple[str, str]:
    """Both as README has them; on other ports if a program on this machine has README's."""
    with socket.socket() as http, socket.socket() as grpc:
        try:
            http.bind(("127.0.0.1", 8080))
            grpc.bind(("127.0.0.1", 8081))
            return command, curl
        except OSError:
            port = free_port()
            command = f"{command.rstrip()} --http_port {port} --grpc_port {free_port()}\n"
            return command, curl.replace(":8080/", f":{port}/")


@pytest.fixture
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, outside of the clone."""
    return tmp_path_factory.mktemp("empty")


def test_first_success(empty: Path, traces: Traces) -> None:
    """The classifier answers in two replicas, with batches; Ctrl-C leaves nothing behind."""
    needs_tool("curl")
    command, curl = on_free_ports(COMMAND, CURL)
    (empty / FILE).write_text(CODE)
    log = empty / "log"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as `activate` sets it
    env = os.environ | traces.env | {"PATH": path}
    with log.open("w") as file:
        server = subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=empty,
            env=env,
            stdout=file,
            stderr=file,
            process_group=0,
        )
    try:
        running = until(lambda: "ready after" in log.read_text() or server.poll() is not None, 180)
        assert running and server.poll() is None, log.read_text()
        asked = subprocess.run(["sh", "-c", curl], env=env, capture_output=True, text=True)
        assert asked.returncode == 0, asked.stderr + log.read_text()
        assert json.loads(asked.stdout) == json.loads(RESPONSE)
        url = re.search(r"http://\S+", curl).group()
        many(url, json.loads(re.search(r"-d '(.*?)'", curl).group(1)))
        told = requests.get(re.match(r"http://[^/]+", url).group() + "/metrics", timeout=10).text
        assert metric(told, 'inference_replicas{model="custom-model"}') == 2
        batches, instances = (
            metric(told, f'inference_batch_size_{part}{{model="custom-model"}}')
            for part in ("count", "sum")
        )
        assert instances > 2 * batches, "each request, of two texts, was a batch of its own"
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
    assert not traces.left()


def many(url: str, body: dict) -> None:
    """Send 160 requests, 16 at a time."""
    with ThreadPoolExecutor(16) as clients:
        sent = [clients.submit(requests.post, url, json=body, timeout=30) for _ in range(160)]
    assert {response.result().status_code for response in sent} == {200}


def metric(text: str, name: str) -> float:
    """The value of a metric in Prometheus' text."""
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M).group(1))
