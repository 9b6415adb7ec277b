"""What the notebooks share: showing code, predictions beside measurements, processes by role."""

import argparse
import contextlib
import difflib
import inspect
import logging
import os
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

# Said once by parts that miss nothing here: gRPC as a server starts, Ray without ipywidgets.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)

import psutil
import ray
import requests
import yaml
from IPython.display import Markdown
from ray._raylet import AuthenticationTokenLoader, Config
from ray.util.state import list_actors, list_nodes
from tqdm import tqdm

from model import options, shapes
from model.bench import client
from model.bench.nodes import Nodes
from model.bench.server import ServerProcess
from model.cluster import Cluster
from model.options import free_port


def code(thing: Any) -> Markdown:
    """The source of a module, class or function, as it stands in the repository."""
    return Markdown(f"```python\n{textwrap.dedent(inspect.getsource(thing)).strip()}\n```")


def diff(old: ModuleType, new: ModuleType) -> Markdown:
    """What changes from one module to the other."""
    texts = [inspect.getsource(module).splitlines() for module in (old, new)]
    names = [Path(module.__file__).name for module in (old, new)]
    lines = difflib.unified_diff(*texts, *names, lineterm="", n=2)
    return Markdown("```diff\n" + "\n".join(lines) + "\n```")


def table(rows: Iterable[dict[str, Any]]) -> Markdown:
    """Dictionaries with the same keys, as a table; floats with three digits."""
    rows = list(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def compare(prediction: Any, measured: Any, unit: str = "") -> None:
    """The reader's prediction beside what was measured."""
    measured = f"{measured:.3g}" if isinstance(measured, float) else measured
    said = "no prediction yet" if prediction is None else f"you predicted {prediction}"
    print(f"{said}; measured: {measured} {unit}".strip())


def progress(steps: Iterable, what: str) -> Iterable:
    """The same steps, with a line that counts them while the reader waits."""
    return tqdm(steps, desc=what, bar_format="{desc}: {n_fmt} in {elapsed}", file=sys.stdout)


# -- requests that overlap -------------------------------------------------------------------


def at_once(server: ServerProcess, requests_: list[list[bytes]]) -> list[dict[str, Any]]:
    """Send all requests at the same moment, one thread each, and wait for all answers.

    Returns for each, in order: `sent` and `answered` (as the client saw it), `worker`, `started`
    and `finished` (as the server tells in its headers), all in seconds since 1970.
    """

    def ask(pictures: list[bytes]) -> dict[str, Any]:
        body = client.v1_body(pictures)
        sent = time.time()
        answer = requests.post(
            f"{server.url}/v1/models/{server.name}:predict", json=body, timeout=120
        )
        answered = time.time()
        answer.raise_for_status()
        return {
            "sent": sent,
            "answered": answered,
            "worker": answer.headers["x-worker"],
            "started": float(answer.headers["x-started"]),
            "finished": float(answer.headers["x-finished"]),
        }

    with ThreadPoolExecutor(len(requests_)) as threads:
        return list(threads.map(ask, requests_))


def health_checks_during(server: ServerProcess, pictures: list[bytes]) -> tuple[list[float], float]:
    """Ask for the server's health, again and again, while it works on one large request.

    Returns the seconds of each health check, and of the large request.
    """
    checks = []
    with ThreadPoolExecutor(1) as thread, requests.Session() as session:
        large = thread.submit(at_once, server, [pictures])
        while not large.done():
            asked = time.time()
            session.get(f"{server.url}/v2/health/live", timeout=120).raise_for_status()
            checks.append(time.time() - asked)
        request = large.result()[0]
    return checks, request["answered"] - request["sent"]


def seconds_until_all(answers: list[dict[str, Any]]) -> float:
    """From the first request's sending to the last one's answer."""
    return max(a["answered"] for a in answers) - min(a["sent"] for a in answers)


def spans(answers: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """When each request was worked on (start, end), in the order of the starts."""
    return sorted((answer["started"], answer["finished"]) for answer in answers)


def overlaps(answers: list[dict[str, Any]]) -> int:
    """How many requests began before the one that began before them had ended."""
    return sum(later[0] < earlier[1] for earlier, later in pairwise(spans(answers)))


def largest_difference(ours: list[list[dict]], theirs: list[list[dict]]) -> float:
    """Between the probabilities of two answers for the same pictures; the labels must agree."""
    pairs = list(zip(sum(ours, []), sum(theirs, []), strict=True))
    assert all(a["label"] == b["label"] for a, b in pairs), "the labels differ"
    return max(abs(a["probability"] - b["probability"]) for a, b in pairs)


def lanes(answers: list[dict[str, Any]], names: dict[str, str]) -> dict[str, list[tuple]]:
    """For each worker when it worked on which request, for plots.timeline.

    The requests are numbered as they were sent; `names` gives the workers' ids their names.
    """
    found: dict[str, list[tuple]] = {name: [] for name in names.values()}
    for i, answer in enumerate(answers, start=1):
        found[names[answer["worker"]]].append((answer["started"], answer["finished"], i))
    return {name: work for name, work in found.items() if work}


def number(workers: Iterable[str], names: dict[str, str] | None = None) -> dict[str, str]:
    """Names for worker ids in the order they are seen: replica 1, replica 2, ..."""
    names = dict(names or {})
    for worker in workers:
        names.setdefault(worker, f"replica {len(names) + 1}")
    return names


# -- loads -----------------------------------------------------------------------------------

# A part of a request's time -> from one moment to the next: the client's own, or those that the
# server tells in its headers.
PARTS = {
    "until the server takes it in": ("sent", "x-received"),
    "until it is read": ("x-received", "x-read"),
    "until its batch begins": ("x-read", "x-started"),
    "decoding the batch": ("x-started", "x-decoded"),
    "network": ("x-decoded", "x-finished"),
    "answer's way back": ("x-finished", "done"),
}


def parts(headers: list[dict]) -> dict[str, float]:
    """Where the time of requests went, from Run.headers: mean milliseconds of each part."""
    return {
        part: 1000 * statistics.mean(float(h[end]) - float(h[begin]) for h in headers)
        for part, (begin, end) in PARTS.items()
    }


def rate(records: list[dict], variant: str, clients: int = 32) -> float:
    """Requests a second of a variant: the median of its runs with so many clients."""
    runs = [r for r in records if (r["variant"], r["clients"]) == (variant, clients)]
    return statistics.median(run["throughput"] for run in runs)


def operator_sees(told: list[tuple[float, dict]]) -> dict[str, list[tuple[float, float]]]:
    """From a server's metrics, asked again and again: what it did, over the seconds.

    told: of trial.watched. Returns requests that came in a second, replicas, requests inside, and
    mean seconds of a prediction.
    """

    def sum_of(metrics: dict, prefix: str) -> float:
        return sum(value for name, value in metrics.items() if name.startswith(prefix))

    found = {name: [] for name in ("requests a second", "replicas", "requests inside", "seconds")}
    for (before, old), (now, new) in pairwise(told):
        at = now - told[0][0]

        def grew(prefix: str, old: dict = old, new: dict = new) -> float:
            return sum_of(new, prefix) - sum_of(old, prefix)

        inside = new["inference_requests_inside"]
        came = grew("inference_requests_total") + inside - old["inference_requests_inside"]
        found["requests a second"].append((at, came / (now - before)))
        found["replicas"].append((at, new["inference_replicas"]))
        found["requests inside"].append((at, inside))
        if answered := grew("request_predict_seconds_count"):
            found["seconds"].append((at, grew("request_predict_seconds_sum") / answered))
    found["mean seconds of a prediction"] = found.pop("seconds")
    return found


# -- processes by role -----------------------------------------------------------------------

# Part of a process's command line -> what it is. Ray's own helpers, then ours.
ROLES = {
    "gcs_server": "GCS (cluster state)",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "_private/monitor.py": "autoscaler monitor",
    "log_monitor.py": "log monitor",
    "DashboardAgent": "dashboard agent",
    "RuntimeEnvAgent": "runtime agent",
    "ray::IDLE": "idle worker",
    "model.ray_server": "KServe server",
    "model.kserve_server": "KServe server",
}


def running() -> dict[str, psutil.Process]:
    """The processes below this notebook, by role: those of Ray, of Serve, and our servers.

    Serve's actors are told apart by Ray's state API.
    """
    roles = _actor_roles()
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            line = " ".join(process.cmdline())
            role = roles.get(process.pid) or next((r for k, r in ROLES.items() if k in line), None)
            if role in found:
                role = next(f"{role} {i}" for i in range(2, 100) if f"{role} {i}" not in found)
            if role:
                found[role] = process
    return found


def _actor_roles() -> dict[int, str]:
    """pid -> role of Serve's actors; nothing while no cluster is joined."""
    if not ray.is_initialized():
        return {}
    roles: dict[int, str] = {}
    replicas: dict[str, int] = {}
    actors = list_actors(here(), filters=[("state", "=", "ALIVE")], limit=1000)
    for actor in sorted(actors, key=lambda actor: actor.pid):
        if actor.class_name == "ServeController":
            roles[actor.pid] = "Serve controller"
        elif actor.class_name == "ProxyActor":
            roles[actor.pid] = "HTTP proxy"
        elif actor.class_name.startswith("ServeReplica:"):
            application = actor.class_name.split(":")[1]
            replicas[application] = replicas.get(application, 0) + 1
            roles[actor.pid] = f"replica {replicas[application]} of {application}"
    return roles


def places(processes: Iterable[str]) -> dict[str, list[str]]:
    """The roles sorted by where they belong, for plots.processes (a cluster of one node)."""
    drivers = [role for role in processes if role.startswith("KServe server")]
    actors = [role for role in processes if role in set(_actor_roles().values())]
    rest = [role for role in processes if role not in drivers + actors]
    return {
        "programs that joined the cluster": drivers,
        "head node: actors of Serve": actors,
        "head node: Ray's housekeeping": rest,
    }


def here() -> str:
    """The address of the cluster this notebook is on; others on the machine are none of ours."""
    return ray.get_runtime_context().gcs_address


@contextlib.contextmanager
def joined(cluster: Nodes) -> Iterator[None]:
    """In this block this process belongs to the cluster, whose token counts here from then on."""
    os.environ.update(cluster.env)
    Config.initialize("")  # Ray has read its settings as it was imported, and the last token since
    AuthenticationTokenLoader.instance().reset_cache()
    there = Cluster(address=cluster.address)
    try:
        yield
    finally:
        there.stop()


def nodes() -> dict[str, str]:
    """Ray's nodes by role (head, worker 1, ...) and their state, from Ray's state API."""
    found = sorted(list_nodes(here()), key=lambda node: not node.is_head_node)
    return {
        "head node" if node.is_head_node else f"worker node {i}": node.state
        for i, node in enumerate(found)
    }


def by_node(cluster: Nodes) -> dict[str, list[str]]:
    """The living nodes and the actors of Serve on each, from Ray's state API, for plots."""
    with joined(cluster):
        roles = _actor_roles()
        actors = list_actors(here(), filters=[("state", "=", "ALIVE")], limit=1000)
        alive = [node for node in list_nodes(here()) if node.state == "ALIVE"]
    found = {}
    for node in sorted(alive, key=lambda node: (not node.is_head_node, node.node_ip)):
        there = sorted(roles[actor.pid] for actor in actors if actor.node_id == node.node_id)
        found["head node" if node.is_head_node else f"worker at {node.node_ip}"] = there
    return found


def cpu_used(action: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds each process used while `action` ran, largest first."""
    processes = running()
    before = {role: sum(process.cpu_times()[:2]) for role, process in processes.items()}
    action()
    used = {}
    for role, process in processes.items():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            used[role] = sum(process.cpu_times()[:2]) - before[role]
    return dict(sorted(used.items(), key=lambda item: -item[1]))


# -- exercises -------------------------------------------------------------------------------


async def check_scale_hello(scale_hello: Callable[[int], Any]) -> None:
    """Notebook 1: does `scale_hello(3)` run three replicas?"""
    handle = scale_hello(3)
    if handle is None:
        return print("not yet: scale_hello returns nothing; return what serve.run returns")
    answers = [handle.remote() for _ in range(120)]
    replicas = {await answer for answer in answers}
    if len(replicas) != 3:
        return print(f"not yet: {len(replicas)} replicas answered, 3 were asked for")
    print("right: three replicas answered")


def check_my_v2_body(my_v2_body: Callable[[list[bytes]], dict], server: ServerProcess) -> None:
    """Notebook 2: does the server answer the body as it answers ours?"""
    pictures = [shapes.jpeg("green square", seed=3), shapes.jpeg("blue star", seed=4)]
    body = my_v2_body(pictures)
    if body is None:
        return print("not yet: my_v2_body returns nothing")
    url = f"{server.url}/v2/models/{server.name}/infer"
    answer = requests.post(url, json=body, timeout=60)
    if answer.status_code != 200:
        return print(f"not yet: the server says {answer.json().get('error', answer.text)}")
    labels = next(out for out in answer.json()["outputs"] if out["name"] == "label")["data"]
    if labels[::5] != ["green square", "blue star"]:
        return print(f"not yet: for a green square and a blue star it answers {labels[::5]}")
    print("right: both pictures are answered, in order")


def check_busy_at_once(busy_at_once: Callable[[list[tuple[float, float]]], int]) -> None:
    """Notebook 3: counts busy_at_once right?"""
    cases = [
        ([(0, 1), (1, 2), (2, 3)], 1, "one ends when the next begins"),
        ([(0, 4), (1, 2), (1, 3)], 3, "two lie within the first"),
        ([(3, 5), (0, 1), (4, 6)], 2, "they need not be in order"),
        ([(0, 2), (1, 3), (2.5, 4)], 2, "each overlaps the one before, never three at once"),
    ]
    for spans, expected, what in cases:
        found = busy_at_once(spans)
        if found is None:
            return print("not yet: busy_at_once returns nothing")
        if found != expected:
            return print(f"not yet: {spans} gives {found}, not {expected} ({what})")
    print("right: four cases of four")


def _accepted(exercise: Callable[..., list[str]], *args: Any) -> argparse.Namespace | str:
    """What model.ray_server makes of the options that an exercise returns, or what is wrong."""
    chosen = exercise(*args)
    if chosen is None:
        return f"{exercise.__name__} returns nothing"
    if not isinstance(chosen, list) or not all(isinstance(word, str) for word in chosen):
        return 'return a list of strings, as in ["--threads", "1"]'
    ports = [f"--http_port={free_port()}", f"--grpc_port={free_port()}"]
    try:
        return options.ray_options([*ports, *chosen])
    except SystemExit as refusal:
        return str(refusal)


def refusal(argv: list[str]) -> None:
    """What model.ray_server says to options that it refuses."""
    print(_accepted(lambda: argv))


def manifest(name: str) -> dict:
    """A file of deploy/, read."""
    return yaml.safe_load((Path(__file__).parent.parent / "deploy" / name).read_text())


def check_four_replicas(four_replicas: Callable[[], list[str]]) -> None:
    """Notebook 3: does the server accept the options, and do they say what was asked?"""
    accepted = _accepted(four_replicas)
    if isinstance(accepted, str):
        return print(f"not yet: {accepted}")
    reserved = accepted.num_replicas * accepted.cpus_per_replica
    if (accepted.num_replicas, reserved, accepted.threads) != (4, 1, 1):
        return print(
            f"not yet: these start {accepted.num_replicas} replicas that reserve {reserved:g} "
            f"cores together, with {accepted.threads} torch threads each"
        )
    print("right: four replicas share one core, with one thread each")


def check_clients_needed(clients_needed: Callable[[float, float], int]) -> None:
    """Notebook 4: Little's law, rounded up."""
    cases = [(40, 0.1, 4), (10, 0.25, 3), (3, 0.1, 1), (100, 1, 100)]
    for rate, latency, expected in cases:
        found = clients_needed(rate, latency)
        if found is None:
            return print("not yet: clients_needed returns nothing")
        if found != expected or not isinstance(found, int):
            return print(f"not yet: for {rate} a second that take {latency} s each: {found!r}")
    print("right: four cases of four")


def check_waited(waited: Callable[[list[tuple[float, float, float]]], float]) -> None:
    """Notebook 4: the right percentile, of latencies from when requests were due."""
    prompt = [(float(i), float(i), i + 0.1 + i / 1000) for i in range(20)]
    late = [(i / 10, float(i), i + 0.5) for i in range(20)]
    cases = [
        (prompt, 0.118, "all sent when due"),
        (late, 0.9 * 18 + 0.5, "sent late: users wait from when they were due"),
        (late[::-1], 0.9 * 18 + 0.5, "they need not be in order"),
        (prompt * 5, 0.118, "a hundred requests: the 95th"),
    ]
    for requests_, expected, what in cases:
        found = waited(requests_)
        if found is None:
            return print("not yet: waited returns nothing")
        if abs(found - expected) > 1e-6:
            return print(f"not yet: {found:.3g} in place of {expected:.3g} ({what})")
    print("right: four cases of four")


def check_batches(batches: Callable[[int, int, int], list[int]]) -> None:
    """Notebook 5: shared out as the batcher does it."""
    cases = [(8, 2, 16), (9, 2, 16), (1, 4, 16), (40, 2, 16), (0, 3, 16), (10, 4, 2)]
    for waiting, free, largest in cases:
        found = batches(waiting, free, largest)
        if found is None:
            return print("not yet: batches returns nothing")
        expected = min(waiting, free * largest)
        fair = not found or max(found) - min(found) <= 1
        if sum(found) != expected or len(found) != min(waiting, free) or not fair:
            return print(
                f"not yet: {waiting} waiting, {free} free, at most {largest} each gives {found}"
            )
    print("right: six cases of six")


def check_low_latency(low_latency: Callable[[int], list[str]]) -> None:
    """Notebook 5: do the options start one replica with all cores that does not wait?"""
    there = options.cores()
    accepted = _accepted(low_latency, there)
    if isinstance(accepted, str):
        return print(f"not yet: {accepted}")
    if (accepted.num_replicas, accepted.threads, accepted.cpus_per_replica) != (1, there, there):
        return print(
            f"not yet: these start {accepted.num_replicas} replicas with {accepted.threads} torch "
            f"threads that reserve {accepted.cpus_per_replica:g} cores each, of {there}"
        )
    if accepted.batching != "off" and accepted.batch_wait_ms > 0:
        return print(f"not yet: a batch waits up to {accepted.batch_wait_ms:g} ms to fill")
    print("right: one replica with all cores, which does not wait")


def check_longest_gap(longest_gap: Callable[[list[tuple[float, bool]]], float]) -> None:
    """Notebook 6: the longest time without a right answer."""
    cases = [
        ([(0.0, True), (1.0, True), (3.0, True)], 2.0, "three right answers"),
        ([(3.0, True), (0.0, True), (1.0, True)], 2.0, "they need not be in order"),
        ([(0.0, True), (2.0, False), (5.0, True)], 5.0, "a failed request is no answer"),
        ([(0.0, False), (4.0, True), (4.5, True)], 0.5, "the first request failed"),
    ]
    for requests_, expected, what in cases:
        found = longest_gap(requests_)
        if found is None:
            return print("not yet: longest_gap returns nothing")
        if abs(found - expected) > 1e-9:
            return print(f"not yet: {requests_} gives {found}, not {expected} ({what})")
    print("right: four cases of four")


def check_bounded(bounded: Callable[[float, float], list[str]]) -> None:
    """Notebook 6: is the queue as long as the wait allows?"""
    for rate, wait_s, expected in ((50, 2, 100), (8.5, 3, 25), (4, 0.1, 1)):
        accepted = _accepted(bounded, rate, wait_s)
        if isinstance(accepted, str):
            return print(f"not yet: {accepted}")
        if accepted.max_queued_requests != expected:
            return print(
                f"not yet: {rate} requests a second and {wait_s} seconds give a queue of "
                f"{accepted.max_queued_requests}, not {expected}"
            )
    print("right: three cases of three")


def check_replicas_needed(replicas_needed: Callable[[float, float, float], int]) -> None:
    """Notebook 7: utilisation, rounded up."""
    cases = [(100, 0.02, 1, 2), (100, 0.02, 0.7, 3), (1000, 0.01, 0.8, 13), (1, 0.01, 0.5, 1)]
    for rate, picture_s, share, expected in cases:
        found = replicas_needed(rate, picture_s, share)
        if found is None:
            return print("not yet: replicas_needed returns nothing")
        if found != expected or not isinstance(found, int):
            return print(
                f"not yet: {rate} pictures a second of {picture_s} s each, busy {share:.0%} of the "
                f"time, take {expected} replicas, not {found!r}"
            )
    print("right: four cases of four")


def check_container_cpus(container_cpus: Callable[[int, float], int]) -> None:
    """Notebook 7: the replicas, KServe and Ray fit, and the number is whole."""
    for replicas, each, expected in ((2, 1, 3), (3, 0.5, 3), (1, 1, 2), (4, 2, 9)):
        found = container_cpus(replicas, each)
        if found is None:
            return print("not yet: container_cpus returns nothing")
        if found != expected or not isinstance(found, int):
            return print(
                f"not yet: for {replicas} replicas of {each} CPUs {found!r} in place of {expected}"
            )
    print("right: four cases of four")
