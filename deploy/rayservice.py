"""One Ray cluster over many pods: KubeRay's RayService, with KServe in front and Redis behind.

The head has no replicas and may be lost: what it knows is in Redis, and replicas and fronts wait
for the next one without starting anew. KServe runs in pods of its own that are nodes of the
cluster too, as a Ray driver must be on one.
"""

import math

import yaml
from kubernetes.client import (
    V1Container,
    V1ContainerPort,
    V1EnvVar,
    V1LabelSelector,
    V1PodDisruptionBudget,
    V1PodDisruptionBudgetSpec,
    V1ServicePort,
    V1VolumeMount,
)
from ray import __version__ as ray_version

from deploy import pods, redis
from deploy.settings import FRONT_CPU, GRPC, HTTP, MODEL, RAY_CPU, Settings
from model import SHARED
from model.cluster import KEEP_MEMORY, OBJECT_STORE_BYTES, PROMPT

# Without its head a driver gives up after a minute. KubeRay gives the nodes ten; so must the front.
PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
# The brackets keep grep from finding itself.
AFTER_THE_FRONT = "while grep -qs model[.]front_server /proc/[0-9]*/cmdline; do sleep 1; done"
METRICS = 8090  # of Ray's node beside KServe; KubeRay would take 8080, which is KServe's
LEAN = {"RAY_USAGE_STATS_ENABLED": "0"}


def _node(name: str, settings: Settings, cpu: float, gb: float, gpus: int = 0) -> V1Container:
    """A container that is a node of the Ray cluster; KubeRay writes its `ray start`.

    With probes of our own: KubeRay's would wait for Serve's HTTP proxy, which nobody needs here.
    """
    healthy = dict(path="/api/healthz", port=52365, period=5)
    return pods.container(
        name,
        settings,
        env=pods.env(**{SHARED: "/tmp"}, **LEAN, **KEEP_MEMORY, **PROMPT),
        resources=pods.resources(cpu, gb, gpus),
        startup_probe=pods.probe(**healthy, failures=36),
        readiness_probe=pods.probe(**healthy, failures=3),
        liveness_probe=pods.probe(**healthy, failures=12),
    )


def _head(settings: Settings) -> dict:
    """The head: no CPUs for replicas; the dashboard takes the configuration from KubeRay.

    No port is named: KubeRay's defaults have all that it makes Services of. Its autoscaler calls
    Kubernetes' API, with the account that KubeRay makes for it.
    """
    node = _node("ray-head", settings, cpu=1, gb=2)
    return {
        "rayStartParams": {
            "num-cpus": "0",
            "dashboard-host": "0.0.0.0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": pods.template("head", settings, [node], automount_service_account_token=None),
    }


def _workers(settings: Settings) -> dict:
    """The pods with replicas. Ray is told their CPUs, or it would count its own share as well."""
    cpu = settings.cpu(settings.replicas, RAY_CPU)
    node = _node("ray-worker", settings, cpu, settings.memory_gb(settings.replicas), settings.gpus)
    params = {
        "num-cpus": str(math.ceil(settings.replicas * settings.cpus)),
        "object-store-memory": str(OBJECT_STORE_BYTES),
    }
    if settings.gpus:
        params["num-gpus"] = str(settings.gpus)
    return {
        "groupName": "replicas",
        "replicas": settings.workers,
        "minReplicas": settings.workers,
        "maxReplicas": settings.max_workers,
        "rayStartParams": params,
        "template": pods.template(
            "worker", settings, [node], topology_spread_constraints=pods.apart("worker")
        ),
    }


def _fronts(settings: Settings) -> dict:
    """The pods with KServe: a Ray node without CPUs, and the server that is a driver on it.

    They share processes, /tmp and /dev/shm, as Ray knows a driver by its pid and its sockets. The
    node ends after the server, or the requests that the server still answers would be lost.
    """
    node = _node("ray-worker", settings, cpu=2 * RAY_CPU, gb=1)
    node.ports = [V1ContainerPort(name="metrics", container_port=METRICS)]
    node.lifecycle = pods.before_the_end("sh", "-c", AFTER_THE_FRONT)
    front = pods.server(
        "kserve-front",
        settings,
        startup_s=600,
        command=pods.command(
            "model.front_server",
            address="auto",
            num_replicas=settings.replicas * settings.max_workers,
            request_timeout_s=settings.request_timeout,
        ),
        env=pods.env(
            V1EnvVar(name="RAY_AUTH_MODE", value="token"),
            V1EnvVar(name="RAY_AUTH_TOKEN", value_from=pods.secret("auth_token")),
            **KEEP_MEMORY,
            **PROMPT,
            **PATIENT,
        ),
        resources=pods.resources(2 * FRONT_CPU, settings.memory_gb(0)),
    )
    return {
        "groupName": "front",
        "replicas": settings.fronts,
        "minReplicas": settings.fronts,
        "maxReplicas": settings.fronts,
        "rayStartParams": {
            "num-cpus": "0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
            "metrics-export-port": str(METRICS),
        },
        "template": pods.template(
            "front",
            settings,
            [node, front],
            share_process_namespace=True,
            topology_spread_constraints=pods.apart("front"),
        ),
    }


def _application(settings: Settings) -> dict:
    """What Serve runs; its args are options of `model.ray_server` without their dashes."""
    replicas = {"num_replicas": settings.workers * settings.replicas}
    replicas |= {"max_replicas_per_node": settings.replicas}
    return {
        "name": MODEL,
        "route_prefix": f"/{MODEL}",
        "import_path": "model.application:application",
        "args": replicas | settings.options(),
    }


def service(settings: Settings) -> dict:
    """The RayService. KubeRay 1.6 or newer: before, the token's Secret could not be named.

    The autoscaler is version 1, since KubeRay never restarts a container of a pod beside version 2,
    and a front that ended would stay so.
    """
    tmp = V1VolumeMount(name="tmp", mount_path="/tmp")
    cluster = {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token", "secretName": pods.SECRET},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v1",
            "env": pods.env(),
            "securityContext": pods.locked(),
            "volumeMounts": [tmp],
        },
        "gcsFaultToleranceOptions": {
            "redisAddress": f"{redis.NAME}:6379",
            "redisPassword": {"valueFrom": pods.secret("redis_password")},
        },
        "headGroupSpec": _head(settings),
        "workerGroupSpecs": [_workers(settings), _fronts(settings)],
    }
    serve = {"proxy_location": "Disabled", "applications": [_application(settings)]}
    return pods.plain(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": pods.metadata(MODEL, settings),
            "spec": {
                "excludeHeadPodFromServeSvc": True,
                "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
                "rayClusterConfig": cluster,
            },
        }
    )


def entrance(settings: Settings) -> dict:
    """The Service that clients call: port 80 for HTTP, 8081 for gRPC, of the front pods."""
    ports = [
        V1ServicePort(name="http", port=80, target_port=HTTP),
        V1ServicePort(name="grpc", port=GRPC, target_port=GRPC, app_protocol="kubernetes.io/h2c"),
    ]
    return pods.service(MODEL, "front", ports, settings)


def disruption(part: str, count: int, settings: Settings) -> dict:
    """Kubernetes may take one pod of a part at a time for work on its nodes.

    By the number that stays: Kubernetes counts a RayCluster's pods in no other way.
    """
    spec = V1PodDisruptionBudgetSpec(
        min_available=count - 1, selector=V1LabelSelector(match_labels=pods.labels(part))
    )
    return pods.plain(
        V1PodDisruptionBudget(
            api_version="policy/v1",
            kind="PodDisruptionBudget",
            metadata=pods.metadata(f"{MODEL}-{part}", settings),
            spec=spec,
        )
    )


def documents(settings: Settings) -> list[dict]:
    """All that the RayService needs, but for the Secret."""
    return [
        *redis.documents(settings),
        service(settings),
        entrance(settings),
        disruption("front", settings.fronts, settings),
        disruption("worker", settings.workers, settings),
    ]
