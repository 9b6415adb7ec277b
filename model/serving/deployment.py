"""The applications that Ray Serve runs for us: replicas of a model, as the options say."""

import base64
import contextlib
import hashlib
import pickle
import re
import time
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from model.serving.config import CannotStart, ClusterConfig, ModelConfig, ServerConfig
from model.serving.model_class import source_of
from model.serving.replica import Replica
from model.serving.upstream_ray import versioned

APPLICATION = "kserve"  # with `--topology ingress`: there is one, whatever it serves
UNLIMITED = 100_000
STARTING = ("NOT_STARTED", "DEPLOYING")
# The last line of a traceback: the kind of the error, without its module, and what it says.
RAISED = re.compile(r"^(?:[\w.]*\()?(?:\w+\.)*(\w*(?:Error|CannotStart)\w*): (.*)", re.M)


def application(args: dict[str, Any]) -> serve.Application:
    """For Ray Serve's config files: `import_path: model.serving.deployment:application`.

    args: `model`, MODULE:CLASS; `name`, of the model; `set`, a dictionary with the arguments of
    the class; and options of `python -m model.serving` without their dashes: `{"num_replicas":
    4}`. What the file itself says of the deployment, `Replica`, wins. Raises ValueError for what
    is no option, or does not fit.
    """
    from model.serving import cli  # which brings KServe's command line

    try:
        config = cli.application_config(args)
    except SystemExit as refusal:
        raise ValueError(str(refusal)) from None
    return bind(config.models[0], config)


def deploy(
    config: ServerConfig, reload_at: float = 0, only: Container[str] | None = None
) -> dict[str, DeploymentHandle | CannotStart]:
    """Have Ray Serve run the models of the configuration, and wait until they do.

    reload_at: as for `bind`. only: the names of some; None: all. Returns for each name the handle
    of its replicas, or why there are none; the others run.
    """
    if config.topology == "ingress":
        return {APPLICATION: deploy_ingress(config, reload_at)}
    models = [model for model in config.models if only is None or model.name in only]
    targets = [
        serve.RunTarget(bind(model, config, reload_at), **run_options(model, config))
        for model in models
    ]
    with contextlib.suppress(RuntimeError):  # of the first that fails; it is looked up below
        serve.run_many(targets)
    return {model.name: _outcome(model.name) for model in models}


def deploy_ingress(
    config: ServerConfig, reload_at: float = 0, draining: bool = False
) -> DeploymentHandle | CannotStart:
    """The same, of one application whose replicas have all models, and KServe around them.

    draining: they say that they are not ready, and go on.
    """
    with contextlib.suppress(RuntimeError):
        serve.run(
            bind_ingress(config, reload_at, draining),
            name=APPLICATION,
            route_prefix="/",
            external_scaler_enabled=config.replicas.num_replicas is not None,
        )
    return _outcome(APPLICATION)


def applications(config: ServerConfig) -> list[str]:
    """The names of the applications that `deploy` makes."""
    if config.topology == "ingress":
        return [APPLICATION]
    return [model.name for model in config.models]


def _outcome(name: str) -> DeploymentHandle | CannotStart:
    """The handle of an application once it runs, or why it does not."""
    while (status := serve.status().applications[name].status) in STARTING:
        time.sleep(0.1)
    return serve.get_app_handle(name) if status == "RUNNING" else CannotStart(_why_not(name))


def _why_not(name: str) -> str:
    """What a replica of an application raised as it was made; the whole of it goes to the log.

    `serve.run` itself says only which deployment failed.
    """
    found = serve.status().applications.get(name)
    for deployment in found.deployments.values() if found else ():
        if deployment.status != "DEPLOY_FAILED":
            continue
        print(deployment.message, flush=True)
        raised = RAISED.findall(deployment.message)
        if raised:
            kind, text = raised[-1]
            plain = ("CannotStart", "RuntimeError", "ValueError")
            return text if kind in plain else f"{kind}: {text}"
        return deployment.message
    return "Ray Serve does not say why; see the replicas' logs"


def bind(model: ModelConfig, config: ServerConfig, reload_at: float = 0) -> serve.Application:
    """The application of one model, to be given to `serve.run` with `run_options`.

    reload_at: a moment; a later one than before has the replicas load their model again.
    """
    options = deployment_options(model, config, reload_at)
    return serve.deployment(Replica).options(**options).bind(*_replica_arguments(model, config))


def bind_ingress(
    config: ServerConfig, reload_at: float = 0, draining: bool = False
) -> serve.Application:
    """The application of all models with KServe in each replica."""
    from model.serving.ingress import IngressReplica  # Ray reads its variables as it is imported

    [first, *_] = config.models
    options = deployment_options(first, config, reload_at)
    options |= {
        "max_ongoing_requests": UNLIMITED,  # ours are, in the application
        "max_queued_requests": -1,
        "user_config": options["user_config"] | {"draining": draining},
    }
    return serve.deployment(IngressReplica).options(**options).bind(config)


def run_options(model: ModelConfig, config: ServerConfig) -> dict[str, Any]:
    """The application's name, its path at Serve's proxy, and whether others may scale it."""
    return {
        "name": model.name,
        "route_prefix": f"/{model.name}",
        "external_scaler_enabled": config.replicas.num_replicas is not None,
    }


def deployment_options(
    model: ModelConfig, config: ServerConfig, reload_at: float = 0
) -> dict[str, Any]:
    """The configuration as the options of one of Ray Serve's deployments."""
    replicas, limits = config.replicas, config.limits
    gpus = replicas.gpus
    if gpus is None:
        total = ray.cluster_resources().get("GPU", 0)
        share = total / (replicas.max_replicas * len(config.models))
        gpus = 1 if share >= 1 else int(share * 100) / 100
    level = "INFO" if config.endpoint.access_log else "WARNING"
    options: dict[str, Any] = {
        "num_replicas": replicas.num_replicas,
        "max_replicas_per_node": replicas.max_replicas_per_node,
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "max_queued_requests": limits.max_queued_requests,
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": gpus},
        "health_check_period_s": 0.5,  # so readiness is true to within a second
        "health_check_timeout_s": 3,  # the event loop of a replica is always free
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": limits.per_attempt_timeout_s,
        "max_constructor_retry_count": 1,  # what fails to load fails again
        "user_config": {"reload_at": reload_at, "deployed": _as_text(config)},
        "logging_config": {"enable_access_log": config.endpoint.access_log, "log_level": level},
        **versioned(_version(model, config)),
    }
    if replicas.num_replicas is None:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 2,
        }
        if config.batching.where == "frontend" and config.topology == "front":
            policy = {"policy_function": "model.serving.routing:scale_by_backlog"}
            options["autoscaling_config"]["policy"] = policy
    if config.batching.where == "frontend" and config.topology == "front":
        router = "model.serving.routing:AssignedReplicaRouter"
        options["request_router_config"] = RequestRouterConfig(request_router_class=router)
    return options


def _as_text(config: ServerConfig) -> str:
    """So that replicas can say how they were deployed; Ray takes what is JSON."""
    return base64.b64encode(pickle.dumps(config)).decode()


def deployed(handle: DeploymentHandle) -> ServerConfig | None:
    """The configuration with which an application runs; None where it does not say."""
    text = handle.deployed.remote().result(timeout_s=60)
    return pickle.loads(base64.b64decode(text)) if text else None


def _replica_arguments(model: ModelConfig, config: ServerConfig) -> tuple:
    return model, config.threads, config.batching, config.limits.watchdog_timeout_s


def _version(model: ModelConfig, config: ServerConfig) -> str:
    """Of a replica: another when it is made otherwise, or its code or the model's is.

    And when the number is to follow the load: Ray has replicas report for that only from their
    start on.
    """
    arguments = _replica_arguments(model, config)
    models = [model]
    if config.topology == "ingress":
        arguments, models = replace(config, replicas=None, cluster=ClusterConfig()), config.models
    made = repr((arguments, config.replicas.num_replicas is None))
    digest = hashlib.sha256(made.encode())
    sources = [source_of(model.target, model.folder) for model in models]
    for place in filter(None, (Path(__file__).parent, *sources)):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
