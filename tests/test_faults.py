"""A fault must leave evidence of its effect: an experiment whose fault did nothing fails."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest

from model.faults import inject
from model.faults.experiment import Experiment, Fault, Observation, run_experiment
from model.faults.nodes import Nodes
from model.faults.observe import metrics, replicas, wait_for_replicas
from model.faults.plots import outcomes_over_time
from model.loadtest.run import RIGHT, Sample
from model.loadtest.workload import Workload

pytestmark = pytest.mark.long

WORK = Workload([b"an image"], ["red star"])
SECONDS = 0.6


class _Handler(BaseHTTPRequestHandler):
    """Answers every request rightly, and tells of two replicas."""

    protocol_version = "HTTP/1.1"

    late_s = 0.0

    def do_GET(self) -> None:
        """/metrics, or the health of the model."""
        time.sleep(self.late_s)
        self._send('# TYPE inference_replicas gauge\ninference_replicas{model="fake"} 2\n')

    def do_POST(self) -> None:
        """A prediction."""
        self.rfile.read(int(self.headers["content-length"]))
        label = [{"label": "red star", "probability": 1.0}]
        self._send(json.dumps({"predictions": [label]}))

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server that always answers rightly."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def server_of(url: str, *names: str) -> Iterator[SimpleNamespace]:
    """A stand-in for a ServerProcess whose processes have these names and do nothing."""
    own = [
        psutil.Popen(["bash", "-c", f"exec -a {name} sleep 60"], start_new_session=True)
        for name in names
    ]
    me = psutil.Process()
    process = SimpleNamespace(environ=dict, pid=me.pid, name=me.name, poll=lambda: 0)
    try:
        for each, name in zip(own, names, strict=True):  # bash has become the process of that name
            assert inject._within(10, lambda each=each, name=name: each.cmdline()[:1] == [name])
        yield SimpleNamespace(
            url=url,
            name="fake",
            predict=f"{url}/predict",
            process=process,
            processes=lambda: [p for p in own if p.is_running()],
        )
    finally:
        for each in own:
            each.kill()
            each.wait(10)


REPLICAS = ("ray::ServeReplica:one", "ray::ServeReplica:two")


def test_a_fault_without_anybody_to_hit_raises(url):
    """No replica, no helper of that name, no process left: nothing was done."""
    with server_of(url, "other") as server:
        for fault in (
            inject.kill_one,
            inject.kill_all,
            inject.stop_one,
            lambda server: inject.kill_helper(server, "ray::ServeController"),
            lambda server: inject.slow_down(server, threading.Event()),
            inject.terminate,
        ):
            with pytest.raises(RuntimeError, match="there is no|had ended before"):
                fault(server)
        assert len(server.processes()) == 1


def test_faults_return_the_evidence_of_their_effect(url):
    """Processes that are gone or stopped, and how many."""
    with server_of(url, *REPLICAS, "gcs_server") as server:
        over = threading.Event()
        threading.Timer(0.5, over.set).start()
        assert "stopped for 0.2 s: " in inject.slow_down(server, over)
        assert inject.stop_one(server) == "processes stopped: 1 (replica of 2)"
        assert [p.status() for p in replicas(server)].count(psutil.STATUS_STOPPED) == 1
        assert inject.kill_helper(server, "gcs_server") == "processes gone: 1 (gcs_server)"
        assert inject.kill_one(server) == "processes gone: 1 (replica of 2)"
        assert inject.kill_all(server) == "processes gone: 1 (replica of 1)"
        assert all(map(inject.is_gone, server.processes()))


def test_a_change_that_changes_nothing_raises(url, monkeypatch):
    """The command may succeed: what counts is that replicas start or end."""
    monkeypatch.setattr(inject, "CHANGED_WITHIN_S", 0.1)
    with server_of(url, *REPLICAS) as server:
        monkeypatch.setattr(inject, "redeploy", lambda *_: None)
        with pytest.raises(RuntimeError, match="no replica has started or ended"):
            inject.change(server, "--num_replicas", "2")
        monkeypatch.setattr(inject, "redeploy", lambda *_: inject.kill_one(server))
        assert inject.change(server) == "replica processes: 0 started, 1 ended"


def test_a_node_that_is_lost_already_cannot_be_lost():
    node = psutil.Popen(["true"])
    node.wait(10)
    nodes = object.__new__(Nodes)
    nodes._started = [node]
    with pytest.raises(RuntimeError, match="no process to kill: node 0"):
        nodes.lose(0)


@pytest.mark.parametrize("evidence", ["", None])
def test_an_experiment_fails_when_its_fault_leaves_no_evidence(url, evidence):
    with server_of(url, *REPLICAS) as server:
        faults = [Fault(0.2, "a fault", lambda: evidence)]
        with pytest.raises(RuntimeError, match="no evidence that it had an effect: a fault"):
            run_experiment(server, "none", WORK, SECONDS, faults)


def test_an_experiment_fails_with_its_fault(url):
    with server_of(url, "other") as server:
        faults = [Fault(0.2, "all killed", lambda: inject.kill_all(server))]
        with pytest.raises(RuntimeError, match="there is no process to kill: replica of 0"):
            run_experiment(server, "none", WORK, SECONDS, faults)


def test_an_experiment_fails_when_its_fault_comes_after_the_load(url):
    with server_of(url, *REPLICAS) as server:
        faults = [Fault(SECONDS + 4, "late", lambda: "it had an effect")]
        with pytest.raises(RuntimeError, match="no fault was injected while the load ran"):
            run_experiment(server, "late", WORK, SECONDS, faults)


def test_a_server_that_is_busy_for_long_is_asked_all_the_same(url, monkeypatch):
    """KServe alone goes on with a flood for more than ten seconds after its clients have left."""
    monkeypatch.setattr(_Handler, "late_s", 11)
    with server_of(url) as server:
        assert metrics(server) == {"inference_replicas fake": 2}


def test_a_load_that_cannot_begin_ends_its_experiment(url, monkeypatch):
    """Its steps do not wait for ever."""
    with server_of(url, *REPLICAS) as server:
        faults = [Fault(0, "at once", lambda: "it had an effect")]
        monkeypatch.setattr(WORK, "bodies", None)
        with pytest.raises(RuntimeError, match="the load generator failed"):
            run_experiment(server, "none", WORK, SECONDS, faults)


def test_a_fault_comes_when_the_load_has_begun(url):
    """Also where its generator starts slowly: the times of faults are the load's."""
    with server_of(url, *REPLICAS) as server:
        faults = [Fault(0, "at once", lambda: "it had an effect")]
        found = run_experiment(server, "at once", WORK, SECONDS, faults)
    assert 0 <= found.faults[0].began - found.run.began < SECONDS


def test_an_experiment_says_the_evidence(url):
    """In its facts; observations need none, and steps are done in the order of their times."""
    seen = []
    with server_of(url, *REPLICAS) as server:
        steps = [
            Fault(0.3, "a fault", lambda: "one effect"),
            Observation(0.35, lambda: seen.append(len(seen))),
            Fault(0.4, "a fault", lambda: "another effect"),
            Fault(0.2, "a fault", lambda: "one effect"),
            Fault(0.1, "a replica killed", lambda: inject.kill_one(server)),
        ]
        found = run_experiment(server, "all", WORK, SECONDS, steps, clients=2)
        wait_for_replicas(server, 2)
    assert seen == [0] and found.failed == found.rejected == found.run.wrong == 0
    assert found.facts == {
        "evidence: a replica killed": "processes gone: 1 (replica of 2)",
        "evidence: a fault": "one effect, 2 times; another effect",
    }
    assert [fault.name for fault in found.faults] == ["a replica killed", *["a fault"] * 3]
    assert found.row()["sent"] == found.answered > 0
    assert list(found.row())[-3:] == [
        "retried",
        "longest time without a success, s",
        "max latency, s",
    ]


def test_the_figure_shows_every_request():
    """Also those of a later panel that are slower than all of the first."""
    experiments = {
        f"{seconds} s": Experiment(
            "", SimpleNamespace(samples=[Sample(0.5, 0.5, 0.5 + seconds, RIGHT, {})], began=0)
        )
        for seconds in (0.8, 1.8)
    }
    for axes in outcomes_over_time(experiments, "").axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.8
