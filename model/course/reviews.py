"""Requests to notebook 3's text model, which returns who worked on a request, and when."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import requests
from kserve import InferenceGRPCClient, InferInput, InferRequest

from model.course.parallel import Response
from model.loadtest.server_process import ServerProcess

TIMEOUT_S = 60
REVIEW = "The acting was wonderfull, the music beautiful, but the ending terible and far too long."
# A V1 request that takes some tenths of a second: eight leave time to find a replica at work
MANY = {"instances": [{"text": REVIEW}] * 1500}


def send_at_once(server: ServerProcess, count: int) -> list[Response]:
    """Send the request MANY so many times at the same moment, and wait for all responses.

    The workers of the responses are process ids. Raises requests.HTTPError when one is not 200.
    """

    def send(_: int) -> Response:
        sent = time.time()
        response = requests.post(server.predict, json=MANY, timeout=TIMEOUT_S)
        received = time.time()
        response.raise_for_status()
        first = response.json()["predictions"][0]
        return Response(sent, received, str(first["process"]), first["started"], first["finished"])

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(send, range(count)))


async def over_grpc(server: ServerProcess, texts: list[str]) -> str:
    """Send texts in V2 over gRPC. Returns their scores, or the error, in words."""
    text = InferInput("text", [len(texts)], "BYTES")
    text.set_data_from_numpy(np.array([t.encode() for t in texts], dtype=object))
    request = InferRequest(model_name=server.name, infer_inputs=[text])
    client = InferenceGRPCClient(server.grpc)
    logging.disable()  # the client logs each error with its traceback
    try:
        response = await client.infer(request, timeout=TIMEOUT_S)
        return f"scores {response.get_output_by_name('score').as_numpy().tolist()}"
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    finally:
        logging.disable(logging.NOTSET)
        await client.close()
