"""Asks a server about pictures, in the three ways in: V1, V2 over REST, V2 over gRPC.

All three take encoded pictures and return V1 predictions: for each picture five
{"label": str, "probability": float}, likeliest first.
"""

import base64

import numpy as np
import requests
from kserve import InferenceGRPCClient, InferInput, InferRequest

from model.bench.server import ServerProcess

Predictions = list[list[dict]]
TIMEOUT_S = 120


def v1_body(pictures: list[bytes]) -> dict:
    """The JSON body of a V1 request."""
    return {"instances": [{"image": {"b64": _text(picture)}} for picture in pictures]}


def v2_body(pictures: list[bytes]) -> dict:
    """The JSON body of a V2 REST request."""
    data = [_text(picture) for picture in pictures]
    return {"inputs": [{"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}]}


def v1(server: ServerProcess, pictures: list[bytes]) -> Predictions:
    """Ask in V1; raises requests.HTTPError unless the answer is 200."""
    url = f"{server.url}/v1/models/{server.name}:predict"
    answer = requests.post(url, json=v1_body(pictures), timeout=TIMEOUT_S)
    answer.raise_for_status()
    return answer.json()["predictions"]


def v2(server: ServerProcess, pictures: list[bytes]) -> Predictions:
    """Ask in V2 over REST; raises requests.HTTPError unless the answer is 200."""
    url = f"{server.url}/v2/models/{server.name}/infer"
    answer = requests.post(url, json=v2_body(pictures), timeout=TIMEOUT_S)
    answer.raise_for_status()
    outputs = {
        out["name"]: np.reshape(out["data"], out["shape"]) for out in answer.json()["outputs"]
    }
    return _predictions(outputs["label"], outputs["probability"])


async def grpc(server: ServerProcess, pictures: list[bytes]) -> Predictions:
    """Ask in V2 over gRPC, with the pictures as raw bytes; raises grpc.aio.AioRpcError."""
    image = InferInput("image", [len(pictures)], "BYTES")
    image.set_data_from_numpy(np.array(pictures, dtype=object))
    client = InferenceGRPCClient(server.grpc)
    try:
        answer = await client.infer(
            InferRequest(model_name=server.name, infer_inputs=[image]), timeout=TIMEOUT_S
        )
    finally:
        await client.close()
    labels = answer.get_output_by_name("label").as_numpy()
    labels = np.vectorize(lambda label: label.decode())(labels)
    return _predictions(labels, answer.get_output_by_name("probability").as_numpy())


def _predictions(labels: np.ndarray, probabilities: np.ndarray) -> Predictions:
    return [
        [
            {"label": str(label), "probability": float(probability)}
            for label, probability in zip(*row, strict=True)
        ]
        for row in zip(labels, probabilities, strict=True)
    ]


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()
