"""AlexNet behind Ray Serve alone: `python -m model.loadtest.peers.ray_serve_server`.

Batches are `@serve.batch`'s; there is no KServe. By way of Ray Serve's HAProxy, or with
`--python_proxy` of its proxy in Python.
"""

import os
import signal
import tempfile
from contextlib import ExitStack

from model.loadtest.peers import command_line

TOGETHER = 64  # requests at a replica; the default, 5, would bound the batches


def main() -> None:
    """Serve until SIGTERM."""
    parser = command_line.parser(__spec__.name)
    parser.add_argument("--python_proxy", action="store_true")
    options = command_line.parsed(parser)
    with ExitStack() as stack:
        if not options.python_proxy:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="haproxy-"))
            os.environ |= {  # which Ray reads as it is imported
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
                "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin",
                "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/log",
                "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
                "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
            }
        import ray
        from ray import serve
        from starlette.requests import Request

        from model.loadtest.peers import kserve_model

        @serve.deployment(num_replicas=options.workers, max_ongoing_requests=TOGETHER)
        class Classifier:
            def __init__(self) -> None:
                self.model = kserve_model.load_model(options)

            @serve.batch(
                max_batch_size=options.max_batch_size,
                batch_wait_timeout_s=options.batch_wait_ms / 1000,
            )
            async def predict(self, bodies: list[dict]) -> list[dict]:
                return kserve_model.predict_all(self.model, bodies)

            async def __call__(self, request: Request) -> dict:
                if request.method == "GET":  # whether it is ready
                    return {}
                body = await request.json()
                if options.max_batch_size == 1:
                    return kserve_model.predict_all(self.model, [body])[0]
                return await self.predict(body)

        ray.init(address="local", num_cpus=options.workers, include_dashboard=False)
        stack.callback(ray.shutdown)
        serve.start(http_options={"host": command_line.HOST, "port": options.port})
        stack.callback(serve.shutdown)
        serve.run(Classifier.bind())
        signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    main()
