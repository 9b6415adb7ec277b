"""The model as KServe's InferenceService: in the server's own process, or in Ray replicas."""

from kserve import V1beta1InferenceService, V1beta1InferenceServiceSpec, V1beta1PredictorSpec
from kubernetes.client import V1Container

from deploy import pods
from deploy.settings import FRONT_CPU, MODEL, RAY_CPU, Settings


def without_ray(settings: Settings) -> dict:
    """One process that holds one model, with as many threads as there would be replicas."""
    device = "cuda" if settings.gpus else "cpu"
    threads = max(1, int(settings.replicas * settings.cpus))
    cpu = settings.cpu(settings.replicas, FRONT_CPU)
    container = pods.server(
        "kserve-container",
        settings,
        startup_s=120,
        command=pods.command(
            "model.kserve_server", device=device, batching="server", threads=threads
        ),
        env=pods.env(),
        resources=pods.resources(cpu, settings.memory_gb(1), settings.gpus),
    )
    return _service(f"{MODEL}-plain", container, settings)


def with_ray(settings: Settings) -> dict:
    """A pod that is a whole Ray cluster: KServe's process, Ray's own, and the replicas."""
    options = {"num_replicas": settings.replicas} | settings.options()
    cpu = settings.cpu(settings.replicas, FRONT_CPU, RAY_CPU)
    container = pods.server(
        "kserve-container",
        settings,
        startup_s=180,
        command=pods.command("model.ray_server", **options),
        env=pods.env(),
        resources=pods.resources(cpu, settings.memory_gb(settings.replicas), settings.gpus),
    )
    return _service(f"{MODEL}-ray", container, settings)


def _service(name: str, container: V1Container, settings: Settings) -> dict:
    """KServe makes a Deployment, a Service and an autoscaler of it, and needs no Knative.

    A container of this name replaces the server that KServe would choose by the model's format.
    """
    annotations = {"deploymentMode": "Standard", "autoscalerClass": "hpa"}
    predictor = V1beta1PredictorSpec(
        labels=pods.labels("server"),
        min_replicas=settings.min_pods,
        max_replicas=settings.max_pods,
        scale_metric="cpu",
        scale_target=80,
        containers=[container],
        # As process 1 a server that starts would not be ended by SIGTERM, but 90 seconds later.
        share_process_namespace=True,
        **pods.pod(settings),
    )
    return pods.plain(
        V1beta1InferenceService(
            api_version="serving.kserve.io/v1beta1",
            kind="InferenceService",
            metadata=pods.metadata(
                name,
                settings,
                annotations={f"serving.kserve.io/{k}": v for k, v in annotations.items()},
            ),
            spec=V1beta1InferenceServiceSpec(predictor=predictor),
        )
    )
