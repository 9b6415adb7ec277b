"""What more replicas and frontends would come to than there are on this machine."""

import math
from collections.abc import Iterable
from dataclasses import replace

from model.capacity.scenario import Scenario, ServiceTimes, capacity
from model.capacity.simulation import one_frontend


def extrapolate(
    times: ServiceTimes,
    replicas: Iterable[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
    frontends: Iterable[int] = (1, 4, 16),
    max_batch_size: int = 16,
    requests: int = 2_000,
) -> list[dict]:
    """For each number of frontends and replicas the throughput simulated, and both upper bounds.

    Each frontend has replicas of its own. There are as many clients as keep the replicas or the
    frontends busy all the time.
    """
    rows, replicas = [], list(replicas)
    full_s = times.alone_s(max_batch_size)
    for n in frontends:
        for count in (count for count in replicas if count >= n):
            scenario = Scenario(
                count, max_batch_size, frontends=n, admission_limit=math.inf, clients=1
            )
            frontend, replica = capacity(times, scenario)
            clients = math.ceil(2 * min(frontend, replica) * full_s) + n
            found = one_frontend(times, replace(scenario, clients=clients), requests)
            row = {"frontends": n, "replicas": count, "throughput": found.throughput}
            rows.append(row | {"frontend_limit": frontend, "replica_limit": replica})
    return rows
