"""The application that Ray Serve runs for us: replicas, as the options of the command line say."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from model import CannotStart, options
from model.options import of_replica
from model.replica import Replica


def application(args: dict[str, Any]) -> serve.Application:
    """The application for Ray Serve's config files: `import_path: model.application:application`.

    args: options of `model.ray_server` without their dashes: `{"num_replicas": 4}`. What the file
    itself says of the deployment, `Replica`, wins. Raises ValueError for what is no option, or
    does not fit.
    """
    try:
        known = options.ray_options(
            [f"--{name}={value}" for name, value in args.items()], "application"
        )
    except SystemExit as refusal:
        raise ValueError(str(refusal)) from None
    replica = serve.deployment(Replica).options(**deployment_options(known))
    return replica.bind("model.alexnet:AlexNetModel", **of_replica(known))


def deployment_options(args: argparse.Namespace) -> dict:
    """The options of `model.ray_server` as Ray Serve's deployments take them.

    Raises CannotStart when a GPU is asked for and the cluster has none.
    """
    gpus = args.gpus_per_replica
    if gpus is None and args.device == "cpu":
        gpus = 0
    elif gpus is None:
        share = ray.cluster_resources().get("GPU", 0) / args.max_replicas
        gpus = 1 if share >= 1 else int(share * 100) / 100
        if args.device == "cuda" and gpus == 0:
            raise CannotStart("the Ray cluster has no GPU: start with --device cpu, or auto")
    deployment = {
        # Ray itself makes up another version each time, and so replaces every replica even
        # when only their number is to change. It takes ours from `_internal` callers only.
        "version": _version(args),
        "_internal": True,
        "num_replicas": args.num_replicas,
        "max_replicas_per_node": args.max_replicas_per_node,
        "max_ongoing_requests": args.max_ongoing_requests,
        "max_queued_requests": args.max_queued_requests,
        "ray_actor_options": {"num_cpus": args.cpus_per_replica, "num_gpus": gpus},
        "health_check_period_s": 0.5,  # so readiness is true to within a second
        # Where the network runs beside the event loop, a replica that is well answers at once.
        "health_check_timeout_s": args.attempt_timeout_s if args.batching == "off" else 3,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": args.attempt_timeout_s,
        "max_constructor_retry_count": 1,  # what fails to load fails again
        "user_config": {"loaded": 0},
        "logging_config": {
            "enable_access_log": args.request_log == "on",
            "log_level": "INFO" if args.request_log == "on" else "WARNING",
        },
    }
    if args.num_replicas == "auto":
        deployment["num_replicas"] = None
        deployment["autoscaling_config"] = {
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_requests,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 2,
        }
        if args.batching == "server":
            policy = {"policy_function": "model.replica:by_requests_here"}
            deployment["autoscaling_config"]["policy"] = policy
    if args.batching == "server":
        deployment["request_router_config"] = RequestRouterConfig(
            request_router_class="model.replica:ByPlace"
        )
    return deployment


def application_options(args: argparse.Namespace) -> dict:
    """The name of the application, its path at Serve's proxy, and who may scale it."""
    return {
        "name": args.model_name,
        "route_prefix": f"/{args.model_name}",
        "external_scaler_enabled": args.num_replicas != "auto",
    }


def _version(args: argparse.Namespace) -> str:
    """Of a replica: another when it is made otherwise, or its code is.

    And when the number is to follow the load: Ray has replicas report for that only from their
    start on.
    """
    made = repr((sorted(of_replica(args).items()), args.num_replicas == "auto")).encode()
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(made + code).hexdigest()[:12]
