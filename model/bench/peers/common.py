"""What the servers in this folder share: their options, the form of a request, and the model."""

import argparse
from typing import Annotated

import pybase64
from fastapi import HTTPException
from kserve.errors import InvalidInput
from pydantic import AfterValidator, BaseModel

from model.alexnet import AlexNetModel
from model.options import cores

HOST = "127.0.0.1"
NAME = "custom-model"
PREDICT = f"/v1/models/{NAME}:predict"  # this and the next as KServe has them
HEALTH = f"/v2/models/{NAME}/ready"


class Image(BaseModel):
    """One encoded picture: comes as base64 text, is kept as bytes."""

    b64: Annotated[str, AfterValidator(lambda text: pybase64.b64decode(text, validate=True))]


class Instance(BaseModel):
    """One instance of a V1 request."""

    image: Image


class Body(BaseModel):
    """A V1 request: {"instances": [{"image": {"b64": ...}}, ...]}."""

    instances: list[Instance]

    def pictures(self) -> list[bytes]:
        """The encoded pictures, in order."""
        return [instance.image.b64 for instance in self.instances]


def options(module: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of a server; all servers take the same."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--port", "--http_port", type=int, default=8080, help=f"of {HOST}")
    parser.add_argument("--grpc_port", type=int, help="not used: there is no gRPC here")
    parser.add_argument("--workers", type=int, default=1, help="processes with a model each")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, help="torch's threads a worker: cores / workers")
    parser.add_argument("--max_batch_size", type=int, default=16, help="requests, where it batches")
    parser.add_argument("--batch_wait_ms", type=float, default=2, help="for a batch to fill")
    found = parser.parse_args(argv)
    found.threads = found.threads or max(1, cores() // found.workers)
    return found


def loaded(options: argparse.Namespace) -> AlexNetModel:
    """The model, ready; to be called in the thread that will run it, as torch's threads are."""
    model = AlexNetModel(
        NAME,
        device="cpu",
        threads=options.threads,
        precision=options.precision,
        layout="channels_last",
    )
    model.load()
    return model


def classify_all(model: AlexNetModel, requests: list[list[bytes]]) -> list[dict]:
    """The V1 answers to several requests, from one run of the network over all their pictures.

    One picture that cannot be read has all of them answered with 400.
    """
    try:
        found = iter(model.classify([picture for request in requests for picture in request]))
    except InvalidInput as error:
        raise HTTPException(400, str(error)) from None
    return [{"predictions": [next(found) for _ in request]} for request in requests]
