"""The requests of a load test, encoded once, and the check of each response."""

import json
from dataclasses import dataclass, field

from model.alexnet import shapes
from model.loadtest.bodies import v1_body, v2_body
from model.loadtest.run import RIGHT, WRONG


@dataclass
class Workload:
    """Requests, and what a right response to each is.

    images: encoded. labels: the right one for each. reference: V1 predictions for each image,
    which those of responses are compared with; None: only labels are compared. images_per_request:
    there are as many requests as images, the i-th holds the i-th image and those that follow. v2:
    in the Open Inference Protocol, whose input is [N, 1] then, as servers that gather batches want
    it; else in V1.
    """

    images: list[bytes]
    labels: list[str]
    reference: list[list[dict]] | None = None
    images_per_request: int = 1
    v2: bool = False
    bodies: list[bytes] = field(init=False, repr=False)  # JSON

    def __post_init__(self) -> None:
        requests = [[self.images[j] for j in self._of(i)] for i in range(len(self.images))]
        self.bodies = [json.dumps(self._body(images)).encode() for images in requests]

    def _body(self, images: list[bytes]) -> dict:
        if not self.v2:
            return v1_body(images)
        body = v2_body(images)
        body["inputs"][0]["shape"] = [len(images), 1]
        return body

    def _of(self, request: int) -> list[int]:
        """The indices of a request's images."""
        return [i % len(self.images) for i in range(request, request + self.images_per_request)]

    @classmethod
    def drawn(cls, count: int = 64, images_per_request: int = 1) -> "Workload":
        """`count` different drawn images of about 100 kB, all labels in turn."""
        labels = [shapes.LABELS[i % len(shapes.LABELS)] for i in range(count)]
        images = [shapes.jpeg(label, seed) for seed, label in enumerate(labels)]
        return cls(images, labels, images_per_request=images_per_request)

    def judge(self, request: int, body: bytes) -> tuple[str, float]:
        """(RIGHT or what is wrong with the body of a response, its distance from the reference).

        The distance is the largest difference of a label's probability; a label that the response
        does not name is taken to have the probability of the least probable that it names.
        """
        try:
            answer = json.loads(body)
            predictions = _predictions(answer) if self.v2 else answer["predictions"]
            pairs = zip(self._of(request), predictions, strict=True)
            outcomes = [self._judge(image, prediction) for image, prediction in pairs]
        except (ValueError, LookupError, TypeError):
            return "unreadable response", 0.0
        worst = next((outcome for outcome, _ in outcomes if outcome != RIGHT), RIGHT)
        return worst, max(distance for _, distance in outcomes)

    def _judge(self, image: int, prediction: list[dict]) -> tuple[str, float]:
        expected = self.reference[image] if self.reference else []
        found = {entry["label"]: entry["probability"] for entry in prediction}
        top, least = prediction[0]["label"], min(found.values())
        distances = [abs(it["probability"] - found.get(it["label"], least)) for it in expected]
        if top != self.labels[image]:
            outcome = WRONG[0]
        else:
            outcome = WRONG[1] if expected and top != expected[0]["label"] else RIGHT
        return outcome, max(distances, default=0.0)


def _predictions(answer: dict) -> list[list[dict]]:
    """What a V2 response says, as V1 has it."""
    outputs = {output["name"]: output for output in answer["outputs"]}
    label, probability = outputs["label"], outputs["probability"]
    pairs = zip(label["data"], probability["data"], strict=True)
    found = [{"label": name, "probability": value} for name, value in pairs]
    each = label["shape"][1]
    return [found[start : start + each] for start in range(0, len(found), each)]


@dataclass
class JsonWorkload:
    """Requests of any model, and the response that each must get.

    requests, responses: what JSON can hold, as many of one as of the other.
    """

    requests: list
    responses: list
    reference: None = None  # responses are compared as a whole
    v2: bool = False  # whose address they go to
    bodies: list[bytes] = field(init=False, repr=False)  # JSON

    def __post_init__(self) -> None:
        if not self.requests or len(self.requests) != len(self.responses):
            raise ValueError("give at least one request, and a response for each")
        self.bodies = [json.dumps(request).encode() for request in self.requests]

    def judge(self, request: int, body: bytes) -> tuple[str, float]:
        """(RIGHT or what is wrong with the body of a response, 0)."""
        try:
            same = json.loads(body) == self.responses[request]
        except ValueError:
            return "unreadable response", 0.0
        return RIGHT if same else WRONG[2], 0.0


class AnyResponse(JsonWorkload):
    """One request, to which any response with status 200 is right."""

    def __init__(self, request: object) -> None:
        """request: what JSON can hold."""
        super().__init__([request], [None])

    def judge(self, request: int, body: bytes) -> tuple[str, float]:
        """It is right."""
        return RIGHT, 0.0
