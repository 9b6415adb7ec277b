"""A model that does nothing but compute, for as long as its requests say."""

import time
from typing import Any

import numpy as np
from kserve import Model

MATRIX = np.ones((64, 64), np.float32)


class TimedModel(Model):
    """V1 {"instances": [{"ms": 30, "shared": 0.8}]} -> {"predictions": [30]}.

    ms: milliseconds of one core for an instance alone. shared: the part of them that a batch needs
    only once, however many instances are in it (0: a batch gains nothing).
    """

    def preprocess(self, payload: dict, headers: dict | None = None) -> list[dict]:
        """The instances of a request."""
        return payload["instances"]

    def predict(self, instances: list[dict], headers: dict | None = None) -> list[float]:
        """One request by itself, as KServe calls it."""
        return self.predict_batch([instances])[0]

    def predict_batch(self, inputs: list[list[dict]]) -> list[list[float]]:
        """The instances of several requests, which all say the same."""
        count = sum(map(len, inputs))
        ms, shared = inputs[0][0]["ms"], inputs[0][0]["shared"]
        compute(ms / 1000 * (shared + (1 - shared) * count))
        return [[instance["ms"] for instance in instances] for instances in inputs]

    def postprocess(self, result: list[float], headers: dict | None = None) -> dict[str, Any]:
        """The response of V1."""
        return {"predictions": result}


def compute(seconds: float) -> None:
    """Use so many seconds of one core, mostly outside Python's lock, as torch and NumPy do."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        MATRIX @ MATRIX
