"""What goes in and comes out, V1 and V2, without torch: requests for pictures and their answers."""

import binascii
import json
import math
import secrets
import struct
import time
from typing import Any, NamedTuple

import numpy as np
import pybase64
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput

MAX_INSTANCES = 64  # pictures in one request
TOP = 5  # labels in an answer
SIDE = 224  # of a preprocessed picture

Images = list[bytes] | np.ndarray  # encoded pictures, or preprocessed: float32 [N, 3, 224, 224]


class Request(NamedTuple):
    """What `preprocess` makes of a request."""

    images: Images
    infer: InferRequest | None = None  # None: a V1 request
    read: float = 0.0  # when that was done, seconds since 1970
    id: str = ""  # the client's, for the logs


class Answer(NamedTuple):
    """What `predict` finds: for each picture its labels, likeliest first; and who was at it when.

    The times are seconds since 1970.
    """

    labels: list[list[str]]  # [N][5]
    probabilities: np.ndarray  # float32 [N, 5]
    worker: str  # the copy of the model that worked on it
    started: float  # on the batch that the request was in
    decoded: float
    finished: float
    request: Request | None = None


class PictureModel(Model):
    """KServe's handlers around `predict`, for models that label pictures.

    V1:  {"instances": [{"image": {"b64": ...}}, ...]}
         -> {"predictions": [[{"label": str, "probability": float}, ... 5], ...]}
    V2:  input `image`, BYTES [N] (a JPEG, PNG ... each; in JSON as base64 text) or
         FP32 [N, 3, 224, 224] (preprocessed) -> `label` BYTES [N, 5], `probability` FP32 [N, 5]

    Every instance of a request is answered, in order. A request that cannot be answered raises
    InvalidInput, which KServe turns into HTTP 400 and gRPC INVALID_ARGUMENT. Answers tell in
    headers which copy of the model worked on them (`x-worker`), when their request was read
    (`x-read`), and when the copy began, had the pictures decoded, and finished (`x-started`,
    `x-decoded`, `x-finished`), in seconds since 1970.
    """

    def __init__(self, name: str) -> None:
        """name: of the model in KServe."""
        super().__init__(name, return_response_headers=True)

    def preprocess(self, payload: Any, headers: dict | None = None) -> Request:
        """Read what came in: a V1 body (dict, or its JSON as bytes) or a V2 InferRequest."""
        if isinstance(payload, InferRequest):
            return Request(_v2_images(payload), payload, time.time())
        return Request(_v1_images(payload), None, time.time())

    def postprocess(
        self, result: Answer, headers: dict | None = None, response_headers: dict | None = None
    ) -> dict | InferResponse:
        """Put the answer into the form of the protocol that the request came in."""
        if response_headers is not None:
            response_headers["x-worker"] = result.worker
            response_headers["x-read"] = f"{result.request.read:.6f}"
            for moment in ("started", "decoded", "finished"):
                response_headers[f"x-{moment}"] = f"{getattr(result, moment):.6f}"
        infer = result.request.infer
        if infer is None:
            return {"predictions": top_labels(result)}
        outputs = {
            "label": InferOutput("label", [len(result.labels), TOP], "BYTES"),
            "probability": InferOutput("probability", [len(result.labels), TOP], "FP32"),
        }
        outputs["label"].data = [label for row in result.labels for label in row]
        outputs["probability"].data = result.probabilities.ravel().tolist()
        wanted = infer.request_outputs
        return InferResponse(
            response_id=infer.id or secrets.token_hex(16),
            model_name=self.name,
            infer_outputs=[outputs[out.name] for out in wanted or outputs.values()],
            use_binary_outputs=infer.use_binary_outputs,
            requested_outputs=wanted,
        )

    def get_input_types(self) -> list[dict]:
        """The V2 input in its two forms: encoded pictures, or preprocessed ones."""
        return [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "image", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]},
        ]

    def get_output_types(self) -> list[dict]:
        """The V2 outputs: for each picture five labels and their probabilities."""
        return [
            {"name": "label", "datatype": "BYTES", "shape": [-1, TOP]},
            {"name": "probability", "datatype": "FP32", "shape": [-1, TOP]},
        ]


def top_labels(answer: Answer) -> list[list[dict]]:
    """The V1 predictions: [N][5] of {"label": str, "probability": float}, likeliest first."""
    return [
        [{"label": name, "probability": p} for name, p in zip(names, row, strict=True)]
        for names, row in zip(answer.labels, answer.probabilities.tolist(), strict=True)
    ]


V1_FORM = '{"instances": [{"image": {"b64": "<base64 of a picture>"}}]}'


def _v1_images(payload: Any) -> list[bytes]:
    """The encoded pictures of a V1 body, in order."""
    if isinstance(payload, bytes):  # KServe parses only some content types
        try:
            payload = json.loads(payload)
        except (ValueError, RecursionError):
            raise InvalidInput(f"the body is not JSON: send {V1_FORM}") from None
    if not isinstance(payload, dict) or not isinstance(payload.get("instances"), list):
        raise InvalidInput(f"the body has no list of instances: send {V1_FORM}")
    _check_count(len(payload["instances"]))
    pictures = []
    for i, instance in enumerate(payload["instances"]):
        image = instance.get("image") if isinstance(instance, dict) else None
        text = image.get("b64") if isinstance(image, dict) else None
        if not isinstance(text, str):
            raise InvalidInput(f"instance {i} has no image with a b64 text: send {V1_FORM}")
        pictures.append(_from_base64(text, f"instance {i}"))
    return pictures


def _v2_images(request: InferRequest) -> Images:
    """The pictures of a V2 request, encoded or preprocessed."""
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
            f"the input is {image.datatype} {image.shape}: send BYTES [N], encoded pictures, "
            f"or FP32 [N, 3, {SIDE}, {SIDE}], preprocessed ones"
        )
    _check_count(image.shape[0])
    array = _as_numpy(image)
    if image.datatype == "FP32":
        if not np.isfinite(array).all():
            raise InvalidInput("the input holds values that are not finite numbers")
        return array
    pictures = [
        _from_base64(item, f"picture {i}") if isinstance(item, str) else item
        for i, item in enumerate(array)
    ]
    if not all(isinstance(picture, bytes) for picture in pictures):
        raise InvalidInput("BYTES holds encoded pictures; in JSON, base64 text of each")
    return pictures


def _as_numpy(image: InferInput) -> np.ndarray:
    try:
        return image.as_numpy()
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        count = math.prod(image.shape)
        raise InvalidInput(
            f"the data does not fill shape {list(image.shape)} with {count} elements "
            f"of {image.datatype}: {error}"
        ) from None


def _check_count(pictures: int) -> None:
    if not 1 <= pictures <= MAX_INSTANCES:
        raise InvalidInput(f"{pictures} pictures in the request: send 1 to {MAX_INSTANCES}")


def _from_base64(text: str, where: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)  # Python's own takes 40 times as long
    except (binascii.Error, ValueError):
        raise InvalidInput(f"{where} is not base64") from None
