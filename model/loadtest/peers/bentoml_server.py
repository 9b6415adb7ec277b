"""AlexNet behind BentoML: `python -m model.loadtest.peers.bentoml_server`.

One service whose workers each hold the model, decode requests and gather batches: what BentoML
calls a batchable API. How long a batch waits it learns by itself, in the first seconds of a load.
"""

import os
import sys
import tempfile
from pathlib import Path

import bentoml

from model.loadtest.peers import command_line, kserve_model, program

HOME = "BENTOML_HOME"  # BentoML's folder; its workers meet there
OPTIONS = command_line.given()


class AsKServe:
    """The address of readiness, and V1 responses: {"predictions": what the API returns}."""

    def __init__(self, app) -> None:
        """app: BentoML's application (ASGI)."""
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """One request."""
        path = scope.get("path")
        if path == command_line.HEALTH:
            scope = scope | {"path": "/readyz"}
        start, parts = {}, []

        async def wrap(message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = b"".join(parts)
            if start["status"] == 200:
                body = b'{"predictions":%b}' % body
            headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
            await send(start | {"headers": headers})
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, wrap if path == command_line.PREDICT else send)


@bentoml.service(
    workers=OPTIONS.workers,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Classifier:
    """What BentoML asks for."""

    def __init__(self) -> None:
        """Load the model, once a worker."""
        self.model = kserve_model.load_model(OPTIONS)
        Path(os.environ[HOME], f"loaded-{os.getpid()}").touch()

    def __is_ready__(self) -> bool:
        """Whether every worker has loaded the model."""
        return len([*Path(os.environ[HOME]).glob("loaded-*")]) >= OPTIONS.workers

    @bentoml.api(
        route=command_line.PREDICT,
        batchable=OPTIONS.max_batch_size > 1,
        max_batch_size=max(2, OPTIONS.max_batch_size),
    )
    def predict(self, instances: list[dict]) -> list:
        """Answer the instances of all requests of a batch in one forward pass."""
        [response] = kserve_model.predict_all(self.model, [{"instances": instances}])
        return response["predictions"]


Classifier.add_asgi_middleware(AsKServe)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    port = command_line.options(__spec__.name).port
    with tempfile.TemporaryDirectory(prefix="bentoml-") as home:
        serve = [sys.executable, "-m", "bentoml", "serve", f"{__spec__.name}:Classifier"]
        serve += ["--host", command_line.HOST, "--port", str(port)]
        env = {HOME: home, "BENTOML_DO_NOT_TRACK": "True"}
        program.run(serve, **env, **command_line.for_workers())


if __name__ == "__main__":
    main()
