"""What the health endpoints say in each state that a server can be in."""

import time
from collections.abc import Iterator

from model.faults import inject
from model.faults.experiment import Observation, run_experiment
from model.faults.observe import health, replicas, wait_for_replicas
from model.faults.servers import HALVES, ours
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload


def probes(work: Workload) -> Iterator[dict[str, str]]:
    """A row for each state: what it is, and the status of each probe."""
    with ours(*HALVES) as server:
        yield {"state": "both replicas run", **health(server)}
        found = []
        look = Observation(2.0, lambda: found.append({"state": "under load", **health(server)}))
        run_experiment(server, "", work, 3, [look])
        yield from found
        inject.kill_one(server)
        yield {"state": "one of two replicas dead", **_health_after(1, server)}
        wait_for_replicas(server, 2)
        inject.kill_all(server)
        yield {"state": "all replicas dead", **_health_after(1, server)}
        wait_for_replicas(server, 2)
        yield {"state": "they run again", **health(server)}
        for process in replicas(server):
            process.suspend()
        yield {"state": "all replicas stuck for 12 s", **_health_after(12, server)}
        wait_for_replicas(server, 2)
        inject.kill_helper(server, "ray::ServeCon")
        yield {"state": "Serve's controller dead", **_health_after(1, server)}
        wait_for_replicas(server, 2)
        inject.kill_helper(server, "gcs_server")
        yield {"state": "Ray's head (its GCS) dead for 8 s", **_health_after(8, server)}


def _health_after(seconds: float, server: ServerProcess) -> dict[str, str]:
    time.sleep(seconds)
    return health(server)
