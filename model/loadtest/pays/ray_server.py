"""TimedModel in two Ray Serve replicas, in KServe's and Ray's own API; see model/basics."""

import ray
from kserve import ModelServer
from kserve.ray import RayModel
from ray import serve

from model.loadtest.pays.timed_model import TimedModel

REPLICAS = 2


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=64)
class Replica(TimedModel):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.load()


if __name__ == "__main__":
    ray.init(address="local", num_cpus=REPLICAS, include_dashboard=False)
    serve.start(proxy_location="Disabled")
    model = RayModel("custom-model", serve.run(Replica.bind("custom-model")))
    model.load()
    ModelServer().start([model])
