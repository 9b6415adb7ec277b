"""Does to a cluster of several nodes what a network will: `make cluster` prints README's tables.

ARGS of make names single ones. Those with a network of their own, `network` and `hop`, take Linux,
root and the tool `ip`; `head` takes a Redis server.
"""

import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator

from model.bench import capacity, results
from model.bench.load import RIGHT, Run, Workload, closed_loop
from model.bench.nodes import Network, Nodes, Redis
from model.bench.reliability import show
from model.bench.server import ServerProcess
from model.bench.simulation import Service, Setting
from model.bench.trial import (
    Trial,
    health,
    kill_all,
    kill_one,
    metrics,
    redeploy,
    replicas,
    under,
    watched,
    whole,
)
from model.replicated import STALE_S

# Ray's default: every 3 s, 10 s to answer, 5 times. So short, a lost node is noticed in seconds.
PROMPT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Nodes and drivers end after so long without a head; Ray's default: a minute. KubeRay's: this.
PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}


# Nothing comes from a node that is cut off: who waits for it must not wait for ever.
IMPATIENT = ("--request_timeout_s", "30", "--attempt_timeout_s", "3")
SPREAD = ("--max_replicas_per_node", "2", "--cpus_per_replica", "0.5", *IMPATIENT)


def joined(nodes: Nodes, *options: str, **env: str) -> ServerProcess:
    """Our server on a cluster, on the head's node unless `--node_address` names another."""
    join = ("--address", nodes.address)
    return ServerProcess("model.ray_server", *join, *options, **nodes.env, **env)


@contextlib.contextmanager
def on_a_network() -> Iterator[tuple[Nodes, ServerProcess]]:
    """Our server at the head, two replicas on a worker node that a wire leads to."""
    with (
        Network() as network,
        Nodes(0, 2, network=network, **PROMPT) as nodes,
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


def on_nodes(server: ServerProcess) -> Counter:
    """How many of its replicas run on each node: address -> number."""
    found: Counter = Counter()
    for process in replicas(server):
        raylet = next(p for p in process.parents() if p.name() == "raylet")
        found[next(w for w in raylet.cmdline() if "node_ip_address=" in w).split("=")[1]] += 1
    return found


def added(nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 30) -> Trial:
    """A worker node joins while requests come, and gets as many replicas as the first has."""
    old = workers(server, work)
    deeds = [
        (2.0, "a node added", lambda: nodes.add(2)),
        (2.1, "4 replicas", lambda: redeploy(server, "--num_replicas", "4", *SPREAD)),
    ]
    trial = under(server, "a node added, and 4 replicas in place of 2", work, seconds, deeds)
    whole(server, 4)
    trial.facts["replicas on each node"] = str(sorted(on_nodes(server).values()))
    answers = workers(server, work)
    new = sum(count for worker, count in answers.items() if worker not in old)
    trial.facts["share of the new node's replicas"] = new / answers.total()
    return trial


def workers(server: ServerProcess, work: Workload, seconds: float = 3) -> Counter:
    """Which copies of the model answer, and how often."""
    run = closed_loop(server.predict, work, 16, seconds, warmup_s=0.5, keep_headers=True)
    return Counter(sample.headers["x-worker"] for sample in run.samples if sample.headers)


def cut(nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 40) -> Trial:
    """The wire to a worker node is cut: nothing comes from it, and no connection is closed.

    The other may not take more replicas than it has.
    """
    what = "one of 2 nodes cut off, with 2 of 4 replicas"
    trial = under(server, what, work, seconds, [(3.0, what, lambda: nodes.cut(1))])
    whole(server, 2)
    trial.facts["replicas that live, those cut off included"] = len(replicas(server))
    trial.facts["settings"] = " ".join([*IMPATIENT, *(f"{k}={v}" for k, v in PROMPT.items())])
    return trial


def head(nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 40) -> Trial:
    """Ray's head is lost, then a replica; another head starts, with what Redis kept.

    Then the second head is lost with nobody asking for anything, and the replicas after it.
    """
    deeds = [
        (2.0, "Ray's head lost", lambda: nodes.lose(0)),
        (0.3 * seconds, "a replica killed", lambda: kill_one(server)),
        (0.4 * seconds, "another head", nodes.start_head_again),
    ]
    with watched(server) as told:
        what = "Ray's head lost, then a replica; another head, with Redis"
        trial = under(server, what, work, seconds, deeds)
    whole(server, 2)
    trial.facts["from the lost replica to the new one, s"] = time.time() - trial.deeds[1][0]
    trial.facts["probes answered otherwise than 200"] = sum(
        status != "200" for _, statuses in told for status in statuses.values()
    )
    nodes.lose(0)
    time.sleep(STALE_S + 1)
    trial.facts["ready, when idle without a head"] = health(server)["model ready"]
    kill_all(server)
    time.sleep(1)
    trial.facts["ready, without head and replicas"] = health(server)["model ready"]
    return trial


def head_for_good(
    nodes: Nodes, server: ServerProcess, work: Workload, seconds: float = 80
) -> Trial:
    """Ray's head is lost, and there is no Redis: how long the rest goes on."""
    deeds = [(2.0, "Ray's head lost", lambda: nodes.lose(0))]
    trial = under(server, "Ray's head lost, no Redis", work, seconds, deeds, ends=True)
    last = max(sample.done for sample in trial.run.samples if sample.outcome == RIGHT)
    lost_at = trial.deeds[0][0] - trial.run.began
    trial.facts["it went on without a head for, s"] = last - lost_at
    return trial


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


def foretold(
    server: ServerProcess, work: Workload, seconds: float = 3
) -> tuple[Service, list[dict]]:
    """The service times that some loads show, and what they say of six others: capacity.validate.

    The first are measured before and after the others, as machines drift.
    """
    known: list[Run] = []

    def learn() -> None:
        how = {"warmup_s": 0.5, "keep_headers": True, "watch": {server.process.pid: "front"}}
        for clients in (2, 6, 12, 24, 40):
            known.append(closed_loop(server.predict, work, clients, seconds / 2, **how))

    learn()
    count = round(metrics(server)["inference_replicas"])
    most = max(run.throughput for run in known)
    settings = [Setting(count, clients=n) for n in (4, 16, 32)]
    settings += [Setting(count, rate=round(share * most)) for share in (0.3, 0.5, 0.7)]
    pairs = []
    for setting in settings:
        load = {"rate": setting.rate} if setting.rate else {"clients": setting.clients}
        how = {"seconds": seconds, "warmup_s": 0.5} | load
        pairs.append((setting, results.measure(server, "ours", work, **how)))
    learn()
    service = capacity.measured(known)
    return service, capacity.validate(pairs, service)


def _trials(names: list[str], work: Workload) -> Iterator[Trial]:
    if "network" in names:
        with on_a_network() as there:
            yield added(*there, work)
            yield cut(*there, work)
    if "head" in names:
        with Redis() as redis, away_from_the_head(redis, **PATIENT) as there:
            yield head(*there, work)
    if "head_for_good" in names:
        with away_from_the_head() as there:
            yield head_for_good(*there, work)


def main() -> None:
    """Print what the machine is, a row for each trial, other facts, predicted and measured loads.

    Draws imgs/capacity.png.
    """
    known = ["network", "head", "head_for_good", "hop", "foretell"]
    names = sys.argv[1:] or known
    if unknown := set(names) - set(known):
        sys.exit(f"no such trial: {', '.join(unknown)}; there are {', '.join(known)}")
    print(json.dumps(results.machine()))
    work, facts = Workload.drawn(), {}
    for i, trial in enumerate(_trials(names, work)):
        show(trial.row(), header=i == 0)
        facts |= {f"{trial.what}: {fact}": value for fact, value in trial.facts.items()}
    if "hop" in names:
        facts |= {f"the hop: {fact}": value for fact, value in hop(work).items()}
    for fact, value in facts.items():
        print(f"{fact}: {value:.3g}" if isinstance(value, float) else f"{fact}: {value}")
    if "foretell" in names:
        with ServerProcess("model.ray_server", "--num_replicas", "2") as server:
            service, rows = foretold(server, work, seconds=10)
        print(service)
        for i, row in enumerate(rows):
            show({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, i == 0)
        foreseen = capacity.extrapolate(service)
        capacity.figure(rows, foreseen).savefig("imgs/capacity.png", dpi=110)
        for row in foreseen:
            if row["fronts"] == 1 and row["replicas"] in (1, 8, 64, 512):
                print({name: round(value) for name, value in row.items()})
        for i, rate in enumerate((100, 1_000, 10_000, 100_000)):
            need = capacity.needed(service, rate, 0.5 + service.alone_s())
            row = {"requests a second": f"{rate:,}", "replicas": f"{need.replicas:,}"}
            row |= {"fronts": need.fronts, "p99, ms": round(need.outcome.p99_ms)}
            show(row | {"pictures in a batch": round(need.outcome.batch, 1)}, i == 0)


if __name__ == "__main__":
    main()
