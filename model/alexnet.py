"""AlexNet as a KServe model: what the plain server runs, and what a Ray Serve replica runs."""

import secrets
import time

import torch
from kserve.errors import InvalidInput
from torch import Tensor

from model import CannotStart, weights
from model.pictures import MAX_PIXELS, pixels
from model.protocol import SIDE, TOP, Answer, Images, PictureModel, Request, top_labels


class AlexNetModel(PictureModel):
    """torchvision's AlexNet behind KServe's handlers load, preprocess, predict, postprocess.

    `preprocess` and `postprocess`, which read requests and write answers, are PictureModel's.
    """

    def __init__(
        self,
        name: str,
        weights: str = "shapes",
        device: str = "auto",
        threads: int | None = None,
        precision: str = "float32",
        layout: str = "contiguous",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Name the model and say how it is to run; `load` does the work.

        weights: `shapes` or `imagenet`. device: `auto` (CUDA where there is a GPU), `cpu` or
        `cuda`. threads: torch's threads on the CPU, None leaves torch's own choice.
        precision: `float32` or `bfloat16`. layout: of pictures and filters in memory,
        `contiguous` (each colour by itself) or `channels_last` (each point's colours together).
        max_pixels: of one picture; a larger one is refused before it is decoded.
        """
        super().__init__(name)
        self.max_pixels = max_pixels
        self.progressed = 0.0  # when the last picture was begun, on the monotonic clock
        self.weights, self.device, self.threads = weights, device, threads
        self.dtype = getattr(torch, precision)
        self.layout = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)

    def load(self) -> bool:
        """Read the weights and answer one blank picture, so that no request pays for the first."""
        self.use_threads()
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise CannotStart("torch finds no usable GPU: start with --device cpu, or auto")
        network, self.labels = weights.build(self.weights)
        network = network.to(self.device, self.dtype, memory_format=self.layout)
        if self.device == "cpu":
            weights.share(network, f"{self.weights}-{self.dtype}-{self.layout}")
        self.network = network
        self._run(torch.zeros(1, 3, SIDE, SIDE))
        self.worker = secrets.token_hex(4)
        self.ready = True
        return self.ready

    def use_threads(self) -> None:
        """Set torch's threads; that counts for the thread that calls it."""
        if self.threads:
            torch.set_num_threads(self.threads)

    def __setstate__(self, state: dict) -> None:
        """KServe's `--workers N` sends the loaded model to N processes."""
        self.__dict__.update(state, worker=secrets.token_hex(4))
        self.use_threads()

    def predict(
        self, payload: Request, headers: dict | None = None, response_headers: dict | None = None
    ) -> Answer:
        """Decode the pictures of one request and run the network over them, in one batch."""
        [answer] = self.answer_all([payload.images])
        if isinstance(answer, InvalidInput):
            raise answer
        return answer._replace(request=payload)

    def answer_all(self, requests: list[Images]) -> list[Answer | InvalidInput]:
        """Answer several requests with one run of the network; for each its answer or its error.

        A picture that cannot be decoded spoils its own request only.
        """
        started = time.time()
        decoded = [self._decoded(images) for images in requests]
        good = [pictures for pictures in decoded if isinstance(pictures, Tensor)]
        then = time.time()
        if not good:
            return decoded
        values, indices = self._run(torch.cat(good))
        labels = [[self.labels[i] for i in row] for row in indices]
        finished, at, answers = time.time(), 0, []
        for pictures in decoded:
            if isinstance(pictures, Tensor):
                mine = slice(at, at := at + len(pictures))
                found = labels[mine], values[mine]
                pictures = Answer(*found, self.worker, started, then, finished)
            answers.append(pictures)
        return answers

    def _run(self, pictures: Tensor) -> tuple:
        """The five likeliest of float32 [N, 3, 224, 224]: their probabilities, their numbers."""
        with torch.inference_mode():
            pictures = pictures.to(self.device, self.dtype, memory_format=self.layout)
            top = self.network(pictures).float().softmax(dim=1).topk(TOP)
        return top.values.cpu().numpy(), top.indices.tolist()

    def _decoded(self, images: Images) -> Tensor | InvalidInput:
        """The pictures of one request as the network takes them, float32 [N, 3, 224, 224]."""
        if not isinstance(images, list):
            return torch.tensor(images)
        pictures = []
        for i, image in enumerate(images):
            self.progressed = time.monotonic()
            try:
                pictures.append(pixels(image, self.max_pixels))
            except InvalidInput as error:
                return InvalidInput(f"picture {i}: {error}")
        return torch.stack(pictures)

    def classify(self, pictures: list[bytes]) -> list[list[dict]]:
        """Encoded pictures in, V1 predictions out, with no server between."""
        return top_labels(self.predict(Request(pictures)))
