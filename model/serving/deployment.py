"""The applications that Ray Serve runs for us: replicas of a model, as the options say."""

import base64
import hashlib
import pickle
import re
import time
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from model.serving.config import (
    APPLICATION,
    CannotStart,
    ClusterConfig,
    EndpointConfig,
    ModelConfig,
    ServerConfig,
)
from model.serving.model_class import source_of
from model.serving.replica import Replica
from model.serving.upstream_ray import versioned

UNLIMITED = 100_000
STARTING = ("NOT_STARTED", "DEPLOYING")
QUIET_S = 30  # a start that takes no longer needs no comment
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
    [first, *_] = plan(config)
    return bind(first, config)


@dataclass(frozen=True)
class Planned:
    """An application that Ray Serve is to run: a deployment with replicas of one kind."""

    name: str
    route_prefix: str  # at Ray Serve's own proxy
    models: tuple[ModelConfig, ...]  # that each replica loads
    replica: type
    arguments: tuple  # of the replica's class: who deploys the same again keeps its replicas
    options: dict[str, Any]  # of the deployment, besides those of every one
    scaling: dict[str, Any]  # and of its autoscaling


def plan(config: ServerConfig) -> list[Planned]:
    """What Ray Serve is to run as the configuration says."""
    if config.topology == "ingress":
        return [_of_all_models(config)]
    return [_of_one_model(model, config) for model in config.models]


def _of_one_model(model: ModelConfig, config: ServerConfig) -> Planned:
    """Its replicas get batches from KServe in front, or gather them themselves."""
    options: dict[str, Any] = {"max_ongoing_requests": config.replicas.max_ongoing_requests}
    scaling = {}
    if config.batching.where == "frontend":
        router = "model.serving.routing:AssignedReplicaRouter"
        options["request_router_config"] = RequestRouterConfig(request_router_class=router)
        scaling = {"policy": {"policy_function": "model.serving.routing:scale_by_backlog"}}
    arguments = model, config.threads, config.batching, config.limits.watchdog_timeout_s
    return Planned(model.name, f"/{model.name}", (model,), Replica, arguments, options, scaling)


def _of_all_models(config: ServerConfig) -> Planned:
    """Its replicas have KServe around the models, and the limits that KServe in front has."""
    from model.serving.ingress import IngressReplica  # Ray reads its variables as it is imported

    own = replace(config, replicas=None, endpoint=EndpointConfig(), cluster=ClusterConfig())
    # A replica that ends answers what it has; HAProxy sends it no more.
    longest_s = config.limits.request_timeout_s
    options = {"max_ongoing_requests": UNLIMITED, "graceful_shutdown_timeout_s": longest_s}
    return Planned(APPLICATION, "/", config.models, IngressReplica, (own,), options, {})


@dataclass(frozen=True)
class State:
    """Of an application's replicas, besides its configuration."""

    reload_at: float = 0.0  # a moment: a later one than before has them load their models again
    draining: bool = False  # those with KServe in them say that they are not ready, and go on
    # Of the replicas, where those that run with it are to stay though files have changed; None:
    # that of the files.
    version: str | None = None
    # Names of models: where one of several cannot be loaded, a new replica does not start.
    required: tuple[str, ...] = ()
    deployed_at: float = 0.0  # another one, and Ray no longer counts what failed before


def deploy(
    config: ServerConfig,
    state: State = State(),
    only: Container[str] | None = None,
    wait: bool = True,
) -> dict[str, DeploymentHandle | CannotStart]:
    """Have Ray Serve run the models of the configuration, and wait until it does.

    only: the names of some applications; None: all. Returns for each name the handle of its
    replicas, or why there are none; the others run. wait: without it nothing is waited for, and
    nothing returned.
    """
    chosen = [each for each in plan(config) if only is None or each.name in only]
    targets = [
        serve.RunTarget(
            bind(each, config, state),
            name=each.name,
            route_prefix=each.route_prefix,
            external_scaler_enabled=config.replicas.num_replicas is not None,
        )
        for each in chosen
    ]
    serve.run_many(
        targets,
        wait_for_ingress_deployment_creation=wait,
        wait_for_applications_running=False,  # it would, without a word, for ever
    )
    return {each.name: _outcome(each.name) for each in chosen if wait}


def _outcome(name: str) -> DeploymentHandle | CannotStart:
    """The handle of an application once it runs, or why it does not.

    What Ray says of one that takes long (there may be no CPU for a replica) is printed.
    """
    told, quiet_until = "", time.monotonic() + QUIET_S
    while (found := serve.status().applications[name]).status in STARTING:
        said = "; ".join(each.message for each in found.deployments.values() if each.message)
        if said != told and time.monotonic() > quiet_until:
            print(f"{name}: {said}", flush=True)
            told = said
        time.sleep(0.1)
    if found.status == "RUNNING":
        return serve.get_app_handle(name)
    return CannotStart(_why_not(name))


def is_starting(name: str) -> bool:
    """Whether Ray Serve is not yet done with what it was told last of an application."""
    found = serve.status().applications.get(name)
    return found is not None and found.status in STARTING


def running(name: str) -> int:
    """How many replicas of an application run."""
    found = serve.status().applications.get(name)
    deployments = found.deployments.values() if found else ()
    return sum(each.replica_states.get("RUNNING", 0) for each in deployments)


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


def bind(planned: Planned, config: ServerConfig, state: State = State()) -> serve.Application:
    """The application itself, for `serve.run`."""
    options = deployment_options(planned, config, state)
    return serve.deployment(planned.replica).options(**options).bind(*planned.arguments)


def deployment_options(
    planned: Planned, config: ServerConfig, state: State = State()
) -> dict[str, Any]:
    """The configuration as the options of one of Ray Serve's deployments."""
    replicas, log = config.replicas, config.application
    gpus = replicas.gpus
    if gpus is None:
        total = ray.cluster_resources().get("GPU", 0)
        share = total / (replicas.max_replicas * len(config.applications))
        gpus = 1 if share >= 1 else int(share * 100) / 100
    version = state.version or _version(planned, config)
    told = {
        "reload_at": state.reload_at,
        "draining": state.draining,
        "required": list(state.required),
        "deployed": _as_text(Deployed(config, replace(state, version=version))),
    }
    level = "INFO" if log.access_log else "WARNING"
    options: dict[str, Any] = {
        "num_replicas": replicas.num_replicas,
        "max_replicas_per_node": replicas.max_replicas_per_node,
        "max_queued_requests": -1,  # admission control bounds the queue; Ray's would reject bursts
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": gpus},
        "health_check_period_s": 0.5,  # so readiness is true to within a second
        "health_check_timeout_s": 3,  # the event loop of a replica is always free
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": config.limits.per_attempt_timeout_s,
        "max_constructor_retry_count": 1,  # what fails to load fails again
        "user_config": told,
        "logging_config": {"enable_access_log": log.access_log, "log_level": level},
        **versioned(version),
        **planned.options,
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
            **planned.scaling,
        }
    return options


@dataclass(frozen=True)
class Deployed:
    """How an application was deployed."""

    config: ServerConfig
    state: State  # with its version


def _as_text(deployed: Deployed) -> str:
    """So that replicas can say how they were deployed; Ray takes what is JSON."""
    return base64.b64encode(pickle.dumps(deployed)).decode()


def deployed(handle: DeploymentHandle, timeout_s: float = 20) -> Deployed | None:
    """How an application was deployed last; None where none of its replicas says it in time."""
    try:
        text = handle.deployed.remote().result(timeout_s=timeout_s)
    except TimeoutError:
        return None
    found = pickle.loads(base64.b64decode(text)) if text else None
    return found if isinstance(found, Deployed) else None


def deploy_again(name: str, old: Deployed | None) -> None:
    """Have an application run as it did before. Raises CannotStart where that cannot be."""
    if old is None:
        raise CannotStart("how it was deployed before is not known")
    [planned] = [each for each in plan(old.config) if each.name == name]
    if _version(planned, old.config) == old.state.version:
        again = deploy(old.config, old.state, only=[name])[name]
        if isinstance(again, Exception):
            raise CannotStart("its old version cannot be deployed again")
        return
    # A replica that is to start again fails for as long as the files are as they are: Ray goes on
    # trying while others run.
    deploy(old.config, old.state, only=[name], wait=False)
    rest = "its old replicas go on, but" if running(name) else "none of its replicas runs:"
    raise CannotStart(
        f"{rest} its files have changed since it was deployed, and a replica that starts reads "
        "them as they are now: put them back, or mend them, and redeploy"
    )


def _version(planned: Planned, config: ServerConfig) -> str:
    """Of a replica: another when it is made otherwise, or its code or the models' is.

    And when the number is to follow the load: Ray has replicas report for that only from their
    start on.
    """
    made = repr((planned.arguments, config.replicas.num_replicas is None))
    digest = hashlib.sha256(made.encode())
    sources = [source_of(model.target, model.folder) for model in planned.models]
    for place in filter(None, (Path(__file__).parent, *sources)):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
