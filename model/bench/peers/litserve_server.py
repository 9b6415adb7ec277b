"""AlexNet behind LitServe: `python -m model.bench.peers.litserve_server --port 8000`."""

import argparse
import signal

import litserve as ls
from fastapi import HTTPException
from pydantic import ValidationError

from model.bench.peers import common


class Classifier(ls.LitAPI):
    """What LitServe asks for; all of it runs in the workers, the HTTP process only parses JSON."""

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

    def decode_request(self, request) -> list[bytes]:  # a type here would move it to HTTP's side
        """The pictures of one request, from its JSON."""
        try:
            return common.Body.model_validate(request).pictures()
        except ValidationError as error:
            raise HTTPException(422, str(error)) from None

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
    # fast_queue is not set: it has no effect in 0.2.19.
    server.run(
        host=common.HOST,
        port=options.port,
        num_api_servers=max(1, options.workers // 4),  # its default, one a worker, takes cores
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
