"""Sends requests to a server at the same moment, and tells which of them overlapped."""

import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import requests

from model.loadtest.bodies import v1_body
from model.loadtest.server_process import ServerProcess

TIMEOUT_S = 120


@dataclass(frozen=True)
class Response:
    """When a request was sent, worked on and answered; all times in seconds since 1970."""

    sent: float
    received: float  # of the response, by the client
    # What only servers of model.serving tell, in their headers:
    worker: str | None = None  # id of the process that holds the model
    started: float | None = None
    finished: float | None = None

    @property
    def latency(self) -> float:
        """Seconds from sending the request to having the response."""
        return self.received - self.sent


def send_at_once(server: ServerProcess, requests_: list[list[bytes]]) -> list[Response]:
    """Send all requests at the same moment, one thread each, and wait for all responses.

    requests_: for each request its encoded images.
    Returns the responses in the order of the requests.
    Raises requests.HTTPError when one is not 200.
    """

    def send(images: list[bytes]) -> Response:
        body = v1_body(images)
        sent = time.time()
        response = requests.post(server.predict, json=body, timeout=TIMEOUT_S)
        received = time.time()
        response.raise_for_status()
        if "x-worker" not in response.headers:
            return Response(sent, received)
        times = [float(response.headers[f"x-{moment}"]) for moment in ("started", "finished")]
        return Response(sent, received, response.headers["x-worker"], *times)

    with ThreadPoolExecutor(len(requests_)) as threads:
        return list(threads.map(send, requests_))


def health_checks_during(server: ServerProcess, images: list[bytes]) -> tuple[list[float], float]:
    """Check the server's health, again and again, while it works on one large request.

    Returns the seconds that each health check took, and those of the large request.
    """
    checks = []
    with ThreadPoolExecutor(1) as thread, requests.Session() as session:
        large = thread.submit(send_at_once, server, [images])
        while not large.done():
            began = time.time()
            session.get(f"{server.url}/v2/health/live", timeout=TIMEOUT_S).raise_for_status()
            checks.append(time.time() - began)
        return checks, large.result()[0].latency


def median_latency(responses: Iterable[Response]) -> float:
    """The median of the requests' latencies, in seconds."""
    return statistics.median(response.latency for response in responses)


def seconds_until_all(responses: list[Response]) -> float:
    """From sending the first request to having the last response."""
    return max(r.received for r in responses) - min(r.sent for r in responses)


def overlaps(responses: list[Response]) -> int:
    """How many requests were begun while any other was being worked on.

    Of two that are begun at the same moment both count.
    """
    return sum(
        any(o is not r and o.started <= r.started < o.finished for o in responses)
        for r in responses
    )


def numbered(workers: Iterable[str], names: dict[str, str] | None = None) -> dict[str, str]:
    """Names for the ids of workers, in the order they are seen: replica 1, replica 2, ...

    names: of those that have one already.
    """
    names = dict(names or {})
    for worker in workers:
        names.setdefault(worker, f"replica {len(names) + 1}")
    return names


def lanes(responses: list[Response], names: dict[str, str]) -> dict[str, list[tuple]]:
    """For each worker when it worked on which request, for plots.timeline.

    The requests are numbered in the order they were sent. names: of the workers' ids.
    """
    found: dict[str, list[tuple]] = {name: [] for name in names.values()}
    for number, response in enumerate(responses, start=1):
        found[names[response.worker]].append((response.started, response.finished, number))
    return {name: work for name, work in found.items() if work}


def largest_difference(ours: list[list[dict]], theirs: list[list[dict]]) -> float:
    """The largest difference between the probabilities of two responses for the same images.

    Raises AssertionError where the labels differ.
    """
    pairs = list(zip(sum(ours, []), sum(theirs, []), strict=True))
    assert all(a["label"] == b["label"] for a, b in pairs), "the labels differ"
    return max(abs(a["probability"] - b["probability"]) for a, b in pairs)
