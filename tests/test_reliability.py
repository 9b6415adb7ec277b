"""What users fear, done to real servers under load: nobody gets a failed or a wrong response.

The same experiments as `make reliability`, in short; each changes the server for those after it.
"""

import os
import re
from collections.abc import Iterator

import grpc
import psutil
import pytest
import requests
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.faults import changes, crashes, retry_after
from model.faults.experiment import Experiment, Observation, run_experiment
from model.faults.observe import metrics, replicas, wait_for_replicas, workers
from model.faults.overload import overload
from model.faults.servers import HALVES, OTHER, ours
from model.loadtest.run import REJECTED, RIGHT
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload
from tests.conftest import until

pytestmark = pytest.mark.long

NAME = "custom-model"


@pytest.fixture(scope="module")
def work() -> Workload:
    """Images to send."""
    return Workload.drawn(16)


@pytest.fixture(scope="module")
def served() -> Iterator[ServerProcess]:
    """Two replicas, a short queue, and room for a third replica."""
    with ours(*HALVES, "--max_queued_requests", "16", "--access_log", "on") as server:
        yield server


def assert_nothing_lost(done: Experiment, rejected: bool = False) -> None:
    """Every request was answered, rightly and once; rejected: or rejected with 503."""
    assert done.failed == 0, done.run.errors
    assert done.run.wrong == 0
    assert rejected or done.rejected == 0, done.run.errors
    assert done.answered + done.rejected == done.run.sent > 0
    assert done.answered_by_server == done.answered, "the server counts responses otherwise"


def test_clients_that_obey_retry_after(served, work):
    """They come less often for each answer, and all get one."""
    found = retry_after.compare(served, work, seconds=4, rounds=1, clients=96)
    as_told, at_once = retry_after.rows(found)
    assert as_told["attempts for an answer"] < at_once["attempts for an answer"]
    assert as_told["without an answer"] == at_once["without an answer"] == 0
    assert len(retry_after.figure(found, "in short").axes) == 3


def test_a_replica_is_killed(served, work):
    """Its requests are retried on another replica; they are counted apart, and answered once."""
    for _ in range(3):  # it may happen to have none
        done = crashes.killed(served, work, seconds=6, every_s=6)
        assert_nothing_lost(done)
        if done.retried:
            break
    assert done.retried > 0
    assert re.search(r"retried \(\w*Error\): \w+", served.log.read_text())  # says why, and which


def test_all_replicas_are_killed(served, work):
    """Requests in flight wait for a new one, later ones are rejected; readiness is the truth."""
    done = crashes.all_killed(served, work, seconds=4)
    assert_nothing_lost(done, rejected=True)
    assert done.rejected > 0
    assert done.facts["not ready after, s"] < 3  # one, on a machine that is not busy
    assert done.facts["ready again after, s"] < 60
    assert done.facts["liveness"] == "200"


def test_a_replica_is_stuck(served, work):
    """What is in flight on it is retried on another, and it is replaced."""
    before = set(replicas(served))
    assert_nothing_lost(crashes.stuck(served, work, seconds=4))
    assert until(lambda: len(before & set(replicas(served))) == 1, 40)
    wait_for_replicas(served, 2)


def test_the_controller_is_killed(served, work):
    """Serve goes on without its controller, and Ray starts it again."""
    assert_nothing_lost(crashes.controller(served, work, seconds=5))


@pytest.mark.alone
def test_overload(served, work):
    """Admitted requests wait as long as the queue is, the others are rejected at once."""
    done = overload(served, work, seconds=7)
    assert_nothing_lost(done, rejected=True)
    facts = done.facts
    assert done.rejected > done.answered / 2
    assert done.latency_s(0.5, REJECTED) < done.latency_s(0.5, RIGHT) / 4
    assert facts["answered within, s (p99)"] < 2 * facts["the queue's length in seconds of work"]
    assert facts["responses a second"] > 0.5 * facts["responses a second, before"]
    assert facts["memory at the end, GB"] < 1.3 * facts["memory in the middle, GB"]
    assert facts["one client alone, after, ms"] < 4 * facts["one client alone, before, ms"]


def test_rejections_over_http_and_grpc(served, work):
    """503 with Retry-After, and UNAVAILABLE, while the queue is full; the body is not looked at."""
    rejections: list[requests.Response] = []
    codes: list[grpc.StatusCode] = []

    def send_until_rejected() -> None:
        """Send by both, what could never be answered, until both are rejected."""

        def rejected() -> bool:
            response = requests.post(served.predict, b"{no json", timeout=30)
            if response.status_code == 503:
                rejections.append(response)
            with grpc.insecure_channel(served.grpc) as channel:
                try:
                    GRPCInferenceServiceStub(channel).ModelInfer(pb.ModelInferRequest(), timeout=30)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        codes.append(error.code())
            return bool(rejections and codes)

        assert until(rejected, 5)

    eight = Workload(work.images, work.labels, images_per_request=8)
    before = metrics(served).get(f"inference_requests_total {NAME} rejected", 0)
    run_experiment(served, "", eight, 4, [Observation(1.5, send_until_rejected)], clients=70)
    assert int(rejections[0].headers["Retry-After"]) >= 1
    assert "busy" in rejections[0].json()["error"]
    values = metrics(served)
    assert values[f"inference_requests_total {NAME} rejected"] > before
    assert values[f"inference_requests_in_flight {NAME}"] == 0
    assert values[f"inference_requests_queued {NAME}"] == 0


def test_metrics_tell_of_the_replicas_work(served, work):
    """Prediction times, batches and replicas are in KServe's process, for work done in others."""
    before = metrics(served)
    done = run_experiment(served, "", work, 2)
    after = metrics(served)
    grew = {name: after[name] - before.get(name, 0) for name in after}
    name = "request_predict_seconds_count custom-model"
    assert grew[name] == done.answered == grew[f"inference_batch_size_sum {NAME}"]
    assert 0 < grew[f"inference_batch_size_count {NAME}"] < done.answered
    assert after[f"inference_replicas {NAME}"] == 2


def test_a_request_can_be_followed(served, work):
    """The client's id is in the response, in the log of KServe's process and in the replica's."""
    for given in ("of-mine-17", None):
        headers = {"content-type": "application/json"} | ({"x-request-id": given} if given else {})
        response = requests.post(served.predict, work.bodies[0], headers=headers, timeout=30)
        number = response.headers["x-request-id"]
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


def test_another_number_and_another_version(served, work):
    """A third replica, then two of another version: other processes, and nothing lost."""
    before = replicas(served)
    assert_nothing_lost(changes.changed(served, work, "", 3, seconds=8))
    assert len(replicas(served)) == 3
    other = changes.changed(served, work, "", 2, *OTHER, seconds=8)
    assert_nothing_lost(other)
    gone = {p.pid for p in before} & {p.pid for p in replicas(served)}
    assert not gone, "replicas of the old version run on"


def test_weights_are_loaded_again(served, work):
    """The same processes, with the weights loaded anew."""
    processes, before = {p.pid for p in replicas(served)}, workers(served, work, 1).keys()
    done = changes.reloaded(served, work, *OTHER, seconds=7)
    assert_nothing_lost(done)
    assert {p.pid for p in replicas(served)} == processes
    assert until(lambda: not workers(served, work, 1).keys() & before)


def test_autoscaling(served, work):
    """A second replica comes with the load and goes with it."""
    done = changes.scaled(served, work, seconds=20, delay_s=1)
    assert_nothing_lost(done, rejected=True)
    assert done.facts["2 replicas serve after, s"] < 60
    assert done.facts["1 replica after, s"] < 60
    assert done.facts["lost before and after"] == 0


def test_sigterm(served, work):
    """What was in flight is answered; then nothing is, and no process is left."""
    processes = served.processes()
    done = crashes.ended(served, work, seconds=3)
    assert done.failed == 0 and done.run.wrong == 0, done.run.errors
    assert done.answered > 0 and done.rejected > 0
    _, left = psutil.wait_procs(processes, timeout=20)
    assert left == []
