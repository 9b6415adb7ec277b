"""--topology ingress: KServe in every replica, behind Ray Serve's HAProxy.

What every server does, test_foreign_model.py asks of this one too; what it does under faults,
`python -m model.faults --kinds ingress`.
"""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from model.faults import inject
from model.faults.experiment import Fault, run_experiment
from model.faults.observe import metrics, replicas
from model.faults.promises import FRAGILE, LEAN, MS, Fragile, work
from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess
from tests.conftest import Traces, until
from tests.served import COUNTS, TEXTS, Served, empty_folder
from tests.test_foreign_model import over_grpc
from tests.test_lifecycle import assert_ends, listening

BODY = {"instances": [{"ms": 1}]}
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def served() -> Iterator[ServerProcess]:
    """Two replicas of FragileModel."""
    with Fragile("ingress")(2, **fresh_token()) as server:
        yield server


def workers(served: ServerProcess) -> set[str]:
    """The replicas that answer 64 requests, sent 16 at a time."""
    with ThreadPoolExecutor(16) as clients:
        sent = [clients.submit(requests.post, served.predict, json=BODY) for _ in range(64)]
        return {each.result().headers["x-worker"] for each in sent}


def test_metrics_are_those_of_all_replicas(served):
    """At one address, whichever replica is asked."""
    before = metrics(served)
    with ThreadPoolExecutor(16) as clients:
        sent = [clients.submit(requests.post, served.predict, json=BODY) for _ in range(60)]
        assert all(each.result().status_code == 200 for each in sent)
    for _ in range(4):  # each time another replica may be asked
        after = metrics(served)
        answered = f"inference_requests_total {served.name} answered"
        assert after[answered] - before.get(answered, 0) == 60
        assert after[f"inference_replicas {served.name}"] == 2
    assert after[f"inference_admission_limit {served.name}"] == 2 * (256 + 16)


LATE = """
import time
from kserve import Model

class Late(Model):
    def __init__(self, name, seconds=0.0):
        super().__init__(name)
        self.seconds = seconds
    def load(self):
        try:
            open("first", "x").close()
        except FileExistsError:
            time.sleep(self.seconds)
        self.ready = True
        return True
    def predict(self, payload, headers=None):
        return {"predictions": payload["instances"]}
"""


def test_it_is_ready_when_haproxy_knows_every_replica(tmp_path):
    """Also one that is loaded long after the other, and of which HAProxy hears late: whoever waits
    for the line gets both."""
    slow = {"RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S": "2"} | fresh_token()
    (tmp_path / "late.py").write_text(LATE)
    options = ["late:Late", "--topology", "ingress", "--num_replicas", "2", *LEAN]
    options += ["--set", "seconds=3"]
    with ServerProcess("model.serving", *options, folder=tmp_path, **slow) as server:
        assert until(lambda: "ready after" in server.log.read_text())
        assert len(workers(server)) == 2


ONE = ["--topology", "ingress", "--num_replicas", "1", *LEAN]


def a_and_b(folder: Path, name: str, source: str, *options: str) -> ServerProcess:
    """One replica with two models, `a` and `b`, of the class that a source defines."""
    (folder / "models_here.py").write_text(source)
    models = [f"{model}=models_here:{name}" for model in "ab"]
    more = {"folder": folder, **fresh_token()}
    return ServerProcess("model.serving", *models, *ONE, *options, **more)


def test_models_that_an_update_does_not_name_stay(tmp_path):
    """All of them are in one application."""
    with a_and_b(tmp_path, "Late", LATE) as server:
        inject.redeploy(server, "--model_name", "b", "--max_queued_requests", "7", *ONE)
        for name in "ab":
            url = f"{server.url}/v1/models/{name}:predict"
            # HAProxy may hear of the new replica a moment later.
            assert until(lambda url=url: requests.post(url, json={"instances": [1]}).ok)
        after = metrics(server)
        assert {after[f"inference_admission_limit {name}"] for name in "ab"} == {7 + 16}


def test_servers_on_one_machine_have_replicas_of_their_own(tmp_path_factory):
    """HAProxy knows a replica by its port, and Ray lets gRPC servers of two clusters share one."""
    options = ["--topology", "ingress", "--num_replicas", "2", *LEAN]
    folder = empty_folder(tmp_path_factory)
    with contextlib.ExitStack() as servers:
        at = {}
        for name in "ab":
            model = [f"{name}=foreign_models:WordCount", *options]
            server = ServerProcess("model.serving", *model, folder=folder, **fresh_token())
            at[name] = Served(servers.enter_context(server), folder)
        for one in at.values():
            assert until(lambda one=one: "ready after" in one.server.log.read_text())
        of_a, of_b = (
            {port for replica in replicas(one.server) for port in listening(replica)}
            for one in at.values()
        )
        assert len(of_a) >= 4 and not of_a & of_b
        for _ in range(20):
            for name, one in at.items():
                response = over_grpc(one, name, TEXTS, "BYTES")  # on a connection of its own
                assert response.outputs[0].as_numpy().tolist() == COUNTS


COUNTING = """
from pathlib import Path
from kserve import Model

class Counting(Model):
    loads = 0
    def load(self):
        if Path("broken", self.name).exists():
            raise OSError("its file is lost")
        self.loads += 1
        self.ready = True
        return True
    def predict(self, payload, headers=None):
        return {"predictions": [self.loads]}

class Broken(Counting):
    def load(self):
        raise OSError("its file is lost")
"""


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory) -> Iterator[tuple[ServerProcess, Path]]:
    """A server for other machines, and its folder."""
    folder = tmp_path_factory.mktemp("everywhere")
    options = ["--enable_grpc", "false", "--host", "0.0.0.0"]
    with a_and_b(folder, "Counting", COUNTING, *options) as server:
        yield server, folder


def test_other_machines_reach_haproxy_alone(everywhere):
    """With --host; what is behind it stays on loopback."""
    server, _ = everywhere
    assert until(lambda: "ready after" in server.log.read_text())
    at = [listening(process) for process in server.processes()]
    port = int(server.url.rpartition(":")[2])
    assert {p for found in at for p, ip in found.items() if ip != "127.0.0.1"} == {port}, at
    assert requests.post(f"{server.url}/v1/models/a:predict", json=BODY, timeout=30).ok


def test_each_of_several_models_is_loaded_again(everywhere):
    """Also after one that cannot be, which goes on as it was, and is named."""
    server, folder = everywhere
    (folder / "broken").mkdir()
    (folder / "broken" / "a").touch()
    with pytest.raises(RuntimeError, match="a: OSError: its file is lost.*what failed goes on"):
        inject.redeploy(server, "--model_name", "a", "--reload", *ONE)
    for name, loads in (("a", 1), ("b", 2)):
        url = f"{server.url}/v1/models/{name}:predict"
        assert requests.post(url, json={"instances": [1]}).json() == {"predictions": [loads]}


def test_an_update_that_breaks_one_of_several_models_changes_nothing(everywhere, monkeypatch):
    """It ends with the reason, and both models are served as before."""
    server, folder = everywhere
    monkeypatch.chdir(folder)  # where the command looks for the class
    (folder / "broken" / "a").unlink(missing_ok=True)
    with pytest.raises(RuntimeError, match="b cannot be loaded.*its file is lost.*as it was"):
        inject.redeploy(server, "b=models_here:Broken", *ONE)
    for name in "ab":
        url = f"{server.url}/v1/models/{name}:predict"
        assert until(lambda url=url: requests.post(url, json={"instances": [1]}).ok)


@pytest.fixture(scope="module")
def one() -> Iterator[ServerProcess]:
    """One replica, at which two requests may wait; then there is none for a while."""
    options = ["--max_queued_requests", "2", "--max_batch_size", "1"]
    with Fragile("ingress")(1, *options, **fresh_token()) as server:
        yield server


def test_a_full_replica_rejects(one):
    """By its own limit, and says when to try again."""
    slow = {"instances": [{"ms": 1500}]}
    with ThreadPoolExecutor(8) as clients:
        sent = [clients.submit(requests.post, one.predict, json=slow) for _ in range(8)]
        found = sorted(each.result().status_code for each in sent)
    assert found == [200] * 3 + [503] * 5
    rejected = [e.result() for e in sent if e.result().status_code == 503]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in rejected)


def test_without_any_replica_clients_are_told_to_try_again(one):
    """HAProxy's own answer is 503, as KServe's in front would be; Ray has it say 500.

    A request that HAProxy tries on an idle connection to the dead replica gets no response.
    """

    def answer() -> requests.Response | None:
        with contextlib.suppress(requests.ConnectionError):
            return requests.post(one.predict, json=BODY, timeout=30)

    def answered(status: int, seconds: float) -> requests.Response:
        found = []
        assert until(lambda: found.append(answer()) or _status(found[-1]) == status, seconds), found
        assert {_status(each) for each in found} <= {None, 503, 200}, found
        return found[-1]

    with inject.nothing_restarted(one):
        inject.kill_helper(one, "ray::ProxyActor")  # Ray's fallback, which waits for a replica
        inject.kill_all(one)
        told = answered(503, 20)
    assert told.headers["Retry-After"] == "1" and "try again" in told.json()["error"]
    answered(200, 40)


def _status(response: requests.Response | None) -> int | None:
    return None if response is None else response.status_code


@pytest.mark.parametrize("kb", [1, 100])
def test_a_client_that_leaves_is_not_worked_for(served, kb):
    """Also on a connection that has been used: the replica hears of it, and does not answer."""
    counted = f"inference_requests_total {served.name} abandoned"
    before = metrics(served).get(counted, 0)
    long = {"instances": [{"ms": 1500, "padding": "x" * (kb << 10)}]}
    for _ in range(8):
        with requests.Session() as client:
            assert client.post(served.predict, json=BODY, timeout=30).status_code == 200
            with pytest.raises(requests.Timeout):
                client.post(served.predict, json=long, timeout=0.2)
    assert until(lambda: metrics(served).get(counted, 0) == before + 8, 5)


def test_a_killed_replica_costs_nobody_a_request(served):
    """HAProxy sends what it held to the other one; its counters stay in the sum."""
    faults = [Fault(2, "a replica killed", lambda: inject.kill_one(served))]
    found = run_experiment(served, "", work(), 8, faults, clients=16)
    assert (found.failed, found.rejected, found.run.wrong) == (0, 0, 0), found.run.errors
    assert until(lambda: metrics(served)[f"inference_replicas {served.name}"] == 2, 60)


def test_an_update_changes_the_number_of_replicas(served):
    """While requests go on, and replicas that need not go stay; one that fails changes nothing."""
    before = workers(served)
    faults = [
        Fault(1, "a third", lambda: inject.change(served, *Fragile("ingress").options(3))),
        Fault(4, "two again", lambda: inject.change(served, *Fragile("ingress").options(2))),
    ]
    found = run_experiment(served, "", work(), 12, faults, clients=8)
    assert (found.failed, found.rejected) == (0, 0), found.run.errors
    assert len(before) == 2 and len(workers(served) & before) > 0
    with pytest.raises(RuntimeError, match="weights are broken"):
        inject.redeploy(served, *Fragile("ingress").options(2), "--set", "broken=true")
    assert requests.post(served.predict, json=BODY, timeout=30).json() == {"predictions": [1]}


def test_the_number_of_replicas_follows_the_load():
    """Up while many are at the replicas, and down again under a few; nobody notices."""
    options = [FRAGILE, "--topology", "ingress", *LEAN, "--num_replicas", "auto"]
    options += ["--max_replicas", "2", "--target_requests", "2"]
    options += ["--upscale_delay_s", "0.5", "--downscale_delay_s", "1"]
    with ServerProcess("model.serving", *options, **fresh_token()) as server:
        count = f"inference_replicas {server.name}"
        assert metrics(server)[count] == 1
        many = run_experiment(server, "", work(), 20, clients=16, keep_headers=True)
        assert len({headers["x-worker"] for headers in many.run.headers}) == 2
        few = run_experiment(server, "", work(), 12, clients=1)
        assert until(lambda: metrics(server)[count] == 1, 30)
        for found in (many, few):
            assert (found.failed, found.rejected) == (0, 0), found.run.errors


def test_haproxy_ends_with_what_manages_it(one):
    """The next one finds its port free, and knows the replicas."""
    inject.kill_helper(one, "ray::HAProxyManager")

    def recovered() -> bool:
        with contextlib.suppress(requests.RequestException):
            answered = requests.post(one.predict, json=BODY, timeout=5).ok
            processes = [p for p in one.processes() if p.name() == "haproxy"]
            return answered and len(processes) == 1
        return False

    assert until(lambda: not recovered(), 10) and until(recovered, 60)


def test_it_ends_as_it_should(traces: Traces):
    """On loopback while it runs; then what is in flight is answered, and nothing stays. No HAProxy
    that ends cuts off what still has time, nor waits for connections without a request."""
    env = traces.env | fresh_token()
    server = Fragile("ingress")(2, "--enable_grpc", "false", "--request_timeout_s", "200", **env)
    assert until(lambda: "ready after" in server.log.read_text())
    at = {process: listening(process) for process in server.processes()}
    assert {ip for found in at.values() for ip in found.values()} == {"127.0.0.1"}, at
    command = next(p.cmdline() for p, ports in at.items() if ports and p.name() == "haproxy")
    config = Path(command[command.index("-f") + 1]).read_text()
    assert int(re.search(r"hard-stop-after (\d+)s", config).group(1)) > 200
    assert len(replicas(server)) == 2
    host, port = server.url.removeprefix("http://").split(":")
    with (
        ThreadPoolExecutor(1) as thread,
        requests.Session() as idle,
        socket.create_connection((host, int(port)), timeout=30) as slow,
    ):
        assert idle.get(f"{server.url}/v2/health/live", timeout=10).ok  # it keeps its connection
        body = {"instances": [{"ms": 20 * MS}]}
        answer = thread.submit(requests.post, server.predict, json=body, timeout=60)
        in_flight = f"inference_requests_in_flight {server.name}"
        assert until(lambda: metrics(server)[in_flight] == 1)
        sent = json.dumps(BODY).encode()
        head = f"POST {urlsplit(server.predict).path} HTTP/1.1\r\nhost: x\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
        slow.sendall(head.encode() + sent[:-1])
        server.process.terminate()
        assert answer.result().status_code == 200
        assert not until(lambda: server.process.poll() is not None, 2)  # a body still arrives
        slow.sendall(sent[-1:])
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        said = server.log.read_text()
        assert_ends(server, traces)
    assert server.process.returncode == 0 and "Traceback" not in said
