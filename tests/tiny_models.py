"""Models that compute nothing, which the tests make wait, fail and crash."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput

from model.serving.replica import Replica


class Tiny(Model):
    """Does what the one instance of a request says: `pid`, `refuse`, or {"until": file}.

    A V2 request waits for the file that its id names.

    In its folder it notes its loads; a file `broken` there makes them fail.
    """

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(name, return_response_headers=True)
        self.folder = Path(folder)
        self.load()

    def load(self) -> bool:
        """Note the load, or fail."""
        if (self.folder / "broken").exists():
            raise RuntimeError("the weights are broken")
        with open(self.folder / "loads", "a") as loads:
            loads.write("loaded\n")
        self.ready = True
        return self.ready

    async def predict(self, payload, headers=None, response_headers=None):
        """The replica's process id, when the request lets it answer."""
        if isinstance(payload, InferRequest):
            if payload.id:
                await self._wait_for(payload.id)
            pid = InferOutput("pid", [1], "INT64", [os.getpid()])
            return InferResponse("tiny", self.name, [pid])
        (order,) = payload["instances"]
        if order == "refuse":
            raise InvalidInput("there is no such image")
        if isinstance(order, dict):
            await self._wait_for(order["until"])
        return {"predictions": [os.getpid()]}

    async def _wait_for(self, file: str) -> None:
        Path(file + ".begun").touch()
        while not Path(file).exists():
            await asyncio.sleep(0.02)

    async def explain(self, payload, headers=None):
        """A response that no prediction looks like."""
        return {"explanations": ["because"]}


class TinyReplica(Replica):
    """A replica of Tiny that answers both: ReplicaPool, and KServe's RayModel as Tiny itself would.

    So a test shows the two side by side on the same replica.
    """

    def load(self) -> None:
        """Load; at each further call, which only RayModel makes, load again."""
        if self._model is None:
            super().load()
        else:
            self._model.load()

    async def __call__(self, body: Any, headers: dict | None = None) -> tuple[Any, dict]:
        """What RayModel calls."""
        return await self._model(body, headers)


class Busy(Model):
    """Takes as many seconds of its thread as the instance of a request says; its process id."""

    def predict(self, payload, headers=None):
        """Without a pause, as a forward pass is."""
        time.sleep(payload["instances"][0])
        return {"predictions": [os.getpid()]}


class Stopping(Model):
    """Its batches take until the test lets them `go`."""

    go = threading.Event()

    def predict_batch(self, inputs: list) -> list:
        """The inputs themselves, when it may."""
        self.go.wait(20)
        return inputs
