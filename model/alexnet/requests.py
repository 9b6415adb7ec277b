"""Request bodies to images and results to response bodies, in both protocols; without torch.

V1:  {"instances": [{"image": {"b64": ...}}, ...]}
     -> {"predictions": [[{"label": str, "probability": float}, ... 5], ...]}
V2:  input `image`, BYTES [N] (a JPEG, PNG ... each; in JSON as base64 text) or
     FP32 [N, 3, 224, 224] (preprocessed) -> `label` BYTES [N, 5], `probability` FP32 [N, 5]
"""

import binascii
import json
import math
import secrets
import struct
from typing import Any

import numpy as np
import pybase64
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput

MAX_INSTANCES = 64  # images in one request
TOP = 5  # labels for each image
SIDE = 224  # of a preprocessed image

INPUTS = [
    {"name": "image", "datatype": "BYTES", "shape": [-1]},
    {"name": "image", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]},
]
OUTPUTS = [
    {"name": "label", "datatype": "BYTES", "shape": [-1, TOP]},
    {"name": "probability", "datatype": "FP32", "shape": [-1, TOP]},
]
V1_FORM = '{"instances": [{"image": {"b64": "<base64 of an image>"}}]}'

Images = list[bytes] | np.ndarray  # encoded images, or preprocessed: float32 [N, 3, 224, 224]


def read(payload: Any) -> Images:
    """The images of a request body, in order.

    payload: V1, a dict or its JSON as bytes, or V2, an InferRequest. Raises InvalidInput, with one
    sentence that says what to send, for any other body.
    """
    return _read_v2(payload) if isinstance(payload, InferRequest) else _read_v1(payload)


def v1_predictions(labels: list[list[str]], probabilities: np.ndarray) -> list[list[dict]]:
    """[N][5] of {"label": str, "probability": float}, likeliest first."""
    return [
        [{"label": label, "probability": p} for label, p in zip(*row, strict=True)]
        for row in zip(labels, probabilities.tolist(), strict=True)
    ]


def v2_response(
    name: str, request: InferRequest, labels: list[list[str]], probabilities: np.ndarray
) -> InferResponse:
    """The V2 response to `request`, with the outputs it asks for.

    name: of the model. labels: [N][5]. probabilities: float32 [N, 5].
    """
    shape = [len(labels), TOP]
    flat = [label for row in labels for label in row]
    outputs = {
        "label": InferOutput("label", shape, "BYTES", flat),
        "probability": InferOutput("probability", shape, "FP32", probabilities.ravel().tolist()),
    }
    requested = request.request_outputs
    return InferResponse(
        response_id=request.id or secrets.token_hex(16),
        model_name=name,
        infer_outputs=[outputs[out.name] for out in requested or outputs.values()],
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=requested,
    )


def _read_v1(payload: Any) -> list[bytes]:
    """The encoded images of a V1 body."""
    if isinstance(payload, bytes):  # KServe parses only some content types
        try:
            payload = json.loads(payload)
        except (ValueError, RecursionError):
            raise InvalidInput(f"the body is not JSON: send {V1_FORM}") from None
    if not isinstance(payload, dict) or not isinstance(payload.get("instances"), list):
        raise InvalidInput(f"the body has no list of instances: send {V1_FORM}")
    _check_count(len(payload["instances"]))
    images = []
    for i, instance in enumerate(payload["instances"]):
        image = instance.get("image") if isinstance(instance, dict) else None
        text = image.get("b64") if isinstance(image, dict) else None
        if not isinstance(text, str):
            raise InvalidInput(f"instance {i} has no image with a b64 text: send {V1_FORM}")
        images.append(_from_base64(text, f"instance {i}"))
    return images


def _read_v2(request: InferRequest) -> Images:
    """The images of a V2 request, encoded or preprocessed."""
    if len(request.inputs) != 1 or request.inputs[0].name != "image":
        raise InvalidInput("send one input, named image")
    outputs = request.request_outputs or []
    if not all(hasattr(it.parameters or {}, "get") for it in (request, *outputs)):
        raise InvalidInput("parameters have names: send an object")
    for output in outputs:
        if output.name not in ("label", "probability"):
            raise InvalidInput(f"there is no output {output.name!r}: ask for label, probability")
    image = request.inputs[0]
    numbers = isinstance(image.shape, list) and all(type(n) is int for n in image.shape)
    form = (image.datatype, *image.shape[1:]) if numbers and image.shape else None
    if form not in (("BYTES",), ("FP32", 3, SIDE, SIDE)):
        raise InvalidInput(
            f"the input is {image.datatype} {image.shape}: send BYTES [N], encoded images, "
            f"or FP32 [N, 3, {SIDE}, {SIDE}], preprocessed ones"
        )
    _check_count(image.shape[0])
    array = _as_numpy(image)
    if image.datatype == "FP32":
        if not np.isfinite(array).all():
            raise InvalidInput("the input holds values that are not finite numbers")
        return array
    images = [
        _from_base64(item, f"image {i}") if isinstance(item, str) else item
        for i, item in enumerate(array)
    ]
    if not all(isinstance(image, bytes) for image in images):
        raise InvalidInput("BYTES holds encoded images; in JSON, base64 text of each")
    return images


def _as_numpy(image: InferInput) -> np.ndarray:
    try:
        return image.as_numpy()
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        count = math.prod(image.shape)
        raise InvalidInput(
            f"the data does not fill shape {list(image.shape)} with {count} elements "
            f"of {image.datatype}: {error}"
        ) from None


def _check_count(images: int) -> None:
    if not 1 <= images <= MAX_INSTANCES:
        raise InvalidInput(f"{images} images in the request: send 1 to {MAX_INSTANCES}")


def _from_base64(text: str, where: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)  # Python's own takes 40 times as long
    except (binascii.Error, ValueError):
        raise InvalidInput(f"{where} is not base64") from None
