"""AlexNet behind Ray Serve alone: `python -m model.loadtest.peers.ray_serve_server`.

Batches are `@serve.batch`'s; there is no KServe. By way of Ray Serve's HAProxy, or with
`--python_proxy` of its proxy in Python.
"""

import contextlib
import os
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import requests

from model.loadtest.peers import command_line

TOGETHER = 64  # requests at a replica; the default, 5, would bound the batches


def main() -> None:
    """Serve until SIGTERM."""
    parser = command_line.parser(__spec__.name)
    parser.add_argument("--python_proxy", action="store_true")
    options = command_line.parsed(parser)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-serve-"))
        ready = Path(folder, "ready")
        os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"  # 30 s by default
        if not options.python_proxy:
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
        from starlette.responses import Response

        from model.loadtest.peers import kserve_model

        @serve.deployment(
            num_replicas=options.workers,
            max_ongoing_requests=TOGETHER,
            logging_config={"enable_access_log": False},
        )
        class Classifier:
            def __init__(self) -> None:
                self.model = kserve_model.load_model(options)

            @serve.batch(
                max_batch_size=options.max_batch_size,
                batch_wait_timeout_s=options.batch_wait_ms / 1000,
            )
            async def predict(self, bodies: list[dict]) -> list[dict]:
                return kserve_model.predict_all(self.model, bodies)

            async def __call__(self, request: Request) -> dict | Response:
                if request.method == "GET":  # whether all are ready
                    return Response(str(os.getpid()), 200 if ready.exists() else 503)
                body = await request.json()
                if options.max_batch_size == 1:
                    return kserve_model.predict_all(self.model, [body])[0]
                return await self.predict(body)

        ray.init(address="local", num_cpus=options.workers, include_dashboard=False)
        stack.callback(ray.shutdown)
        serve.start(http_options={"host": command_line.HOST, "port": options.port})
        stack.callback(serve.shutdown)
        serve.run(Classifier.bind())
        met = set()
        while len(met) < options.workers:  # until each has answered, by way of the proxy
            with contextlib.suppress(requests.RequestException):
                address = f"http://{command_line.HOST}:{options.port}{command_line.HEALTH}"
                met.add(requests.get(address, timeout=5).text)
        ready.touch()
        signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    main()
