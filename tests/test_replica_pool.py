"""What kserve's RayModel leaves out, shown on it ("stock") and on ReplicaPool ("mended").

The numbers are those of the rows in a table of RayModel's defects: 1 verb, 2 load, 3 readiness,
4 gRPC, 5 error bodies, 6 overload, 7 lost replicas, 8 time limit. Where "stock" no longer fails,
upstream has mended the row.
"""

import asyncio
import os
import pickle
import secrets
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import requests
from kserve.errors import ModelNotReady
from kserve.model import InferenceVerb
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.ray import RayModel
from ray import serve
from ray.exceptions import RayActorError

from model.loadtest.server_process import ServerProcess
from model.serving import replica_pool
from model.serving.config import ClusterConfig, LimitsConfig, ModelConfig
from model.serving.protocol import Description, Request
from model.serving.ray_cluster import Cluster
from model.serving.replica import Replica
from model.serving.replica_pool import ReplicaPool
from tests.conftest import until
from tests.tiny_models import TinyReplica
from tests.ways import assert_plain

UPSTREAM = "RayModel {} now: row {} can go"
KINDS = pytest.mark.parametrize("kind", ["stock", "mended"])
WATCHDOG_S = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the applications have a folder each."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster with four applications of one replica; `narrow` has room for two requests."""
    options = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 0.5}
    tiny = serve.deployment(TinyReplica).options(**options)
    narrow = tiny.options(max_ongoing_requests=1, max_queued_requests=1)
    busy = serve.deployment(Replica).options(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with Cluster(ClusterConfig(num_cpus=2)) as cluster:
            for app, kind in (("steady", tiny), ("mortal", tiny), ("narrow", narrow)):
                (folder / app).mkdir()
                own = (("folder", str(folder / app)),)
                model = ModelConfig(app, "tests.tiny_models:Tiny", own)
                serve.run(kind.bind(model), name=app, route_prefix=f"/{app}")
            model = ModelConfig("busy", "tests.tiny_models:Busy")
            bound = busy.bind(model, watchdog_timeout_s=WATCHDOG_S)
            serve.run(bound, name="busy", route_prefix="/busy")
            yield cluster


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Iterator[ServerProcess]:
    """KServe with each application as models named stock-… and mended-…."""
    join = ["--address", cluster.address, "--num_replicas", "1"]
    with ServerProcess("tests.tiny_server", *join, "--model_name", "mended-steady") as server:
        yield server


def ask(
    server: ServerProcess, model: str, order: object, verb="predict", **more
) -> requests.Response:
    """A V1 request with one instance."""
    url = f"{server.url}/v1/models/{model}:{verb}"
    return requests.post(url, json={"instances": [order]}, **({"timeout": 60} | more))


def ask_grpc(server: ServerProcess, model: str, release="", timeout=30) -> pb.ModelInferResponse:
    """A V2 request over gRPC, that waits for the file `release`; raises grpc.RpcError."""
    with grpc.insecure_channel(server.grpc) as channel:
        x = pb.ModelInferRequest.InferInputTensor(name="x", datatype="INT64", shape=[1])
        request = pb.ModelInferRequest(model_name=model, id=release, inputs=[x])
        request.raw_input_contents.append(bytes(8))
        request.parameters["of the request"].string_param = "a protobuf map"
        return GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=timeout)


def pid_of(server: ServerProcess, model: str, order: object = "pid") -> int:
    """The process of its replica, which answers."""
    return ask(server, model, order).json()["predictions"][0]


def assert_try_again(response: requests.Response) -> None:
    """503 with the time to wait and a plain sentence."""
    assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
    assert_plain(response.json()["error"])


def assert_raises(error: type[Exception], call: Callable, else_say: str) -> None:
    """As pytest.raises, with a sentence of one's own where nothing is raised."""
    try:
        call()
    except error:
        return
    pytest.fail(else_say)


@KINDS
def test_1_the_verb_reaches_the_replica(server, kind):
    """:explain is explained; stock answers it with a prediction."""
    body = ask(server, f"{kind}-steady", "pid", verb="explain").json()
    said = UPSTREAM.format("passes the verb", 1) if kind == "stock" else body
    assert list(body) == ["predictions" if kind == "stock" else "explanations"], said


@KINDS
def test_2_load_does_not_load_again(cluster, folder, kind):
    """The replica loaded as it was made; stock's load has it load once more at each call."""

    def loads() -> int:
        return len((folder / "steady" / "loads").read_text().splitlines())

    handle, before = serve.get_app_handle("steady"), loads()
    model = RayModel(kind, handle) if kind == "stock" else ReplicaPool(kind, handle, LimitsConfig())
    for _ in range(2):
        model.load()
    if kind == "stock":
        mended = UPSTREAM.format("does not load again", 2)
        assert model.ready and until(lambda: loads() == before + 2), mended
    else:
        assert model.description.inputs == [] and loads() == before
        assert asyncio.run(model.healthy())
    model.stop()


@KINDS
def test_4_grpc_requests_reach_the_replica(server, kind):
    """A gRPC request is answered; stock cannot pickle it."""
    if kind == "stock":
        mended = UPSTREAM.format("carries gRPC", 4)
        assert_raises(grpc.RpcError, lambda: ask_grpc(server, "stock-steady"), mended)
    else:
        assert ask_grpc(server, "mended-steady").outputs[0].contents.int64_contents[0] > 0


@KINDS
def test_5_an_error_of_the_model_arrives_as_itself(server, kind):
    """The model's own sentence; stock sends a remote traceback with pid and address."""
    response = ask(server, f"{kind}-steady", "refuse")
    assert response.status_code == 400
    if kind == "stock":
        error = response.json()["error"]
        assert "pid=" in error and "ip=" in error, UPSTREAM.format("sends plain errors", 5)
    else:
        assert response.json() == {"error": "there is no such image"}


@KINDS
def test_6_overload(server, folder, kind):
    """More than the queue holds: 503 and UNAVAILABLE, try again; stock says that it is at fault."""
    release = folder / f"{kind}-release"
    order = {"until": str(release)}
    with ThreadPoolExecutor(9) as clients:
        accepted = [clients.submit(ask, server, f"{kind}-narrow", order)]
        assert until(Path(f"{release}.begun").exists)
        while wait([request := clients.submit(ask, server, f"{kind}-narrow", order)], 0.5).not_done:
            accepted.append(request)  # it waits in the queue
        refused = [request.result(), ask(server, f"{kind}-narrow", order, timeout=10)]
        with pytest.raises(grpc.RpcError) as error:
            ask_grpc(server, f"{kind}-narrow")
        release.touch()
    assert [request.result().status_code for request in accepted] == [200, 200]
    if kind == "stock":
        mended = UPSTREAM.format("says that it is busy", 6)
        assert {response.status_code for response in refused} == {500}, mended
        assert error.value.code() is not grpc.StatusCode.UNAVAILABLE, mended
    else:
        for response in refused:
            assert_try_again(response)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert_plain(error.value.details())


@KINDS
def test_8_a_stuck_replica(server, folder, kind):
    """A limit ends the wait with 504 and DEADLINE_EXCEEDED; stock holds the client forever."""
    release = folder / f"{kind}-stuck"
    never = {"until": str(release)}
    if kind == "stock":
        mended = UPSTREAM.format("has a time limit", 8)
        waiting = partial(ask, server, "stock-narrow", never, timeout=3)
        assert_raises(requests.ReadTimeout, waiting, mended)
        release.touch()
        return
    response = ask(server, "hurried-narrow", never, timeout=30)
    assert response.status_code == 504 and "0.5 seconds" in response.json()["error"]
    assert_plain(response.json()["error"])
    with pytest.raises(grpc.RpcError) as error:
        ask_grpc(server, "hurried-narrow", str(release))
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.5 seconds" in error.value.details()  # the server's word, not the client's own


@pytest.mark.parametrize("model", ["hurried-narrow", "mended-narrow"])
def test_8_nobody_waits_any_more(server, folder, model):
    """A request past its limit, or whose gRPC client has gone, leaves the replica to others."""
    with pytest.raises(grpc.RpcError):
        ask_grpc(server, model, str(folder / "never"), timeout=1)
    assert ask(server, "mended-narrow", "pid", timeout=20).status_code == 200


def test_a_busy_replica_is_not_killed(server):
    """A step longer than several attempts: 504, which names what ran out; the replica lives on.

    It is at work for longer than an attempt may take, but not for longer than the watchdog waits.
    """
    before = pid_of(server, "mended-busy", 0)
    response = ask(server, "retried-busy", WATCHDOG_S / 2)
    assert response.status_code == 504
    assert "in 3 attempts of 0.4 seconds" in response.json()["error"]
    assert_plain(response.json()["error"])
    assert until(lambda: ask(server, "mended-busy", 0, timeout=20).status_code == 200, 40)
    assert pid_of(server, "mended-busy", 0) == before


def test_a_stuck_replica_is_killed(server):
    """A step longer than the watchdog waits: another replica takes its place."""
    before = pid_of(server, "mended-busy", 0)
    with pytest.raises(requests.ReadTimeout):
        ask(server, "mended-busy", 600, timeout=1)

    def another() -> bool:
        response = ask(server, "mended-busy", 0, timeout=20)
        return response.ok and response.json()["predictions"] != [before]

    assert until(another, 60)
    assert until(lambda: not Path(f"/proc/{before}").exists())


@pytest.mark.parametrize(
    ("limits", "attempts", "idempotent", "named"),
    [
        (LimitsConfig(request_timeout_s=9, per_attempt_timeout_s=2), 3, True, "3 attempts of 2 "),
        (LimitsConfig(request_timeout_s=9, per_attempt_timeout_s=3), 3, True, "within 9 "),
        (LimitsConfig(request_timeout_s=9, per_attempt_timeout_s=20), 1, True, "within 9 "),
        (LimitsConfig(request_timeout_s=9, per_attempt_timeout_s=2), 0, False, "within 2 "),
        (LimitsConfig(request_timeout_s=9, per_attempt_timeout_s=20), 0, False, "within 9 "),
    ],
)
def test_the_limit_that_ran_out_is_named(limits, attempts, idempotent, named):
    """In the sentence of the 504."""
    pool = ReplicaPool("slow", SimpleNamespace(options=lambda **_: None), limits)
    pool._running = 1
    pool.description = Description([], [], True, idempotent, ModelConfig("slow"))
    error = pool._translated(TimeoutError(), attempts)
    assert isinstance(error, TimeoutError) and named in str(error)


class TooLarge(grpc.RpcError):
    """What gRPC raises for a message, request or response, above its limit."""

    def code(self) -> grpc.StatusCode:
        """As of a call."""
        return grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("idempotent", [True, False])
def test_a_message_that_is_too_large_for_grpc(idempotent):
    """It goes by the object store; at once where the model must not be asked twice."""
    calls = []

    def handle(way: str) -> SimpleNamespace:
        async def answer() -> bytes:
            calls.append(way)
            if way == "gRPC":
                raise TooLarge
            return pickle.dumps(["response"])

        remote = SimpleNamespace(remote=lambda *_, **__: answer())
        return SimpleNamespace(call=remote, options=lambda **_: handle("gRPC"))

    pool = ReplicaPool("large", handle("object store"), LimitsConfig())
    pool.description = Description([], [], False, idempotent, ModelConfig("large"))
    request = Request({}, {})
    assert asyncio.run(pool.call(request, InferenceVerb.PREDICT)) == "response"
    assert calls == (["gRPC", "object store"] if idempotent else ["object store"])


def test_an_update_may_change_what_the_model_says_of_itself(monkeypatch):
    """While it goes on, a request may be retried only where both versions say so."""
    found = [Description([], [], True, True, ModelConfig("m"))]
    describe = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda **_: found[0]))
    handle = SimpleNamespace(describe=describe, app_name="m", deployment_name="m")
    handle.options = lambda **_: handle
    deployment = SimpleNamespace(replica_states={"RUNNING": 2})
    app = SimpleNamespace(deployments={"m": deployment}, status="RUNNING", last_deployed_time_s=1.0)
    status = SimpleNamespace(applications={"m": app})
    monkeypatch.setattr(replica_pool.serve, "status", lambda: status)
    monkeypatch.setattr(replica_pool, "WATCH_PERIOD_S", 0.01)
    pool = ReplicaPool("m", handle, LimitsConfig())
    pool.load()
    try:
        assert pool.description.idempotent and pool.description.has_predict_batch
        found[0] = Description([], [], False, False, ModelConfig("m"))
        app.status, app.last_deployed_time_s = "DEPLOYING", 2.0
        assert until(lambda: not pool.description.idempotent)
        assert pool.description.has_predict_batch
        app.status = "RUNNING"
        assert until(lambda: not pool.description.has_predict_batch)
    finally:
        pool.stop()


@pytest.fixture(scope="module")
def accident(server: ServerProcess, folder: Path) -> dict[str, requests.Response]:
    """Kill the only replica of `mortal` for good, and keep what two clients of it were told."""
    kinds = ("stock", "mended")
    pid = pid_of(server, "mended-mortal")
    with ThreadPoolExecutor(2) as clients:
        orders = {kind: {"until": str(folder / f"never-{kind}")} for kind in kinds}
        asked = {k: clients.submit(ask, server, f"{k}-mortal", orders[k]) for k in kinds}
        begun = [Path(f"{orders[kind]['until']}.begun") for kind in kinds]
        assert until(lambda: all(path.exists() for path in begun))
        (folder / "mortal" / "broken").touch()  # the next replica cannot load
        os.kill(pid, signal.SIGKILL)
        return {kind: request.result() for kind, request in asked.items()}


@KINDS
def test_7_a_lost_replica(accident, kind):
    """A request whose replica dies gets 503, try again; stock gets 500."""
    if kind == "stock":
        mended = UPSTREAM.format("handles a lost replica", 7)
        assert accident["stock"].status_code == 500, mended
    else:
        assert_try_again(accident["mended"])


@KINDS
def test_3_readiness_is_the_truth(server, accident, kind):
    """With every replica dead the model is not ready, also over gRPC; stock says it is."""
    ready = f"{server.url}/v2/models/{kind}-mortal/ready"
    if kind == "stock":
        status = requests.get(ready).status_code
        assert status == 200, UPSTREAM.format("is not ready without replicas", 3)
        return
    assert until(lambda: requests.get(ready).status_code == 503)
    assert_try_again(requests.get(ready))
    assert_try_again(ask(server, "mended-mortal", "pid"))
    with pytest.raises(grpc.RpcError) as error:
        ask_grpc(server, "mended-mortal")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(server.grpc) as channel:
        answer = GRPCInferenceServiceStub(channel).ModelReady(
            pb.ModelReadyRequest(name="mended-mortal")
        )
    assert not answer.ready


@KINDS
def test_2_load_tells_that_it_failed(accident, monkeypatch, kind):
    """A replica that cannot load makes load raise; stock says that it is ready."""
    monkeypatch.setattr(replica_pool, "LOAD_TIMEOUT_S", 2.0)
    handle = serve.get_app_handle("mortal")
    if kind == "stock":
        model = RayModel("mortal", handle)
        model.load()
        assert model.ready, UPSTREAM.format("notices that loading failed", 2)
        return
    pool = ReplicaPool("mortal", handle, LimitsConfig())
    with pytest.raises(ModelNotReady) as error:
        pool.load()
    assert_plain(str(error.value))
    assert not asyncio.run(pool.healthy())


def test_3_readiness_comes_back(server, accident, folder):
    """When a replica runs again the model is ready and answers."""
    (folder / "mortal" / "broken").unlink()
    ready = f"{server.url}/v2/models/mended-mortal/ready"
    assert until(lambda: requests.get(ready).status_code == 200, 60)
    assert ask(server, "mended-mortal", "pid", timeout=30).status_code == 200


def test_no_attempt_is_spent_on_a_replica_that_is_dead():
    """Four are lost together; who is retried asks each of them first, and has two attempts left."""
    calls = []

    async def predict_batch(payload: bytes, worker_index: int, **_: object) -> tuple[bytes, bool]:
        calls.append(worker_index)
        if worker_index < 4:
            raise RayActorError
        return pickle.dumps(["response"]), False

    async def ping(worker_index: int) -> None:
        if worker_index < 4:
            raise RayActorError

    remote = {"predict_batch": predict_batch, "ping": ping}
    handle = SimpleNamespace(**{k: SimpleNamespace(remote=v) for k, v in remote.items()})
    handle.options = lambda **_: handle
    pool = ReplicaPool("lost", handle, LimitsConfig())
    pool.description = Description([], [], True, True, ModelConfig("lost"))
    assert asyncio.run(pool.predict_batch([Request({}, {})], 0, 1)) == ["response"]
    assert calls == [0, 4]


def test_retries_have_a_budget():
    """Of 20 calls that are lost together at most four are retried at a time; none is dropped."""
    active, most, first = [0], [0], set()

    async def call(payload: bytes, **_: object) -> bytes:
        number = pickle.loads(payload)[0].id
        if number not in first:
            first.add(number)
            await asyncio.sleep(0.01)
            raise RayActorError
        active[0] += 1
        most[0] = max(most[0], active[0])
        await asyncio.sleep(0.02)
        active[0] -= 1
        return pickle.dumps([number])

    async def ping(worker_index: int) -> None:
        """It is alive."""

    remote = {"call": call, "ping": ping}
    handle = SimpleNamespace(**{k: SimpleNamespace(remote=v) for k, v in remote.items()})
    handle.options = lambda **_: handle
    pool = ReplicaPool("lost", handle, LimitsConfig())
    pool.description = Description([], [], False, True, ModelConfig("lost"))

    async def main() -> list:
        each = [Request({}, {}, str(i)) for i in range(20)]
        return await asyncio.gather(*(pool.call(r, InferenceVerb.PREDICT) for r in each))

    assert asyncio.run(main()) == [str(i) for i in range(20)]
    assert most[0] == 4
