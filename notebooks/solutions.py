"""One solution for each exercise; a test puts it in place of the stub and runs the check.

Where the exercise is a file, the function's body is the file.
"""

from ray import serve


def scale_hello(replicas: int):
    """Notebook 1: the same class with other options; the name stays, so it is replaced."""
    small = Hello.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0.5})  # noqa: F821
    return serve.run(small.bind(), name="hello", route_prefix="/hello")


def pipeline():
    """Notebook 1: an application of two deployments."""

    @serve.deployment
    class Quadruple:
        def __init__(self, double):
            self.double = double

        async def __call__(self, number):
            return await self.double.remote(await self.double.remote(number))

    application = Quadruple.bind(Double.bind())  # noqa: F821
    return serve.run(application, name="pipeline", route_prefix="/pipeline")


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
    import time

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


def serve_batch() -> None:
    """Notebook 5: the file my_server.py."""
    import os

    import torch
    from ray import serve

    from model.basics import ray_server
    from model.basics.kserve_server import AlexNetModel

    @serve.deployment(num_replicas=int(os.environ["REPLICAS"]), max_ongoing_requests=64)
    class Replica(AlexNetModel):
        def __init__(self, name):
            super().__init__(name)
            self.load()

        async def predict(self, inputs, headers=None):
            images, request = inputs
            probabilities, classes = await self.predict_together(images)
            return probabilities, classes, request

        @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
        async def predict_together(self, several):
            print(f"requests in this batch: {len(several)}", flush=True)
            with torch.inference_mode():
                top = self.network(torch.cat(several)).softmax(1).topk(5)
            sizes = [len(images) for images in several]
            return list(zip(top.values.split(sizes), top.indices.split(sizes), strict=True))

    if __name__ == "__main__":
        ray_server.main(Replica, Replica.num_replicas)


def gathering() -> None:
    """Notebook 5: the file gathering.py."""
    import asyncio

    from kserve.ray import RayModel

    class GatheringModel(RayModel):
        def __init__(self, name, handle, replicas):
            super().__init__(name, handle)
            self.handle, self.free, self.waiting = handle, replicas, []

        async def __call__(self, body, headers=None, verb=None):
            response = asyncio.get_running_loop().create_future()
            self.waiting.append((body, response))
            self.send_batches()
            return await response, {}

        def send_batches(self):
            while self.waiting and self.free:
                batch, self.waiting = self.waiting[:16], self.waiting[16:]
                self.free -= 1
                asyncio.create_task(self.send(batch))

        async def send(self, batch):
            answers = await self.handle.answer.remote([body for body, _ in batch])
            for (_, response), answer in zip(batch, answers, strict=True):
                response.set_result(answer)
            self.free += 1
            self.send_batches()


def lone_client(cores: int):
    """Notebook 5: Ray gives a replica as many threads as it reserves cores."""
    return ray_server.Replica.options(  # noqa: F821
        num_replicas=1, ray_actor_options={"num_cpus": cores}
    )


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
            for _ in range(3):
                try:
                    return await asyncio.wait_for(self.handle.healthy.remote(), 5)
                except RayActorError:
                    pass  # that replica is dead, and another may not be
                except TimeoutError:
                    break  # there is none to ask
            return False

    if __name__ == "__main__":
        ray.init(address="local", num_cpus=2, include_dashboard=False)
        serve.start(proxy_location="Disabled")
        handle = serve.run(Replica.options(max_ongoing_requests=64).bind("custom-model"))
        model = ResilientModel("custom-model", handle)
        model.load()
        ModelServer().start([model])


def placed() -> None:
    """Notebook 7: the file my_deployment.py."""
    from ray import serve

    @serve.deployment(num_replicas=2, max_replicas_per_node=1, ray_actor_options={"num_cpus": 0.1})
    class Placed:
        def __call__(self) -> str:
            return "here"

    app = Placed.bind()  # noqa: F841


def replicas_needed(rate: float, image_s: float, share: float) -> int:
    """Notebook 7."""
    return int(-(-round(rate * image_s / share, 9) // 1))


def tickets() -> None:
    """Notebook 8: the file tickets.py."""
    from pathlib import Path

    import joblib
    from kserve import Model
    from kserve.errors import InvalidInput

    class TicketModel(Model):
        def load(self) -> bool:
            self.pipeline = joblib.load(Path(__file__).with_name("tickets.joblib"))
            self.ready = True
            return self.ready

        def preprocess(self, payload: dict, headers: dict | None = None) -> list[str]:
            texts = payload.get("instances")
            listed = isinstance(texts, list) and texts
            if not listed or not all(isinstance(text, str) for text in texts):
                raise InvalidInput('send {"instances": ["the text of a ticket", ...]}')
            return texts

        def predict(self, texts: list[str], headers: dict | None = None) -> list[str]:
            return self.pipeline.predict(texts).tolist()

        def postprocess(self, labels: list[str], headers: dict | None = None) -> dict:
            return {"predictions": labels}


def batched_tickets() -> None:
    """Notebook 8: the file batched_tickets.py."""
    from tickets import TicketModel

    class BatchedTickets(TicketModel):
        def predict_batch(self, inputs: list[list[str]]) -> list[list[str]]:
            labels = iter(self.predict([text for texts in inputs for text in texts]))
            return [[next(labels) for _ in texts] for texts in inputs]


def choose(ms: float, saved: float, clients: int) -> str:
    """Notebook 8: batches where they save, processes where the work is worth the way there."""
    if clients == 1:
        return "plain KServe"
    if not saved:
        return "two KServe workers"
    if ms < 1:
        return "a thread, with batches"
    return "model.serving, KServe in each of two replicas"
