"""KServe in front of tiny replicas, through RayModel and ReplicaPool side by side."""

from kserve.ray import RayModel
from ray import serve

from model.serving.batched_model import BatchedModel
from model.serving.cli import server_config
from model.serving.config import BatchingConfig, LimitsConfig
from model.serving.ray_cluster import Cluster
from model.serving.replica_pool import ReplicaPool
from model.serving.server import serve_models

APPLICATIONS = ("steady", "mortal", "narrow", "busy")
OURS = LimitsConfig(request_timeout_s=12, per_attempt_timeout_s=12)
LIMITS = {  # of more models: the application, and its limits
    "hurried-narrow": ("narrow", LimitsConfig(request_timeout_s=0.5, per_attempt_timeout_s=5)),
    "retried-busy": ("busy", LimitsConfig(request_timeout_s=20, per_attempt_timeout_s=0.4)),
}
NO_BATCHES = BatchingConfig("off")


class Stock(RayModel):
    """RayModel, which says nothing of whether it could be loaded."""

    failure = None

    def load(self) -> bool:
        """As RayModel does it."""
        super().load()
        return True


def main() -> None:
    """Join the cluster of the tests and serve its applications until SIGTERM."""
    config = server_config()
    with Cluster(config.cluster):
        handles = {name: serve.get_app_handle(name) for name in APPLICATIONS}
        limits = {f"mended-{name}": (name, OURS) for name in APPLICATIONS} | LIMITS
        models = [
            BatchedModel(
                name, ReplicaPool(name, handles[app], own), NO_BATCHES, own.request_timeout_s
            )
            for name, (app, own) in limits.items()
        ]
        models += [Stock(f"stock-{name}", handle) for name, handle in handles.items()]
        serve_models(models, config)


if __name__ == "__main__":
    main()
