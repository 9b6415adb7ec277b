"""The published way, to compare with: KServe's own RayModel before a deployment of the model.

`python -m model.bench.stock_server`, with the options of model.ray_server.
"""

import math

from kserve.ray import RayModel
from ray import serve

from model import options
from model.alexnet import AlexNetModel
from model.application import application_options
from model.cluster import Cluster
from model.front import StrictModelServer
from model.gate import gate


class Loaded(AlexNetModel):
    """A model that loads as it is made, in each replica."""

    def __init__(self, **made_with) -> None:
        super().__init__(**made_with)
        self.load()


def main() -> None:
    """Serve until SIGTERM or Ctrl-C.

    RayModel and the deployment's settings are the published ones; the model, the HTTP server
    around them and Ray's start are ours. One setting is not the default: a replica takes as many
    requests as ours. With Ray's five, throughput falls as clients are added: another story.
    """
    args = options.ray_options()
    with Cluster.of(args):
        deployment = serve.deployment(Loaded).options(
            num_replicas=args.num_replicas,
            max_ongoing_requests=args.max_ongoing_requests,
            ray_actor_options={"num_cpus": args.cpus_per_replica},
        )
        handle = serve.run(deployment.bind(**options.of_model(args)), **application_options(args))
        model = RayModel(args.model_name, handle)
        model.load()
        server = StrictModelServer(args)
        gate.limit = math.inf
        server.start([model])


if __name__ == "__main__":
    options.run(main)
