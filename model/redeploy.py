"""Changes a running Ray server without a pause: `python -m model.redeploy --help`"""

import time

from ray import serve

from model import CannotStart, options
from model.application import application_options, deployment_options
from model.cluster import Cluster
from model.replica import Replica


def main() -> None:
    """Deploy the model of a running server anew, with these options, and wait until it is done.

    Give all options that the replicas are to have: what is left out returns to its default. Ray
    Serve changes what differs: another number of replicas is started or drained; replicas that
    are to be made otherwise are replaced in turn, each new one before the next old one goes;
    `--reload` has each load its weights again. The server in front goes on. Its own options are
    as it was started: `--batching`, the limits, the ports.
    """
    args = options.ray_options(command="redeploy")
    with Cluster(address=args.address):
        if args.model_name not in serve.status().applications:
            raise CannotStart(
                f"no server runs {args.model_name!r} on the cluster at {args.address}"
            )
        deployment = deployment_options(args)
        if args.reload:
            deployment["user_config"] = {"loaded": time.time()}
        replica = serve.deployment(Replica).options(**deployment)
        app = replica.bind("model.alexnet:AlexNetModel", **options.of_replica(args))
        serve.run(app, **application_options(args))
    print(f"{args.model_name}: {options.described(args)}", flush=True)


if __name__ == "__main__":
    options.run(main)
