"""AlexNet behind KServe, in Ray Serve replicas: `python -m model.ray_server --help`"""

from ray import serve

from model import options
from model.cluster import Cluster
from model.front import Server
from model.replicated import Replica, ReplicatedModel


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options.ray_options()
    print(options.listed(args), flush=True)
    with Cluster.of(args) as cluster:
        deployment = serve.deployment(Replica).options(**cluster.deployment_options(args))
        app = deployment.bind(
            "model.alexnet:AlexNetModel", args.model_name, args.weights, args.device, args.threads
        )
        handle = serve.run(
            app,
            name=args.model_name,
            route_prefix=f"/{args.model_name}",
            external_scaler_enabled=True,
        )
        model = ReplicatedModel(args.model_name, handle, args.request_timeout_s)
        model.load()
        Server(args).start([model])


if __name__ == "__main__":
    main()
