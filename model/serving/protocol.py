"""What passes between the parts: requests, responses, and what a model says of itself."""

import copy
from typing import Any, NamedTuple

from kserve import InferRequest
from kserve.protocol.infer_type import to_http_parameters

from model.serving.config import ModelConfig

MOST_UNKNOWN = 2**20  # instances in a request whose size is not known


class Request(NamedTuple):
    """One request as KServe decoded it."""

    body: Any  # V1: the JSON as a dictionary (or bytes, if the client called it otherwise); V2:
    # an InferRequest
    headers: dict[str, str]
    id: str = ""  # the client's, for the logs
    instances: int = 1  # how much of a batch it takes
    size: int = 0  # bytes of its body, as it arrived; 0 where that is not known


class Response(NamedTuple):
    """What a model answered, and headers for the client: those of the model, and x-…"""

    body: Any
    headers: dict[str, str]


class Description(NamedTuple):
    """What a loaded model says of itself, so that nobody else needs its class."""

    inputs: list[dict]
    outputs: list[dict]
    has_predict_batch: bool
    idempotent: bool  # whether a request may be retried when its replica is lost
    model: ModelConfig


def count_instances(body: Any, size: int = 0) -> int:
    """How many instances a request holds, by the protocol alone; 1 where that cannot be told.

    V1: the length of `instances`. V2: the first dimension of the first input, which is what the
    client says; but no more than the body has bytes. size: of the body; 0 where it is not known.
    """
    if isinstance(body, dict):
        instances = body.get("instances")
        return max(1, len(instances)) if isinstance(instances, list) else 1
    if isinstance(body, InferRequest) and body.inputs:
        shape = body.inputs[0].shape
        first = shape[0] if isinstance(shape, list) and shape else 1
        return max(1, min(first, size or MOST_UNKNOWN)) if isinstance(first, int) else 1
    return 1


def picklable(body: Any) -> Any:
    """The same body without the protobuf map that gRPC requests carry their parameters in."""
    if isinstance(body, InferRequest) and body.from_grpc:
        body = copy.copy(body)
        body.parameters = to_http_parameters(body.parameters or {})
    return body
