"""The options that we add to KServe's own command line."""

import argparse
import math
import sys

from model.serving.config import (
    BatchingConfig,
    EndpointConfig,
    LimitsConfig,
    ReplicaConfig,
    ServerConfig,
)

# Of KServe's. Threads are for handlers that are no coroutines, of which its gRPC has none, either.
WITHOUT_EFFECT = ("max_asyncio_workers", "max_threads")
KSERVE_HELP = {  # of its own options, where they are something else here
    "event_loop": "of the HTTP server: uvloop, or else Python's own (auto is Python's own, too)",
    **dict.fromkeys(WITHOUT_EFFECT, argparse.SUPPRESS),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without a page of usage before it."""

    def error(self, message: str):
        """Exit with status 1."""
        sys.exit(f"{self.prog}: {message} (--help lists the options)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of each option that has one, unless its text does; and KSERVE_HELP."""

    def add_argument(self, action: argparse.Action) -> None:
        action.help = KSERVE_HELP.get(action.dest, action.help)
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "(default:" in (action.help or "") or action.default in (None, [])
        return action.help if told else super()._get_help_string(action)


def _number(kind: type, least: float, most: float = math.inf):
    """A converter for argparse: a number of a kind within limits."""

    def number(text: str):
        value = kind(text)
        if not least <= value <= most or value == math.inf:  # nan is neither
            to = "on" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} {to}")
        return value

    number.__name__ = kind.__name__  # argparse says it: invalid int value
    return number


def _replicas(text: str) -> int | str:
    return text if text == "auto" else _number(int, 1)(text)


_replicas.__name__ = "int"  # argparse says it: invalid int value
_seconds = _number(float, 0.01)
_delay = _number(float, 0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command of ours takes."""
    ours = parser.add_argument_group("added by this server")
    ours.add_argument(
        "--host", default=EndpointConfig.host, help="the address HTTP and gRPC listen on"
    )
    ours.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[NAME.]KEY=VALUE",
        help="give the class's constructor an argument; can be repeated",
    )
    ours.add_argument(
        "--batching",
        choices=["off", "replica", "frontend"],
        default=BatchingConfig.where,
        help="where waiting requests are collected into batches: in each replica, or in KServe's "
        "process, which sends a whole batch in one call; a model without predict_batch gets none",
    )
    ours.add_argument(
        "--max_batch_size",
        type=_number(int, 1),
        default=BatchingConfig.max_size,
        help="instances in a batch",
    )
    ours.add_argument(
        "--batch_wait_ms",
        type=_delay,
        default=1000 * BatchingConfig.wait_s,
        help="how long a free replica waits for a request that is expected, at most",
    )
    ours.add_argument(
        "--dispatch_rule",
        metavar="MODULE:FUNCTION",
        help="a function that decides when a free replica gets a batch, and how large it is "
        "(default: even_share of model.serving.dispatch)",
    )
    ours.add_argument(
        "--threads",
        type=_number(int, 1),
        help="OMP_NUM_THREADS in each process that holds a model (default: its share of the cores)",
    )
    ours.add_argument(
        "--max_body_mb",
        type=_number(float, 0.001, 2000),
        default=LimitsConfig.max_body_mb,
        help="largest body of a request; for gRPC --grpc_max_receive_message_length overrides it",
    )
    ours.add_argument(
        "--max_body_memory_mb",
        type=_number(float, 0.001),
        default=LimitsConfig.max_body_memory_mb,
        help="memory for all bodies together, those that arrive and those that are worked on; "
        "above it, the one that has been arriving for longest gets 503",
    )
    ours.add_argument(
        "--max_queued_requests",
        type=_number(int, 1),
        default=LimitsConfig.max_queued_requests,
        help="how many requests of a model may wait, besides those at work; more are rejected",
    )
    ours.add_argument(
        "--overload_status",
        type=int,
        choices=[503, 429],
        default=LimitsConfig.overload_status,
        help="the status of requests rejected because the queue is full (gRPC: UNAVAILABLE)",
    )
    ours.add_argument(
        "--request_timeout_s",
        type=_seconds,
        default=LimitsConfig.request_timeout_s,
        help="a request that takes longer gets 504",
    )
    ours.add_argument(
        "--drain_s",
        type=_delay,
        default=EndpointConfig.drain_s,
        help="how long the server goes on answering after SIGTERM, while it says that it is not "
        "ready, so that clients turn elsewhere; Ctrl-C or a second signal skips the rest of that",
    )
    ours.add_argument(
        "--repository_api",
        choices=["off", "on"],
        default="off",
        help="on: any caller may use KServe's load and unload; a model that is unloaded is gone "
        "until the server starts again: KServe cannot load it again",
    )
    ours.add_argument(
        "--access_log",
        choices=["off", "on"],
        default="off",
        help="log lines of KServe, uvicorn and the replicas, four for each request",
    )


RAY_ONLY = (
    "topology",
    *("num_replicas", "min_replicas", "max_replicas", "target_requests", "upscale_delay_s"),
    *("downscale_delay_s", "max_replicas_per_node", "cpus_per_replica", "gpus_per_replica"),
    *("max_ongoing_requests", "per_attempt_timeout_s", "watchdog_timeout_s", "address"),
    *("node_address", "dashboard", "proxy"),
)


def add_ray_options(
    parser: argparse.ArgumentParser,
    address: str | None,
    address_help: str = "RAY_ADDRESS, or else a cluster of its own",
) -> None:
    """What concerns replicas and Ray. address: the default of `--address`."""
    ray = parser.add_argument_group("Ray Serve")
    ray.add_argument(
        "--topology",
        choices=["front", "ingress"],
        default=ServerConfig.topology,
        help="front: KServe in front of the replicas, where it collects batches and retries what a "
        "crashed replica had; ingress: KServe in each replica, behind Ray Serve's HAProxy, for "
        "models that take a few milliseconds (Linux, HTTP without TLS)",
    )
    ray.add_argument(
        "--num_replicas",
        type=_replicas,
        metavar="N|auto",
        help="copies of the model; auto: as many as the load needs (default: cores, at most 8)",
    )
    ray.add_argument(
        "--min_replicas",
        type=_number(int, 1),
        default=ReplicaConfig.min_replicas,
        help="for auto",
    )
    ray.add_argument(
        "--max_replicas",
        type=_number(int, 1),
        help="for auto (default: cores, at most 8)",
    )
    ray.add_argument(
        "--target_requests",
        type=_number(float, 0.1),
        default=ReplicaConfig.target_requests,
        help="for auto: instances that wait or are worked on, per replica",
    )
    for way, number in (("up", "more"), ("down", "fewer")):
        ray.add_argument(
            f"--{way}scale_delay_s",
            type=_delay,
            default=getattr(ReplicaConfig, f"{way}scale_delay_s"),
            help=f"for auto: how long the load must ask for {number} replicas",
        )
    ray.add_argument(
        "--max_replicas_per_node",
        type=_number(int, 1, 100),
        help="most replicas on one node, which are lost together (default: as many as fit)",
    )
    ray.add_argument(
        "--cpus_per_replica",
        type=_number(float, 0.01),
        help="cores a replica reserves (default: an equal share of all; 1 with --address)",
    )
    ray.add_argument(
        "--gpus_per_replica",
        type=_delay,
        help="GPUs a replica reserves (default: an equal share of all, at most 1)",
    )
    ray.add_argument(
        "--max_ongoing_requests",
        type=_number(int, 1),
        default=ReplicaConfig.max_ongoing_requests,
        help="calls that a replica accepts at a time, where batches are not collected in front",
    )
    ray.add_argument(
        "--per_attempt_timeout_s",
        type=_seconds,
        help="after this time a request is retried on another replica "
        "(default: a third of --request_timeout_s)",
    )
    ray.add_argument(
        "--watchdog_timeout_s",
        type=_seconds,
        help="a replica whose batch makes no progress for so long is replaced "
        "(default: --request_timeout_s)",
    )
    ray.add_argument(
        "--address",
        default=address,
        help=f"the Ray cluster to join; it is left running (default: {address_help})",
    )
    ray.add_argument(
        "--node_address",
        metavar="HOST",
        help="the node of that cluster to join through, where this machine has several "
        "(default: the head, if it is here)",
    )
    for name, what in (("dashboard", "Ray's dashboard"), ("proxy", "Serve's own HTTP proxy")):
        ray.add_argument(
            f"--{name}",
            type=_number(int, 0, 65535),
            nargs="?",
            const=0,
            metavar="PORT",
            help=f"start {what} on loopback; without PORT, on a free one",
        )
