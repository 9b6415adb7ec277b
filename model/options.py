"""The command lines of both servers: KServe's own arguments, and what we add."""

import argparse
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from kserve.errors import ModelNotReady
from kserve.model_server import DEFAULT_HTTP_PORT, DEFAULT_HTTPS_PORT
from kserve.model_server import parser as kserve_parser
from kserve.utils.utils import cpu_count

from model import CannotStart

WEIGHTS = ("shapes", "imagenet")  # of the environment variable MODEL_WEIGHTS; the first is default


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without a page of usage before it."""

    def error(self, message: str):
        sys.exit(f"{self.prog}: {message} (--help lists the options)")


def _number(kind: type, least: float, most: float = math.inf):
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


def _parser(module: str, description: str) -> _Parser:
    parser = _Parser(
        prog=f"python -m {module}",
        description=description,
        parents=[kserve_parser],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(model_name="custom-model", grpc_max_receive_message_length=None)
    ours = parser.add_argument_group("of this server")
    ours.add_argument("--host", default="127.0.0.1", help="the address HTTP and gRPC listen on")
    ours.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    ours.add_argument(
        "--precision",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of weights and arithmetic; bfloat16 changes probabilities in the third digit",
    )
    ours.add_argument(
        "--layout",
        choices=["contiguous", "channels_last"],
        help="of pictures and filters in memory",
    )
    ours.add_argument("--max_batch_size", type=_number(int, 1), default=16, help="pictures")
    ours.add_argument(
        "--batch_wait_ms",
        type=_number(float, 0),
        default=5.0,
        help="a batch that is not full waits at most this long for the next request",
    )
    ours.add_argument(
        "--max_body_mb",
        type=_number(float, 0.001, 2000),
        default=64.0,
        help="a larger request is refused; --grpc_max_receive_message_length overrides it for gRPC",
    )
    ours.add_argument(
        "--max_pixels",
        type=_number(int, 1),
        default=50_000_000,
        help="of one picture, also when its short side is scaled to 256; a larger one is refused",
    )
    ours.add_argument(
        "--repository_api",
        choices=["off", "on"],
        default="off",
        help="on: any caller may load the model and unload it",
    )
    ours.add_argument(
        "--request_log",
        choices=["on", "off"],
        help="KServe's and uvicorn's log lines, four a request",
    )
    return parser


def kserve_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `python -m model.kserve_server`, checked; exits with a sentence if wrong."""
    parser = _parser("model.kserve_server", "AlexNet behind KServe, in the server's own process.")
    parser.add_argument("--threads", type=_number(int, 1), default=cores(), help="torch's threads")
    parser.add_argument(
        "--batching",
        choices=["off", "server"],
        default="off",
        help="server: requests that wait are answered as a batch, in a thread of its own",
    )
    parser.set_defaults(layout="contiguous", request_log="on")
    options = parser.parse_args(argv)
    _check_weights(parser, options)
    _hold_ports(parser, options)
    return options


def ray_options(argv: list[str] | None = None, command: str = "ray_server") -> argparse.Namespace:
    """The options of `python -m model.ray_server`, checked; exits with a sentence if wrong.

    Without options there is a replica for every core, up to 8, and the cores are shared out.
    command: ray_server, redeploy, front_server, or application, which is none but takes the same.
    """
    listens = command in ("ray_server", "front_server")
    parser = _parser(f"model.{command}", "AlexNet behind KServe, in Ray Serve replicas.")
    ray = parser.add_argument_group("of Ray Serve")
    ray.add_argument(
        "--num_replicas",
        type=_replicas,
        metavar="N|auto",
        help="copies of the model (default: cores, at most 8); auto: as the load asks for",
    )
    ray.add_argument("--min_replicas", type=_number(int, 1), default=1, help="of auto")
    ray.add_argument(
        "--max_replicas", type=_number(int, 1), help="of auto (default: cores, at most 8)"
    )
    ray.add_argument(
        "--target_requests",
        type=_number(float, 0.1),
        default=8.0,
        help="of auto: pictures that wait or are in work, for each replica there should be",
    )
    for way, seconds in (("up", 3.0), ("down", 30.0)):
        ray.add_argument(
            f"--{way}scale_delay_s",
            type=_number(float, 0),
            default=seconds,
            help="of auto: the load asks for it all this time before it is done",
        )
    ray.add_argument(
        "--max_replicas_per_node",
        type=_number(int, 1, 100),
        help="so that a node that is lost takes few of them (default: as many as fit)",
    )
    ray.add_argument("--threads", type=_number(int, 1), help="torch's threads a replica")
    ray.add_argument("--cpus_per_replica", type=_number(float, 0.01), help="cores it reserves")
    ray.add_argument(
        "--gpus_per_replica",
        type=_number(float, 0),
        help="GPUs it reserves (default: an equal part of those there are)",
    )
    ray.add_argument(
        "--batching",
        choices=["off", "replica", "server"],
        default="server",
        help="where requests that wait are gathered into a batch: in each replica, or in KServe's "
        "process, which sends a batch in one call",
    )
    parser.set_defaults(layout="channels_last", request_log="off")
    ray.add_argument(
        "--max_ongoing_requests", type=_number(int, 1), default=64, help="at a replica at a time"
    )
    ray.add_argument(
        "--max_queued_requests",
        type=_number(int, 1),
        default=256,
        help="that wait for a replica; more get 503 at once",
    )
    ray.add_argument(
        "--attempt_timeout_s",
        type=_number(float, 0.01),
        help="a replica that takes longer loses the request to another "
        "(default: a third of --request_timeout_s)",
    )
    ray.add_argument(
        "--request_timeout_s",
        type=_number(float, 0.01),
        default=60.0,
        help="a request that takes longer gets 504",
    )
    ray.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or ("auto" if command == "front_server" else None),
        help="join the Ray cluster there, and leave it running (default: RAY_ADDRESS, or else "
        + ("the one on this machine)" if command == "front_server" else "a cluster of its own)"),
    )
    ray.add_argument(
        "--node_address",
        metavar="HOST",
        help="of that cluster's nodes the one to join through, where several are on this machine "
        "(default: the head if it is here)",
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
    if command == "redeploy":
        ray.add_argument("--reload", action="store_true", help="replicas load their weights again")
    options = parser.parse_args(argv)
    if command == "redeploy" and not options.address:
        parser.error("--address is missing: a server's log says where its Ray is")
    if options.workers > 1:
        parser.error("--workers is 1 here: replicas are the workers, see --num_replicas")
    if options.address and (options.dashboard is not None or options.proxy is not None):
        parser.error("--dashboard and --proxy belong to a cluster of its own, not to --address")
    available = cores()
    options.num_replicas = options.num_replicas or min(available, 8)
    if options.num_replicas != "auto":
        options.max_replicas = options.num_replicas
    options.max_replicas = options.max_replicas or max(options.min_replicas, min(available, 8))
    if options.num_replicas == "auto" and options.max_replicas < options.min_replicas:
        parser.error(
            f"--max_replicas {options.max_replicas} is less than "
            f"--min_replicas {options.min_replicas}"
        )
    if options.attempt_timeout_s is None:
        options.attempt_timeout_s = options.request_timeout_s / 3
    if options.cpus_per_replica is None:
        share = available / options.max_replicas
        whole = math.floor(share) if share >= 1 else math.floor(share * 100) / 100
        options.cpus_per_replica = max(float(whole), 0.01)
    if options.threads is None:
        options.threads = max(1, int(options.cpus_per_replica))
    wanted = options.max_replicas * options.cpus_per_replica
    if command == "ray_server" and not options.address and wanted > available:
        parser.error(
            f"{options.max_replicas} replicas of {options.cpus_per_replica:g} CPUs need "
            f"{wanted:g}, there are {available}: lower --num_replicas or --cpus_per_replica"
        )
    _check_weights(parser, options)
    if listens:
        _hold_ports(parser, options)
    return options


def _check_weights(parser: _Parser, options: argparse.Namespace) -> None:
    """Add the weights' name; refuse unknown ones."""
    options.weights = os.environ.get("MODEL_WEIGHTS") or WEIGHTS[0]
    if options.weights not in WEIGHTS:
        parser.error(f"MODEL_WEIGHTS={options.weights} is not known: set {' or '.join(WEIGHTS)}")


def _hold_ports(parser: _Parser, options: argparse.Namespace) -> None:
    """Add gRPC's limit; refuse ports that are taken, and half of a certificate."""
    if bool(options.ssl_certfile) != bool(options.ssl_keyfile):
        parser.error("--ssl_certfile and --ssl_keyfile belong together: give both, or none")
    for file in filter(None, (options.ssl_certfile, options.ssl_keyfile)):
        if not os.access(file, os.R_OK):
            parser.error(f"the file {file} cannot be read: see --ssl_certfile and --ssl_keyfile")
    if options.ssl_certfile and options.http_port == DEFAULT_HTTP_PORT:
        options.http_port = DEFAULT_HTTPS_PORT  # as KServe itself does
    if options.grpc_max_receive_message_length is None:
        options.grpc_max_receive_message_length = int(options.max_body_mb * 2**20)
    ports = {"--http_port": options.http_port}
    if options.enable_grpc:
        ports["--grpc_port"] = options.grpc_port
        if options.grpc_port == options.http_port:
            parser.error(f"HTTP and gRPC cannot share port {options.http_port}: choose --grpc_port")
    # On Linux the ports stay bound until we listen ourselves: Ray, too, takes ports that are free.
    options._held = []
    for name, port in ports.items():
        try:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            options._held.append(socket.socket(family))
            options._held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            options._held[-1].bind((options.host, port))
            if sys.platform != "linux":  # where nobody else could bind them, nor could we
                options._held.pop().close()
        except (OSError, OverflowError) as error:
            parser.error(f"cannot listen on {options.host} port {port} ({error}): choose {name}")


def of_model(options: argparse.Namespace) -> dict:
    """What AlexNetModel is made with."""
    names = ("weights", "device", "threads", "precision", "layout", "max_pixels")
    return {"name": options.model_name} | {name: getattr(options, name) for name in names}


def of_replica(options: argparse.Namespace) -> dict:
    """What a Replica is made with, beside the model's class."""
    gather = batches(options) if options.batching == "replica" else None
    return of_model(options) | {"gather": gather, "stuck_s": 0.8 * options.attempt_timeout_s}


def batches(options: argparse.Namespace) -> dict:
    """The size and the waiting time of a GatheredModel's batches."""
    return {"size": options.max_batch_size, "wait_s": options.batch_wait_ms / 1000}


def limits(options: argparse.Namespace) -> dict:
    """How long a ReplicatedModel waits, in all and for one replica."""
    return {"timeout_s": options.request_timeout_s, "attempt_s": options.attempt_timeout_s}


def most_inside(options: argparse.Namespace) -> float:
    """How many requests for predictions a server lets in: those in work, and the queue.

    The plain server has no such limit.
    """
    if not hasattr(options, "max_queued_requests"):
        return math.inf
    gathered = options.batching == "server"
    in_work = options.max_batch_size if gathered else options.max_ongoing_requests
    return options.max_queued_requests + options.max_replicas * in_work


def described(options: argparse.Namespace) -> str:
    """What a server serves, for its ready line."""
    text = f"{options.model_name} (AlexNet, {options.weights} weights, {options.device}), "
    if hasattr(options, "num_replicas"):
        few = "" if options.num_replicas == options.max_replicas else f"{options.min_replicas} to "
        text += f"{few}{options.max_replicas} replicas of "
    text += f"{options.threads} torch {'threads' if options.threads > 1 else 'thread'}"
    return text + f", {options.precision} {options.layout}, batching {options.batching}"


def listed(options: argparse.Namespace) -> str:
    """Every option and its value, in one line."""
    shown = {name: value for name, value in vars(options).items() if not name.startswith("_")}
    return "options: " + " ".join(f"{name}={value}" for name, value in shown.items())


def run(main: Callable[[], None]) -> None:
    """Call a server's `main`; when it cannot start, exit with the sentence that says why."""
    try:
        main()
    except (CannotStart, ModelNotReady) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped before it was ready")


def age() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def cores() -> int:
    """The cores this process may use; a container's limit counts.

    KServe's own count misses the limits of cgroup version 2, which containers have today.
    """
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        limit = math.inf
    return min(cpu_count(), limit)


def free_port() -> int:
    """A TCP port on loopback that is free now, chosen by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
