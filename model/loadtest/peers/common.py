"""What the servers in this folder share: their options, the addresses, and the model."""

import argparse

import torch
from fastapi import HTTPException
from kserve import Model
from kserve.errors import InvalidInput

from model.alexnet.model import AlexNetModel
from model.loadtest.pays.timed_model import TimedModel
from model.serving.machine import cores

HOST = "127.0.0.1"
NAME = "custom-model"
PREDICT = f"/v1/models/{NAME}:predict"  # this and the next as KServe has them
HEALTH = f"/v2/models/{NAME}/ready"


def options(module: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of a server; all servers take the same."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--port", "--http_port", type=int, default=8080, help=f"of {HOST}")
    parser.add_argument("--grpc_port", type=int, help="not used: there is no gRPC here")
    parser.add_argument("--workers", type=int, default=1, help="processes with a model each")
    parser.add_argument("--model", choices=["alexnet", "timed"], default="alexnet")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, help="torch's threads a worker: cores / workers")
    parser.add_argument("--max_batch_size", type=int, default=16, help="requests, where it batches")
    parser.add_argument("--batch_wait_ms", type=float, default=2, help="for a batch to fill")
    found = parser.parse_args(argv)
    found.threads = found.threads or max(1, cores() // found.workers)
    return found


def load_model(options: argparse.Namespace) -> Model:
    """The model, ready; to be called in the thread that will run it, as torch's threads are."""
    if options.model == "timed":
        return TimedModel(NAME)
    torch.set_num_threads(options.threads)
    model = AlexNetModel(NAME, device="cpu", precision=options.precision)
    model.load()
    return model


def predict_all(model: Model, requests: list[dict]) -> list[dict]:
    """The V1 responses to several V1 requests, from one call of predict_batch.

    One request that is invalid has all of them answered with 400.
    """
    try:
        inputs = [model.preprocess(request) for request in requests]
    except InvalidInput as error:
        raise HTTPException(400, str(error)) from None
    return [model.postprocess(result) for result in model.predict_batch(inputs)]
