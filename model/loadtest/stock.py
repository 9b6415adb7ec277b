"""model.basics.ray_server with other values: `python -m model.loadtest.stock --num_replicas 1`.

It takes KServe's own arguments too. What is not given is as it is there.
"""

import argparse
import math

from kserve import model_server

from model.basics import ray_server


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if something is wrong."""
    stock = ray_server.Replica
    parser = argparse.ArgumentParser(
        prog="python -m model.loadtest.stock",
        description="RayModel in front of replicas, as in model.basics, with other values.",
        parents=[model_server.parser],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--num_replicas", type=int, default=stock.num_replicas)
    parser.add_argument(
        "--cpus_per_replica",
        type=float,
        default=stock.ray_actor_options["num_cpus"],
        help="that it reserves",
    )
    parser.add_argument(
        "--max_ongoing_requests",
        type=int,
        default=stock.max_ongoing_requests,
        help="that a replica takes at a time",
    )
    return parser.parse_args(argv)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options()
    deployment = ray_server.Replica.options(
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.cpus_per_replica},
        max_ongoing_requests=args.max_ongoing_requests,
    )
    ray_server.main(deployment, math.ceil(args.num_replicas * args.cpus_per_replica))


if __name__ == "__main__":
    main()
