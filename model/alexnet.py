"""AlexNet as a KServe model: what the plain server runs, and what a Ray Serve replica runs."""

import base64
import binascii
import json
import math
import secrets
import struct
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput
from torch import Tensor

from model import CannotStart, weights
from model.pictures import pixels

MAX_INSTANCES = 64  # pictures in one request
TOP = 5  # labels in an answer
SIDE = 224  # of a preprocessed picture


class Pictures(NamedTuple):
    """What `preprocess` hands to `predict`: the pictures, and the request they came in."""

    pixels: Tensor  # float32 [N, 3, 224, 224]
    request: InferRequest | None  # None: a V1 request
    started: float  # when work on the request began, seconds since 1970


class Answer(NamedTuple):
    """What `predict` hands to `postprocess`: for each picture its labels, likeliest first."""

    labels: list[list[str]]  # [N][5]
    probabilities: np.ndarray  # float32 [N, 5]
    request: InferRequest | None


class AlexNetModel(Model):
    """torchvision's AlexNet behind KServe's handlers load, preprocess, predict, postprocess.

    V1:  {"instances": [{"image": {"b64": ...}}, ...]}
         -> {"predictions": [[{"label": str, "probability": float}, ... 5], ...]}
    V2:  input `image`, BYTES [N] (a JPEG, PNG ... each; in JSON as base64 text) or
         FP32 [N, 3, 224, 224] (preprocessed) -> `label` BYTES [N, 5], `probability` FP32 [N, 5]

    Every instance of a request is answered, in order. A request that cannot be answered raises
    InvalidInput, which KServe turns into HTTP 400 and gRPC INVALID_ARGUMENT.
    """

    def __init__(
        self,
        name: str,
        weights: str = "shapes",
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Name the model and say how it is to run; `load` does the work.

        weights: `shapes` or `imagenet`. device: `auto` (CUDA where there is a GPU), `cpu` or
        `cuda`. threads: torch's threads on the CPU, None leaves torch's own choice.
        """
        super().__init__(name, return_response_headers=True)
        self.weights, self.device, self.threads = weights, device, threads

    def load(self) -> bool:
        """Read the weights and answer one blank picture, so that no request pays for the first."""
        self._settle()
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise CannotStart("torch finds no usable GPU: start with --device cpu, or auto")
        network, self.labels = weights.build(self.weights)
        self.network = network.to(self.device)
        self.predict(Pictures(torch.zeros(1, 3, SIDE, SIDE), None, time.time()))
        self.ready = True
        return self.ready

    def _settle(self) -> None:
        """What each process does for itself: torch's threads, and a name for its copy."""
        if self.threads:
            torch.set_num_threads(self.threads)
        self.worker = secrets.token_hex(4)

    def __setstate__(self, state: dict) -> None:
        """KServe's `--workers N` sends the loaded model to N processes."""
        self.__dict__.update(state)
        self._settle()

    def preprocess(self, payload: Any, headers: dict | None = None) -> Pictures:
        """Decode what came in: a V1 body (dict, or its JSON as bytes) or a V2 InferRequest."""
        started = time.time()
        if isinstance(payload, InferRequest):
            return Pictures(_v2_pixels(payload), payload, started)
        return Pictures(_stack(_v1_pictures(payload)), None, started)

    def predict(
        self, payload: Pictures, headers: dict | None = None, response_headers: dict | None = None
    ) -> Answer:
        """Run the network over all pictures of the request, in one batch."""
        with torch.inference_mode():
            logits = self.network(payload.pixels.to(self.device))
            top = logits.float().softmax(dim=1).topk(TOP)
        labels = [[self.labels[i] for i in row] for row in top.indices.tolist()]
        if response_headers is not None:  # who worked on it, and when (seconds since 1970)
            response_headers["x-worker"] = self.worker
            response_headers["x-started"] = f"{payload.started:.6f}"
            response_headers["x-finished"] = f"{time.time():.6f}"
        return Answer(labels, top.values.cpu().numpy(), payload.request)

    def postprocess(
        self, result: Answer, headers: dict | None = None, response_headers: dict | None = None
    ) -> dict | InferResponse:
        """Put the answer into the form of the protocol that the request came in."""
        if result.request is None:
            return {"predictions": top_labels(result)}
        outputs = {
            "label": InferOutput("label", [len(result.labels), TOP], "BYTES"),
            "probability": InferOutput("probability", [len(result.labels), TOP], "FP32"),
        }
        outputs["label"].data = [label for row in result.labels for label in row]
        outputs["probability"].data = result.probabilities.ravel().tolist()
        wanted = result.request.request_outputs
        return InferResponse(
            response_id=result.request.id or secrets.token_hex(16),
            model_name=self.name,
            infer_outputs=[outputs[out.name] for out in wanted or outputs.values()],
            use_binary_outputs=result.request.use_binary_outputs,
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

    def classify(self, pictures: list[bytes]) -> list[list[dict]]:
        """Encoded pictures in, V1 predictions out, with no server between."""
        return top_labels(self.predict(Pictures(_stack(pictures), None, time.time())))


def top_labels(answer: Answer) -> list[list[dict]]:
    """The V1 predictions: [N][5] of {"label": str, "probability": float}, likeliest first."""
    return [
        [{"label": name, "probability": p} for name, p in zip(names, row, strict=True)]
        for names, row in zip(answer.labels, answer.probabilities.tolist(), strict=True)
    ]


V1_FORM = '{"instances": [{"image": {"b64": "<base64 of a picture>"}}]}'


def _v1_pictures(payload: Any) -> list[bytes]:
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


def _v2_pixels(request: InferRequest) -> Tensor:
    """The preprocessed pictures of a V2 request: float32 [N, 3, 224, 224]."""
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
        return torch.from_numpy(np.array(array))
    pictures = [
        _from_base64(item, f"picture {i}") if isinstance(item, str) else item
        for i, item in enumerate(array)
    ]
    if not all(isinstance(picture, bytes) for picture in pictures):
        raise InvalidInput("BYTES holds encoded pictures; in JSON, base64 text of each")
    return _stack(pictures)


def _stack(pictures: list[bytes]) -> Tensor:
    """Decode and preprocess encoded pictures: float32 [N, 3, 224, 224]."""
    batch = []
    for i, picture in enumerate(pictures):
        try:
            batch.append(pixels(picture))
        except InvalidInput as error:
            raise InvalidInput(f"picture {i}: {error}") from None
    return torch.stack(batch)


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
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput(f"{where} is not base64") from None
