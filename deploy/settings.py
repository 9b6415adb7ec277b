"""The settings that all manifests are made from, and the numbers that follow from them."""

import math
from dataclasses import dataclass, field

MODEL = "custom-model"  # the model's name in requests, and what the names of all objects begin with
HTTP, GRPC = 8080, 8081
# Measured: cores that KServe's process and Ray's own take, GB that both take without a replica.
FRONT_CPU, RAY_CPU, BASE_MEMORY = 0.5, 0.25, 1.0
HEADROOM = 1.5  # memory over what was measured at rest: overload took a quarter more, and it grows
PRESTOP_S = 5


def _setting(default: object, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """What the manifests are made from; each is an option of `python -m deploy.manifests`."""

    namespace: str = _setting("default", "of everything")
    image: str = _setting("parallel-inference:0.1.0", "made by deploy/Dockerfile")
    replicas: int = _setting(2, "of the model in each pod that has any")
    cpus: float = _setting(1.0, "cores that each replica reserves")
    gpus: int = _setting(0, "GPUs that the replicas of a pod share; 0: they run on the CPU")
    memory: float = _setting(0.5, "GB that each replica takes")
    min_pods: int = _setting(1, "of each InferenceService; with Ray, each is a cluster of its own")
    max_pods: int = _setting(3, "of each InferenceService")
    workers: int = _setting(2, "pods with replicas in the RayService")
    max_workers: int = _setting(3, "how many the RayService's autoscaler may make of them")
    fronts: int = _setting(2, "pods with KServe in the RayService")
    request_timeout: int = _setting(60, "seconds, as --request_timeout_s of the servers")
    gateway_namespace: str = _setting("envoy-gateway-system", "where the ingress gateway runs")
    operator_namespace: str = _setting("ray-system", "where KubeRay's operator runs")

    def cpu(self, replicas: int, *others: float) -> float:
        """The CPU limit of a container with so many replicas and what else runs in it.

        Two replicas of one core, KServe (0.5) and Ray (0.25) make 2.75. The servers count whole
        cores only, so those must be enough for the replicas by themselves.
        """
        taken = replicas * self.cpus
        return max(taken + sum(others), math.ceil(taken))

    def memory_gb(self, replicas: int) -> float:
        """The memory limit: 0.5 GB for each replica and 1 GB for the rest, and half again.

        What lies in /dev/shm is counted by Kubernetes as the container's memory, too.
        """
        return HEADROOM * (replicas * self.memory + BASE_MEMORY)

    def options(self) -> dict[str, object]:
        """Options of `model.ray_server` and of the application, for the replicas of a pod."""
        device = {"device": "cpu"}
        if self.gpus:
            device = {"device": "cuda", "gpus_per_replica": self.gpus / self.replicas}
        timeout = {"request_timeout_s": self.request_timeout}
        return {"cpus_per_replica": self.cpus} | device | timeout
