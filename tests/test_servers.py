"""Both servers end to end: every way to ask gives the numbers that the model itself gives."""

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import requests
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput
from matplotlib import cbook

from model import shapes
from model.bench import client, trial
from model.bench.server import ServerProcess
from tests.conftest import BOTH, Traces
from tests.samples import GOOD
from tests.ways import WAYS, ask_grpc, assert_equal, v2_post


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_same_answers(server, way, local, pictures):
    """Several instances, answered all and in order, as the model in this process answers."""
    assert_equal(way(server, pictures[:3]), local.classify(pictures[:3]))
    assert_equal(way(server, pictures[2::-1]), local.classify(pictures[2::-1]))


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_photograph_gets_five_labels(server, way, local):
    """A real JPEG of 512 x 606 pixels, of nothing that the demo weights know, is answered too."""
    photograph = Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes()
    (answer,) = way(server, [photograph])
    assert len({entry["label"] for entry in answer} & set(shapes.LABELS)) == 5
    assert_equal([answer], local.classify([photograph]))


@BOTH
@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.__name__)
def test_one_and_64_pictures_but_not_65(server, way, local, pictures):
    """A request holds 1 to 64 pictures."""
    assert_equal(way(server, pictures[:1]), local.classify(pictures[:1]))
    assert_equal(way(server, pictures), local.classify(pictures))
    with pytest.raises((requests.HTTPError, grpc.aio.AioRpcError)) as refusal:
        way(server, [*pictures, pictures[0]])
    if isinstance(refusal.value, requests.HTTPError):
        assert refusal.value.response.status_code == 400
        assert "send 1 to 64" in refusal.value.response.json()["error"]
    else:
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@BOTH
def test_64_clients_at_once_get_their_own_answers(server, local, pictures):
    """Different pictures at the same time over all protocols: every answer fits its request."""
    expected = [local.classify([picture]) for picture in pictures]
    highest = [answer[0][0]["probability"] for answer in expected]
    assert len({round(number, 5) for number in highest}) > 60  # else a mix-up would not show
    with ThreadPoolExecutor(64) as clients:
        ways = itertools.cycle(WAYS[:3])
        waiting = [clients.submit(next(ways), server, [picture]) for picture in pictures]
        for answer, right in zip(waiting, expected, strict=True):
            assert_equal(answer.result(timeout=60), right)


def workers(server: ServerProcess, requests_at_once: int = 24) -> set[str]:
    """Which copies of the model answer when that many V1 requests are sent at once."""
    url, body = f"{server.url}/v1/models/{server.name}:predict", client.v1_body([GOOD])
    with ThreadPoolExecutor(requests_at_once) as clients:
        answers = clients.map(lambda _: requests.post(url, json=body), range(requests_at_once))
        return {answer.headers["x-worker"] for answer in answers}


def test_both_replicas_work(plain, replicas):
    """Two copies of the model answer behind Ray, one in the plain server."""
    assert len(workers(replicas)) == 2 and len(workers(plain)) == 1


@BOTH
def test_one_output_and_the_request_id(server):
    """V2: only the outputs asked for come back, and so does the request's id; else a fresh one."""
    body = client.v2_body([GOOD])
    asked = v2_post(server, body | {"id": "of mine", "outputs": [{"name": "label"}]}).json()
    assert [output["name"] for output in asked["outputs"]] == ["label"]
    assert asked["id"] == "of mine" and asked["model_name"] == server.name
    fresh = {v2_post(server, body).json()["id"] for _ in range(2)}
    assert len(fresh) == 2 and all(fresh)
    image = InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([GOOD], dtype=object))
    request = InferRequest(server.name, [image], request_outputs=[RequestedOutput("probability")])
    answer = asyncio.run(ask_grpc(server, request))
    assert [output.name for output in answer.outputs] == ["probability"] and answer.id


@BOTH
@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", None])
@pytest.mark.parametrize("path", ["v1/models/{}:predict", "v2/models/{}/infer"])
def test_content_types(server, kind, path):
    """JSON with a charset, and JSON that does not say what it is, are read as JSON."""
    body = client.v1_body([GOOD]) if path.startswith("v1") else client.v2_body([GOOD])
    request = requests.Request("POST", f"{server.url}/{path.format(server.name)}", json=body)
    sent = request.prepare()
    del sent.headers["content-type"]
    if kind:
        sent.headers["content-type"] = kind
    with requests.Session() as session:
        answer = session.send(sent)
    assert answer.status_code == 200 and "red star" in answer.text


@BOTH
def test_metadata_and_readiness(server):
    """Both protocols describe the model's inputs and outputs and say that it is ready."""
    about = requests.get(f"{server.url}/v2/models/{server.name}").json()
    assert [(x["name"], x["datatype"], x["shape"]) for x in about["inputs"]] == [
        ("image", "BYTES", [-1]),
        ("image", "FP32", [-1, 3, 224, 224]),
    ]
    assert [(x["name"], x["datatype"], x["shape"]) for x in about["outputs"]] == [
        ("label", "BYTES", [-1, 5]),
        ("probability", "FP32", [-1, 5]),
    ]
    for path in ("v2/models/{}/ready", "v1/models/{}", "v2/health/ready", "v2/health/live"):
        assert requests.get(f"{server.url}/{path.format(server.name)}").status_code == 200

    async def over_grpc() -> tuple[bool, bool]:
        async with InferenceGRPCClient(server.grpc) as connection:
            ready = await connection.is_model_ready(server.name)
            return ready, await connection.is_server_live()

    assert asyncio.run(over_grpc()) == (True, True)


@BOTH
def test_each_request_is_counted_once(server):
    """At /metrics, over HTTP and gRPC, by what became of it."""
    before = trial.metrics(server)
    assert client.v1(server, [GOOD]) and asyncio.run(client.grpc(server, [GOOD]))
    requests.post(server.predict, b"no json")
    with pytest.raises(grpc.aio.AioRpcError):
        asyncio.run(client.grpc(server, [b"no picture"]))
    after = trial.metrics(server)
    grew = {name: after[name] - before.get(name, 0) for name in after if "requests_total" in name}
    outcomes = {"answered": 2, "invalid": 2, "failed": 0, "refused": 0}
    for outcome, count in outcomes.items():
        assert grew.get(f"inference_requests_total {outcome}", 0) == count
    assert after["inference_requests_inside"] == 0


@BOTH
def test_explain_is_not_implemented(server):
    """:explain gets 501, not a prediction."""
    url = f"{server.url}/v1/models/{server.name}:explain"
    answer = requests.post(url, json=client.v1_body([GOOD]))
    assert answer.status_code == 501 and "Traceback" not in answer.text


def test_plain_server_with_two_workers(traces: Traces, local, pictures):
    """KServe's --workers 2 answers as one does, and stops without leaving anything."""
    with ServerProcess("model.kserve_server", "--workers", "2", **traces.env) as server:
        for way in WAYS[:3]:
            assert_equal(way(server, pictures[:2]), local.classify(pictures[:2]))
        assert len(traces.processes()) >= 3
    assert traces.left() == []
