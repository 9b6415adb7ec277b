"""Models by somebody who knows KServe and nothing of this repository.

The tests copy this file into an empty folder and serve its classes from there. Where it lies it
leaves the notes that they read: which processes imported it, loaded a model, were called.
"""

import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput


def note(file: str, text: object = "") -> None:
    """A line with this process's id and a text, in a file of the folder."""
    with Path(__file__).with_name(file).open("a") as notes:
        notes.write(f"{os.getpid()} {text}\n")


note("imported")


class WordCount(Model):
    """With predict_batch: how many words each text has."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        super().__init__(name)
        self.seconds = seconds

    def load(self) -> bool:
        """Fails while there is a file `broken`."""
        if Path(__file__).with_name("broken").exists():
            raise OSError("the words are lost")
        note("loads", self.name)
        self.ready = True
        return self.ready

    def predict_batch(self, inputs: list) -> list:
        """Of several requests, in V1 or V2; not while there is a file `hold`."""
        time.sleep(self.seconds)
        while Path(__file__).with_name("hold").exists():
            time.sleep(0.02)
        return [self._count(payload) for payload in inputs]

    def _count(self, payload: dict | InferRequest):
        v2 = isinstance(payload, InferRequest)
        texts = list(payload.inputs[0].as_numpy()) if v2 else payload["instances"]
        texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
        if not all(isinstance(text, str) for text in texts):
            return InvalidInput("send texts")
        counts = [len(text.split()) for text in texts]
        if not v2:
            return {"predictions": counts}
        output = InferOutput("words", [len(counts)], "INT64", counts)
        return InferResponse(payload.id, self.name, [output])

    def get_input_types(self) -> list[dict]:
        """One tensor of texts."""
        return [{"name": "text", "datatype": "BYTES", "shape": [-1]}]


class Celsius(Model):
    """Without predict_batch, as KServe alone needs it: some handlers are coroutines."""

    def __init__(self, name: str) -> None:
        super().__init__(name, return_response_headers=True)

    async def preprocess(self, payload, headers=None):
        """Degrees Fahrenheit, and the V2 request if it is one."""
        if isinstance(payload, InferRequest):
            return payload.inputs[0].as_numpy(), payload
        try:
            return np.array(payload["instances"], dtype=float), None
        except (KeyError, ValueError):
            raise InvalidInput("send degrees Fahrenheit as numbers") from None

    def predict(self, inputs, headers=None, response_headers=None):
        """Degrees Celsius."""
        response_headers["x-unit"] = "celsius"
        if inputs[0].max() > 1e6:
            raise OverflowError("nothing is so hot")
        return (inputs[0] - 32) / 1.8, inputs[1]

    async def explain(self, inputs, headers=None):
        """How it is computed."""
        return np.array(["(degrees - 32) / 1.8"]), inputs[1]

    def postprocess(self, result, headers=None, response_headers=None):
        """The body of the response."""
        numbers, request = result
        if request is None:
            return {"predictions": numbers.tolist()}
        output = InferOutput("celsius", list(numbers.shape), "FP64")
        output.set_data_from_numpy(numbers, binary_data=False)
        return InferResponse(request.id, self.name, [output])


class NoWeights(Exception):
    """Of this file, which nobody but the replica imports."""


class Broken(Model):
    """Cannot be loaded."""

    def load(self) -> bool:
        """Fail."""
        raise NoWeights("the file weights.bin is missing")


class Typed(Model):
    """With typed arguments; its predictions are what it was made with."""

    def __init__(
        self,
        name: str,
        threshold: float,
        unit: Literal["words", "letters"] = "words",
        top: int | None = None,
        sizes: list[int] | None = None,
        loud: bool = False,
        folder: Path = Path("."),
        weights: np.ndarray | None = None,
        untyped=3,
    ) -> None:
        super().__init__(name)
        self.made_with = [threshold, unit, top, sizes, loud, str(folder), untyped]

    def predict(self, payload, headers=None):
        """The arguments."""
        return {"predictions": self.made_with}


class Once(Model):
    """Must not be asked twice: each prediction counts."""

    idempotent = False

    def predict(self, payload, headers=None):
        """Wait for the file that the instance names; the process's id."""
        [file] = payload["instances"]
        note("calls", file)
        while file and not Path(file).exists():
            time.sleep(0.02)
        return {"predictions": [os.getpid()]}
