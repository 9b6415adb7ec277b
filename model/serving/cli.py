"""The command lines: KServe's own arguments and ours, checked, and turned into a ServerConfig."""

import argparse
import json
import math
import os
import sys
from importlib.util import find_spec
from typing import Any

from model.serving.config import (
    DEFAULT_NAME,
    DEFAULT_TARGET,
    ApplicationConfig,
    BatchingConfig,
    CannotStart,
    ClusterConfig,
    EndpointConfig,
    LimitsConfig,
    ModelConfig,
    ReplicaConfig,
    ServerConfig,
)
from model.serving.dispatch import load_rule
from model.serving.machine import cores, hold_port
from model.serving.model_class import check_target
from model.serving.options import (
    RAY_ONLY,
    WITHOUT_EFFECT,
    Help,
    Parser,
    add_options,
    add_ray_options,
)

# kserve.model_server reads sys.argv as it is imported, and would answer a mistake in it with a
# page of usage.
_argv, sys.argv = sys.argv, [sys.argv[0], *(a for a in sys.argv if a == "--enable_docs_url")]
from kserve.model_server import DEFAULT_HTTP_PORT, DEFAULT_HTTPS_PORT  # noqa: E402
from kserve.model_server import parser as kserve_parser  # noqa: E402

sys.argv = _argv

MODELS_HELP = "what to serve: MODULE:CLASS of a kserve.Model, with NAME= before it if there are "
MODELS_HELP += f"several (default: {DEFAULT_TARGET})"


def server_config(argv: list[str] | None = None) -> ServerConfig:
    """`python -m model.serving`; exits with a sentence if something is wrong.

    Without options there is a replica of each model for every core, up to 8, and the cores are
    shared out.
    """
    parser = _parser("model.serving", "Serves any kserve.Model, in Ray Serve replicas.")
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODULE:CLASS", help=MODELS_HELP)
    parser.add_argument(
        "--in_process",
        action="store_true",
        help="without Ray: the model runs in a thread of this process",
    )
    add_ray_options(parser, address=os.environ.get("RAY_ADDRESS") or None)
    args = parser.parse_args(argv)
    models = _models(parser, args, args.models or [DEFAULT_TARGET])
    if args.in_process:
        given = [
            f"--{name}" for name in RAY_ONLY if getattr(args, name) != parser.get_default(name)
        ]
        if given:
            parser.error(f"{given[0]} is for replicas: leave it or --in_process out")
        if args.batching == "replica":
            parser.error("--batching replica needs replicas: leave it or --in_process out")
        config = _config(parser, args, models, replicas=None)
    else:
        config = _config(parser, args, models, _replicas(parser, args, models))
        if config.topology == "ingress" and (args.address or args.proxy is not None):
            parser.error("--topology ingress starts a cluster: leave --address and --proxy out")
        number = config.replicas.max_replicas * _deployments(args, models)
        wanted = number * config.replicas.cpus
        if not config.cluster.address and wanted > cores():
            parser.error(
                f"{number} replicas of {config.replicas.cpus:g} CPUs need {wanted:g}, "
                f"there are {cores()}: "
                "lower --num_replicas or --cpus_per_replica"
            )
    _check_rule(parser, config.batching)
    _hold_ports(parser, config.endpoint)
    return config


def frontend_config(argv: list[str] | None = None) -> ServerConfig:
    """`python -m model.serving.frontend`; exits with a sentence if something is wrong."""
    parser = _parser("model.serving.frontend", "KServe in front of applications that run already.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the applications")
    add_ray_options(
        parser, os.environ.get("RAY_ADDRESS") or "auto", "RAY_ADDRESS, or the one on this machine"
    )
    args = parser.parse_args(argv)
    _front_only(parser, args)
    models = tuple(ModelConfig(name) for name in args.names or [args.model_name])
    config = _config(parser, args, models, _replicas(parser, args, models))
    _check_rule(parser, config.batching)
    _hold_ports(parser, config.endpoint)
    return config


def redeploy_config(argv: list[str] | None = None) -> tuple[ServerConfig, bool, bool]:
    """`python -m model.serving.redeploy`; exits with a sentence if something is wrong.

    Returns the configuration, whether the models themselves were named (otherwise they stay), and
    whether they are to be loaded again.
    """
    parser = _parser("model.serving.redeploy", "Changes the replicas of a running server.")
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODULE:CLASS", help=MODELS_HELP)
    parser.add_argument("--reload", action="store_true", help="replicas load their model again")
    add_ray_options(parser, os.environ.get("RAY_ADDRESS") or None, "RAY_ADDRESS")
    args = parser.parse_args(argv)
    if not args.address:
        parser.error("--address is missing: a server's log says where its Ray is")
    named = bool(args.models)
    models = _models(parser, args, args.models or [DEFAULT_TARGET])
    config = _config(parser, args, models, _replicas(parser, args, models))
    return config, named, args.reload


def application_config(args: dict[str, Any]) -> ServerConfig:
    """Of an application in Ray Serve's config files; exits with a sentence if something is wrong.

    args: as for model.serving.deployment.application.
    """
    options = dict(args)
    target, name = options.pop("model", DEFAULT_TARGET), options.pop("name", DEFAULT_NAME)
    typed = [
        f"--set={key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in (options.pop("set", None) or {}).items()
    ]
    parser = _parser("model.serving", "An application of Ray Serve's config files.")
    add_ray_options(parser, address="auto")
    typed += [f"--{key}={value}" for key, value in options.items()]
    parsed = parser.parse_args([f"--model_name={name}", *typed])
    _front_only(parser, parsed)
    models = _models(parser, parsed, [target])
    return _config(parser, parsed, models, _replicas(parser, parsed, models))


def _parser(module: str, description: str) -> Parser:
    parser = Parser(
        prog=f"python -m {module}",
        description=description,
        parents=[kserve_parser],
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.set_defaults(model_name=DEFAULT_NAME, grpc_max_receive_message_length=None)
    parser.set_defaults(**dict.fromkeys(WITHOUT_EFFECT))
    add_options(parser)
    return parser


def _front_only(parser: Parser, args: argparse.Namespace) -> None:
    if args.topology != "front":
        parser.error("--topology is for `python -m model.serving`: leave it out")


def _models(
    parser: Parser, args: argparse.Namespace, targets: list[str]
) -> tuple[ModelConfig, ...]:
    """The models to serve, each with its arguments of `--set`."""
    folder = os.getcwd()
    named = dict.fromkeys(_named(parser, args, target) for target in targets)
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        parser.error("two models have the same name: give each its own, as in a=MODULE:CLASS")
    arguments: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for text in args.set:
        key, equals, value = text.partition("=")
        owner, dot, own = key.rpartition(".")
        if not equals or not key:
            parser.error(f"--set {text}: give KEY=VALUE")
        if dot and owner not in arguments:
            parser.error(f"--set {text}: no model is called {owner}")
        if not dot and len(names) > 1:
            parser.error(f"--set {text}: with several models give NAME.KEY=VALUE")
        arguments[owner or names[0]].append((own, value))
    for _, target in named:
        try:
            check_target(target, folder)
        except CannotStart as error:
            parser.error(str(error))
    return tuple(
        ModelConfig(name, target, tuple(arguments[name]), folder) for name, target in named
    )


def _named(parser: Parser, args: argparse.Namespace, text: str) -> tuple[str, str]:
    name, equals, target = text.rpartition("=")
    if equals and not name:
        parser.error(f"{text}: give a name before the =")
    if not equals and len(getattr(args, "models", [])) > 1:
        parser.error(f"several models need names: give NAME={target}")
    if "/" in name or ":" in name:
        parser.error(f"{name} cannot be the name of a model: it becomes part of an address")
    return name or args.model_name, target


def _deployments(args: argparse.Namespace, models: tuple[ModelConfig, ...]) -> int:
    """How many kinds of replicas there are: one for each model, or one that has all of them."""
    return 1 if args.topology == "ingress" else len(models)


def _replicas(
    parser: Parser, args: argparse.Namespace, models: tuple[ModelConfig, ...]
) -> ReplicaConfig:
    """What Ray Serve is to run of each kind of replica."""
    deployments = _deployments(args, models)
    available = max(1, cores() // deployments)
    number = args.num_replicas or min(available, 8)
    most = args.max_replicas or max(args.min_replicas, min(available, 8))
    if number != "auto":
        most = number
    elif most < args.min_replicas:
        parser.error(f"--max_replicas {most} is less than --min_replicas {args.min_replicas}")
    cpus = args.cpus_per_replica
    if cpus is None and args.address:
        cpus = 1.0  # the cores of this machine say nothing about the cluster's
    elif cpus is None:
        share = cores() / (most * deployments)
        cpus = max(float(math.floor(share) if share >= 1 else math.floor(share * 100) / 100), 0.01)
    return ReplicaConfig(
        num_replicas=None if number == "auto" else number,
        min_replicas=args.min_replicas,
        max_replicas=most,
        target_requests=args.target_requests,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        max_replicas_per_node=args.max_replicas_per_node,
        cpus=cpus,
        gpus=args.gpus_per_replica,
        max_ongoing_requests=args.max_ongoing_requests,
    )


def _config(
    parser: Parser,
    args: argparse.Namespace,
    models: tuple[ModelConfig, ...],
    replicas: ReplicaConfig | None,
) -> ServerConfig:
    _check_kserve_options(parser, args)
    if args.address and (args.dashboard is not None or args.proxy is not None):
        parser.error("--dashboard and --proxy belong to a cluster of its own, not to --address")
    if args.drain_s and args.workers > 1:
        parser.error("--drain_s has no effect with --workers: leave one of them out")
    if args.max_body_memory_mb < args.max_body_mb:
        parser.error("--max_body_memory_mb must be at least --max_body_mb")
    if replicas and args.workers > 1:
        parser.error("--workers is for --in_process: replicas are the workers, --num_replicas")
    ingress = replicas is not None and args.topology == "ingress"
    batching = "frontend" if ingress and args.batching == "replica" else args.batching
    endpoint = _endpoint(parser, args)
    if ingress and args.event_loop != parser.get_default("event_loop"):
        parser.error("replicas have Ray's event loop: leave --event-loop or --topology out")
    if ingress and endpoint.certificate:
        parser.error("HAProxy does not speak TLS here: leave --ssl_certfile or --topology out")
    each = max(1, int(replicas.cpus)) if replicas else max(1, cores() // args.workers)
    timeout = args.request_timeout_s
    return ServerConfig(
        models=models,
        batching=BatchingConfig(
            batching, args.max_batch_size, args.batch_wait_ms / 1000, args.dispatch_rule
        ),
        limits=LimitsConfig(
            max_queued_requests=args.max_queued_requests,
            overload_status=args.overload_status,
            max_body_mb=args.max_body_mb,
            max_body_memory_mb=args.max_body_memory_mb,
            request_timeout_s=timeout,
            per_attempt_timeout_s=args.per_attempt_timeout_s or timeout / 3,
            watchdog_timeout_s=args.watchdog_timeout_s or timeout,
        ),
        endpoint=endpoint,
        application=ApplicationConfig(
            repository_api=args.repository_api == "on",
            access_log=args.access_log == "on",
            access_log_format=args.access_log_format,
            latency_log=args.access_log == "on" and args.enable_latency_logging,
            log_config_file=args.log_config_file,
        ),
        threads=args.threads or each,
        replicas=replicas,
        topology="ingress" if ingress else "front",
        cluster=ClusterConfig(
            args.address,
            args.node_address,
            args.dashboard,
            args.proxy,
            haproxy=endpoint if ingress else None,
            num_cpus=cores(),
        ),
    )


def _check_kserve_options(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what KServe's own options take and what fails later, or has no effect."""
    if args.workers < 1:
        parser.error(f"--workers {args.workers} is not a number from 1 on")
    for name in WITHOUT_EFFECT:
        if getattr(args, name) is not None:
            parser.error(f"--{name} has no effect here: leave it out")
    if args.access_log_format and find_spec("asgi_logger") is None:
        parser.error(
            "--access_log_format needs a package that is not installed: "
            "pip install 'kserve[logging]'"
        )


def _check_rule(parser: Parser, batching: BatchingConfig) -> None:
    """Refuse a dispatch rule that cannot be imported, before anything starts."""
    try:
        load_rule(batching.rule, os.getcwd())
    except CannotStart as error:
        parser.error(str(error))


def _endpoint(parser: Parser, args: argparse.Namespace) -> EndpointConfig:
    """Where to listen; refuses half of a certificate and options that have no effect here."""
    if args.predictor_host:
        parser.error("--predictor_host is for transformers, which only KServe's ModelServer runs")
    if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
        parser.error("--ssl_certfile and --ssl_keyfile belong together: give both, or none")
    for file in filter(None, (args.ssl_certfile, args.ssl_keyfile)):
        if not os.access(file, os.R_OK):
            parser.error(f"the file {file} cannot be read: see --ssl_certfile and --ssl_keyfile")
    http_port = args.http_port
    if args.ssl_certfile and http_port == DEFAULT_HTTP_PORT:
        http_port = DEFAULT_HTTPS_PORT  # as KServe itself does
    if args.enable_grpc and args.grpc_port == http_port:
        parser.error(f"HTTP and gRPC cannot share port {http_port}: choose --grpc_port")
    receive = args.grpc_max_receive_message_length
    return EndpointConfig(
        host=args.host,
        http_port=http_port,
        grpc_port=args.grpc_port if args.enable_grpc else None,
        grpc_max_receive_bytes=int(args.max_body_mb * 2**20) if receive is None else receive,
        grpc_max_send_bytes=args.grpc_max_send_message_length,
        certificate=(args.ssl_keyfile, args.ssl_certfile) if args.ssl_certfile else None,
        drain_s=args.drain_s,
        workers=args.workers,
        event_loop=args.event_loop,
        keep_alive_s=args.timeout_keep_alive,
    )


def _hold_ports(parser: Parser, endpoint: EndpointConfig) -> None:
    """Refuse ports that are taken."""
    ports = {"--http_port": endpoint.http_port, "--grpc_port": endpoint.grpc_port}
    for option, port in ports.items():
        if port is None:
            continue
        try:
            hold_port(endpoint.host, port)
        except (OSError, OverflowError) as error:
            parser.error(f"cannot listen on {endpoint.host} port {port} ({error}): choose {option}")
