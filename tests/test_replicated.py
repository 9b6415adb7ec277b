"""What kserve's RayModel leaves out, shown on it ("stock") and on ReplicatedModel ("mended").

The numbers are those of the rows in a table of RayModel's defects: 1 verb, 2 load, 3 readiness,
4 gRPC, 5 error bodies, 6 overload and lost replicas, 8 time limit.
"""

import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import grpc
import pytest
import requests
from kserve.errors import ModelNotReady
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.ray import RayModel
from ray import serve

from model.bench.server import ServerProcess
from model.cluster import Cluster
from model.replicated import ReplicatedModel
from tests.conftest import until
from tests.tiny_models import Tiny
from tests.ways import assert_plain

KINDS = pytest.mark.parametrize("kind", ["stock", "mended"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the applications have a folder each."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster with three applications of one replica; `narrow` has room for two requests."""
    watched = {"health_check_period_s": 0.5}  # as model.cluster has it
    tiny = serve.deployment(Tiny).options(ray_actor_options={"num_cpus": 0.1}, **watched)
    narrow = tiny.options(max_ongoing_requests=1, max_queued_requests=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with Cluster(num_cpus=2) as cluster:
            for app, kind in (("steady", tiny), ("mortal", tiny), ("narrow", narrow)):
                (folder / app).mkdir()
                serve.run(kind.bind(app, str(folder / app)), name=app, route_prefix=f"/{app}")
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
    return requests.post(url, json={"instances": [order]}, **more)


def ask_grpc(server: ServerProcess, model: str, release="", timeout=30) -> pb.ModelInferResponse:
    """A V2 request over gRPC, that waits for the file `release`; raises grpc.RpcError."""
    with grpc.insecure_channel(server.grpc) as channel:
        image = pb.ModelInferRequest.InferInputTensor(name="x", datatype="INT64", shape=[1])
        request = pb.ModelInferRequest(model_name=model, id=release, inputs=[image])
        request.raw_input_contents.append(bytes(8))
        request.parameters["of the request"].string_param = "a protobuf map"
        return GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=timeout)


def assert_try_again(answer: requests.Response) -> None:
    """503 with the time to wait and a plain sentence."""
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert_plain(answer.json()["error"])


@KINDS
def test_1_the_verb_reaches_the_replica(server, kind):
    """:explain is explained; stock answers it with a prediction."""
    answer = ask(server, f"{kind}-steady", "pid", verb="explain").json()
    assert list(answer) == ["predictions" if kind == "stock" else "explanations"]


def fresh(kind: str) -> RayModel:
    """A model of the kind in this process, not loaded yet."""
    return (RayModel if kind == "stock" else ReplicatedModel)(kind, serve.get_app_handle("steady"))


@KINDS
def test_2_load_does_not_load_again(cluster, folder, kind):
    """The replica loaded as it was made; stock's load has it load once more at each call."""

    def loads() -> int:
        return len((folder / "steady" / "loads").read_text().splitlines())

    before, model = loads(), fresh(kind)
    for _ in range(2):
        model.load()
    assert model.ready
    if kind == "stock":
        assert until(lambda: loads() == before + 2)
    else:
        assert serve.get_app_handle("steady").healthy.remote().result() and loads() == before
    model.stop()


@KINDS
def test_2_load_tells_that_it_failed(cluster, folder, kind):
    """A replica that cannot load makes load raise; stock says that it is ready."""
    model, broken = fresh(kind), folder / "steady" / "broken"
    broken.touch()
    if kind == "stock":
        model.load()
        assert model.ready
    else:
        with pytest.raises(ModelNotReady, match="has loaded"):
            model.load()
        assert not model.ready
    broken.unlink()


@KINDS
def test_4_grpc_requests_reach_the_replica(server, kind):
    """A gRPC request is answered; stock cannot pickle it."""
    if kind == "stock":
        with pytest.raises(grpc.RpcError):
            ask_grpc(server, "stock-steady")
    else:
        assert ask_grpc(server, "mended-steady").outputs[0].contents.int64_contents[0] > 0


@KINDS
def test_5_an_error_of_the_model_arrives_as_itself(server, kind):
    """The model's own sentence; stock sends a remote traceback with pid and address."""
    answer = ask(server, f"{kind}-steady", "refuse")
    assert answer.status_code == 400
    if kind == "stock":
        assert "pid=" in answer.json()["error"] and "ip=" in answer.json()["error"]
    else:
        assert answer.json() == {"error": "there is no such picture"}


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
        assert {answer.status_code for answer in refused} == {500}
        assert error.value.code() is not grpc.StatusCode.UNAVAILABLE
    else:
        for answer in refused:
            assert_try_again(answer)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert_plain(error.value.details())


@KINDS
def test_8_a_stuck_replica(server, folder, kind):
    """A limit ends the wait with 504 and DEADLINE_EXCEEDED; stock holds the client for ever."""
    release = folder / f"{kind}-stuck"
    never = {"until": str(release)}
    if kind == "stock":
        with pytest.raises(requests.ReadTimeout):
            ask(server, "stock-narrow", never, timeout=3)
        release.touch()
        return
    answer = ask(server, "hurried-narrow", never, timeout=30)
    assert answer.status_code == 504 and "0.5 seconds" in answer.json()["error"]
    assert_plain(answer.json()["error"])
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


@pytest.fixture(scope="module")
def accident(server: ServerProcess, folder: Path) -> dict[str, requests.Response]:
    """Kill the only replica of `mortal` for good, and keep what two clients of it were told."""
    kinds = ("stock", "mended")
    pid = ask(server, "mended-mortal", "pid").json()["predictions"][0]
    with ThreadPoolExecutor(2) as clients:
        orders = {kind: {"until": str(folder / f"never-{kind}")} for kind in kinds}
        asked = {k: clients.submit(ask, server, f"{k}-mortal", orders[k]) for k in kinds}
        begun = [Path(f"{orders[kind]['until']}.begun") for kind in kinds]
        assert until(lambda: all(path.exists() for path in begun))
        (folder / "mortal" / "broken").touch()  # the next replica cannot load
        os.kill(pid, signal.SIGKILL)
        return {kind: request.result() for kind, request in asked.items()}


@KINDS
def test_6_a_lost_replica(accident, kind):
    """A request whose replica dies gets 503, try again; stock gets 500."""
    if kind == "stock":
        assert accident["stock"].status_code == 500
    else:
        assert_try_again(accident["mended"])


@KINDS
def test_3_readiness_is_the_truth(server, accident, kind):
    """With every replica dead the model is not ready, also over gRPC; stock says it is."""
    ready = f"{server.url}/v2/models/{kind}-mortal/ready"
    if kind == "stock":
        assert requests.get(ready).status_code == 200
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


def test_3_readiness_comes_back(server, accident, folder):
    """When a replica runs again the model is ready and answers."""
    (folder / "mortal" / "broken").unlink()
    ready = f"{server.url}/v2/models/mended-mortal/ready"
    assert until(lambda: requests.get(ready).status_code == 200, 40)
    assert ask(server, "mended-mortal", "pid", timeout=30).status_code == 200
