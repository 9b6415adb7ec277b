"""KServe in front of Tiny's replicas, through RayModel and ReplicatedModel side by side."""

from kserve.ray import RayModel
from ray import serve

from model import options
from model.cluster import Cluster
from model.front import StrictModelServer
from model.replicated import ReplicatedModel


def main() -> None:
    """Join the cluster of the tests and serve its applications until SIGTERM."""
    args = options.ray_options()
    with Cluster(address=args.address):
        handles = {app: serve.get_app_handle(app) for app in ("steady", "mortal", "narrow")}
        models = [ReplicatedModel("hurried-narrow", handles["narrow"], timeout_s=0.5)]
        limits = {"timeout_s": 12, "attempt_s": 12}
        models += [ReplicatedModel(f"mended-{app}", h, **limits) for app, h in handles.items()]
        models += [RayModel(f"stock-{app}", handle) for app, handle in handles.items()]
        for model in models:
            model.load()
        StrictModelServer(args).start(models)


if __name__ == "__main__":
    main()
