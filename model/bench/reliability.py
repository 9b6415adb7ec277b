"""Does to servers, under load, what production will: `make reliability` prints README's tables.

Each function does one thing to servers and returns what came of it, a Trial. ARGS of make names
single ones; `soak` runs for half an hour and only when it is named.
"""

import json
import math
import secrets
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from model.bench.load import RIGHT, Workload
from model.bench.nodes import Nodes
from model.bench.results import machine
from model.bench.server import ServerProcess
from model.bench.trial import (
    TURNED_AWAY,
    Trial,
    health,
    kill_one,
    metrics,
    redeploy,
    replicas,
    under,
    watched,
    whole,
)

TWO = ("--num_replicas", "2")
HALVES = ("--num_replicas", "2", "--cpus_per_replica", "0.5")


def ray_server(*options: str, **env: str) -> ServerProcess:
    """The Ray server with a token of ours, so that others can join its cluster."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return ServerProcess("model.ray_server", *options, **token | env)


def killed(server: ServerProcess, work: Workload, seconds: float = 60, every: float = 10) -> Trial:
    """One of the replicas is killed, again and again."""
    times = [every / 2 + i * every for i in range(int(seconds / every))]
    deeds = [(at, "killed", lambda: kill_one(server)) for at in times]
    what = f"one of 2 replicas killed, {len(deeds)} times"
    trial = under(server, what, work, seconds, deeds)
    gaps = [when - trial.run.began for when, _ in trial.deeds]
    hit = [
        s.done - s.due
        for s in trial.run.samples
        if s.outcome == RIGHT and any(s.due <= gap + 1 and s.done >= gap for gap in gaps)
    ]
    if hit:
        worst = statistics.quantiles(hit, n=100)[98]
        trial.remarks.append(f"p99 of the {len(hit)} requests around a kill: {worst:.2f} s")
    whole(server, 2)
    return trial


def stuck(server: ServerProcess, work: Workload, seconds: float = 45) -> Trial:
    """A replica is stopped: it lives, and answers nothing ever again."""
    deeds = [(3.0, "stopped", lambda: kill_one(server, signal.SIGSTOP))]
    trial = under(server, "one of 2 replicas stuck for ever", work, seconds, deeds)
    whole(server, 2)
    return trial


def slow(server: ServerProcess, work: Workload, seconds: float = 20) -> Trial:
    """A replica gets a third of the time it needs."""
    over = threading.Event()

    def stutter() -> None:
        victim = replicas(server)[0]
        try:
            while not over.wait(0.1):
                victim.suspend()
                over.wait(0.2)
                victim.resume()
        finally:
            victim.resume()

    ender = threading.Timer(seconds - 2, over.set)
    ender.start()
    trial = under(server, "one of 2 replicas slow", work, seconds, [(1.0, "slowed", stutter)])
    ender.join()
    return trial


def controller(server: ServerProcess, work: Workload, seconds: float = 20) -> Trial:
    """Serve's controller is killed; Ray starts it again."""

    def kill() -> None:
        for process in server.processes():
            if process.name().startswith("ray::ServeCon"):
                process.kill()

    trial = under(server, "Serve's controller killed", work, seconds, [(3.0, "killed", kill)])
    whole(server, 2)
    return trial


def only(work: Workload, seconds: float = 30) -> Trial:
    """The only replica is killed."""
    with ray_server("--num_replicas", "1") as server, watched(server) as seen:
        deeds = [(5.0, "killed", lambda: kill_one(server))]
        trial = under(server, "the only replica killed", work, seconds, deeds, clients=4)
    (when, _), *_ = trial.deeds
    down = next((t for t, state in seen if t > when and state["model ready"] != "200"), math.inf)
    up = next((t for t, state in seen if t > down and state["model ready"] == "200"), math.inf)
    trial.remarks.append(
        f"readiness false {down - when:.2f} s after the kill, true again after {up - when:.1f} s; "
        f"liveness {sorted({state['live'] for _, state in seen})}"
    )
    return trial


def node(work: Workload, seconds: float = 30) -> Trial:
    """A worker node is lost with the replica on it."""
    with (
        Nodes(1, 1) as nodes,
        ServerProcess(
            "model.ray_server",
            *("--address", nodes.address, *HALVES),
            **nodes.env,
        ) as server,
    ):
        deeds = [(5.0, "lost", lambda: nodes.raylet(1).kill())]
        trial = under(server, "one of 2 nodes lost", work, seconds, deeds)
        whole(server, 2)
    return trial


def overload(work: Workload, seconds: float = 60) -> Trial:
    """Three times as many requests arrive as can be answered, of 8 pictures each."""
    eight = Workload(work.pictures[:16], work.labels[:16], each=8)
    with ray_server(*TWO, "--max_queued_requests", "16") as server:
        before = under(server, "", eight, 8, clients=8)
        capacity = before.answered / before.run.seconds
        alone = under(server, "", work, 3, clients=1).latency_s(0.5)
        memory: list[int] = []
        looks = [
            (share * seconds, "", lambda: memory.append(server.memory())) for share in (0.4, 0.9)
        ]
        what = "3 times the load it can bear"
        trial = under(server, what, eight, seconds, looks, rate=3 * capacity)
        after = under(server, "", work, 3, clients=1).latency_s(0.5)
        bound = metrics(server)["inference_requests_limit"] / capacity
    refusal = trial.latency_s(0.5, TURNED_AWAY)
    front = sum(trial.run.cpu.values())
    trial.remarks += [
        f"capacity {capacity:.1f} requests a second, sent {3 * capacity:.1f}; "
        f"answered {trial.answered / trial.run.seconds:.1f} a second",
        f"refusals after {1000 * refusal:.1f} ms (median), answers within "
        f"{trial.latency_s(0.99):.2f} s (p99); the queue's bound is {bound:.2f} s",
        f"memory {memory[0] / 1e9:.2f} GB in the middle, {memory[1] / 1e9:.2f} GB at the end; "
        f"one client alone {1000 * alone:.0f} ms before, {1000 * after:.0f} ms after",
        f"cores used: the generator {trial.run.client_cpu:.2f}, KServe's process {front:.2f}",
    ]
    return trial


def changes(work: Workload, seconds: float = 15) -> Iterator[Trial]:
    """More replicas, fewer, a new version, weights loaded again, the end."""
    other = ("--layout", "contiguous")
    steps = [
        ("3 replicas in place of 2", 3, ()),
        ("2 replicas in place of 3", 2, ()),
        ("another version, replica by replica", 2, other),
        ("weights loaded again", 2, (*other, "--reload")),
    ]
    with ray_server(*HALVES) as server:
        for what, count, options in steps:
            options = (*HALVES, "--num_replicas", str(count), *options)
            change = (1.0, what, lambda options=options: redeploy(server, *options))
            yield under(server, what, work, seconds, [change])
            whole(server, count)
        end = (2.0, "SIGTERM", server.process.terminate)
        yield under(server, "the server ended (SIGTERM)", work, 4, [end], ends=True)


def scaled(work: Workload, seconds: float = 25) -> Trial:
    """The load rises and falls, and the number of replicas with it."""
    options = ("--num_replicas", "auto", "--max_replicas", "2", "--downscale_delay_s", "5")
    with ray_server(*options) as server, watched(server, metrics, 0.2) as told:
        low = under(server, "", work, 5, clients=1)
        trial = under(server, "autoscaling from 1 to 2 replicas", work, seconds, clients=32)
        high = time.time()
        last = under(server, "", work, 20, clients=1)
    seen = [(when, what["inference_replicas"]) for when, what in told]
    up = next((t for t, n in seen if n == 2), math.inf)
    down = next((t for t, n in seen if t > up and n == 1), math.inf)
    trial.remarks.append(
        f"the second replica served {up - trial.run.began:.1f} s after the load rose and was gone "
        f"{down - high:.1f} s after it fell; one client before and after: "
        f"{low.failed + last.failed} failed, {low.refused + last.refused} refused"
    )
    return trial


def soak(work: Workload, minutes: float = 30) -> Trial:
    """70 % of what it can do, for half an hour: memory and open files of every process."""
    with ray_server(*TWO) as server:
        capacity = under(server, "", work, 10).answered / 10
        seen: list[tuple[float, str, float, int]] = []
        over = threading.Event()

        def look() -> None:
            names: dict[int, str] = {}
            while not over.wait(10):
                for process in server.processes():
                    name = names.setdefault(process.pid, f"{process.name()} {len(names)}")
                    memory = process.memory_full_info().uss
                    seen.append((time.time(), name, memory, process.num_fds()))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            what = f"{minutes:g} minutes at 70 % of its capacity"
            trial = under(server, what, work, minutes * 60, rate=0.7 * capacity)
        finally:
            over.set()
            thread.join()
    settled = trial.run.began + minutes * 60 / 6  # caches and pools fill first
    for name in dict.fromkeys(name for _, name, _, _ in seen):
        mine = [row for row in seen if row[1] == name and row[0] > settled]
        if len(mine) > 10:
            hours = np.array([(row[0] - settled) / 3600 for row in mine])
            memory, files = (np.array([row[i] for row in mine], float) for i in (2, 3))
            slope, error = _slope(hours, memory / 1e6)
            trial.remarks.append(
                f"{name}: {memory[-1] / 1e6:.0f} MB, {slope:+.1f} ± {error:.1f} MB an hour; "
                f"{files[-1]:.0f} files open, at most {files.max():.0f}, at least {files.min():.0f}"
            )
    return trial


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a straight line through the points, and half of its 95 % interval."""
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), 1.96 * math.sqrt(covariance[0, 0])


def states(work: Workload) -> list[dict]:
    """What the health endpoints say in each state a server can be in."""
    rows = []

    def note(state: str, server: ServerProcess) -> None:
        rows.append({"state": state, **health(server)})

    with ray_server(*TWO) as server:
        note("both replicas run", server)
        under(server, "", work, 3, [(2.0, "", lambda: note("under load", server))])
        first = kill_one(server)
        first.wait()
        time.sleep(1)
        note("one replica of two dead", server)
        whole(server, 2)
        for process in replicas(server):
            process.kill()
        time.sleep(1)
        note("all replicas dead", server)
        whole(server, 2)
        note("they run again", server)
        for process in replicas(server):
            process.suspend()
        time.sleep(12)
        note("all replicas stuck", server)
        whole(server, 2)
        for process in server.processes():
            if process.name().startswith("ray::ServeCon"):
                process.kill()
        time.sleep(1)
        note("Serve's controller dead for a second", server)
        whole(server, 2)
        for process in server.processes():
            if process.name() == "gcs_server":
                process.kill()
        time.sleep(8)
        note("Ray's head (GCS) dead for 8 seconds", server)
    return rows


ON_TWO = {"killed": killed, "stuck": stuck, "slow": slow, "controller": controller}
ALONE: dict[str, Callable] = {
    "only": only,
    "node": node,
    "overload": overload,
    "changes": changes,
    "scaled": scaled,
    "soak": soak,
}


def main() -> None:
    """Print what the machine is, then a row for each trial, and the health table."""
    names = sys.argv[1:] or [*ON_TWO, *ALONE, "states"]
    if unknown := set(names) - {*ON_TWO, *ALONE, "states"}:
        sys.exit(f"no such trial: {', '.join(unknown)}; there are {', '.join([*ON_TWO, *ALONE])}")
    if not sys.argv[1:]:
        names.remove("soak")
    print(json.dumps(machine()))
    work, header = Workload.drawn(), False
    for trial in _trials(names, work):
        if not header:
            print("| " + " | ".join(trial.row()) + " |\n|" + "---|" * len(trial.row()))
            header = True
        print("| " + " | ".join(map(str, trial.row().values())) + " |")
        for remark in trial.remarks:
            print(f"    {remark}")
        sys.stdout.flush()
    if "states" in names:
        for row in states(work):
            print("| " + " | ".join(row.values()) + " |", flush=True)


def _trials(names: list[str], work: Workload) -> Iterator[Trial]:
    together = [name for name in names if name in ON_TWO]
    if together:
        with ray_server(*TWO) as server:
            for name in together:
                yield ON_TWO[name](server, work)
    for name in names:
        if name in ALONE:
            done = ALONE[name](work)
            yield from [done] if isinstance(done, Trial) else done


if __name__ == "__main__":
    main()
