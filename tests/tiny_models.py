"""Models without a network, which the tests make wait, fail and die."""

import asyncio
import os
import threading
from pathlib import Path

from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput


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

    async def healthy(self) -> bool:
        """Not when it could not load again."""
        return not (self.folder / "broken").exists()

    async def predict(self, payload, headers=None, response_headers=None):
        """The replica's process id, when the request lets it answer."""
        if isinstance(payload, InferRequest):
            if payload.id:
                await self._wait_for(payload.id)
            pid = InferOutput("pid", [1], "INT64", [os.getpid()])
            return InferResponse("tiny", self.name, [pid])
        (order,) = payload["instances"]
        if order == "refuse":
            raise InvalidInput("there is no such picture")
        if isinstance(order, dict):
            await self._wait_for(order["until"])
        return {"predictions": [os.getpid()]}

    async def _wait_for(self, file: str) -> None:
        Path(file + ".begun").touch()
        while not Path(file).exists():
            await asyncio.sleep(0.02)

    async def explain(self, payload, headers=None):
        """An answer that no prediction looks like."""
        return {"explanations": ["because"]}


class Stopping:
    """A model whose thread waits until it may `go`."""

    progressed = 0.0

    def __init__(self) -> None:
        self.go = threading.Event()

    def load(self) -> None:
        """Nothing to load."""

    def use_threads(self) -> None:
        """Nothing to set."""

    def answer_all(self, batch: list) -> list:
        """The batch itself, when it may."""
        self.go.wait(10)
        return batch
