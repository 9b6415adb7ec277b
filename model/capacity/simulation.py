"""The server as a simulation: what a load would come to, with nothing started.

A request passes admission control, is read by its frontend (KServe's process), waits there for a
place in a batch, is worked on by a replica, and its response passes the frontend again. Each
frontend has admission control and a batcher of its own; whether it has replicas of its own too or
shares all of them, the Scenario says. Left out is the network to the clients. Where replicas and
frontends share the cores of a machine, put in service times that were measured by the clock while
all of them were busy (model/capacity/fitting.py).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import simpy

from model.capacity.frontend import Frontend, Replica
from model.capacity.scenario import Outcome, Scenario, ServiceTimes, capacity

REJECTED_S = 0.001  # until a client of a closed loop that was rejected sends its next request


def simulate(
    times: ServiceTimes,
    scenario: Scenario,
    seconds: float = 60,
    warmup_s: float = 10,
    seed: int = 0,
) -> Outcome:
    """Run the system, empty at first, and count what comes in the `seconds` after the warm-up.

    The same seed gives the same outcome. Raises ValueError when a request would take no time.
    """
    if times.seconds(1) <= 0:
        raise ValueError("a replica's time must be above 0: give image_s or fixed_s")
    env, end, draw = simpy.Environment(), warmup_s + seconds, random.Random(seed)
    shared = [Replica() for _ in range(scenario.replicas)] if scenario.shared_replicas else None
    frontends = [
        Frontend(env, times, scenario, shared or [Replica() for _ in range(count)], draw)
        for count in scenario.replicas_of_each()
    ]

    def least() -> Frontend:
        fewest = min(frontend.in_flight for frontend in frontends)
        return draw.choice([f for f in frontends if f.in_flight == fewest])

    def arrivals():
        while True:
            yield env.timeout(draw.expovariate(scenario.rate))
            if env.now >= end:
                return
            one = frontends[draw.randrange(len(frontends))]
            env.process((least() if scenario.least_connections else one).request())

    def client(own):
        while env.now < end:
            frontend = least() if scenario.least_connections else own
            if not (yield from frontend.request()):
                yield env.timeout(REJECTED_S)

    if scenario.rate:
        env.process(arrivals())
    for frontend in islice(cycle(frontends), scenario.clients or 0):
        env.process(client(frontend))
    env.run()  # until the last response
    return _outcome(frontends, scenario, warmup_s, end)


def _outcome(
    frontends: Sequence[Frontend], scenario: Scenario, begin: float, end: float
) -> Outcome:
    def recorded(name: str, columns: int) -> np.ndarray:
        rows = [row for frontend in frontends for row in getattr(frontend, name)]
        return np.array(rows, float).reshape(-1, columns).T

    def within(start, stop):  # seconds of each span that lie in the window
        return np.clip(stop, begin, end) - np.clip(start, begin, end)

    due, done = recorded("answered", 2)
    (rejected,) = recorded("rejected", 1)
    dispatched, images = recorded("batches", 2)
    levels = [np.array(frontend.levels).T for frontend in frontends]
    due_in, done_in = ((begin <= moments) & (moments < end) for moments in (due, done))
    counted = due_in if scenario.rate else done_in
    latencies = 1e3 * (done - due)[counted]
    rejections = ((begin <= rejected) & (rejected < end)).sum()
    p50, p95, p99 = np.quantile(latencies, (0.5, 0.95, 0.99)) if counted.any() else [math.nan] * 3
    began = (begin <= dispatched) & (dispatched < end)
    window = end - begin
    return Outcome(
        throughput=float(done_in.sum() / window),
        rejected=float(rejections / max(1, rejections + due_in.sum())),
        mean_ms=float(latencies.mean()) if counted.any() else math.nan,
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        in_flight=float(sum((within(at[:-1], at[1:]) * n[:-1]).sum() for at, n in levels) / window),
        batch=float(images[began].mean()) if began.any() else math.nan,
        replicas_busy=float(within(*recorded("occupied", 2)).sum() / window / scenario.replicas),
        frontends_busy=float(within(*recorded("turns", 2)).sum() / window / len(frontends)),
    )


def one_frontend(
    times: ServiceTimes, scenario: Scenario, requests: int = 20_000, seed: int = 0
) -> Outcome:
    """As `simulate`, at the cost of one frontend: for systems that are large.

    Frontends with replicas of their own have nothing in common, so one with its share of the
    replicas and of the load stands for all (replicas left over when they are dealt out are idle).
    The window is that of `long_enough`. Raises ValueError for several frontends with shared
    replicas, or that get requests by what the others have: use `simulate`.
    """
    n = scenario.frontends
    if n > 1 and (scenario.shared_replicas or scenario.least_connections):
        raise ValueError("frontends that share something have to be simulated together")
    share = replace(
        scenario,
        frontends=1,
        replicas=scenario.replicas // n,
        rate=scenario.rate and scenario.rate / n,
        clients=scenario.clients and -(-scenario.clients // n),
    )
    found = long_enough(times, share, requests, seed)
    return replace(found, throughput=n * found.throughput, in_flight=n * found.in_flight)


def long_enough(
    times: ServiceTimes, scenario: Scenario, requests: int = 20_000, seed: int = 0
) -> Outcome:
    """As `simulate`, in a window that holds about `requests` requests, and six times what a
    request takes in a full batch."""
    rate = min(*capacity(times, scenario), scenario.rate or math.inf)
    full_s = times.alone_s(scenario.max_batch_size)
    seconds = max(requests / rate, 6 * full_s)
    return simulate(times, scenario, seconds, max(seconds / 4, 3 * full_s), seed)
