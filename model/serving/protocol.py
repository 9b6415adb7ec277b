"""What passes between the parts: requests, responses, and what a model says of itself."""

import copy
import dataclasses
import enum
import io
import pickle
import sys
from typing import Any, NamedTuple

from kserve import InferRequest
from kserve.protocol.infer_type import to_http_parameters

from model.serving.config import ModelConfig

# Whose classes a frontend has, too. It imports nothing else to read a response.
SHARED = {*sys.stdlib_module_names, "numpy", "pandas", "kserve", "fastapi", "starlette", "pydantic"}
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


def pickled(value: Any) -> bytes:
    """The value for another process of the serving layer, which lacks the model's own classes.

    As in JSON, a dataclass is a dictionary of its fields, and an Enum its value. Raises what pickle
    raises, TypeError for an object of a class that only the model's modules have.
    """
    to = io.BytesIO()
    _Pickler(to, pickle.HIGHEST_PROTOCOL).dump(value)
    return to.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        kind = value if isinstance(value, type) or callable(value) else type(value)
        module = getattr(kind, "__module__", None) or "builtins"
        if module.partition(".")[0] in SHARED or module.startswith("model.serving."):
            return NotImplemented  # as pickle does it
        if isinstance(value, enum.Enum):
            return type(value.value), (value.value,)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return dict, ({field.name: getattr(value, field.name) for field in fields},)
        raise TypeError(
            f"it holds a {getattr(kind, '__qualname__', kind)} of {module}, which only the model "
            "knows: return numbers, texts, lists, dictionaries, NumPy arrays or an InferResponse"
        )
