"""What can be observed of a server from outside: metrics, health, replicas, over the time too."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from model.loadtest.generator import closed_loop
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

REPLICAS_WITHIN_S = 60
# KServe alone answers nothing while it works on all that clients have given up: ten seconds and
# more, after a flood.
METRICS_WITHIN_S = 60
HEALTH = {
    "live": "/v2/health/live",
    "server ready": "/v2/health/ready",
    "model ready": "/v2/models/{}/ready",
}


def metrics(server: ServerProcess) -> dict[str, float]:
    """What a server's /metrics tells of its requests.

    Returns name, with its labels' values after it -> number: "inference_replicas custom-model".
    Raises requests.RequestException when the server does not answer within a minute.
    """
    text = requests.get(f"{server.url}/metrics", timeout=METRICS_WITHIN_S).text
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith(("inference_", "request_predict"))
        for sample in family.samples
    }


def retries(values: dict[str, float]) -> int:
    """How many requests were retried on another replica. values: of `metrics`."""
    return round(sum(v for k, v in values.items() if k.startswith("inference_retries_total")))


def health(server: ServerProcess) -> dict[str, str]:
    """What a kubelet would see: the status of each probe, "timeout" after a second, "refused"."""
    found = {}
    for name, path in HEALTH.items():
        try:
            response = requests.get(server.url + path.format(server.name), timeout=1)
            found[name] = str(response.status_code)
        except requests.Timeout:
            found[name] = "timeout"
        except requests.ConnectionError:
            found[name] = "refused"
    return found


@contextlib.contextmanager
def snapshots(
    server: ServerProcess, take: Callable[[ServerProcess], dict] = health, every_s: float = 0.05
) -> Iterator[list[tuple[float, dict]]]:
    """Takes snapshots of a server, of its health or its metrics, as long as the block runs.

    Yields the growing list of (when, since 1970; what `take` returned). Snapshots that fail with
    requests.RequestException are left out; when all do, the first error is raised at the end. Any
    other error ends the snapshots, and is raised at the end too.
    """
    taken: list[tuple[float, dict]] = []
    over, failures, unexpected = threading.Event(), [], []

    def watch() -> None:
        while not over.wait(every_s):
            try:
                taken.append((time.time(), take(server)))
            except requests.RequestException as error:  # the next one may succeed
                failures.append(error)
            except Exception as error:
                unexpected.append(error)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()
    if unexpected or failures and not taken:
        raise (unexpected or failures)[0]


def replicas(server: ServerProcess) -> list[psutil.Process]:
    """The processes of its replicas, on whatever node of this machine."""
    token = server.process.environ().get("RAY_AUTH_TOKEN")
    everywhere = server.processes() if token is None else psutil.process_iter()
    return [p for p in everywhere if _is_replica(p, token)]


def _is_replica(process: psutil.Process, token: str | None) -> bool:
    try:
        if not " ".join(process.cmdline()).startswith("ray::ServeReplica"):
            return False
        return token is None or process.environ().get("RAY_AUTH_TOKEN") == token
    except psutil.Error:
        return False


def workers(server: ServerProcess, work: Workload, seconds: float = 3) -> Counter[str]:
    """The loaded models (x-worker) that answer under load, and how often each does."""
    run = closed_loop(server.predict, work, 16, seconds, warmup_s=0.5, keep_headers=True)
    return Counter(headers["x-worker"] for headers in run.headers)


def wait_for_replicas(server: ServerProcess, count: int) -> None:
    """Wait until `count` replicas run and the model is ready; RuntimeError after a minute."""
    began = time.monotonic()
    while _replica_count(server) != count or health(server)["model ready"] != "200":
        if time.monotonic() - began > REPLICAS_WITHIN_S:
            raise RuntimeError(f"there are not {count} replicas after {REPLICAS_WITHIN_S} s")
        time.sleep(0.1)


def _replica_count(server: ServerProcess) -> float:
    """As the server tells; KServe's own RayModel does not: then the number of processes."""
    count = metrics(server).get(f"inference_replicas {server.name}")
    return len(replicas(server)) if count is None else count
