"""One solution for each exercise; a test puts it in place of the stub and runs the check.

Where the exercise is a file, the function's body is the file.
"""

import time

from ray import serve


def scale_hello(replicas: int):
    """Notebook 1: the same class with other options; the name stays, so it is replaced."""
    small = Hello.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0.5})  # noqa: F821
    return serve.run(small.bind(), name="hello", route_prefix="/hello")


def sentiment() -> None:
    """Notebook 2: the file sentiment.py."""
    from kserve import Model, ModelServer
    from kserve.errors import InvalidInput

    WORDS = {"excellent": 1, "wonderful": 1, "beautiful": 1, "terrible": -1, "boring": -1}

    class SentimentModel(Model):
        def preprocess(self, payload: dict, headers: dict | None = None) -> list[str]:
            try:
                texts = [instance["text"] for instance in payload["instances"]]
            except (KeyError, TypeError):
                raise InvalidInput('send instances of {"text": "..."}') from None
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InvalidInput("send at least one instance; each text is a string")
            return texts

        def predict(self, texts: list[str], headers: dict | None = None) -> dict:
            scores = [sum(WORDS.get(word, 0) for word in text.split()) for text in texts]
            return {"predictions": [{"score": score} for score in scores]}

    if __name__ == "__main__":
        model = SentimentModel("custom-model")
        model.load()
        ModelServer().start([model])


def three_steps() -> None:
    """Notebook 3: the file my_server.py."""
    import ray
    from kserve import ModelServer
    from kserve.ray import RayModel
    from ray import serve
    from sentiment import SentimentModel

    @serve.deployment(num_replicas=2)
    class Replica(SentimentModel):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.load()

    if __name__ == "__main__":
        ray.init(address="local", num_cpus=2, include_dashboard=False)
        serve.start(proxy_location="Disabled")
        handle = serve.run(Replica.bind("custom-model"))
        model = RayModel("custom-model", handle)
        model.load()
        ModelServer().start([model])


def client(url: str, body: bytes, until: float) -> list[tuple[float, float]]:
    """Notebook 4: the next request is sent when the response to the last one is here."""
    import requests

    times = []
    with requests.Session() as session:
        while (sent := time.monotonic()) < until:
            session.post(url, data=body, headers={"Content-Type": "application/json"})
            times.append((sent, time.monotonic()))
    return times


def ongoing() -> None:
    """Notebook 4: the file my_server.py."""
    from model.basics import ray_server

    Mine = ray_server.Replica.options(max_ongoing_requests=16)

    if __name__ == "__main__":
        ray_server.main(Mine)


def waited(requests: list[tuple[float, float, float]]) -> float:
    """Notebook 4: from due to answered; when it was sent does not matter."""
    latencies = sorted(answered - due for due, _, answered in requests)
    return latencies[-(-95 * len(latencies) // 100) - 1]


def batches(waiting: int, free: int, largest: int) -> list[int]:
    """Notebook 5: each worker takes its even share of what is left."""
    found = []
    while waiting and free:
        found.append(min(largest, -(-waiting // free)))
        waiting, free = waiting - found[-1], free - 1
    return found


def low_latency(cores: int) -> list[str]:
    """Notebook 5: one replica gets all cores by default, and as many threads."""
    return ["--num_replicas", "1", "--batch_wait_ms", "0"]


def resilient() -> None:
    """Notebook 6: the file my_server.py."""
    import asyncio

    import ray
    from kserve import ModelServer
    from kserve.ray import RayModel
    from ray import serve
    from ray.exceptions import RayActorError

    from model.basics.ray_server import Replica

    class ResilientModel(RayModel):
        def __init__(self, name, handle):
            super().__init__(name, handle)
            self.handle = handle

        async def __call__(self, body, headers=None, verb=None):
            for _ in range(2):
                try:
                    return await self.handle.remote(body, headers=headers)
                except RayActorError:
                    pass
            return await self.handle.remote(body, headers=headers)

        async def healthy(self):
            try:
                return await asyncio.wait_for(self.handle.healthy.remote(), 2)
            except (TimeoutError, RayActorError):
                return False

    if __name__ == "__main__":
        ray.init(address="local", num_cpus=2, include_dashboard=False)
        serve.start(proxy_location="Disabled")
        handle = serve.run(Replica.options(max_ongoing_requests=64).bind("custom-model"))
        model = ResilientModel("custom-model", handle)
        model.load()
        ModelServer().start([model])


def replicas_needed(rate: float, image_s: float, share: float) -> int:
    """Notebook 7."""
    return int(-(-round(rate * image_s / share, 9) // 1))


def container_cpus(replicas: int, cpus_per_replica: float) -> int:
    """Notebook 7."""
    return int(-(-replicas * cpus_per_replica // 1)) + 1
