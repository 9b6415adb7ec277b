"""The server in process and with replicas: every way in gives the model's own predictions."""

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

from model.alexnet import shapes
from model.faults.observe import metrics
from model.loadtest import client
from model.loadtest.bodies import v1_body, v2_body
from model.loadtest.server_process import ServerProcess
from tests.conftest import BOTH, Traces
from tests.samples import GOOD
from tests.ways import WAYS, ask_grpc, assert_equal, v2_post


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_same_predictions(server, way, local, images):
    """For several instances, all and in order, what the model in this process predicts."""
    assert_equal(way(server, images[:3]), local.classify(images[:3]))
    assert_equal(way(server, images[2::-1]), local.classify(images[2::-1]))


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_photograph_gets_five_labels(server, way, local):
    """A real JPEG of 512 x 606 pixels, of nothing that the demo weights know, too."""
    photograph = Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes()
    (prediction,) = way(server, [photograph])
    assert len({entry["label"] for entry in prediction} & set(shapes.LABELS)) == 5
    assert_equal([prediction], local.classify([photograph]))


@BOTH
@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.__name__)
def test_one_and_64_images_but_not_65(server, way, local, images):
    """A request holds 1 to 64 images."""
    assert_equal(way(server, images[:1]), local.classify(images[:1]))
    assert_equal(way(server, images), local.classify(images))
    with pytest.raises((requests.HTTPError, grpc.aio.AioRpcError)) as refusal:
        way(server, [*images, images[0]])
    if isinstance(refusal.value, requests.HTTPError):
        assert refusal.value.response.status_code == 400
        assert "send 1 to 64" in refusal.value.response.json()["error"]
    else:
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@BOTH
def test_64_clients_at_once_get_their_own_predictions(server, local, images):
    """Different images at the same time over all protocols: every response fits its request."""
    expected = [local.classify([image]) for image in images]
    highest = [predictions[0][0]["probability"] for predictions in expected]
    assert len({round(number, 5) for number in highest}) > 60  # else a mix-up would not show
    with ThreadPoolExecutor(64) as clients:
        ways = itertools.cycle(WAYS[:3])
        waiting = [clients.submit(next(ways), server, [image]) for image in images]
        for response, right in zip(waiting, expected, strict=True):
            assert_equal(response.result(timeout=60), right)


def workers(server: ServerProcess, requests_at_once: int = 24) -> set[str]:
    """Which processes hold the models that predict when that many V1 requests are sent at once."""
    body = v1_body([GOOD])
    with ThreadPoolExecutor(requests_at_once) as clients:
        responses = clients.map(
            lambda _: requests.post(server.predict, json=body), range(requests_at_once)
        )
        return {response.headers["x-worker"] for response in responses}


def test_both_replicas_work(plain, replicas):
    """Two processes hold the model behind Ray Serve, one in process."""
    assert len(workers(replicas)) == 2 and len(workers(plain)) == 1


@BOTH
def test_one_output_and_the_request_id(server):
    """V2: only the requested outputs come back, and the request's id, or else a fresh one."""
    body = v2_body([GOOD])
    asked = v2_post(server, body | {"id": "of mine", "outputs": [{"name": "label"}]}).json()
    assert [output["name"] for output in asked["outputs"]] == ["label"]
    assert asked["id"] == "of mine" and asked["model_name"] == server.name
    fresh = {v2_post(server, body).json()["id"] for _ in range(2)}
    assert len(fresh) == 2 and all(fresh)
    image = InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([GOOD], dtype=object))
    request = InferRequest(server.name, [image], request_outputs=[RequestedOutput("probability")])
    response = asyncio.run(ask_grpc(server, request))
    assert [output.name for output in response.outputs] == ["probability"] and response.id


@BOTH
@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", None])
@pytest.mark.parametrize("path", ["v1/models/{}:predict", "v2/models/{}/infer"])
def test_content_types(server, kind, path):
    """JSON with a charset, and JSON that does not say what it is, are read as JSON."""
    body = v1_body([GOOD]) if path.startswith("v1") else v2_body([GOOD])
    request = requests.Request("POST", f"{server.url}/{path.format(server.name)}", json=body)
    sent = request.prepare()
    del sent.headers["content-type"]
    if kind:
        sent.headers["content-type"] = kind
    with requests.Session() as session:
        response = session.send(sent)
    assert response.status_code == 200 and "red star" in response.text


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
    before = metrics(server)
    assert client.v1(server, [GOOD]) and asyncio.run(client.grpc(server, [GOOD]))
    requests.post(server.predict, b"no json")
    with pytest.raises(grpc.aio.AioRpcError):
        asyncio.run(client.grpc(server, [b"no image"]))
    after = metrics(server)
    grew = {name: after[name] - before.get(name, 0) for name in after if "requests_total" in name}
    outcomes = {"answered": 2, "invalid": 2, "failed": 0, "rejected": 0}
    for outcome, count in outcomes.items():
        assert grew.get(f"inference_requests_total {server.name} {outcome}", 0) == count
    assert after[f"inference_requests_in_flight {server.name}"] == 0


@BOTH
def test_explain_is_not_implemented(server):
    """:explain gets 501, not a prediction."""
    url = f"{server.url}/v1/models/{server.name}:explain"
    response = requests.post(url, json=v1_body([GOOD]))
    assert response.status_code == 501 and "Traceback" not in response.text


@pytest.mark.long
def test_in_process_with_two_workers(traces: Traces, local, images):
    """KServe's --workers 2 predicts as one does, and stops without leaving anything."""
    options = ["--in_process", "--workers", "2"]
    with ServerProcess("model.serving", *options, **traces.env) as server:
        for way in WAYS[:3]:
            assert_equal(way(server, images[:2]), local.classify(images[:2]))
        assert len(traces.processes()) >= 3
    assert traces.left() == []
