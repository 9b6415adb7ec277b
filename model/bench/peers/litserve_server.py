"""AlexNet behind LitServe: `python -m model.bench.peers.litserve_server --port 8000`."""

import argparse
import signal

import litserve as ls

from model.bench.peers import common


class Classifier(ls.LitAPI):
    """What LitServe asks for. `setup`, `batch` and `predict` run in the workers.

    Requests are read and their base64 is decoded in the HTTP processes, so that less has to be
    sent to the workers.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """options: the command line."""
        super().__init__(
            api_path=common.PREDICT,
            max_batch_size=options.max_batch_size,
            batch_timeout=options.batch_wait_ms / 1000,
        )
        self.options = options

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self.model = common.loaded(self.options)

    def decode_request(self, request: common.Body) -> list[bytes]:
        """The pictures of one request."""
        return request.pictures()

    def batch(self, inputs: list[list[bytes]]) -> list[list[bytes]]:
        """As they are: the model itself stacks the pictures, once they are decoded."""
        return inputs

    def predict(self, x: list) -> list[dict] | dict:
        """Answer all requests of a batch in one run; unbatched, with a batch of 1, just one."""
        if self.max_batch_size == 1:
            return common.classify_all(self.model, [x])[0]
        return common.classify_all(self.model, x)

    def unbatch(self, output: list[dict]) -> list[dict]:
        """As they are: one answer a request."""
        return output


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    options = common.options("model.bench.peers.litserve_server")
    # LitServe ends its processes on SIGINT; SIGTERM would leave them behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = ls.LitServer(
        Classifier(options),
        accelerator="cpu",
        workers_per_device=options.workers,
        healthcheck_path=common.HEALTH,
    )
    server.run(
        host=common.HOST,
        port=options.port,
        num_api_servers=None,
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
