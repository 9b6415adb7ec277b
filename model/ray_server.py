"""AlexNet behind KServe, in Ray Serve replicas: `python -m model.ray_server --help`"""

from ray import serve

from model import options
from model.cluster import Cluster
from model.front import StrictModelServer
from model.replicated import Replica, ReplicatedModel


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options.ray_options()
    print(options.listed(args), flush=True)
    with Cluster.of(args) as cluster:
        replica = serve.deployment(Replica).options(**cluster.deployment_options(args))
        model_args = args.model_name, args.weights, args.device, args.threads
        app = replica.bind("model.alexnet:AlexNetModel", *model_args)
        handle = serve.run(app, **cluster.application_options(args))
        model = ReplicatedModel(args.model_name, handle, args.request_timeout_s)
        model.load()
        StrictModelServer(args).start([model])


if __name__ == "__main__":
    options.run(main)
