"""Redis in one pod: what the head of the Ray cluster knows, for the head that comes after it.

Its data is lost with the pod. Who must not lose it gives it a volume, or takes a Redis elsewhere.
"""

from kubernetes.client import (
    V1ContainerPort,
    V1Deployment,
    V1DeploymentSpec,
    V1DeploymentStrategy,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1LabelSelector,
    V1ServicePort,
    V1Volume,
    V1VolumeMount,
)

from deploy import pods
from deploy.settings import MODEL, Settings

NAME = f"{MODEL}-redis"


def documents(settings: Settings) -> list[dict]:
    """The Deployment and the Service."""
    security = pods.locked()
    security.run_as_user = 999  # the image's own
    container = pods.container(
        "redis",
        settings,
        args=["--requirepass", "$(REDIS_PASSWORD)", "--appendonly", "yes"],
        env=[V1EnvVar(name="REDIS_PASSWORD", value_from=pods.secret("redis_password"))],
        ports=[V1ContainerPort(name="redis", container_port=6379)],
        resources=pods.resources(0.25, 0.25),
    )
    container.image, container.security_context = "redis:7.2-alpine", security
    container.volume_mounts = [V1VolumeMount(name="data", mount_path="/data")]
    data = V1Volume(name="data", empty_dir=V1EmptyDirVolumeSource(size_limit="1Gi"))
    template = pods.template("redis", settings, [container], volumes=[data])
    template.spec.security_context.run_as_user = 999
    deployment = V1Deployment(
        api_version="apps/v1",
        kind="Deployment",
        metadata=pods.metadata(NAME, settings),
        spec=V1DeploymentSpec(
            replicas=1,
            strategy=V1DeploymentStrategy(type="Recreate"),
            selector=V1LabelSelector(match_labels=pods.labels("redis")),
            template=template,
        ),
    )
    ports = [V1ServicePort(name="redis", port=6379, target_port=6379)]
    return [
        pods.plain(deployment),
        pods.service(NAME, "redis", ports, settings),
    ]
