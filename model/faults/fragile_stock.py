"""FragileModel in Ray Serve replicas, in KServe's and Ray's own API; see model/basics.

`python -m model.faults.fragile_stock --num_replicas 4`, and KServe's own arguments.
"""

import argparse

import ray
from kserve import ModelServer, model_server
from kserve.ray import RayModel
from ray import serve

from model.faults.fragile import FragileModel


class Replica(FragileModel):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.load()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    parser.add_argument("--num_replicas", type=int)
    count = parser.parse_args().num_replicas
    ray.init(address="local", num_cpus=count, include_dashboard=False)
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(Replica).options(num_replicas=count, max_ongoing_requests=64)
    model = RayModel("custom-model", serve.run(deployment.bind("custom-model")))
    model.load()
    ModelServer().start([model])
