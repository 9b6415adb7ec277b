"""KServe in front of replicas that run already: `python -m model.front_server --help`"""

from ray import serve
from ray.serve.exceptions import RayServeException

from model import CannotStart, options
from model.batcher import gathered
from model.cluster import Cluster
from model.front import StrictModelServer
from model.replicated import ReplicatedModel


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; the application stays, so several may stand before it.

    It runs on a node of the Ray cluster. Give the options that the application was deployed with:
    `--batching` and `--max_replicas` count here too.
    """
    args = options.ray_options(command="front_server")
    print(options.listed(args), flush=True)
    with Cluster(address=args.address, node=args.node_address):
        try:
            handle = serve.get_app_handle(args.model_name)
        except RayServeException:
            raise CannotStart(
                f"no application {args.model_name!r} runs on the Ray cluster at {args.address}: "
                "deploy it first, or name another by --model_name"
            ) from None
        model = ReplicatedModel(args.model_name, handle, **options.limits(args))
        model.load()
        StrictModelServer(args).start([gathered(model, args)])


if __name__ == "__main__":
    options.run(main)
