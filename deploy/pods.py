"""What the pods of all manifests have in common: security, volumes, probes, names."""

from kubernetes.client import (
    V1Capabilities,
    V1Container,
    V1ContainerPort,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1EnvVarSource,
    V1ExecAction,
    V1HTTPGetAction,
    V1LabelSelector,
    V1Lifecycle,
    V1LifecycleHandler,
    V1ObjectMeta,
    V1PodSecurityContext,
    V1PodSpec,
    V1PodTemplateSpec,
    V1Probe,
    V1ResourceRequirements,
    V1SeccompProfile,
    V1SecretKeySelector,
    V1SecurityContext,
    V1Service,
    V1ServicePort,
    V1ServiceSpec,
    V1TopologySpreadConstraint,
    V1Volume,
    V1VolumeMount,
)

from deploy.settings import GRPC, HTTP, MODEL, PRESTOP_S, Settings

SECRET = f"{MODEL}-secret"  # made by hand, see README: auth_token for Ray, redis_password for Redis


def command(module: str, **options: object) -> list[str]:
    """The command line of a server; every address of the pod, as the kubelet must reach it."""
    words = [f"--{name}={value}" for name, value in options.items()]
    return ["python", "-m", module, "--host=0.0.0.0", *words]


def container(name: str, settings: Settings, **more: object) -> V1Container:
    """A container of our image that may do nothing beyond running the model.

    /tmp and /dev/shm are the only places it can write to.
    """
    mounts = [V1VolumeMount(name="tmp", mount_path="/tmp")]
    mounts.append(V1VolumeMount(name="shm", mount_path="/dev/shm"))
    return V1Container(
        name=name,
        image=settings.image,
        image_pull_policy="IfNotPresent",
        security_context=locked(),
        volume_mounts=mounts,
        **more,
    )


def server(name: str, settings: Settings, startup_s: int, **more: object) -> V1Container:
    """A container with a KServe server: its ports, its probes, and an end without lost requests.

    The wait before SIGTERM is for Kubernetes to take the pod out of the Service first.
    """
    return container(
        name,
        settings,
        ports=[
            V1ContainerPort(name="http1", container_port=HTTP, protocol="TCP"),
            V1ContainerPort(name="grpc", container_port=GRPC, protocol="TCP"),
        ],
        lifecycle=before_the_end("sleep", str(PRESTOP_S)),
        startup_probe=probe("/v2/health/live", period=2, failures=startup_s // 2),
        readiness_probe=probe(f"/v2/models/{MODEL}/ready", period=2, failures=2),
        liveness_probe=probe("/v2/health/live", period=10, failures=3),
        **more,
    )


def before_the_end(*command: str) -> V1Lifecycle:
    """What a container runs before it gets SIGTERM."""
    return V1Lifecycle(pre_stop=V1LifecycleHandler(_exec=V1ExecAction(command=[*command])))


def probe(path: str, period: int, failures: int, port: int = HTTP) -> V1Probe:
    """A GET every `period` seconds; it fails after `failures` of them in a row."""
    return V1Probe(
        http_get=V1HTTPGetAction(path=path, port=port, scheme="HTTP"),
        period_seconds=period,
        failure_threshold=failures,
        timeout_seconds=2,
    )


def resources(cpu: float, gb: float, gpus: int = 0) -> V1ResourceRequirements:
    """Requests equal to limits: what is promised is there, and the pod is evicted last."""
    amounts = {"cpu": f"{round(cpu * 1000)}m", "memory": f"{round(gb * 1024)}Mi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return V1ResourceRequirements(requests=amounts, limits=dict(amounts))


def env(*more: V1EnvVar, **values: str) -> list[V1EnvVar]:
    """Environment variables: a home that can be written to, and `values`."""
    return [V1EnvVar(name=k, value=v) for k, v in {"HOME": "/tmp", **values}.items()] + [*more]


def secret(key: str) -> V1EnvVarSource:
    """A value of the Secret, for an environment variable."""
    return V1EnvVarSource(secret_key_ref=V1SecretKeySelector(name=SECRET, key=key))


def locked() -> V1SecurityContext:
    """No root, no privileges, no writing to the image."""
    return V1SecurityContext(
        run_as_non_root=True,
        run_as_user=1000,
        read_only_root_filesystem=True,
        allow_privilege_escalation=False,
        capabilities=V1Capabilities(drop=["ALL"]),
        seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
    )


def pod(settings: Settings) -> dict:
    """The fields of a pod that has containers of ours, but for the containers.

    It has no access to Kubernetes' API, and time to answer what it has begun. Ray keeps its
    sockets, logs and sessions in /tmp, and its object store in /dev/shm.
    """
    return dict(
        automount_service_account_token=False,
        security_context=V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=1000,
            run_as_group=1000,
            fs_group=1000,
            seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
        ),
        termination_grace_period_seconds=settings.request_timeout + PRESTOP_S + 25,
        volumes=[
            V1Volume(name="tmp", empty_dir=V1EmptyDirVolumeSource(size_limit="2Gi")),
            V1Volume(
                name="shm", empty_dir=V1EmptyDirVolumeSource(medium="Memory", size_limit="512Mi")
            ),
        ],
    )


def template(part: str, settings: Settings, containers: list, **more: object) -> V1PodTemplateSpec:
    """What Kubernetes or KubeRay makes pods of a part from."""
    fields = pod(settings) | {"containers": containers} | more
    return V1PodTemplateSpec(metadata=V1ObjectMeta(labels=labels(part)), spec=V1PodSpec(**fields))


def apart(part: str) -> list[V1TopologySpreadConstraint]:
    """Pods of a part on different nodes, where there are enough."""
    return [
        V1TopologySpreadConstraint(
            max_skew=1,
            topology_key="kubernetes.io/hostname",
            when_unsatisfiable="ScheduleAnyway",
            label_selector=V1LabelSelector(match_labels=labels(part)),
        )
    ]


def labels(part: str | None = None) -> dict[str, str]:
    """The labels of our pods: server, front, head, worker or redis; without `part`, of all."""
    return {"model": MODEL} | ({"part": part} if part else {})


def metadata(name: str, settings: Settings, **more: object) -> V1ObjectMeta:
    """The name and the namespace of an object."""
    return V1ObjectMeta(name=name, namespace=settings.namespace, **more)


def service(name: str, part: str, ports: list[V1ServicePort], settings: Settings) -> dict:
    """A Service: one address for the pods of a part."""
    return plain(
        V1Service(
            api_version="v1",
            kind="Service",
            metadata=metadata(name, settings),
            spec=V1ServiceSpec(selector=labels(part), ports=ports),
        )
    )


def plain(thing: object) -> object:
    """Objects of the Kubernetes and the KServe SDK as what YAML shows, without what is not set."""
    if hasattr(thing, "attribute_map"):
        named = {name: getattr(thing, field) for field, name in thing.attribute_map.items()}
        return {name: plain(value) for name, value in named.items() if value is not None}
    if isinstance(thing, dict):
        return {name: plain(value) for name, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [plain(value) for value in thing]
    return thing
