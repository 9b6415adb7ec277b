"""AlexNet behind KServe, in Ray Serve replicas: `python -m model.ray_server --help`"""

from ray import serve

from model import options
from model.application import application_options, deployment_options
from model.batcher import gathered
from model.cluster import Cluster
from model.front import StrictModelServer
from model.replica import Replica
from model.replicated import ReplicatedModel


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options.ray_options()
    print(options.listed(args), flush=True)
    with Cluster.of(args):
        replica = serve.deployment(Replica).options(**deployment_options(args))
        app = replica.bind("model.alexnet:AlexNetModel", **options.of_replica(args))
        handle = serve.run(app, **application_options(args))
        model = ReplicatedModel(args.model_name, handle, **options.limits(args))
        model.load()
        StrictModelServer(args).start([gathered(model, args)])


if __name__ == "__main__":
    options.run(main)
