"""Checks of the exercises of notebook 8, on a live server of the learner's own model.

Each prints "right: …" or "not yet: …", and returns whether it is right.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from model.course import tickets
from model.course.checks import batch_sizes
from model.course.checks_basics import cannot_start
from model.faults.observe import metrics
from model.loadtest.pays.advice import throughputs
from model.loadtest.pays.measure import SERVERS
from model.loadtest.server_process import ServerProcess

BAD = {
    "no instances": {"texts": ["my parcel is late"]},
    "an empty list of instances": {"instances": []},
    "a text in place of a list": {"instances": "my parcel is late"},
    "a number in place of a list": {"instances": 5},
    "a text that is a number": {"instances": ["my parcel is late", 5]},
}
# The learner's class, with a line in the log for each call.
PROBE = """from batched_tickets import BatchedTickets


class Probe(BatchedTickets):
    def predict(self, texts, headers=None):
        print("predict is called", flush=True)
        return super().predict(texts)

    if hasattr(BatchedTickets, "predict_batch"):

        def predict_batch(self, inputs):
            print(f"predict_batch is called with {len(inputs)}", flush=True)
            return super().predict_batch(inputs)
"""
ENOUGH, IN_EACH_ROW = 0.95, 0.8  # of the best throughput: on average over the cases, and at least


def check_tickets(folder: Path, pipeline) -> bool:
    """Does `tickets.py` give the pipeline's labels, and 400 for bad input?"""
    return _told(_serve(folder, "tickets:TicketModel", pipeline, _wrong_errors))


def check_batched_tickets(folder: Path, pipeline) -> bool:
    """Does `batched_tickets.py` predict several requests in one call, with the same labels?"""
    probe = folder / "probe.py"
    probe.write_text(PROBE)
    try:
        return _told(_serve(folder, "probe:Probe", pipeline, _no_batches))
    finally:
        probe.unlink()


def check_choose(choose: Callable[[float, float, int], str | None], measured: list[dict]) -> None:
    """Does the learner's rule choose servers that do nearly as much as the best, and no more?

    measured: of model.loadtest.pays, in which the rule is looked up.
    """
    cases = throughputs(measured)
    shares, chosen = {}, set()
    for case, rates in cases.items():
        name = choose(*case)
        if name is None:
            return print("not yet: choose returns nothing")
        if name not in rates:
            return print(f"not yet: {name!r} is none of {', '.join(map(repr, rates))}")
        shares[case] = rates[name] / max(rates.values())
        chosen.add(name)
    mean, worst = sum(shares.values()) / len(shares), min(shares, key=shares.get)
    always = {n: sum(r[n] / max(r.values()) for r in cases.values()) / len(cases) for n in SERVERS}
    simple = max(always, key=always.get)
    told = f"{mean:.0%} of the best throughput on average; the worst row, {worst[0]:g} ms of which "
    told += f"a batch saves {worst[1]:.0%}, with {worst[2]} clients, has {shares[worst]:.0%}"
    if mean < ENOUGH or shares[worst] < IN_EACH_ROW:
        print(f"not yet: {told}")
        print(
            f"{ENOUGH:.0%} on average and {IN_EACH_ROW:.0%} in each row pass; always '{simple}' "
            f"gives {always[simple]:.0%} on average"
        )
        return
    print(f"right: {told}, with {len(chosen)} kinds of servers")


def _serve(folder: Path, model: str, pipeline, more: Callable[[ServerProcess], str]) -> str:
    """What is wrong with the model in the folder, or nothing."""
    texts, _ = tickets.drawn(32, seed=7)
    expected = pipeline.predict(texts).tolist()
    try:
        with ServerProcess("model.serving", model, "--in_process", folder=folder) as server:
            response = requests.post(server.predict, json={"instances": texts}, timeout=30)
            if response.status_code != 200:
                return f"a good request gets {response.status_code}: {response.text[:200]}"
            if response.json() != {"predictions": expected}:
                return f"the response is {response.text[:120]} …, not {{'predictions': [labels]}}"
            return more(server)
    except RuntimeError as error:
        return cannot_start(error)


def _wrong_errors(server: ServerProcess) -> str:
    for what, body in BAD.items():
        response = requests.post(server.predict, json=body, timeout=30)
        if response.status_code != 400:
            return f"the labels are right, but {what} gets {response.status_code}, not 400"
    return ""


def _no_batches(server: ServerProcess) -> str:
    """What is wrong where 32 requests wait while the model works on a large one, or nothing."""
    texts, _ = tickets.drawn(32, seed=8)
    large = tickets.drawn(20_000, seed=9)[0]

    def send(instances: list[str]) -> list:
        response = requests.post(server.predict, json={"instances": instances}, timeout=60)
        return response.json().get("predictions")

    expected = send(texts)
    with ThreadPoolExecutor(33) as clients:
        first = clients.submit(send, large)
        deadline = time.monotonic() + 30
        name = f"inference_requests_in_flight {server.name}"
        while metrics(server)[name] == 0 and not first.done() and time.monotonic() < deadline:
            time.sleep(0.01)
        found = list(clients.map(send, [[text] for text in texts]))
    if found != [[label] for label in expected]:
        return "32 requests at the same time do not get what they get one after the other"
    said = server.log.read_text()
    sizes = batch_sizes(said, "predict_batch is called with ")
    if not sizes:
        return "BatchedTickets has no predict_batch"
    if max(sizes) == 1:
        return f"predict_batch was called {len(sizes)} times, each time with one request"
    if (calls := said.count("predict is called")) > len(sizes):
        return "predict_batch calls predict for each request: put their texts into one list"
    if calls < len(sizes):
        return "predict_batch does without self.predict: call it once, with the texts of all"
    return ""


def _told(missing: str) -> bool:
    print(f"not yet: {missing}" if missing else "right: the server gives the labels it should")
    return not missing
