"""Models that are not ours, served as they are: from another folder, in process and in replicas.

Their classes are in foreign_models.py; see there what each is.
"""

import asyncio
import importlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from kserve import InferenceGRPCClient, InferInput, InferRequest, InferResponse
from kserve.model import InferenceVerb

from model.faults.observe import metrics, replicas
from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess
from model.serving.machine import free_port
from tests.conftest import Traces, long, until
from tests.served import COUNTS, TEXTS, Served, empty_folder, notes
from tests.ways import assert_plain

SEVERAL = [
    f"{name}=foreign_models:{kind}"
    for name, kind in {
        "words": "WordCount",
        "celsius": "Celsius",
        "broken": "Broken",
        "once": "Once",
        "typed": "Typed",
    }.items()
]
SEVERAL += ["--set", "typed.threshold=0.5", "--set", "typed.sizes=[1, 2]"]
SEVERAL += ["--set", "words.seconds=0.02", "--max_queued_requests", "8"]
PLACES = {
    "in process": ["--in_process"],
    "replicas": ["--num_replicas", "1", "--cpus_per_replica", "0.1"],
    "ingress": ["--num_replicas", "1", "--cpus_per_replica", "0.1", "--topology", "ingress"],
}


@pytest.fixture(scope="module", params=[long(p) if p == "ingress" else p for p in PLACES])
def several(request, tmp_path_factory) -> Iterator[Served]:
    """Five models in one server, of which one cannot be loaded."""
    folder = empty_folder(tmp_path_factory)
    options = [*SEVERAL, *PLACES[request.param]]
    with ServerProcess("model.serving", *options, folder=folder, **fresh_token()) as server:
        assert until(lambda: "ready after" in server.log.read_text()), "gRPC is not there"
        yield Served(server, folder)


@pytest.fixture(scope="module")
def foreign_models(tmp_path_factory) -> Any:
    """The module with the classes, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(empty_folder(tmp_path_factory)))
        yield importlib.import_module("foreign_models")
        del sys.modules["foreign_models"]


def tensor(values: list, datatype: str, binary: bool) -> InferInput:
    """One input, as KServe's client sends it."""
    kind = object if datatype == "BYTES" else np.float64
    found = InferInput("x", [len(values)], datatype)
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    found.set_data_from_numpy(np.array(encoded, dtype=kind), binary_data=binary)
    return found


def v2(served: Served, model: str, values: list, datatype: str, binary: bool) -> dict:
    """The one output of a V2 request over REST, its data in JSON or behind it."""
    request = InferRequest(model, [tensor(values, datatype, binary)], request_id="mine")
    body, length = request.to_rest()
    headers = {"inference-header-content-length": str(length)} if binary else {}
    url = f"{served.server.url}/v2/models/{model}/infer"
    sent = {"data": body, "headers": headers} if binary else {"json": body}
    response = requests.post(url, **sent, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["id"] == "mine" and response.json()["model_name"] == model
    return response.json()["outputs"][0]


def over_grpc(served: Served, model: str, values: list, datatype: str) -> InferResponse:
    """The response to a V2 request over gRPC."""

    async def infer() -> InferResponse:
        async with InferenceGRPCClient(served.server.grpc) as client:
            request = InferRequest(model, [tensor(values, datatype, True)], request_id="mine")
            return await client.infer(request, timeout=60)

    return asyncio.run(infer())


def test_every_protocol(several):
    """V1, V2 over REST in JSON and binary, and gRPC: the same of each."""
    response = several.v1("words", TEXTS)
    assert response.status_code == 200 and response.json() == {"predictions": COUNTS}
    for binary in (False, True):
        assert v2(several, "words", TEXTS, "BYTES", binary)["data"] == COUNTS
    response = over_grpc(several, "words", TEXTS, "BYTES")
    assert response.id == "mine" and response.outputs[0].as_numpy().tolist() == COUNTS
    about = requests.get(f"{several.server.url}/v2/models/words", timeout=10).json()
    assert about["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]


def test_a_bad_request_spoils_itself_only(several):
    """In a batch with good ones, predict_batch may return an exception for one alone."""
    with ThreadPoolExecutor(12) as clients:
        sent = [[7] if i % 3 == 0 else ["a b"] for i in range(12)]
        responses = list(clients.map(lambda instances: several.v1("words", instances), sent))
    for instances, response in zip(sent, responses, strict=True):
        if instances == [7]:
            assert (response.status_code, response.json()) == (400, {"error": "send texts"})
        else:
            assert (response.status_code, response.json()) == (200, {"predictions": [2]})


def test_batches_are_made_of_what_waits(several):
    """Counted in instances; a model without predict_batch has none."""
    before = metrics(several.server)
    with ThreadPoolExecutor(8) as clients:
        for response in clients.map(lambda _: several.v1("words", TEXTS), range(24)):
            assert response.json() == {"predictions": COUNTS}
    after = metrics(several.server)
    grew = {name: number - before.get(name, 0) for name, number in after.items()}
    assert grew["inference_batch_size_sum words"] == 24 * len(TEXTS)
    assert 0 < grew["inference_batch_size_count words"] < 24
    assert not any(name.startswith("inference_batch_size") for name in after if "celsius" in name)


def test_a_model_for_kserve_alone_works_unchanged(several, foreign_models):
    """Its responses, errors and headers are those of KServe's own call of it."""
    model = foreign_models.Celsius("celsius")

    def kserve(instances: list, verb: InferenceVerb = InferenceVerb.PREDICT) -> tuple:
        return asyncio.run(model({"instances": instances}, {}, verb))

    body, headers = kserve([212, 32])
    response = several.v1("celsius", [212, 32])
    assert response.status_code == 200 and response.json() == body
    assert body["predictions"] == pytest.approx([100, 0])
    assert headers == {"x-unit": response.headers["x-unit"]}
    response = several.v1("celsius", [1], "explain")
    assert response.json() == kserve([1], InferenceVerb.EXPLAIN)[0]
    for binary in (False, True):
        assert v2(several, "celsius", [212.0], "FP64", binary)["data"] == pytest.approx([100])
    response = over_grpc(several, "celsius", [212.0], "FP64")
    assert response.outputs[0].as_numpy() == pytest.approx(np.array([100]))
    wrong = several.v1("celsius", ["warm"])
    assert wrong.status_code == 400
    assert wrong.json()["error"] == "send degrees Fahrenheit as numbers"
    failed = several.v1("celsius", [1e9])
    assert failed.status_code == 500 and "nothing is so hot" in failed.json()["error"]
    with pytest.raises(grpc.aio.AioRpcError, match="nothing is so hot"):
        over_grpc(several, "celsius", [1e9], "FP64")


def test_arguments_are_typed_by_the_signature(several):
    """Given as text, they are what the annotations say; others have their defaults."""
    made_with = several.v1("typed", [1]).json()["predictions"]
    assert made_with == [0.5, "words", None, [1, 2], False, ".", 3]


def test_a_model_that_cannot_be_loaded_leaves_the_others_serving(several):
    """The log and the 503 say which it is and why."""
    response = several.v1("broken", [1])
    assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
    sentence = "broken cannot be loaded: NoWeights: the file weights.bin is missing"
    assert sentence in response.json()["error"]
    assert_plain(response.json()["error"])
    assert f"not served: {sentence}\n" in several.server.log.read_text()
    assert (several.ready("broken"), several.ready("words")) == (503, 200)
    with pytest.raises(grpc.aio.AioRpcError, match="weights.bin") as error:
        over_grpc(several, "broken", ["x"], "BYTES")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_each_model_has_its_own_queue_and_metrics(several, tmp_path):
    """While one is full the other serves; every number is labelled with its model."""
    if several.ready("once") != 200:
        pytest.skip("HAProxy would send its requests again, so it is not served there")
    limit, file = 8 + 16, tmp_path / "go"
    before = metrics(several.server)
    with ThreadPoolExecutor(limit) as clients:
        waiting = [clients.submit(several.v1, "once", [str(file)]) for _ in range(limit)]
        name = "inference_requests_in_flight"
        assert until(lambda: metrics(several.server)[f"{name} once"] == limit)
        rejected = several.v1("once", [str(file)])
        assert rejected.status_code == 503 and int(rejected.headers["Retry-After"]) >= 1
        assert "busy" in rejected.json()["error"]
        assert several.v1("words", TEXTS).json() == {"predictions": COUNTS}
        told = metrics(several.server)
        file.touch()
        assert {response.result().status_code for response in waiting} == {200}
    assert told[f"{name} words"] == 0
    for model in ("words", "once"):
        assert told[f"inference_admission_limit {model}"] == limit
    counted = "inference_requests_total {} {}"
    grew = {
        (model, outcome): told.get(counted.format(model, outcome), 0)
        - before.get(counted.format(model, outcome), 0)
        for model in ("words", "once")
        for outcome in ("answered", "rejected")
    }
    assert grew == {
        ("words", "answered"): 1,
        ("words", "rejected"): 0,
        ("once", "answered"): 0,
        ("once", "rejected"): 1,
    }
    assert until(lambda: metrics(several.server)[f"{name} once"] == 0)


def test_a_burst_within_the_limit_is_answered(several):
    """By a model without batches too, each of whose requests is a call of its own."""
    limit = 8 + 16
    for _ in range(5):
        together = threading.Barrier(limit)

        def send(_: int) -> requests.Response:
            together.wait()  # noqa: B023
            return several.v1("celsius", [212])

        with ThreadPoolExecutor(limit) as clients:
            found = Counter(r.text for r in clients.map(send, range(limit)))
        assert len(found) == 1 and "predictions" in [*found][0], found


def test_each_request_has_an_id(several):
    """The client's own; a fresh one where it gave none, or an empty one."""
    fresh = set()
    for given in ("of-mine-17", "", None):
        headers = {} if given is None else {"x-request-id": given}
        found = several.v1("words", TEXTS, headers=headers).headers["x-request-id"]
        assert found == given or (not given and len(found) > 8)
        fresh.add(found)
    assert len(fresh) == 3


def test_a_model_that_is_not_idempotent_is_never_retried(several, tmp_path):
    """Its replica is killed: 500 for the request, which no other replica sees; after a 503 clients
    would send it again."""
    own = [p for p in replicas(several.server) if "once" in " ".join(p.cmdline())]
    if not own:
        pytest.skip("in process there is nothing to lose")
    [replica], file = own, str(tmp_path / "never")
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(several.v1, "once", [file])
        assert until(lambda: [str(replica.pid), file] in notes(several.folder, "calls"))
        replica.kill()
        response = waiting.result()
    assert response.status_code == 500 and "may have been done" in response.json()["error"]
    assert "retry-after" not in response.headers
    assert until(lambda: not replica.is_running())
    assert until(lambda: several.ready("once") == 200, 60)
    assert several.v1("once", [""]).json()["predictions"] != [replica.pid]
    calls = [pid for pid, *texts in notes(several.folder, "calls") if texts == [file]]
    assert calls == [str(replica.pid)]
    assert not any(n for k, n in metrics(several.server).items() if "retries_total once" in k)


CODE = """
import sys
sys.argv[1:] = ["--http_port", "1", "--grpc_port", "1", "--access_log", "on", "--workers", "1"]
from model.serving.cli import server_config
from model.serving.start import start
if __name__ == "__main__":
    start(server_config({argv!r}))
"""


@pytest.mark.parametrize("access_log", ["off", "on"])
def test_the_configuration_counts_also_in_workers(tmp_path_factory, access_log):
    """Ports, and whether there are lines a request; not what the command line happens to be."""
    folder, port = empty_folder(tmp_path_factory), free_port()
    argv = ["foreign_models:WordCount", "--in_process", "--workers", "2"]
    argv += ["--access_log", access_log, "--http_port", str(port), "--grpc_port", str(free_port())]
    (folder / "own_server.py").write_text(CODE.format(argv=argv))
    with (folder / "log").open("w") as log:
        command = [sys.executable, "own_server.py"]
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/v1/models/custom-model:predict"
    try:
        assert until(lambda: "ready after" in (folder / "log").read_text() or server.poll(), 90)
        workers = set()

        def both() -> bool:
            response = requests.post(url, json={"instances": TEXTS}, timeout=30)
            assert response.json() == {"predictions": COUNTS}
            workers.add(response.headers["x-worker"])
            return len(workers) == 2

        assert until(both, 60)
    finally:
        server.terminate()
        server.wait(60)
    lines = [line for line in (folder / "log").read_text().splitlines() if ":predict" in line]
    assert bool(lines) == (access_log == "on"), lines


def cannot_start(folder: Path, traces: Traces, *options: str) -> str:
    """The sentence with which a server ends that has one model and cannot load it."""
    ports = ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
    ended = subprocess.run(
        [sys.executable, "-m", "model.serving", *ports, *options],
        cwd=folder,
        env=os.environ | traces.env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 1, ended.stderr
    assert traces.left() == []
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("place", ["in process", long("replicas"), long("ingress")])
def test_alone_a_model_that_cannot_be_loaded_ends_the_server(place, traces, tmp_path_factory):
    """Status 1 and a sentence that says why; nothing is left."""
    folder = empty_folder(tmp_path_factory)
    sentence = cannot_start(folder, traces, "foreign_models:Broken", *PLACES[place])
    assert sentence == ("custom-model cannot be loaded: NoWeights: the file weights.bin is missing")


def test_a_wrong_argument_ends_the_server(traces, tmp_path_factory):
    """Status 1 and a sentence that names it."""
    wrong = ["foreign_models:Typed", "--set", "threshold=high", *PLACES["in process"]]
    sentence = cannot_start(empty_folder(tmp_path_factory), traces, *wrong)
    assert "--set threshold=high: give a valid number" in sentence
