"""How servers end, and what they leave alone: no process, port or file stays, nobody else's Ray."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from model.bench import client
from model.bench.server import ServerProcess
from model.options import free_port
from tests.conftest import BOTH, Traces, needs_tool, run, until
from tests.foreign import ForeignRay
from tests.samples import GOOD

ENDS_WITHIN_S = 20
REPLICAS = ("--num_replicas", "2", "--cpus_per_replica", "0.5")
MODULES = {"model.kserve_server": (), "model.ray_server": REPLICAS}


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


def ask_for_a_while(server: ServerProcess) -> requests.Response:
    """A request that takes seconds: 64 large pictures."""
    url = f"{server.url}/v1/models/{server.name}:predict"
    return requests.post(url, json=client.v1_body([GOOD] * 64), timeout=60)


def worked(server: ServerProcess) -> float:
    """Seconds of CPU that its processes have used."""
    times = [process.cpu_times() for process in server.processes()]
    return sum(time.user + time.system for time in times)


def assert_ends(server: ServerProcess, traces: Traces) -> None:
    """The server exits in time, and neither process nor port nor file of it stays."""
    server.process.wait(ENDS_WITHIN_S)
    assert traces.left() == []
    for port in ports(server):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    server.stop()


SIGNALS = {
    "SIGTERM": lambda server: server.process.terminate(),
    "Ctrl-C": lambda server: os.killpg(server.process.pid, signal.SIGINT),  # to all in the group
}


ENDS = [(module, name) for module in MODULES for name in SIGNALS]


@pytest.mark.parametrize(("module", "name"), ENDS)
def test_a_signal_ends_everything(module, name, traces, foreign):
    """It answers the request in flight, ends, leaves nothing, and lets the other Ray be."""
    server = ServerProcess(module, *MODULES[module], **traces.env)
    with ThreadPoolExecutor(1) as thread:
        before = worked(server)
        answer = thread.submit(ask_for_a_while, server)
        until(lambda: worked(server) > before + 0.5)  # it is at work on the request
        assert not answer.done()
        SIGNALS[name](server)
        assert answer.result().status_code == 200
        assert len(answer.result().json()["predictions"]) == 64
    assert_ends(server, traces)
    assert foreign.is_as_it_was()


@BOTH
def test_only_this_machine_can_reach_it(server):
    """HTTP and gRPC listen on loopback, not on every address as KServe's own do."""
    found = listening(server.process)
    assert {found[port] for port in ports(server)} == {"127.0.0.1"}


def test_the_cluster_is_on_loopback(replicas):
    """Whatever of Ray and Serve listens, listens on loopback."""
    found = {process.name(): listening(process) for process in replicas.processes()}
    assert len(found) > 5 and all(set(at.values()) <= {"127.0.0.1"} for at in found.values()), found


def test_joining_a_cluster(traces, foreign):
    """--address: it serves from the other's cluster, and takes away only what it brought."""
    join = ["--address", foreign.address, *REPLICAS]
    server = ServerProcess("model.ray_server", *join, **traces.env | foreign.env)
    assert len(foreign.serve_processes()) == 3  # a controller, two replicas
    refused = run("model.ray_server", *join, **foreign.env)
    assert refused.returncode == 1 and "choose another --model_name" in refused.stderr
    assert client.v1(server, [GOOD])[0][0]["label"] == "red star"
    server.process.send_signal(signal.SIGINT)
    assert_ends(server, traces)
    assert foreign.is_as_it_was()


@pytest.mark.parametrize("module", MODULES)
def test_a_server_that_cannot_load_its_model(module, traces):
    """It ends with a sentence that says what to do, and leaves nothing behind."""
    nowhere = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nowhere |= {"no_proxy": "", "NO_PROXY": "", "TORCH_HOME": traces.env["TMPDIR"] + "-torch"}
    one = ["--num_replicas", "1"] if module == "model.ray_server" else []
    ended = run(module, *one, MODEL_WEIGHTS="imagenet", **nowhere, **traces.env)
    assert ended.returncode == 1 and "Unset MODEL_WEIGHTS" in ended.stderr.splitlines()[-1]
    assert traces.left() == []


def test_no_cluster_at_the_address():
    """--address where no Ray is: one sentence, in a moment."""
    address = f"127.0.0.1:{free_port()}"
    ended = run("model.ray_server", "--address", address)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and address in ended.stderr


def test_a_killed_notebook_takes_its_server_along(traces):
    """SIGKILL to the process that started a server ends the server too."""
    needs_tool("setpriv")  # Linux alone tells a child that its parent died
    code = (
        "from model.bench.server import ServerProcess; s = ServerProcess('model.kserve_server'); "
    )
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", ["Setting max asyncio", "Starting uvicorn"])
def test_a_signal_during_the_last_of_the_start_is_obeyed(number, line):
    """One signal ends the server also before uvicorn listens for it (KServe: REST goes on)."""
    ports = ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
    server = subprocess.Popen(
        [sys.executable, "-m", "model.kserve_server", *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert any(line in said for said in server.stdout)
        server.send_signal(number)
        said = server.communicate(timeout=ENDS_WITHIN_S)[0]
    finally:
        server.kill()
    assert "Traceback" not in said and "ready after" not in said
