"""AlexNet behind LitServe: `python -m model.loadtest.peers.litserve_server`."""

import argparse
import signal

import litserve as ls

from model.loadtest.peers import command_line, kserve_model


class Classifier(ls.LitAPI):
    """What LitServe asks for; all of it runs in the workers, the HTTP process only parses JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        """options: the command line."""
        super().__init__(
            api_path=command_line.PREDICT,
            max_batch_size=options.max_batch_size,
            batch_timeout=options.batch_wait_ms / 1000,
        )
        self.options = options

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self.model = kserve_model.load_model(self.options)

    def decode_request(self, request) -> dict:  # a type here would move it to the HTTP process
        """The V1 request as it is: the model itself reads it."""
        return request

    def batch(self, inputs: list[dict]) -> list[dict]:
        """As they are: the model itself stacks the images, once they are decoded."""
        return inputs

    def predict(self, x: list[dict] | dict) -> list[dict] | dict:
        """Answer all requests of a batch in one forward pass; without batches, just one."""
        if self.max_batch_size == 1:
            return kserve_model.predict_all(self.model, [x])[0]
        return kserve_model.predict_all(self.model, x)

    def unbatch(self, output: list[dict]) -> list[dict]:
        """As they are: one response a request."""
        return output


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    options = command_line.options("model.loadtest.peers.litserve_server")
    # LitServe ends its processes on SIGINT; SIGTERM would leave them behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = ls.LitServer(
        Classifier(options),
        accelerator="cpu",
        workers_per_device=options.workers,
        healthcheck_path=command_line.HEALTH,
    )
    # fast_queue is not set: it has no effect in 0.2.19.
    server.run(
        host=command_line.HOST,
        port=options.port,
        num_api_servers=max(1, options.workers // 4),  # its default, one a worker, takes cores
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
