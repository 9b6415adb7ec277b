"""AlexNet behind KServe, in Ray Serve replicas: `python -m model.ray_server --help`"""

from model import options
from model.alexnet import AlexNetModel
from model.cluster import Cluster, serve
from model.front import Server
from model.replicated import ReplicatedModel


@serve.deployment
class Replica(AlexNetModel):
    """A copy of the model in a process of its own, which Ray starts: so it loads itself."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.load()


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options.ray_options()
    print(options.listed(args), flush=True)
    with Cluster.of(args):
        replicas = Replica.options(**options.deployment(args))
        app = replicas.bind(args.model_name, args.weights, args.device, args.threads)
        handle = serve.run(app, name=args.model_name, route_prefix=f"/{args.model_name}")
        model = ReplicatedModel(args.model_name, handle, args.request_timeout_s)
        model.load()
        Server(args).start([model])


if __name__ == "__main__":
    main()
