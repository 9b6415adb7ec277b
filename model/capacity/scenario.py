"""What a simulation takes and gives: service times, a scenario, and its outcome."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ServiceTimes:
    """How long the parts of a request take, in seconds."""

    frontend_s: float  # CPU of the frontend, to read a request; one at a time
    fixed_s: float = 0.0  # of a replica for a batch, whatever its size
    image_s: float = 0.0  # and for each image in it
    cv: float = 0.0  # standard deviation / mean of a batch's time: 0 constant, 1 exponential
    response_s: float = 0.0  # CPU of the frontend, to write a response
    call_s: float = 0.0  # CPU of the frontend for a batch: the call of a replica
    hop_s: float = 0.0  # of a batch on its way to the replica and back
    measured: Mapping[int, float] | None = None  # images -> seconds; replaces fixed_s and image_s

    def seconds(self, images: int) -> float:
        """A replica's mean time for a batch; interpolated between sizes that were measured."""
        if not self.measured:
            return self.fixed_s + images * self.image_s
        sizes = sorted(self.measured)
        found = np.interp(images, sizes, [self.measured[size] for size in sizes])
        return float(found) * max(1.0, images / sizes[-1])

    def occupied_s(self, images: int) -> float:
        """How long a batch occupies a replica, as its frontend sees it: the call and hop count."""
        return self.call_s + self.hop_s + self.seconds(images)

    def alone_s(self, images: int = 1) -> float:
        """The latency of a request in a batch of so many images when nothing else is in flight."""
        return self.frontend_s + self.occupied_s(images) + self.response_s

    def frontend_cpu_s(self, images: int) -> float:
        """CPU of the frontend for a request, in batches of so many images."""
        return self.frontend_s + self.call_s / images + self.response_s


@dataclass(frozen=True)
class Scenario:
    """A system and its load.

    The load is `rate` requests a second at random moments, or so many `clients`, each of which
    sends its next request as soon as it has a response. Each request holds one image.

    With `shared_replicas` every frontend dispatches to all replicas, as the frontends of a
    RayService do; a batch waits at a replica that works on another frontend's. Without, the
    replicas are dealt out evenly and each frontend has its own, as the pods of an InferenceService
    do, each of which holds a Ray cluster.

    With `least_connections` a request goes to the frontend that has the fewest in flight, as
    HAProxy does: with KServe in each replica there are as many frontends as replicas. Without, it
    goes to one at random, and each client stays with its own.
    """

    replicas: int  # of all frontends together
    max_batch_size: int = 16  # images; 1: no batches
    batch_wait_s: float = 0.005  # as the Batcher's
    # Requests in flight at a frontend. None: as the servers' default, a queue of
    # --max_queued_requests and a full batch for each replica that it has.
    admission_limit: float | None = None
    frontends: int = 1
    shared_replicas: bool = False
    least_connections: bool = False
    rate: float | None = None
    clients: int | None = None

    def __post_init__(self) -> None:
        fewest = 1 if self.shared_replicas else self.frontends
        if self.frontends < 1 or self.replicas < fewest or self.max_batch_size < 1:
            raise ValueError("each frontend needs a replica, and a batch needs an image")
        if not (self.rate or 0) + (self.clients or 0) > 0 or self.rate and self.clients:
            raise ValueError("give either a rate or a number of clients, above 0")

    def replicas_of_each(self) -> list[int]:
        """How many replicas each frontend dispatches to."""
        if self.shared_replicas:
            return [self.replicas] * self.frontends
        share, more = divmod(self.replicas, self.frontends)
        return [share + (i < more) for i in range(self.frontends)]


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to, counted in its window as loadtest.run.Run does."""

    throughput: float  # responses a second
    rejected: float  # share of the requests
    mean_ms: float  # latency of the responses; so are the quantiles
    p50_ms: float
    p95_ms: float
    p99_ms: float
    in_flight: float  # requests, mean over time
    batch: float  # images in a batch, mean
    replicas_busy: float  # share of the time, mean over all replicas
    frontends_busy: float

    def littles_law(self) -> float:
        """Requests in flight / (throughput x mean latency): near 1, or it was not steady."""
        expected = self.throughput * self.mean_ms / 1e3
        return self.in_flight / expected if expected else math.nan


def capacity(times: ServiceTimes, scenario: Scenario) -> tuple[float, float]:
    """Upper bounds on requests a second: of the frontends, and of the replicas (full batches)."""
    cpu_s = times.frontend_cpu_s(scenario.max_batch_size)
    full_s = times.occupied_s(scenario.max_batch_size)
    replicas = scenario.replicas * scenario.max_batch_size / full_s
    return scenario.frontends / cpu_s if cpu_s else math.inf, replicas
