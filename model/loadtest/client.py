"""A client for each of the three protocols: V1, V2 over REST, V2 over gRPC.

All three functions take encoded images and return V1 predictions: for each image the five most
probable {"label": str, "probability": float}, most probable first.
"""

from dataclasses import replace

import numpy as np
import requests
from kserve import InferenceGRPCClient, InferInput, InferRequest

from model.loadtest.bodies import v1_body, v2_body
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

Predictions = list[list[dict]]
TIMEOUT_S = 120


def v1(server: ServerProcess, images: list[bytes]) -> Predictions:
    """Send a V1 request; raises requests.HTTPError unless the status is 200."""
    response = requests.post(server.predict, json=v1_body(images), timeout=TIMEOUT_S)
    response.raise_for_status()
    return response.json()["predictions"]


def v2(server: ServerProcess, images: list[bytes]) -> Predictions:
    """Send a V2 request over REST; raises requests.HTTPError unless the status is 200."""
    url = f"{server.url}/v2/models/{server.name}/infer"
    response = requests.post(url, json=v2_body(images), timeout=TIMEOUT_S)
    response.raise_for_status()
    outputs = {
        out["name"]: np.reshape(out["data"], out["shape"]) for out in response.json()["outputs"]
    }
    return _predictions(outputs["label"], outputs["probability"])


async def grpc(server: ServerProcess, images: list[bytes]) -> Predictions:
    """Send a V2 request over gRPC, the images as raw bytes; raises grpc.aio.AioRpcError."""
    image = InferInput("image", [len(images)], "BYTES")
    image.set_data_from_numpy(np.array(images, dtype=object))
    client = InferenceGRPCClient(server.grpc)
    try:
        response = await client.infer(
            InferRequest(model_name=server.name, infer_inputs=[image]), timeout=TIMEOUT_S
        )
    finally:
        await client.close()
    labels = response.get_output_by_name("label").as_numpy()
    labels = np.vectorize(lambda label: label.decode())(labels)
    return _predictions(labels, response.get_output_by_name("probability").as_numpy())


def with_reference(work: Workload, server: ServerProcess) -> Workload:
    """The same workload; what `server` predicts now, one image at a time, is the reference."""
    return replace(work, reference=[v1(server, [image])[0] for image in work.images])


def _predictions(labels: np.ndarray, probabilities: np.ndarray) -> Predictions:
    return [
        [
            {"label": str(label), "probability": float(probability)}
            for label, probability in zip(*row, strict=True)
        ]
        for row in zip(labels, probabilities, strict=True)
    ]
