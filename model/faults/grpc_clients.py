"""Clients of gRPC, each with a connection of its own, who send one request after the other."""

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.loadtest.server_process import ServerProcess

PUSHBACK_S = 1.0  # what a client waits after an error, as gRPC's own do that have a retry policy
ANSWERED = "answered"
REFUSED = "refused"  # UNAVAILABLE before the request was begun: to be retried elsewhere
# What the server says as it stops or is full, or gRPC itself where nobody listens any more.
SAID = ("the server stops", "the server is busy", "the server holds")
NOT_BEGUN = re.compile("|".join((*SAID, "connection refused", "failed to connect")), re.I)


def wait(server: ServerProcess, ms: float) -> None:
    """Until a request is answered: HAProxy may know the replicas for HTTP a moment earlier.

    Raises RuntimeError when none is within half a minute.
    """
    for _ in range(30):
        if set(call(server, ms, clients=1, seconds=0.1)) == {ANSWERED}:
            return
    raise RuntimeError("no request over gRPC is answered")


def call(server: ServerProcess, ms: float, clients: int, seconds: float) -> Counter[str]:
    """Outcomes of requests to FragileModel, each of which takes `ms` there: ANSWERED, REFUSED, or
    another status.

    The clients wait a while after an error, and call again. An error that is not gRPC's ends its
    client; it is raised when all have ended, with a note of all outcomes.
    """
    until = time.monotonic() + seconds

    def client(mine: Counter[str]) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
        with grpc.insecure_channel(server.grpc, options=options) as channel:
            infer = GRPCInferenceServiceStub(channel).ModelInfer
            while time.monotonic() < until:
                try:
                    response = infer(request, timeout=90)
                    right = np.frombuffer(response.raw_output_contents[0], np.float32) == ms
                    mine[ANSWERED if right.all() else "wrong"] += 1
                except grpc.RpcError as error:
                    mine[_outcome(error)] += 1
                    time.sleep(PUSHBACK_S)
                except Exception as error:
                    mine[type(error).__name__] += 1
                    raise

    tensor = InferInput("ms", [1], "FP32")
    tensor.set_data_from_numpy(np.array([ms], dtype=np.float32))
    request = InferRequest(model_name=server.name, infer_inputs=[tensor]).to_grpc()
    counts: list[Counter[str]] = [Counter() for _ in range(clients)]
    with ThreadPoolExecutor(clients) as threads:
        done = [threads.submit(client, mine) for mine in counts]
    outcomes = sum(counts, Counter())
    errors = [error for each in done if (error := each.exception())]
    if errors:
        errors[0].add_note(f"what became of the calls: {dict(outcomes)}")
        raise errors[0]
    return outcomes


def _outcome(error: grpc.RpcError) -> str:
    """A call that was cut off is UNAVAILABLE as well: "Socket closed", say."""
    unavailable = error.code() is grpc.StatusCode.UNAVAILABLE
    return REFUSED if unavailable and NOT_BEGUN.search(error.details() or "") else error.code().name
