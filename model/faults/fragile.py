"""A model that does what a request says, its own crash included; for the table of promises."""

import os
import signal
import time
from typing import Any

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model


class FragileModel(Model):
    """V1 {"instances": [{"ms": 20}]} -> {"predictions": [20]}, after so many milliseconds.

    V2 has the milliseconds in a tensor "ms" FP32 [n], and returns such a tensor. {"crash": true}
    kills its process. A batch takes as long as its longest instance.
    """

    def __init__(self, name: str, broken: bool = False, wrong: bool = False) -> None:
        """broken: it cannot be loaded. wrong: it predicts one too many, which it finds itself."""
        super().__init__(name)
        self.broken, self.wrong = broken, wrong

    def load(self) -> bool:
        """Raises RuntimeError where it is broken, or where its check of itself fails."""
        if self.broken:
            raise RuntimeError("the weights are broken")
        if (found := self.predict_batch([[{"ms": 1}]])) != [[1]]:
            raise RuntimeError(f"the check of itself failed: 1 gives {found[0][0]}")
        self.ready = True
        return self.ready

    def preprocess(self, payload: dict | InferRequest, headers: dict | None = None) -> list[dict]:
        """The instances of a request."""
        if isinstance(payload, InferRequest):
            return _Tensor({"ms": ms} for ms in payload.inputs[0].as_numpy().tolist())
        return payload["instances"]

    def predict(self, instances: list[dict], headers: dict | None = None) -> list[float]:
        """One request by itself."""
        return self.predict_batch([instances])[0]

    def predict_batch(self, inputs: list[list[dict]]) -> list[list[float]]:
        """Of several requests; sleeps, so that many replicas fit on a few cores."""
        instances = [instance for request in inputs for instance in request]
        if any(instance.get("crash") for instance in instances):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(max(instance["ms"] for instance in instances) / 1000)
        return [type(request)(i["ms"] + self.wrong for i in request) for request in inputs]

    def postprocess(
        self, result: list[float], headers: dict | None = None
    ) -> dict[str, Any] | InferResponse:
        """The response, of V1 or V2 as the request was."""
        if not isinstance(result, _Tensor):
            return {"predictions": result}
        output = InferOutput("ms", [len(result)], "FP32")
        output.set_data_from_numpy(np.array(result, dtype=np.float32))
        return InferResponse("", self.name, [output])


class _Tensor(list):
    """What a V2 request holds, or gets."""
