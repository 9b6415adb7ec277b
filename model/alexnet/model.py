"""AlexNet as a KServe model, with `predict_batch` for the requests that wait at the same time."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from kserve import InferRequest, InferResponse, Model
from kserve.errors import InvalidInput
from torch import Tensor

from model.alexnet import images, requests
from model.alexnet.network import load_network, share, weights_name


class Inputs(NamedTuple):
    """What `preprocess` makes of a request."""

    images: Tensor  # float32 [N, 3, 224, 224]
    request: InferRequest | None  # None: V1


class Result(NamedTuple):
    """What `predict` returns: the five likeliest labels of each image, likeliest first."""

    labels: list[list[str]]  # [N][5]
    probabilities: np.ndarray  # float32 [N, 5]
    request: InferRequest | None


class AlexNetModel(Model):
    """torchvision's AlexNet behind KServe's handlers; see `model.alexnet.requests` for bodies.

    Every instance of a request is answered, in order. A request that cannot be answered raises
    InvalidInput, which KServe turns into HTTP 400 and gRPC INVALID_ARGUMENT.
    """

    def __init__(
        self,
        name: str,
        weights: Literal["shapes", "imagenet"] | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["float32", "bfloat16"] = "float32",
        memory_format: Literal["contiguous", "channels_last"] = "channels_last",
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        """Say how the model is to run; `load` makes it ready.

        weights: None is what MODEL_WEIGHTS says, else `shapes`. device: `auto` is CUDA where there
        is a GPU. precision: of weights and arithmetic. memory_format: of images and filters,
        `channels_last` is the faster one on CPUs. max_pixels: a larger image is refused before it
        is decoded. Raises ValueError for weights that are not known.
        """
        super().__init__(name)
        self.weights, self.device, self.max_pixels = weights_name(weights), device, max_pixels
        self.dtype = getattr(torch, precision)
        self.memory_format = {
            "contiguous": torch.contiguous_format,
            "channels_last": torch.channels_last,
        }[memory_format]

    def load(self) -> bool:
        """Read the weights and run the model once, so that no request pays for the first run.

        Raises RuntimeError when there is no GPU but one is asked for, or the weights cannot be
        downloaded.
        """
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no usable GPU: set device to cpu or auto")
        network, self.labels = load_network(self.weights)
        network = network.to(self.device, self.dtype, memory_format=self.memory_format)
        if self.device == "cpu":
            share(network, f"{self.weights}-{self.dtype}-{self.memory_format}")
        self.network = network
        self._forward(torch.zeros(1, 3, requests.SIDE, requests.SIDE))
        self.ready = True
        return self.ready

    def preprocess(self, payload: Any, headers: dict[str, str] | None = None) -> Inputs:
        """Read a V1 body (dict, or its JSON as bytes) or a V2 InferRequest and decode its images.

        Raises InvalidInput for a body of another form and for an image that cannot be decoded.
        """
        request = payload if isinstance(payload, InferRequest) else None
        return Inputs(self._decode(requests.read(payload)), request)

    def predict(self, inputs: Inputs, headers: dict[str, str] | None = None) -> Result:
        """Run the model on the images of one request."""
        return self.predict_batch([inputs])[0]

    def predict_batch(self, inputs: list[Inputs]) -> list[Result]:
        """Run the model once on the images of several requests; for each request its result."""
        values, indices = self._forward(torch.cat([each.images for each in inputs]))
        labels = [[self.labels[i] for i in row] for row in indices]
        results, start = [], 0
        for each in inputs:
            own = slice(start, start := start + len(each.images))
            results.append(Result(labels[own], values[own], each.request))
        return results

    def postprocess(
        self, result: Result, headers: dict[str, str] | None = None
    ) -> dict | InferResponse:
        """The response body, in the protocol that the request came in."""
        if result.request is None:
            return {"predictions": requests.v1_predictions(result.labels, result.probabilities)}
        return requests.v2_response(self.name, result.request, result.labels, result.probabilities)

    def classify(self, encoded: list[bytes]) -> list[list[dict]]:
        """Encoded images in, V1 predictions out, with no server between."""
        result = self.predict(Inputs(self._decode(encoded), None))
        return requests.v1_predictions(result.labels, result.probabilities)

    def get_input_types(self) -> list[dict]:
        """The V2 input in its two forms: encoded images, or preprocessed ones."""
        return requests.INPUTS

    def get_output_types(self) -> list[dict]:
        """The V2 outputs: for each image five labels and their probabilities."""
        return requests.OUTPUTS

    def _decode(self, found: requests.Images) -> Tensor:
        """The images of one request as the model takes them, float32 [N, 3, 224, 224]."""
        if not isinstance(found, list):
            return torch.tensor(found)
        decoded = []
        for i, image in enumerate(found):
            try:
                decoded.append(images.preprocess(image, self.max_pixels))
            except images.ImageError as error:
                raise InvalidInput(f"image {i}: {error}") from None
        return torch.stack(decoded)

    def _forward(self, batch: Tensor) -> tuple[np.ndarray, list[list[int]]]:
        """The five likeliest classes of float32 [N, 3, 224, 224]: probabilities and numbers."""
        with torch.inference_mode():
            batch = batch.to(self.device, self.dtype, memory_format=self.memory_format)
            top = self.network(batch).float().softmax(dim=1).topk(requests.TOP)
        return top.values.cpu().numpy(), top.indices.tolist()
