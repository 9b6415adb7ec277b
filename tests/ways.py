"""Every way to send images to a server, and what may be said of its responses."""

import asyncio
import re

import numpy as np
import pytest
import requests
import torch
from kserve import InferenceGRPCClient, InferInput, InferRequest, InferResponse

from model.alexnet.images import preprocess
from model.loadtest import client
from model.loadtest.server_process import ServerProcess
from tests.samples import GOOD


def prepared(images: list[bytes]) -> np.ndarray:
    """The images as FP32 [N, 3, 224, 224], for clients that preprocess themselves."""
    return torch.stack([preprocess(image) for image in images]).numpy()


def v2_post(server: ServerProcess, body: dict, **more) -> requests.Response:
    """A V2 REST request."""
    return requests.post(f"{server.url}/v2/models/{server.name}/infer", json=body, **more)


def v1_form(labels: list[list[str]], probabilities: list[list[float]]) -> client.Predictions:
    """V2's two outputs in the form of V1's predictions."""
    return [
        [{"label": label, "probability": number} for label, number in zip(*row, strict=True)]
        for row in zip(labels, probabilities, strict=True)
    ]


def v2_predictions(response: requests.Response) -> client.Predictions:
    """What V2 over REST responded; raises requests.HTTPError unless the status is 200."""
    response.raise_for_status()
    numbers = {
        out["name"]: np.reshape(out["data"], out["shape"]) for out in response.json()["outputs"]
    }
    return v1_form(numbers["label"].tolist(), numbers["probability"].tolist())


def v2_fp32(server: ServerProcess, images: list[bytes]) -> client.Predictions:
    """Preprocessed images in JSON."""
    array = prepared(images)
    image = {"name": "image", "datatype": "FP32", "shape": array.shape}
    body = {"inputs": [image | {"data": array.ravel().tolist()}]}
    return v2_predictions(v2_post(server, body))


def fp32_request(server: ServerProcess, images: list[bytes]) -> InferRequest:
    """Preprocessed images as KServe's own client class, raw."""
    image = InferInput("image", [len(images), 3, 224, 224], "FP32")
    image.set_data_from_numpy(prepared(images), binary_data=True)
    return InferRequest(server.name, [image], request_id="of mine")


def v2_fp32_binary(server: ServerProcess, images: list[bytes]) -> client.Predictions:
    """Preprocessed images as raw bytes behind the JSON, as KServe's REST client sends them."""
    return _binary(server, fp32_request(server, images))


def v2_binary(server: ServerProcess, images: list[bytes]) -> client.Predictions:
    """Encoded images as raw bytes behind the JSON, as KServe's REST client sends them."""
    image = InferInput("image", [len(images)], "BYTES")
    image.set_data_from_numpy(np.array(images, dtype=object), binary_data=True)
    return _binary(server, InferRequest(server.name, [image]))


def _binary(server: ServerProcess, request: InferRequest) -> client.Predictions:
    body, length = request.to_rest()
    headers = {"inference-header-content-length": str(length)}
    url = f"{server.url}/v2/models/{server.name}/infer"
    headers["content-type"] = "application/octet-stream"
    return v2_predictions(requests.post(url, body, headers=headers))


async def ask_grpc(server: ServerProcess, request: InferRequest) -> InferResponse:
    """One call of KServe's gRPC client."""
    async with InferenceGRPCClient(server.grpc) as connection:
        return await connection.infer(request)


def grpc_fp32(server: ServerProcess, images: list[bytes]) -> client.Predictions:
    """Preprocessed images over gRPC."""
    response = asyncio.run(ask_grpc(server, fp32_request(server, images)))
    assert response.id == "of mine"
    label, probability = (response.get_output_by_name(n) for n in ("label", "probability"))
    labels = [[label.decode() for label in row] for row in label.as_numpy()]
    return v1_form(labels, probability.as_numpy().tolist())


def v2_grpc(server: ServerProcess, images: list[bytes]) -> client.Predictions:
    """Encoded images over gRPC."""
    return asyncio.run(client.grpc(server, images))


WAYS = [client.v1, client.v2, v2_grpc, v2_fp32, v2_fp32_binary, v2_binary, grpc_fp32]


def assert_equal(predictions: client.Predictions, expected: client.Predictions) -> None:
    """The same labels, and probabilities equal to 1e-5."""
    assert len(predictions) == len(expected)
    for ours, theirs in zip(predictions, expected, strict=True):
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
        assert [entry["probability"] for entry in ours] == pytest.approx(
            [entry["probability"] for entry in theirs], abs=1e-5
        )


INTERNAL = (
    r"Traceback|Error\(|\x1b|pid=|ip=|0x[0-9a-f]{6}|ray::"
    r"|\.(py|cpp|c)\b|/(home|root|tmp|usr|work|__w)/"
)


def assert_plain(sentence: str) -> None:
    """One line for a person, without the server's internals."""
    assert re.fullmatch(r"[^\n]{5,400}", sentence), sentence
    assert not re.search(INTERNAL, sentence), sentence


def assert_answers(server: ServerProcess) -> None:
    """The server still labels a red star right."""
    assert client.v1(server, [GOOD])[0][0]["label"] == "red star"
