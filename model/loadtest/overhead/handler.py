"""TimedModel behind Ray Serve alone, without KServe: `python -m model.loadtest.overhead.handler`.

By way of Ray Serve's Python proxy, or with `--haproxy` of its HAProxy.
"""

import argparse
import os
import signal
import tempfile
from contextlib import ExitStack

HOST, REPLICAS = "127.0.0.1", 2


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m model.loadtest.overhead.handler")
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--http_port", type=int, default=8080, help=f"of {HOST}")
    parser.add_argument("--grpc_port", type=int, help="not used: there is no gRPC here")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.haproxy:
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

        from model.loadtest.pays.timed_model import TimedModel

        @serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=64)
        class Handler:
            def __init__(self) -> None:
                self.model = TimedModel("custom-model")

            async def __call__(self, request: Request) -> dict:
                if request.method == "GET":  # whether it is ready
                    return {}
                instances = self.model.preprocess(await request.json())
                return self.model.postprocess(self.model.predict(instances))

        ray.init(address="local", num_cpus=REPLICAS, include_dashboard=False)
        stack.callback(ray.shutdown)
        serve.start(http_options={"host": HOST, "port": args.http_port})
        stack.callback(serve.shutdown)
        serve.run(Handler.bind())
        signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    main()
