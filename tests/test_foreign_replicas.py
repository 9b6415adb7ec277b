"""Replicas of a model that is not ours: lost, overloaded, changed; behind another frontend.

See foreign_models.py for the model.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from model.faults.observe import metrics, replicas, retries, wait_for_replicas
from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess
from tests.conftest import run, until
from tests.foreign import ForeignRay
from tests.served import COUNTS, TEXTS, Served, empty_folder, notes
from tests.ways import assert_plain

OPTIONS = ["--cpus_per_replica", "0.3", "--set", "seconds=0.05"]  # of all deployments


@pytest.fixture(scope="module")
def token() -> dict[str, str]:
    """What joins the cluster of `pair`."""
    return fresh_token()


@pytest.fixture(scope="module")
def pair(token, tmp_path_factory) -> Iterator[Served]:
    """Two replicas of WordCount, with a short queue."""
    folder = empty_folder(tmp_path_factory)
    options = ["foreign_models:WordCount", "--num_replicas", "2", *OPTIONS]
    options += ["--max_queued_requests", "16"]
    with ServerProcess("model.serving", *options, folder=folder, **token) as server:
        yield Served(server, folder)


@contextlib.contextmanager
def load(served: Served, clients: int = 12) -> Iterator[list[tuple[int, Any]]]:
    """Clients that send one request after another while the block runs, and once more after it.

    Yields the growing list of statuses and predictions.
    """
    over, seen = threading.Event(), []

    def client() -> None:
        with requests.Session() as session:
            last = False
            while not last:
                last = over.is_set()
                url, body = served.url(served.server.name), {"instances": TEXTS}
                response = session.post(url, json=body, timeout=90)
                seen.append((response.status_code, response.json().get("predictions")))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield seen
        finally:
            over.set()
    for each in running:
        each.result()


def assert_all_answered(seen: list[tuple[int, Any]]) -> None:
    """Rightly, and there were some."""
    assert len(seen) > 12 and set(map(str, seen)) == {str((200, COUNTS))}


def test_the_frontend_imports_neither_torch_nor_the_model(pair):
    """It knows of the class what a replica tells."""
    maps = {part.path for part in pair.server.process.memory_maps()}
    assert len(maps) > 50 and not [path for path in maps if "/torch/" in path]
    imported = {int(pid) for pid, *_ in notes(pair.folder, "imported")}
    assert imported == {process.pid for process in replicas(pair.server)}


def test_a_replica_is_killed_under_load(pair):
    """Its requests are retried on the other, and none fails."""
    before = retries(metrics(pair.server))
    with load(pair) as seen:
        for _ in range(3):  # it may happen to have none
            victim = replicas(pair.server)[0]
            victim.kill()
            assert until(lambda victim=victim: not victim.is_running())
            assert until(lambda victim=victim: len(replicas(pair.server)) == 2, 90)
            wait_for_replicas(pair.server, 2)
            if retries(metrics(pair.server)) > before:
                break
    assert_all_answered(seen)
    assert retries(metrics(pair.server)) > before
    assert "retried (" in pair.server.log.read_text()


def test_overload(pair):
    """What does not fit into the queue is rejected at once, and counted; the rest is answered."""
    counted = "inference_requests_total custom-model {}"
    before, limit, hold = metrics(pair.server), 16 + 2 * 16, pair.folder / "hold"
    with ThreadPoolExecutor(limit + 12) as clients:
        hold.touch()
        try:
            sent = [clients.submit(pair.v1, "custom-model", ["a"]) for _ in range(limit + 12)]
            name = counted.format("rejected")
            assert until(lambda: metrics(pair.server).get(name, 0) >= before.get(name, 0) + 12)
        finally:
            hold.unlink()
        responses = [each.result() for each in sent]
    rejected = [response for response in responses if response.status_code != 200]
    assert [response.json() for response in responses if response not in rejected] == (
        [{"predictions": [1]}] * limit
    )
    assert len(rejected) == 12
    for response in rejected:
        assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
        assert_plain(response.json()["error"])
    after = metrics(pair.server)
    for outcome, count in (("rejected", 12), ("answered", limit), ("failed", 0)):
        name = counted.format(outcome)
        assert after.get(name, 0) - before.get(name, 0) == count


def redeploy(pair: Served, token: dict[str, str], *options: str) -> subprocess.CompletedProcess:
    """Change the deployment, from whatever folder this is."""
    address = re.search(r"Ray at (\S+),", pair.server.log.read_text())[1]
    return run("model.serving.redeploy", "--address", address, *OPTIONS, *options, **token)


@pytest.mark.long  # notebook 6 does it in make test
def test_another_number_of_replicas(pair, token):
    """The class need not be named, the replicas that stay are the same, nothing is lost."""
    before = {process.pid for process in replicas(pair.server)}
    with load(pair) as seen:
        for number in (1, 2):
            done = redeploy(pair, token, "--num_replicas", str(number))
            assert done.returncode == 0, done.stderr
            assert "foreign_models:WordCount" in done.stdout
            wait_for_replicas(pair.server, number)
            assert until(lambda n=number: len(replicas(pair.server)) == n, 60)
    assert_all_answered(seen)
    assert len(before & {process.pid for process in replicas(pair.server)}) == 1


def test_the_models_are_loaded_again(pair, token):
    """--reload: in the same processes."""
    before = {str(process.pid) for process in replicas(pair.server)}
    loads = len(notes(pair.folder, "loads"))
    with load(pair) as seen:
        done = redeploy(pair, token, "--num_replicas", "2", "--reload")
        assert done.returncode == 0, done.stderr
        assert until(lambda: len(notes(pair.folder, "loads")) == loads + 2)
    assert_all_answered(seen)
    assert {pid for pid, *_ in notes(pair.folder, "loads")[loads:]} == before
    assert {str(process.pid) for process in replicas(pair.server)} == before


def test_loading_again_fails(pair, token):
    """A sentence, status 1, and the replicas go on with what they had."""
    before, broken = {process.pid for process in replicas(pair.server)}, pair.folder / "broken"
    broken.touch()
    with load(pair) as seen:
        done = redeploy(pair, token, "--num_replicas", "2", "--reload")
    broken.unlink()
    assert done.returncode == 1
    why = "OSError: the words are lost"
    sentence = f"custom-model could not be loaded again ({why}): it goes on as it was"
    assert done.stderr.splitlines()[-1] == sentence
    assert_all_answered(seen)
    assert {process.pid for process in replicas(pair.server)} == before


def test_redeploying_what_cannot_be_made(pair, token):
    """Another name, an argument that there is not: a sentence, status 1, and it serves on."""
    for options, part in (
        (["--model_name", "other"], "no server runs 'other'"),
        (["--num_replicas", "2", "--set", "minutes=1"], "minutes: WordCount has no such argument"),
    ):
        done = redeploy(pair, token, *options)
        assert done.returncode == 1 and part in done.stderr.splitlines()[-1]
        assert pair.v1("custom-model", TEXTS).json() == {"predictions": COUNTS}


@pytest.mark.long  # notebook 6 does it in make test
def test_autoscaling(pair, token):
    """A second replica starts with the load and ends with it, and nothing is lost."""
    delays = ["--upscale_delay_s", "0.5", "--downscale_delay_s", "1", "--target_requests", "2"]
    auto = ["--num_replicas", "auto", "--max_replicas", "2", *delays]
    done = redeploy(pair, token, *auto)
    assert done.returncode == 0, done.stderr
    assert until(lambda: metrics(pair.server)["inference_replicas custom-model"] == 1, 90)
    with load(pair) as seen:
        assert until(lambda: metrics(pair.server)["inference_replicas custom-model"] == 2, 90)
    assert_all_answered(seen)
    assert until(lambda: metrics(pair.server)["inference_replicas custom-model"] == 1, 90)
    assert until(lambda: len(replicas(pair.server)) == 1, 60)
    assert pair.v1("custom-model", TEXTS).json() == {"predictions": COUNTS}


@pytest.mark.long
def test_a_config_file_and_a_frontend(tmp_path_factory):
    """Ray Serve deploys it from its own kind of file; KServe stands before it, and leaves it."""
    folder, ray = empty_folder(tmp_path_factory), ForeignRay()
    try:
        model = {"model": "foreign_models:WordCount", "name": "words", "set": {"seconds": 0.01}}
        application = {
            "name": "words",
            "import_path": "model.serving.deployment:application",
            "route_prefix": "/words",
            "runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}},
            "args": model | {"num_replicas": 1, "cpus_per_replica": 0.3},
        }
        (folder / "serve.yaml").write_text(yaml.safe_dump({"applications": [application]}))
        serve = [Path(sys.executable).with_name("serve"), "run", "serve.yaml", "--non-blocking"]
        env = os.environ | ray.env | {"RAY_ADDRESS": ray.address}
        done = subprocess.run(serve, cwd=folder, env=env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert until(lambda: len(ray.serve_processes()) == 2, 90)  # a controller, a replica
        join = ["--address", ray.address, "--model_name", "words"]
        with ServerProcess("model.serving.frontend", *join, **ray.env) as server:
            served = Served(server, folder)
            assert served.v1("words", TEXTS).json() == {"predictions": COUNTS}
            assert server.process.pid not in {int(pid) for pid, *_ in notes(folder, "imported")}
        missing = run("model.serving.frontend", *join[:2], "other", **ray.env)
        assert missing.returncode == 1 and "'other'" in missing.stderr.splitlines()[-1]
        assert len(ray.serve_processes()) == 2
    finally:
        ray.end()
