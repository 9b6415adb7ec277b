"""Experiments with a cluster of several nodes: `python -m model.faults.cluster [NAME …]`.

`make cluster` prints the tables of docs/scaling.md with it. Those with a network of their own,
`network` and `hop`, take Linux, root and the tool `ip`; `head` takes a Redis server.
"""

import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from model.faults import inject
from model.faults.experiment import Experiment, Fault, run_experiment
from model.faults.network import Network
from model.faults.nodes import Nodes
from model.faults.observe import health, replicas, snapshots, wait_for_replicas, workers
from model.faults.redis_server import Redis
from model.faults.report import chosen, print_facts, report
from model.loadtest.generator import closed_loop
from model.loadtest.run import RIGHT
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

# Ray's default: every 3 s, 10 s to answer, 5 times. So short, a lost node is noticed in seconds.
FREQUENT_NODE_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Nodes and drivers end after so long without a head; Ray's default: a minute. KubeRay's: this.
SURVIVE_WITHOUT_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
# Nothing comes from a node that is cut off: a request that waits for it must not wait forever.
SHORT_ATTEMPTS = ("--request_timeout_s", "30", "--per_attempt_timeout_s", "3")
SPREAD = ("--max_replicas_per_node", "2", "--cpus_per_replica", "0.5", *SHORT_ATTEMPTS)
FRONTEND_TRUSTS_S = 5.0  # a frontend relies on what the head last said for so long


def joined(nodes: Nodes, *options: str, **env: str) -> ServerProcess:
    """Our server on a cluster, on the head's node unless `--node_address` names another."""
    join = ("--address", nodes.address)
    return ServerProcess("model.serving", *join, *options, **nodes.env, **env)


@contextlib.contextmanager
def on_a_network() -> Iterator[tuple[Nodes, ServerProcess]]:
    """Our server at the head, two replicas on a worker node that a wire leads to."""
    with (
        Network() as network,
        Nodes(0, 2, network=network, **FREQUENT_NODE_CHECKS) as nodes,
        joined(nodes, "--num_replicas", "2", *SPREAD) as server,
    ):
        yield nodes, server


@contextlib.contextmanager
def away_from_the_head(
    redis: Redis | None = None, **env: str
) -> Iterator[tuple[Nodes, ServerProcess]]:
    """Our server on the first of two worker nodes, with a replica on each."""
    one_each = ("--num_replicas", "2", "--cpus_per_replica", "1", "--node_address")
    with (
        Nodes(0, 1, 1, redis=redis, **env) as nodes,
        joined(nodes, *one_each, nodes.hosts[1], **env) as server,
    ):
        yield nodes, server


def replicas_by_node(server: ServerProcess) -> Counter:
    """How many of its replicas run on each node: address -> number."""
    found: Counter = Counter()
    for process in replicas(server):
        raylet = next(p for p in process.parents() if p.name() == "raylet")
        found[next(w for w in raylet.cmdline() if "node_ip_address=" in w).split("=")[1]] += 1
    return found


def added(nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 30) -> Experiment:
    """A worker node joins while requests come, and gets as many replicas as the first has."""
    old = workers(server, work)
    change = ("--num_replicas", "4", *SPREAD)
    faults = [
        Fault(2.0, "a node added", lambda: nodes.add(2)),
        Fault(2.1, "4 replicas", lambda: inject.change(server, *change)),
    ]
    name = "a node added, and 4 replicas in place of 2"
    experiment = run_experiment(server, name, work, seconds, faults)
    wait_for_replicas(server, 4)
    experiment.facts["replicas on each node"] = str(sorted(replicas_by_node(server).values()))
    now = workers(server, work)
    new = sum(count for worker, count in now.items() if worker not in old)
    experiment.facts["share of the new node's replicas"] = new / now.total()
    return experiment


def cut(nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 40) -> Experiment:
    """The wire to a worker node is cut: nothing comes from it, and no connection is closed.

    The other node may not take more replicas than it has.
    """
    name = "one of 2 nodes cut off, with 2 of 4 replicas"
    fault = Fault(3.0, "a node cut off", lambda: nodes.cut(1))
    experiment = run_experiment(server, name, work, seconds, [fault])
    wait_for_replicas(server, 2)
    experiment.facts["replicas that live, those cut off included"] = len(replicas(server))
    checks = (f"{k}={v}" for k, v in FREQUENT_NODE_CHECKS.items())
    experiment.facts["settings"] = " ".join([*SHORT_ATTEMPTS, *checks])
    return experiment


def head(nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 40) -> Experiment:
    """Ray's head is lost, then a replica; another head starts, with what Redis kept.

    Then the second head is lost while no request comes, and the replicas after it.
    """
    faults = [
        Fault(2.0, "Ray's head lost", lambda: nodes.lose(0)),
        Fault(0.3 * seconds, "a replica killed", lambda: inject.kill_one(server)),
        Fault(0.4 * seconds, "another head", nodes.start_another_head),
    ]
    name = "Ray's head lost, then a replica; another head, with Redis"
    with snapshots(server) as seen:
        experiment = run_experiment(server, name, work, seconds, faults, keep_headers=True)
    wait_for_replicas(server, 2)
    facts, killed = experiment.facts, experiment.faults[1].began
    answered = experiment.run.headers
    old = {each["x-worker"] for each in answered if each["done"] < killed}
    by_new = [each["done"] for each in answered if each["x-worker"] not in old]
    lasted = min(by_new, default=math.inf) - killed
    facts["from the lost replica to the first response of the new one, s"] = lasted
    facts["probes answered otherwise than 200"] = sum(
        status != "200" for _, statuses in seen for status in statuses.values()
    )
    nodes.lose(0)
    time.sleep(FRONTEND_TRUSTS_S + 1)
    facts["ready, when idle without a head"] = health(server)["model ready"]
    inject.kill_all(server)
    time.sleep(1)
    facts["ready, without head and replicas"] = health(server)["model ready"]
    return experiment


def head_for_good(
    nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 80
) -> Experiment:
    """Ray's head is lost, and there is no Redis: how long the rest goes on."""
    fault = Fault(2.0, "Ray's head lost", lambda: nodes.lose(0))
    name = "Ray's head lost, no Redis"
    experiment = run_experiment(server, name, work, seconds, [fault], ends=True)
    last = max(sample.done for sample in experiment.run.samples if sample.outcome == RIGHT)
    lost_at = experiment.faults[0].began - experiment.run.began
    experiment.facts["it went on without a head for, s"] = last - lost_at
    return experiment


def hop(work: Workload, seconds: float = 10) -> dict[str, float | str]:
    """What it costs that the replica is on another node: one client, in turn here and there."""
    one = ("--num_replicas", "1", "--cpus_per_replica", "1")
    with contextlib.ExitStack() as stack:
        wires = stack.enter_context(Network())
        near = stack.enter_context(Nodes(1))
        far = stack.enter_context(Nodes(0, 1, network=wires))
        servers = [stack.enter_context(joined(nodes, *one)) for nodes in (near, far)]
        p50: dict[str, list[float]] = {"same node": [], "another node": []}
        sent = requests = 0
        for _ in range(3):
            for name, server in zip(p50, servers, strict=True):
                before = wires.sent()
                run = closed_loop(server.predict, work, 1, seconds / 3, warmup_s=0)
                p50[name].append(1000 * run.quantile(0.5))
                if name == "another node":
                    sent, requests = sent + wires.sent() - before, requests + run.requests
    found = {f"{name}, p50 ms": statistics.median(times) for name, times in p50.items()}
    return found | {"on the wire, kB a request": sent / requests / 1000}


def run(names: Sequence[str], work: Workload) -> Iterator[Experiment]:
    """Run the experiments named: `network`, `head`, `head_for_good`."""
    if "network" in names:
        with on_a_network() as there:
            yield added(*there, work)
            yield cut(*there, work)
    if "head" in names:
        with Redis() as redis, away_from_the_head(redis, **SURVIVE_WITHOUT_HEAD) as there:
            yield head(*there, work)
    if "head_for_good" in names:
        with away_from_the_head() as there:
            yield head_for_good(*there, work)


def main() -> None:
    """Run what the command line names; print a table of it, and what the hop costs."""
    known = ["network", "head", "head_for_good", "hop"]
    names = chosen("model.faults.cluster", "Injects faults into a cluster.", known)
    work = Workload.drawn()
    report(run(names, work))
    if "hop" in names:
        print_facts((f"the hop: {name}", value) for name, value in hop(work).items())


if __name__ == "__main__":
    main()
