"""What users fear, done to real servers under load: nobody gets a failed or a wrong answer.

The same trials as `make reliability`, in short; each changes the server for those after it.
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import psutil
import pytest
import requests
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.bench import plots, reliability, trial
from model.bench.load import RIGHT, Sample, Workload
from model.bench.server import ServerProcess
from tests.conftest import until


@pytest.fixture(scope="module")
def work() -> Workload:
    """Pictures to ask about."""
    return Workload.drawn(16)


@pytest.fixture(scope="module")
def served() -> Iterator[ServerProcess]:
    """Two replicas, a short queue, and room for a third replica."""
    with reliability.ray_server(
        *reliability.HALVES, "--max_queued_requests", "16", "--request_log", "on"
    ) as server:
        yield server


def assert_nothing_lost(done: trial.Trial, refused: bool = False) -> None:
    """Every request was answered, rightly and once; refused: or told to come again."""
    assert done.failed == 0, done.run.errors
    assert done.run.wrong == 0
    assert refused or done.refused == 0, done.run.errors
    assert done.answered + done.refused == done.run.sent > 0
    assert done.counted == done.answered, "the server counts answers otherwise"


def test_a_replica_is_killed(served, work):
    """Its requests are sent to another replica; they are counted apart, and answered once."""
    for _ in range(3):  # it may happen to have none
        done = reliability.killed(served, work, seconds=6, every=6)
        assert_nothing_lost(done)
        if done.again:
            break
    assert done.again > 0
    assert "sent again (ActorDiedError)" in served.log.read_text()


def test_all_replicas_are_killed(served, work):
    """Who is in waits for a new one; new ones are told to come again; readiness is the truth."""
    done = reliability.all_killed(served, work, seconds=4)
    assert_nothing_lost(done, refused=True)
    assert done.refused > 0
    assert done.facts["not ready after, s"] < 3  # one, on a machine that is not busy
    assert done.facts["ready again after, s"] < 60
    assert done.facts["liveness"] == "200"


def test_a_replica_is_stuck(served, work):
    """What it holds goes to another, and it is replaced."""
    before = set(trial.replicas(served))
    assert_nothing_lost(reliability.stuck(served, work, seconds=4))
    assert until(lambda: len(before & set(trial.replicas(served))) == 1, 40)
    trial.whole(served, 2)


def test_the_controller_is_killed(served, work):
    """Serve goes on without its controller, and Ray starts it again."""
    assert_nothing_lost(reliability.controller(served, work, seconds=5))


def test_the_figure_shows_every_request():
    """Also those of a later panel that are slower than all of the first."""
    trials = {
        f"{seconds} s": trial.Trial(
            "", SimpleNamespace(samples=[Sample(0.5, 0.5, 0.5 + seconds, RIGHT, {})], began=0)
        )
        for seconds in (0.8, 1.8)
    }
    for axes in plots.through(trials, "").axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.8


@pytest.mark.alone
def test_overload(served, work):
    """Those who are let in wait as long as the queue is, the others are told so at once."""
    done = reliability.overload(served, work, seconds=7)
    assert_nothing_lost(done, refused=True)
    facts = done.facts
    assert done.refused > done.answered / 2
    assert done.latency_s(0.5, trial.TURNED_AWAY) < done.latency_s(0.5, RIGHT) / 4
    assert facts["answered within, s (p99)"] < 2 * facts["the queue's length in seconds of work"]
    assert facts["answers a second"] > 0.5 * facts["answers a second, before"]
    assert facts["memory at the end, GB"] < 1.3 * facts["memory in the middle, GB"]
    assert facts["one client alone, after, ms"] < 4 * facts["one client alone, before, ms"]


def test_a_full_gate_over_http_and_grpc(served, work):
    """503 with Retry-After, and UNAVAILABLE, while the queue is full; the body is not looked at."""
    refusals: list[requests.Response] = []
    codes: list[grpc.StatusCode] = []

    def ask() -> None:
        """Ask in both ways, with nothing that could be answered, until both are refused."""

        def refused() -> bool:
            answer = requests.post(served.predict, b"{no json", timeout=30)
            if answer.status_code == 503:
                refusals.append(answer)
            with grpc.insecure_channel(served.grpc) as channel:
                try:
                    GRPCInferenceServiceStub(channel).ModelInfer(pb.ModelInferRequest(), timeout=30)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        codes.append(error.code())
            return bool(refusals and codes)

        assert until(refused, 5)

    eight = Workload(work.pictures, work.labels, each=8)
    before = trial.metrics(served)["inference_requests_total refused"]
    trial.under(served, "", eight, 4, [(1.5, "", ask)], clients=70)
    assert int(refusals[0].headers["Retry-After"]) >= 1
    assert "busy" in refusals[0].json()["error"]
    told = trial.metrics(served)
    assert told["inference_requests_total refused"] > before
    assert told["inference_requests_inside"] == told["inference_requests_waiting"] == 0


def test_metrics_tell_of_the_replicas_work(served, work):
    """Prediction times, batches and replicas are in KServe's process, for work done in others."""
    before = trial.metrics(served)
    done = trial.under(served, "", work, 2)
    after = trial.metrics(served)
    grew = {name: after[name] - before.get(name, 0) for name in after}
    name = "request_predict_seconds_count custom-model"
    assert grew[name] == done.answered == grew["inference_batch_pictures_sum"]
    assert 0 < grew["inference_batch_pictures_count"] < done.answered
    assert after["inference_replicas"] == 2


def test_a_request_can_be_followed(served, work):
    """The client's id is in the answer, in the log of KServe's process and in the replica's."""
    for given in ("of-mine-17", None):
        headers = {"content-type": "application/json"} | ({"x-request-id": given} if given else {})
        answer = requests.post(served.predict, work.bodies[0], headers=headers, timeout=30)
        number = answer.headers["x-request-id"]
        assert number == (given or number) and len(number) > 8
        assert until(lambda number=number: f"requestId: {number}" in served.log.read_text())
        folder = served.log.read_text().split("replicas log to ")[1].splitlines()[0]
        logs = [os.path.join(folder, name) for name in os.listdir(folder) if "replica" in name]
        assert until(
            lambda number=number, logs=logs: any(f"requests {number}" in read(log) for log in logs)
        )


def read(path: str) -> str:
    """What the file holds."""
    with open(path) as file:
        return file.read()


def workers(server: ServerProcess, work: Workload) -> set[str]:
    """The copies of the model that answer now."""
    run = trial.closed_loop(server.predict, work, 16, 1, warmup_s=0, keep_headers=True)
    return {sample.headers["x-worker"] for sample in run.samples}


def test_another_number_and_another_version(served, work):
    """A third replica, then two of another version: other processes, and nothing lost."""
    before = trial.replicas(served)
    assert_nothing_lost(reliability.changed(served, work, "", 3, seconds=8))
    assert len(trial.replicas(served)) == 3
    other = reliability.changed(served, work, "", 2, *reliability.OTHER, seconds=8)
    assert_nothing_lost(other)
    gone = {p.pid for p in before} & {p.pid for p in trial.replicas(served)}
    assert not gone, "replicas of the old version run on"


def test_weights_are_loaded_again(served, work):
    """The same processes, with the weights loaded anew."""
    processes, copies = {p.pid for p in trial.replicas(served)}, workers(served, work)
    done = reliability.changed(served, work, "", 2, *reliability.OTHER, "--reload", seconds=7)
    assert_nothing_lost(done)
    assert {p.pid for p in trial.replicas(served)} == processes
    assert until(lambda: not workers(served, work) & copies)


def test_autoscaling(served, work):
    """A second replica comes with the load and goes with it."""
    done = reliability.scaled(served, work, seconds=20, delay=1)
    assert_nothing_lost(done, refused=True)
    assert done.facts["2 replicas serve after, s"] < 60
    assert done.facts["1 replica after, s"] < 60
    assert done.facts["lost before and after"] == 0


def test_sigterm(served, work):
    """Whoever was let in is answered; then nobody is, and no process is left."""
    processes = served.processes()
    done = reliability.ended(served, work, seconds=3)
    assert done.failed == 0 and done.run.wrong == 0, done.run.errors
    assert done.answered > 0 and done.refused > 0
    _, left = psutil.wait_procs(processes, timeout=20)
    assert left == []
