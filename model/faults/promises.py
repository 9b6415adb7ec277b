"""What our server promises when its own parts fail, each promise with a fault that tests it.

Each function starts the servers that it needs, and returns Outcomes; NotTested when the fault did
not happen as it was to.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import requests

from model.faults import grpc_clients, inject
from model.faults.clients import status_of
from model.faults.experiment import Fault, NotTested, run_experiment
from model.faults.grpc_clients import ANSWERED, REFUSED
from model.faults.observe import replicas, snapshots, wait_for_replicas
from model.faults.outcome import Outcome, by_outcome, nothing_lost
from model.loadtest.joining import another_frontend, fresh_token
from model.loadtest.run import Run
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import JsonWorkload

FRAGILE = "model.faults.fragile:FragileModel"
MS = 50  # of a batch
CLIENTS = 32
MEMORY_BOUND_MB = 6 * 512  # times --max_body_memory_mb: a body is parsed, pickled, and copied
REFUSED_FOR = {  # version of FragileModel -> why `redeploy` refuses it
    "broken": "the weights are broken",
    "wrong": "the check of itself failed",
}
LEAN = ("--cpus_per_replica", "0.1")  # replicas that sleep: many fit on a few cores


def work(count: int = 64) -> JsonWorkload:
    """Requests for FragileModel, each with a response of its own."""
    each = [MS + i / 1000 for i in range(count)]
    return JsonWorkload(
        [{"instances": [{"ms": ms}]} for ms in each], [{"predictions": [ms]} for ms in each]
    )


def stock_fragile(count: int, *_: str, **env: str) -> ServerProcess:
    """The same behind KServe's RayModel, without options of ours."""
    return ServerProcess("model.faults.fragile_stock", "--num_replicas", str(count), **env)


Start = Callable[..., ServerProcess]  # a number of replicas, options of ours, environment


@dataclass(frozen=True)
class Fragile:
    """Starts servers of ours with FragileModel."""

    topology: str = "front"

    def options(self, count: int) -> list[str]:
        """Of the command line, for so many replicas."""
        return [FRAGILE, "--num_replicas", str(count), *LEAN, "--topology", self.topology]

    def __call__(self, count: int, *options: str, **env: str) -> ServerProcess:
        return ServerProcess("model.serving", *self.options(count), *options, **env)


fragile = Fragile()


def killed(start: Start, seconds: float = 20, every_s: float = 6) -> Outcome:
    """One replica of two is killed, again and again."""
    with start(2, **fresh_token()) as server:
        times = [2 + i * every_s for i in range(int((seconds - 2) / every_s))]
        kill = partial(inject.kill_one, server)
        faults = [Fault(at, "a replica killed", kill) for at in times]
        what = f"one of 2 replicas killed, {len(times)} times"
        found = run_experiment(server, what, work(), seconds, faults, clients=CLIENTS)
    return nothing_lost("no request is lost with a replica", found)


def mass_failure(start: Start, count: int, seconds: float = 15) -> Iterator[Outcome]:
    """All replicas of so many are lost, all but one, and one after the other in 0.3 s."""

    def one_by_one(server: ServerProcess) -> str:
        there = replicas(server)
        for replica in there:
            replica.kill()
            time.sleep(0.3 / len(there))
        return inject.kill(there, "replicas, one by one")

    ways = {
        "all at once": inject.kill_all,
        "all but one": lambda server: inject.kill(replicas(server)[1:], "replicas of all but one"),
        "one by one in 0.3 s": one_by_one,
    }
    with start(count, **fresh_token()) as server:
        for name, how in ways.items():
            fault = Fault(3, name, partial(how, server))
            what = f"{count} replicas lost: {name}"
            found = run_experiment(server, what, work(), seconds, [fault], clients=CLIENTS)
            promise = "every admitted request gets a response, however many replicas are lost"
            yield nothing_lost(promise, found, may_reject=name != "all but one")
            wait_for_replicas(server, count)


def poison(start: Start, seconds: float = 20, every_s: float = 8) -> Outcome:
    """Now and then a request crashes every replica that gets it; others are beside it."""
    statuses, seen, crashed = [], set(), set()

    def look(server: ServerProcess) -> dict:
        """Take down the replicas: also those that start meanwhile, which takes seconds."""
        seen.update(there := replicas(server))
        return {"replicas": there}

    def send(server: ServerProcess) -> str:
        look(server)
        body = {"instances": [{"ms": MS, "crash": True}]}
        statuses.append(requests.post(server.predict, json=body, timeout=90).status_code)
        gone = set(filter(inject.is_gone, seen.copy())) - crashed
        if not gone:
            raise NotTested("the request crashed no replica")
        crashed.update(gone)
        return f"replicas crashed: {len(gone)}"

    times = [2 + i * every_s for i in range(max(1, int((seconds - 2) / every_s)))]
    with start(4, **fresh_token()) as server, snapshots(server, look, every_s=0.5):
        steps = [
            Fault(at, "a request that crashes replicas", partial(send, server)) for at in times
        ]
        found = run_experiment(server, "", work(), seconds, steps, clients=CLIENTS)
    lost = sum(found.run.errors.values())
    return Outcome(
        promise="a request that crashes replicas takes no other with it",
        fault=f"{len(times)} such requests, 4 replicas, {CLIENTS} clients",
        evidence=f"replicas crashed: {len(crashed)}",
        requests=by_outcome(found.run),
        found=f"{len(crashed) / len(statuses):.1f} replicas for each, which got "
        f"{_counted(statuses)}; {lost} other requests lost",
        kept=lost == 0 and len(crashed) <= 3 * len(statuses) and set(statuses) == {500},
    )


def stopped(start: Start, times: int = 5, seconds: float = 12) -> Iterator[Outcome]:
    """SIGTERM under full load, to a server that drains, which ours does when it is told to.

    Its clients go on meanwhile, and after it; connections that are refused are not counted: who
    makes them has been answered before, and nothing of theirs is lost.
    """
    for _ in range(times):
        with start(2, "--drain_s", "3") as server:
            fault = Fault(seconds / 2, "SIGTERM", partial(inject.terminate, server))
            found = run_experiment(
                server,
                "SIGTERM under full load",
                work(),
                seconds,
                [fault],
                clients=CLIENTS,
                ends=True,
            )
        yield nothing_lost("a server that is told to end loses nothing", found, may_reject=True)


def stopped_over_grpc(start: Start, times: int = 5, seconds: float = 7) -> Iterator[Outcome]:
    """The same over gRPC, where a connection stays until the server ends.

    What is refused before it is begun is not counted: gRPC's clients send such a request again, to
    another server if there is one. A call that is cut off is.
    """
    for _ in range(times):
        with start(2, "--drain_s", "2") as server, ThreadPoolExecutor(1) as thread:
            grpc_clients.wait(server, MS)
            calls = thread.submit(grpc_clients.call, server, MS, CLIENTS, seconds)
            time.sleep(seconds / 2)
            evidence = inject.terminate(server)
            outcomes = calls.result()
        lost = sum(outcomes.values()) - outcomes[ANSWERED] - outcomes[REFUSED]
        yield Outcome(
            promise="a server that is told to end loses nothing",
            fault="SIGTERM under full load, over gRPC",
            evidence=evidence,
            requests=dict(outcomes),
            found=f"{lost} of {sum(outcomes.values())} lost",
            kept=lost == 0,
            facts={"lost": lost},
        )


def failing_update(start: Fragile, seconds: float = 25) -> Iterator[Outcome]:
    """A new version that cannot be loaded, and one whose check of itself fails.

    seconds: of load, or as many as it takes to see all of it: twice as long as without load.
    """
    options = start.options(2)
    with start(2, **fresh_token()) as server:
        began = time.monotonic()
        _refused(server, "broken", *options)
        seconds = max(seconds, 2 * (time.monotonic() - began) + 3)
        wait_for_replicas(server, 2)
        for what in REFUSED_FOR:
            fault = Fault(1, what, partial(_refused, server, what, *options))
            name = f"an update to a version that is {what}"
            found = run_experiment(server, name, work(), seconds, [fault], clients=CLIENTS)
            wait_for_replicas(server, 2)
            yield nothing_lost("an update that fails changes nothing", found)


def _refused(server: ServerProcess, version: str, *options: str) -> str:
    """`redeploy` of a version, which is to fail for what is wrong with that."""
    try:
        inject.redeploy(server, *options, "--set", f"{version}=true")
    except RuntimeError as error:
        if REFUSED_FOR[version] not in str(error):
            raise NotTested(f"redeploy failed for another reason: {error}") from None
        return f"redeploy: {str(error).strip().splitlines()[-1][:150]}"
    raise RuntimeError("redeploy succeeded")


def two_frontends(start: Fragile, seconds: float = 6) -> Outcome:
    """Two frontends, four replicas, one client at each: none of them waits for the other."""
    with (
        start(4, **fresh_token()) as first,
        another_frontend(first, "--num_replicas", "4") as second,
        ThreadPoolExecutor(2) as threads,
    ):

        def load(server: ServerProcess) -> Run:
            how = {"clients": 1, "keep_headers": True}
            return run_experiment(server, "", work(), seconds, **how).run

        runs = list(threads.map(load, (first, second)))
    together_s = min(run.began for run in runs) + seconds - max(run.began for run in runs)
    if together_s < 0.8 * seconds:
        raise NotTested(f"the two frontends were loaded together for {together_s:.1f} s only")
    answered = [h for run in runs for h in run.headers]
    shared = sum(_together(a, answered) for a in answered) / max(1, len(answered))
    lost = sum(sum(run.errors.values()) for run in runs)
    counts = sum((Counter(by_outcome(run)) for run in runs), Counter())
    return Outcome(
        promise="several frontends share the replicas evenly",
        fault="2 frontends, 4 replicas, one client at each frontend",
        evidence=f"requests by frontend: {', '.join(str(run.sent) for run in runs)}",
        requests=dict(counts),
        found=f"{shared:.0%} of the requests met another at their replica; {lost} lost",
        kept=shared < 0.05 and lost == 0 and all(run.headers for run in runs),
        facts={"shared": shared},
    )


def _together(one: dict, others: list[dict]) -> bool:
    """Whether it and another request were sent to the same replica, and one waited for the other.

    For a fifth of what a batch takes, or more: the replica itself works on one after the other.
    """
    return any(
        other is not one
        and other["x-worker"] == one["x-worker"]
        and min(float(each["x-finished"]) for each in (one, other))
        - max(each["sent"] for each in (one, other))
        > MS / 5000
        for other in others
    )


def large_bodies(start: Start, clients: int = 288, mb: int = 60) -> Outcome:
    """So many clients send a request of so many MB at the same time, each once."""
    instance = {"ms": MS, "padding": "x" * (mb * 2**20)}
    body = json.dumps({"instances": [instance]}).encode()
    with start(2) as server:
        before = server.memory()
        with (
            snapshots(server, lambda server: {"bytes": server.memory()}, every_s=0.2) as taken,
            ThreadPoolExecutor(clients) as threads,
        ):
            sent = [threads.submit(status_of, server.predict, body, 90) for _ in range(clients)]
            statuses = Counter(each.result() for each in sent)
        after = requests.post(server.predict, json=work().requests[0], timeout=30).status_code
    grew = (max(found["bytes"] for _, found in taken) - before) / 2**20
    if not statuses["200"] or grew < mb:
        raise NotTested(f"no body was taken in: {dict(statuses)}, {grew:.0f} MB more than at rest")
    return Outcome(
        promise="the memory of large bodies is bounded",
        fault=f"{clients} clients send {mb} MB each",
        evidence=f"MB sent: {clients * mb:,}; answered: {statuses['200'] * mb:,} of them",
        requests=dict(statuses),
        found=f"{grew:,.0f} MB more than at rest, of {MEMORY_BOUND_MB:,} allowed",
        kept=grew < MEMORY_BOUND_MB and after == 200 and set(statuses) <= {"200", "408", "503"},
        facts={"grew_mb": grew},
    )


def _counted(statuses: list[int]) -> str:
    return ", ".join(f"{count} × {status}" for status, count in Counter(statuses).items())
