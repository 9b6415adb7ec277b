"""AlexNet behind MLServer, which speaks V2: `python -m model.loadtest.peers.mlserver_server`."""

import asyncio
import tempfile

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from mlserver.utils import install_uvloop_event_loop

from model.loadtest.peers import command_line, without_kserve
from model.serving.machine import free_port


class Classifier(MLModel):
    """What MLServer asks for; it runs in the workers, and the HTTP process gathers batches."""

    async def load(self) -> bool:
        """Load the model, once a worker."""
        self.classifier = without_kserve.Classifier(**self.settings.parameters.classifier)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer all requests of a batch, which MLServer has made one, in one forward pass."""
        texts = payload.inputs[0].data.root
        labels, probabilities = self.classifier.predict(texts)
        shape = [len(texts), without_kserve.TOP]
        outputs = [
            ResponseOutput(name="label", shape=shape, datatype="BYTES", data=labels),
            ResponseOutput(name="probability", shape=shape, datatype="FP32", data=probabilities),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def serve(options, folder: str) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = MLServer(
        Settings(
            debug=False,
            host=command_line.HOST,
            http_port=options.port,
            grpc_port=options.grpc_port or free_port(),
            parallel_workers=options.workers,
            metrics_endpoint=None,
            environments_dir=folder,
        )
    )
    batches = {
        "max_batch_size": options.max_batch_size,
        "max_batch_time": options.batch_wait_ms / 1000,
    }
    classifier = {"precision": options.precision, "threads": options.threads}
    about = ModelSettings(
        name=command_line.NAME,
        implementation=Classifier,
        parameters=ModelParameters(classifier=classifier),
        **(batches if options.max_batch_size > 1 else {}),
    )
    await server.start([about])


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    install_uvloop_event_loop()  # as MLServer's own command line does
    with tempfile.TemporaryDirectory(prefix="mlserver-") as folder:
        asyncio.run(serve(command_line.options(__spec__.name), folder))


if __name__ == "__main__":
    main()
