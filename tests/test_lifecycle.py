"""How servers end, and what they leave alone: no process, port or file stays, nobody else's Ray."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from model.faults.observe import metrics
from model.loadtest.bodies import v1_body
from model.loadtest.server_process import ServerProcess
from model.serving.config import EndpointConfig, LimitsConfig, ServerConfig
from model.serving.machine import free_port
from tests.conftest import ROOT, Traces, long, needs_tool, run, until
from tests.foreign import ForeignRay
from tests.in_process import started
from tests.samples import GOOD

ENDS_WITHIN_S = 60
BUSY = "tests.tiny_models:Busy"  # takes as many seconds as the instance says
REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
REPLICAS = ("--num_replicas", "2", "--cpus_per_replica", "0.5")


@pytest.fixture(scope="module")
def foreign() -> Iterator[ForeignRay]:
    """Somebody's Ray, which runs all the while."""
    ray = ForeignRay()
    yield ray
    ray.end()


def listening(process: psutil.Process) -> dict[int, str]:
    """The ports that a process listens on, each with its address."""
    return {
        connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")  # IPv4 within IPv6
        for connection in process.connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def ports(server: ServerProcess) -> list[int]:
    """The ports of HTTP and of gRPC."""
    return [int(address.rpartition(":")[2]) for address in (server.url, server.grpc)]


def assert_ends(server: ServerProcess, traces: Traces) -> None:
    """The server exits in time, and neither process nor port nor file of it stays."""
    server.process.wait(ENDS_WITHIN_S)
    assert traces.left() == []
    for port in ports(server):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    server.stop()


def sigterm(server: ServerProcess) -> None:
    """As Kubernetes does it."""
    server.process.terminate()


def impatient_ctrl_c(server: ServerProcess) -> None:
    """As a terminal does it, to all processes of the group, again and again."""
    while server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGINT)
        time.sleep(0.3)


def test_a_drain(traces):
    """After SIGTERM: not ready at once, and it answers for as long as it was told; then it ends."""
    options = ("--in_process", "--drain_s", "3", BUSY)
    with ServerProcess("model.serving", *options, **traces.env) as server, requests.Session() as s:
        ask = {"json": {"instances": [0]}, "timeout": 10}
        assert s.post(server.predict, **ask).headers.get("connection") != "close"
        began = time.monotonic()
        sigterm(server)
        ready = f"{server.url}/v2/models/{server.name}/ready"
        assert until(lambda: s.get(ready, timeout=10).status_code == 503, 2)
        assert s.get(f"{server.url}/v2/health/ready", timeout=10).status_code == 503
        assert s.get(f"{server.url}/v2/health/live", timeout=10).status_code == 200
        while time.monotonic() - began < 2:
            response = s.post(server.predict, **ask)
            assert response.status_code == 200 and response.headers["connection"] == "close"
        assert server.process.wait(ENDS_WITHIN_S) == 0
        assert time.monotonic() - began > 3
        assert_ends(server, traces)


@pytest.mark.parametrize("end", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_a_drain_that_is_cut_short(traces, end):
    """By a second signal, or by Ctrl-C."""
    options = ("--in_process", "--drain_s", "60", BUSY)
    with ServerProcess("model.serving", *options, **traces.env) as server:
        for number in end:
            server.process.send_signal(number)
            time.sleep(0.5)
        assert server.process.wait(20) == 0


@pytest.mark.parametrize("when", ["not taken yet", "without a request", "used before"])
def test_no_connection_is_lost_when_http_stops(when):
    """A request on a connection that the client has made already is answered."""
    answers = asyncio.run(answers_at_the_end(when))
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers), answers


async def answers_at_the_end(when: str, count: int = 20) -> list[bytes]:
    """What clients read that have connected before a server stops, and send while it does.

    The server is in this process, so that it can be stopped at just that moment.
    """
    endpoint = EndpointConfig(http_port=free_port())
    server, serving = await started(hello, endpoint, grace_s=30)
    with contextlib.ExitStack() as stack:
        address = (endpoint.host, endpoint.http_port)
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(count)]
        while when != "not taken yet" and len(server.server_state.connections) < count:
            await asyncio.sleep(0.01)
        if when == "used before":
            for client in clients:
                client.sendall(REQUEST)
            while server.server_state.total_requests < count:
                await asyncio.sleep(0.01)
            for client in clients:
                client.recv(1000)
        for client in clients:
            client.sendall(REQUEST)
        await server.shutdown()
        server.should_exit = True
        await serving
        return [client.recv(1000) for client in clients]


@pytest.mark.parametrize("takes_s, answered", [(0.5, True), (60, False)])
def test_what_is_in_flight_has_so_long(takes_s, answered):
    """Until grace_s is over a request is answered; then it is cut, and the server ends."""

    async def slow(scope, receive, send) -> None:
        await asyncio.sleep(takes_s)
        await hello(scope, receive, send)

    async def main() -> bytes:
        endpoint = EndpointConfig(http_port=free_port())
        server, serving = await started(slow, endpoint, grace_s=2)
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.http_port)
        writer.write(REQUEST)
        while not server.server_state.tasks:
            await asyncio.sleep(0.01)
        server.should_exit = True
        async with asyncio.timeout(20):
            await serving
            return await reader.read()

    assert asyncio.run(main()).startswith(b"HTTP/1.1 200") == answered


def test_the_memory_of_a_server_whose_process_has_just_ended(monkeypatch):
    """HAProxy is replaced whenever it learns of a replica: what is there counts."""
    ended = psutil.Popen(["true"])
    ended.wait()
    server = object.__new__(ServerProcess)
    monkeypatch.setattr(server, "processes", lambda: [psutil.Process(), ended], raising=False)
    assert server.memory() > 0


def test_requests_in_flight_have_all_the_time_that_they_may_take():
    """Also where that is long."""
    limits = LimitsConfig(request_timeout_s=300)
    assert ServerConfig((), limits=limits).grace_s > 300


async def hello(_scope, _receive, send) -> None:
    """An ASGI application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


class Case(NamedTuple):
    """A server, a request that takes it a while, and how it is ended."""

    options: tuple[str, ...]
    body: dict
    end: Callable[[ServerProcess], None]


CASES = {
    "in process, SIGTERM": Case(("--in_process", BUSY), {"instances": [3]}, sigterm),
    "in process, Ctrl-C": Case(("--in_process", BUSY), {"instances": [3]}, impatient_ctrl_c),
    "replicas, SIGTERM": Case(REPLICAS, v1_body([GOOD] * 64), sigterm),
    "replicas, Ctrl-C": Case((BUSY, *REPLICAS), {"instances": [3]}, impatient_ctrl_c),
}


@pytest.mark.parametrize("case", [long(c) if c == "replicas, Ctrl-C" else c for c in CASES])
def test_a_signal_ends_everything(case, traces, foreign):
    """It answers the request in flight, ends, leaves nothing, and lets the other Ray be.

    Until then nobody outside this machine can reach it.
    """
    options, body, end = CASES[case]
    server = ServerProcess("model.serving", *options, **traces.env)
    assert_on_loopback(server, ray="--in_process" not in options)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(requests.post, server.predict, json=body, timeout=60)
        in_flight = f"inference_requests_in_flight {server.name}"
        assert until(lambda: metrics(server)[in_flight] == 1)
        end(server)
        assert answer.result().status_code == 200
        assert len(answer.result().json()["predictions"]) == len(body["instances"])
    said = server.log.read_text()
    assert_ends(server, traces)
    assert server.process.returncode == 0 and "Traceback" not in said
    assert foreign.is_as_it_was()


def assert_on_loopback(server: ServerProcess, ray: bool) -> None:
    """Whatever of it listens, Ray and Serve included; and Ray runs no more than it needs."""
    found = {process: listening(process) for process in server.processes()}
    assert set(ports(server)) <= set(found[server.process])
    assert (len(found) > 5) == ray
    assert all(set(at.values()) <= {"127.0.0.1"} for at in found.values()), found
    for process in found:
        command = " ".join(process.cmdline())
        assert not any(f"/{name}.py" in command for name in ("dashboard", "monitor", "log_monitor"))


def test_joining_a_cluster(traces, foreign):
    """--address: it serves from the other's cluster, and takes away only what it brought."""
    join = ["--address", foreign.address, BUSY, *REPLICAS]
    server = ServerProcess("model.serving", *join, **traces.env | foreign.env)
    assert len(foreign.serve_processes()) == 3  # a controller, two replicas
    refused = run("model.serving", *join, **foreign.env)
    assert refused.returncode == 1 and "choose another --model_name" in refused.stderr
    assert requests.post(server.predict, json={"instances": [0]}, timeout=60).status_code == 200
    server.process.send_signal(signal.SIGINT)
    assert_ends(server, traces)
    assert foreign.is_as_it_was()


def test_a_server_that_cannot_load_its_model(traces, tmp_path):
    """It ends with a sentence that says what to do, and leaves nothing behind."""
    nowhere = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nowhere |= {"no_proxy": "", "NO_PROXY": "", "TORCH_HOME": str(tmp_path)}
    options = ["--in_process", "--set", "weights=imagenet"]
    ended = run("model.serving", *options, **nowhere, **traces.env)
    assert ended.returncode == 1 and "Unset MODEL_WEIGHTS" in ended.stderr.splitlines()[-1]
    assert traces.left() == []


ONCE = """
from kserve import Model

class Once(Model):
    def load(self):
        open("loaded", "x").close()
        self.ready = True
        return True
    def predict(self, payload, headers=None):
        return {"predictions": payload["instances"]}
"""


@pytest.mark.long
def test_a_worker_that_cannot_load_its_model(tmp_path):
    """Where the process that starts it could: the server ends, rather than refuse one request in
    two."""
    (tmp_path / "once.py").write_text(ONCE)
    options = ["once:Once", "--in_process", "--workers", "2"]
    with pytest.raises(RuntimeError, match="--workers could not load"):
        ServerProcess("model.serving", *options, folder=tmp_path)


@pytest.mark.long
def test_workers_that_end_take_no_connections(traces):
    """While one still answers, whoever comes is refused at once."""
    server = ServerProcess("model.serving", BUSY, "--in_process", "--workers", "2", **traces.env)
    address = ("127.0.0.1", ports(server)[0])

    def refused() -> bool:
        with socket.socket() as client:
            return client.connect_ex(address) != 0

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(requests.post, server.predict, json={"instances": [5]}, timeout=60)
        assert until(lambda: metrics(server)[f"inference_requests_in_flight {server.name}"] == 1)
        server.process.terminate()
        assert until(refused, 4) and not answer.done()
        assert answer.result().status_code == 200
    assert_ends(server, traces)


def test_no_cluster_at_the_address():
    """--address where no Ray is: one sentence, in a moment."""
    address = f"127.0.0.1:{free_port()}"
    ended = run("model.serving", "--address", address)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and address in ended.stderr


def test_a_killed_notebook_takes_its_server_along(traces):
    """SIGKILL to the process that started a server ends the server too."""
    needs_tool("setpriv")  # Linux alone tells a child that its parent died
    code = "from model.loadtest.server_process import ServerProcess; "
    code += f"s = ServerProcess('model.serving', '--in_process', {BUSY!r}); "
    code += "print('started', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | traces.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as notebook:
        assert any("started" in line for line in notebook.stdout)
        assert len(traces.processes()) == 2
        notebook.kill()
    until(lambda: not traces.processes())
    assert traces.processes() == []


def has_loaded(library: str) -> Callable[[psutil.Process, str], bool]:
    """A moment of the imports: a library is there."""

    def moment(server: psutil.Process, said: str) -> bool:
        try:
            return library in Path(f"/proc/{server.pid}/maps").read_text()
        except OSError:  # it has ended
            return False

    return moment


def has_started(name: str) -> Callable[[psutil.Process, str], bool]:
    """A moment of Ray's start: a process of it is there."""

    def moment(server: psutil.Process, said: str) -> bool:
        try:
            return any(name in child.name() for child in server.children(recursive=True))
        except psutil.NoSuchProcess:
            return False

    return moment


def has_said(line: str) -> Callable[[psutil.Process, str], bool]:
    """A moment by the log."""
    return lambda server, said: line in said


IN_PROCESS, PAIR = ["--in_process", BUSY], [BUSY, *REPLICAS]
MOMENTS = {
    "imports, early": (IN_PROCESS, has_loaded("/numpy/"), signal.SIGINT),
    "imports, late": (IN_PROCESS, has_loaded("/pydantic_core/"), signal.SIGTERM),
    "imports of the model": (IN_PROCESS, has_said("options:"), signal.SIGTERM),
    "imports of Ray": (PAIR, has_said("options:"), signal.SIGINT),
    "Ray's start, first process": (PAIR, has_started("gcs_server"), signal.SIGTERM),
    "Ray's start, second process": (PAIR, has_started("raylet"), signal.SIGTERM),
    "Serve's start": (PAIR, has_started("ray::"), signal.SIGINT),
    "deploying": (PAIR, has_said("Serve on it"), signal.SIGTERM),
}


IN_SHORT = ("imports of the model", "deploying")


@pytest.mark.parametrize("moment", [m if m in IN_SHORT else long(m) for m in MOMENTS])
def test_a_signal_during_the_start_is_obeyed(moment, traces, tmp_path_factory):
    """One signal ends it at any time: a sentence, no traceback, none of C++, nothing left."""
    options, is_there, number = MOMENTS[moment]
    ports = ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
    folder = tmp_path_factory.mktemp("said")
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        command = [sys.executable, "-m", "model.serving", *ports, *options]
        server = psutil.Popen(
            command, stdout=out, stderr=err, env=os.environ | traces.env, cwd=ROOT
        )
    try:
        said = (folder / "out").read_text
        assert until(lambda: server.poll() is not None or is_there(server, said()), 120)
        server.send_signal(number)
        status = server.wait(ENDS_WITHIN_S)
    finally:
        if server.is_running():
            server.kill()
    assert "ready after" not in said()
    assert (folder / "err").read_text() == "stopped before it was ready\n"
    assert status == 128 + number
    assert traces.left() == []


def test_a_semaphore_of_somebody_else_is_no_trace(traces):
    """The processes of another test made it: it is theirs, from its first moment on."""
    if not Path("/dev/shm").exists():
        pytest.skip("this system has no /dev/shm, where semaphores are files")
    lock = multiprocessing.get_context("spawn").Lock()
    assert Path(f"/dev/shm/sem.{lock._semlock.name.removeprefix('/')}").exists()
    assert traces.left() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_as_it_begins_to_listen_is_obeyed(number, traces):
    """One signal ends the server also before uvicorn listens (KServe: REST goes on)."""
    ports = ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
    server = subprocess.Popen(
        [sys.executable, "-m", "model.serving", *ports, *IN_PROCESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | traces.env,
        cwd=ROOT,
    )
    try:
        assert any("Started server process" in said for said in server.stdout)
        server.send_signal(number)
        said = server.communicate(timeout=ENDS_WITHIN_S)[0]
    finally:
        server.kill()
    assert "Traceback" not in said and server.returncode == 0
    assert traces.left() == []
