"""The same model in two Ray Serve replicas, KServe in front: `python -m model.basics.ray_server`"""

import argparse

# Step 1, import: Ray Serve, and the KServe model that hands each request on to it.
import ray
from kserve import ModelServer, model_server
from kserve.ray import RayModel
from ray import serve

from model.basics.kserve_server import AlexNetModel


# Step 2, deployment: how many replicas, what each reserves, how many requests it takes at a time.
@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=5)
class Replica(AlexNetModel):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.load()  # Ray runs the constructor in each replica; RayModel.load reaches only one


def main(deployment: serve.Deployment = Replica, num_cpus: int = 2) -> None:
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    parser.set_defaults(model_name="custom-model")
    args, _ = parser.parse_known_args()
    # Step 3, start: a Ray cluster in this machine, the replicas, then KServe in front of them.
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False)
    serve.start(proxy_location="Disabled")  # clients come to KServe, not to Serve's own proxy
    handle = serve.run(deployment.bind(args.model_name))
    model = RayModel(args.model_name, handle)
    model.load()
    ModelServer().start([model])


if __name__ == "__main__":
    main()
