"""The servers that experiments are done to."""

from pathlib import Path

from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess

HALVES = ("--num_replicas", "2", "--cpus_per_replica", "0.5")  # there is room for a third
OTHER = ("--set", "memory_format=contiguous")  # another version of the same model


def ours(*options: str, folder: Path | None = None) -> ServerProcess:
    """model.serving with a token of ours, so that others can join its Ray cluster.

    folder: to start it in, where the class of a model is.
    """
    return ServerProcess("model.serving", *options, folder=folder, **fresh_token())


def stock(*options: str) -> ServerProcess:
    """model.basics.ray_server with as many requests at a replica as ours.

    options: of model.loadtest.stock. (With five at a replica, as there, throughput falls as
    clients are added, which is another matter.)
    """
    return ServerProcess(
        "model.loadtest.stock", *HALVES, "--max_ongoing_requests", "64", *options, **fresh_token()
    )
