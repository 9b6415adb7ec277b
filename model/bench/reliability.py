"""Does to servers, under load, what production will: `make reliability` prints README's tables.

Each function does something to servers and returns what came of it, Trials. ARGS of make names
single ones; `soak` runs for half an hour and only when it is named.
"""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil

from model.bench.load import Workload, closed_loop
from model.bench.nodes import Nodes, fresh_token
from model.bench.results import machine
from model.bench.server import ServerProcess
from model.bench.trial import (
    TURNED_AWAY,
    Trial,
    health,
    kill_all,
    kill_helper,
    kill_one,
    metrics,
    redeploy,
    replicas,
    under,
    watched,
    whole,
)

HALVES = ("--num_replicas", "2", "--cpus_per_replica", "0.5")  # there is room for a third
OTHER = ("--layout", "contiguous")


def ray_server(*options: str) -> ServerProcess:
    """The Ray server with a token of ours, so that others can join its cluster."""
    return ServerProcess("model.ray_server", *options, **fresh_token())


def killed(server: ServerProcess, work: Workload, seconds: float = 60, every: float = 10) -> Trial:
    """One of the replicas is killed, again and again."""
    times = [every / 2 + i * every for i in range(int(seconds / every))]
    deeds = [(at, "a replica killed", lambda: kill_one(server)) for at in times]
    what = f"one of 2 replicas killed, {len(deeds)} times"
    trial = under(server, what, work, seconds, deeds)
    kills = [when - trial.run.began for when, _ in trial.deeds]
    around = [
        s.done - s.due
        for s in trial.run.samples
        if any(s.due < kill + 1 and s.done > kill for kill in kills)
    ]
    trial.facts["p99 of the requests around a kill, s"] = float(np.quantile(around, 0.99))
    whole(server, 2)
    return trial


def all_killed(server: ServerProcess, work: Workload, seconds: float = 30) -> Trial:
    """Every replica is killed at once, as the only one would be: nobody can answer."""
    with watched(server) as told:
        deeds = [(2.0, "all killed", lambda: kill_all(server))]
        trial = under(
            server,
            "all replicas killed at once, 20 requests a second",
            work,
            seconds,
            deeds,
            rate=20,
        )
        whole(server, 2)
    (when, _), *_ = trial.deeds
    down = next((t for t, state in told if t > when and state["model ready"] != "200"), math.inf)
    up = next((t for t, state in told if t > down and state["model ready"] == "200"), math.inf)
    trial.facts["not ready after, s"] = down - when
    trial.facts["ready again after, s"] = up - when
    trial.facts["liveness"] = ", ".join(sorted({state["live"] for _, state in told}))
    return trial


def stuck(server: ServerProcess, work: Workload, seconds: float = 40) -> Trial:
    """A replica is stopped: it lives, and answers nothing ever again."""
    deeds = [(2.0, "a replica stopped", lambda: kill_one(server, signal.SIGSTOP))]
    trial = under(server, "one of 2 replicas stuck for ever", work, seconds, deeds)
    whole(server, 2)
    return trial


def slow(server: ServerProcess, work: Workload, seconds: float = 20) -> Trial:
    """A replica gets a third of the time that it would take."""
    over = threading.Event()

    def stutter() -> None:
        victim = replicas(server)[0]
        while not over.wait(0.1):
            victim.suspend()
            over.wait(0.2)
            victim.resume()

    ender = threading.Timer(seconds - 1, over.set)
    ender.start()
    trial = under(server, "one of 2 replicas slow", work, seconds, [(1.0, "slowed", stutter)])
    ender.join()
    return trial


def controller(server: ServerProcess, work: Workload, seconds: float = 20) -> Trial:
    """Serve's controller is killed; Ray starts it again."""
    deeds = [(2.0, "the controller killed", lambda: kill_helper(server, "ray::ServeCon"))]
    trial = under(server, "Serve's controller killed", work, seconds, deeds)
    whole(server, 2)
    return trial


def overload(server: ServerProcess, work: Workload, seconds: float = 60) -> Trial:
    """Three times as many requests arrive as can be answered, of 8 pictures each.

    So large, they cost much to answer and little to send and to refuse.
    """
    eight = Workload(work.pictures[:16], work.labels[:16], each=8)
    calm = max(2.0, seconds / 10)
    capacity = closed_loop(server.predict, eight, 8, calm, warmup_s=1).throughput
    alone = under(server, "", work, calm, clients=1).latency_s(0.5)
    memory: list[int] = []
    looks = [(seconds * at, "", lambda: memory.append(server.memory())) for at in (0.4, 0.9)]
    what = "3 times the load it can bear"
    trial = under(server, what, eight, seconds, looks, rate=3 * capacity)
    again = under(server, "", work, calm, clients=1).latency_s(0.5)
    bound = metrics(server)["inference_requests_limit"] / trial.run.throughput
    trial.facts |= {
        "arrivals a second": 3 * capacity,
        "answers a second, before": capacity,
        "answers a second": trial.run.throughput,
        "refused after, ms (median)": 1000 * trial.latency_s(0.5, TURNED_AWAY),
        "answered within, s (p99)": trial.latency_s(0.99),
        "the queue's length in seconds of work": bound,
        "memory in the middle, GB": memory[0] / 1e9,
        "memory at the end, GB": memory[-1] / 1e9,
        "one client alone, before, ms": 1000 * alone,
        "one client alone, after, ms": 1000 * again,
        "cores used by the generator": trial.run.client_cpu,
        "cores used by KServe's process": sum(trial.run.cpu.values()),
    }
    return trial


def changed(
    server: ServerProcess, work: Workload, what: str, count: int, *options: str, seconds: float = 15
) -> Trial:
    """The server is redeployed with other options."""
    options = (*HALVES, "--num_replicas", str(count), *options)
    trial = under(server, what, work, seconds, [(1.0, what, lambda: redeploy(server, *options))])
    trial.facts["the change was done after, s"] = trial.seconds[0]
    whole(server, count)
    return trial


def changes(server: ServerProcess, work: Workload) -> Iterator[Trial]:
    """More replicas, fewer, a new version, weights loaded again."""
    yield changed(server, work, "3 replicas in place of 2", 3)
    yield changed(server, work, "2 replicas in place of 3", 2)
    yield changed(server, work, "another version, replica by replica", 2, *OTHER)
    yield changed(server, work, "weights loaded again", 2, *OTHER, "--reload")


def scaled(server: ServerProcess, work: Workload, seconds: float = 25, delay: float = 3) -> Trial:
    """The load rises and falls, and the number of replicas with it.

    delay: seconds for which the load must ask for another number.
    """
    auto = ["--num_replicas", "auto", "--max_replicas", "2", "--cpus_per_replica", "0.5"]
    auto += ["--upscale_delay_s", str(delay), "--downscale_delay_s", str(delay)]
    redeploy(server, *auto, *OTHER)
    whole(server, 1)
    with watched(server, metrics, 0.2) as told:
        low = under(server, "", work, 3, clients=1)
        what = "autoscaling from 1 to 2 replicas and back, 32 clients"
        trial = under(server, what, work, seconds, clients=32)
        fell = time.time()
        last = under(server, "", work, delay + 8, clients=1)
        whole(server, 1)
    seen = [(when, what["inference_replicas"]) for when, what in told]
    up = next((t for t, n in seen if n == 2), math.inf)
    down = next((t for t, n in seen if t > up and n == 1), math.inf)
    trial.facts["2 replicas serve after, s"] = up - trial.run.began
    trial.facts["1 replica after, s"] = down - fell
    trial.facts["lost before and after"] = sum(run.failed + run.refused for run in (low, last))
    return trial


def ended(server: ServerProcess, work: Workload, seconds: float = 5) -> Trial:
    """The server gets SIGTERM; what is in is answered."""
    deeds = [(seconds / 2, "SIGTERM", server.process.terminate)]
    return under(server, "the server ended (SIGTERM)", work, seconds, deeds, ends=True)


def node(work: Workload, seconds: float = 30) -> Trial:
    """A worker node is lost with the replica on it."""
    with Nodes(1, 1) as nodes:
        join = ("--address", nodes.address, *HALVES)
        with ServerProcess("model.ray_server", *join, **nodes.env) as server:
            deeds = [(3.0, "a node lost", lambda: nodes.lose(1))]
            trial = under(server, "one of 2 nodes lost", work, seconds, deeds)
            whole(server, 2)
    return trial


def soak(server: ServerProcess, work: Workload, minutes: float = 30) -> Trial:
    """70 % of what it can do, for half an hour: memory and open files of every process."""
    capacity = under(server, "", work, 10).run.throughput

    def sizes(_: ServerProcess) -> dict[psutil.Process, tuple[float, int]]:
        found = {}
        for process in server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[process] = process.memory_full_info().uss / 1e6, process.num_fds()
        return found

    with watched(server, sizes, every=10) as told:
        what = f"{minutes:g} minutes at 70 % of what it can do"
        trial = under(server, what, work, minutes * 60, rate=0.7 * capacity)
    settled = trial.run.began + minutes * 60 / 6  # caches and pools fill first
    told = [(when, found) for when, found in told if when > settled]
    hours = np.array([(when - settled) / 3600 for when, _ in told])
    lasting = [p for p in server.processes() if all(p in found for _, found in told)]
    for number, process in enumerate(lasting):
        memory, files = np.array([found[process] for _, found in told], float).T
        slope, half = _slope(hours, memory)
        trial.facts[f"{number} {process.name()}"] = (
            f"{memory[-1]:.0f} MB, {slope:+.1f} ± {half:.1f} MB an hour; open files "
            f"{files[0]:.0f} at first, {files[-1]:.0f} at last, {files.max():.0f} at most"
        )
    return trial


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a straight line through the points, and half of its 95 % interval."""
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), 1.96 * math.sqrt(covariance[0, 0])


def states(work: Workload) -> Iterator[dict[str, str]]:
    """What the health endpoints say in each state that a server can be in."""
    with ray_server(*HALVES) as server:
        yield {"state": "both replicas run", **health(server)}
        found = []
        look = (2.0, "", lambda: found.append({"state": "under load", **health(server)}))
        under(server, "", work, 3, [look])
        yield from found
        kill_one(server).wait()
        yield {"state": "one of two replicas dead", **after(1, server)}
        whole(server, 2)
        kill_all(server)
        yield {"state": "all replicas dead", **after(1, server)}
        whole(server, 2)
        yield {"state": "they run again", **health(server)}
        for process in replicas(server):
            process.suspend()
        yield {"state": "all replicas stuck for 12 s", **after(12, server)}
        whole(server, 2)
        kill_helper(server, "ray::ServeCon")
        yield {"state": "Serve's controller dead", **after(1, server)}
        whole(server, 2)
        kill_helper(server, "gcs_server")
        yield {"state": "Ray's head (its GCS) dead for 8 s", **after(8, server)}


def after(seconds: float, server: ServerProcess) -> dict[str, str]:
    """Its health then."""
    time.sleep(seconds)
    return health(server)


TRIALS: dict[str, Callable] = {
    "killed": killed,
    "all_killed": all_killed,
    "stuck": stuck,
    "slow": slow,
    "controller": controller,
    "overload": overload,
    "changes": changes,
    "scaled": scaled,
    "soak": soak,
    "ended": ended,
}


def main() -> None:
    """Print what the machine is, a row for each trial, then the table of health."""
    known = [*TRIALS, "node", "states"]
    names = sys.argv[1:] or [name for name in known if name != "soak"]
    if unknown := set(names) - set(known):
        sys.exit(f"no such trial: {', '.join(unknown)}; there are {', '.join(known)}")
    print(json.dumps(machine()))
    work, facts = Workload.drawn(), []
    for i, trial in enumerate(_trials(names, work)):
        show(trial.row(), header=i == 0)
        facts += [f"{trial.what}: {name}: {_shown(value)}" for name, value in trial.facts.items()]
    print(*facts, sep="\n")
    if "states" in names:
        for i, row in enumerate(states(work)):
            show(row, header=i == 0)


def _trials(names: list[str], work: Workload) -> Iterator[Trial]:
    """One server for all, as far as they can share one."""
    if shared := [name for name in TRIALS if name in names]:
        with ray_server(*HALVES, "--max_queued_requests", "16") as server:
            for name in shared:
                found = TRIALS[name](server, work)
                yield from [found] if isinstance(found, Trial) else found
    if "node" in names:
        yield node(work)


def show(row: dict, header: bool) -> None:
    """A row of a table in Markdown, with its header if it is the first."""
    if header:
        print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


def _shown(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
