"""The load generator: with servers whose behaviour is known, beside wrk, with a real server."""

import asyncio
import base64
import contextlib
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from model.alexnet import shapes
from model.loadtest import records
from model.loadtest.client import with_reference
from model.loadtest.generator import closed_loop, open_loop
from model.loadtest.load import Load
from model.loadtest.run import LOST, RIGHT, Run, Sample
from model.loadtest.server_process import ServerProcess, _model_name
from model.loadtest.summary import interleaved, interval, summary
from model.loadtest.workload import Workload
from model.serving.machine import free_port
from tests.conftest import needs_tool, until

pytestmark = [pytest.mark.long, pytest.mark.alone]

LABELS = list(shapes.LABELS)
WORK = Workload([label.encode() for label in LABELS], LABELS)  # Known reads them as images


def http(label: str, status: int = 200, headers: str = "") -> bytes:
    """A response that names one label."""
    body = json.dumps({"predictions": [[{"label": label, "probability": 0.75}]]})
    return f"HTTP/1.1 {status} So\r\n{headers}content-length: {len(body)}\r\n\r\n{body}".encode()


def chunked(label: str) -> bytes:
    """The same in two chunks, with all that chunks may carry."""
    body = http(label).partition(b"\r\n\r\n")[2]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = b"9;a=b\r\n%b\r\n%x\r\n%b\r\n" % (body[:9], len(body) - 9, body[9:])
    return head + parts + b"0\r\nx-late: 1\r\n\r\n"


class Known:
    """A server in a thread, whose responses `reply` gives.

    reply: number of the request, label of its image -> what the generator should make of the
    response, its text, and how many seconds to wait before it.
    """

    def __init__(self, reply: Callable[[int, str], tuple[str, bytes, float]], idle_s: float = 60):
        self.reply, self.idle_s, self.ready = reply, idle_s, threading.Event()
        self.kinds, self.connections, self.answered = Counter(), 0, []
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Known":
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)

    async def _run(self) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict"
        self.ready.set()
        await self.stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(EOFError, OSError, TimeoutError):
            while True:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.idle_s)
                assert head.startswith(b"POST /predict HTTP/1.1\r\n")
                length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", head)[1])
                (instance,) = json.loads(await reader.readexactly(length))["instances"]
                label = base64.b64decode(instance["image"]["b64"]).rstrip(b"\0").decode()
                kind, text, wait = self.reply(self.kinds.total(), label)
                self.kinds[kind] += 1
                await asyncio.sleep(wait)
                writer.write(text)
                self.answered.append(time.time())
                if kind == LOST:
                    break
        writer.close()


def steady(seconds: float) -> Callable:
    """A reply that takes that long, one after the other."""

    def reply(number: int, label: str) -> tuple[str, bytes, float]:
        time.sleep(seconds)  # on the server's event loop, on purpose
        return RIGHT, http(label), 0

    return reply


def test_a_closed_loop_counts_what_the_server_counts():
    """All requests of the run and those of the window; Little's law; connections are kept."""
    with Known(steady(0.005)) as server:
        run = closed_loop(server.url, WORK, 4, 1.5, warmup_s=0.5)
    assert run.errors == {} and run.sent == server.kinds[RIGHT] == len(run.samples)
    start = run.began + 0.5
    within = sum(start <= moment < start + 1.5 for moment in server.answered)
    assert run.requests == pytest.approx(within, abs=4)
    assert run.throughput == run.requests / 1.5 and len(run.latencies) == run.requests
    assert server.connections == 4
    assert run.in_flight == pytest.approx(4, rel=0.05)
    assert run.littles_law() == pytest.approx(1, rel=0.05)
    assert run.quantile(0.5) == pytest.approx(4 / run.throughput, rel=0.1)
    assert run.quantile(0) == min(run.latencies) and run.quantile(1) == max(run.latencies)


def test_errors_are_counted_by_kind():
    """Whatever goes wrong is counted under its name, in closed and open loop, and ends neither."""
    answers = {
        RIGHT: chunked,
        "HTTP 503": lambda label: http(label, 503),
        "wrong label": lambda label: http("green " + label),
        "unreadable response": lambda label: http(label).replace(b"predictions", b"projections"),
        "not HTTP/1.1": lambda label: b"220 smtp.example.org\r\n\r\n",
        "connection lost": lambda label: http(label)[:-9] if label < "green" else b"",
        "timed out": lambda label: http("too late"),
    }

    def reply(number: int, label: str) -> tuple[str, bytes, float]:
        kind = [*answers, RIGHT][number % (len(answers) + 1)]
        return kind, answers[kind](label), 0.6 * (kind == "timed out")

    for loop, load_of in ((closed_loop, 3), (open_loop, 40)):
        with Known(reply) as server:
            run = loop(server.url, WORK, load_of, 0.7, warmup_s=0.2, timeout_s=0.3)
        assert run.errors == server.kinds - Counter({RIGHT: server.kinds[RIGHT]})
        assert len(run.errors) == 6 and run.wrong == run.errors["wrong label"]
        assert run.sent == server.kinds.total()
        right = sum(sample.outcome == RIGHT for sample in run.samples)
        assert right == server.kinds[RIGHT] and len(run.latencies) < run.requests


@pytest.mark.parametrize("retry, pause_s", [("at once", 0), ("as told", 1)])
def test_what_is_rejected_is_retried(retry, pause_s):
    """At once or when Retry-After says so: one request, timed from its first attempt."""

    def reply(number: int, label: str) -> tuple[str, bytes, float]:
        if number % 3:
            return "HTTP 503", http(label, 503, "Retry-After: 1\r\n"), 0
        return RIGHT, http(label), 0.01

    with Known(lambda number, label: reply(number + 1, label)) as server:  # the first is rejected
        run = closed_loop(server.url, WORK, 1, 0.5, warmup_s=0, timeout_s=5, retry=retry)
    assert run.errors == {} and run.sent == server.kinds[RIGHT] >= 1
    assert run.retries == server.kinds["HTTP 503"] == 2 * run.sent
    [first, *_] = run.samples
    assert 2 * pause_s <= first.done - first.due < 2 * pause_s + 0.4


def test_a_retry_that_comes_too_late_is_an_error():
    """Its timeout is over before Retry-After is."""
    with Known(lambda *_: ("HTTP 503", http("", 503, "Retry-After: 1\r\n"), 0)) as server:
        run = closed_loop(server.url, WORK, 1, 0.1, warmup_s=0, timeout_s=0.5, retry="as told")
    assert run.errors == {"HTTP 503": run.sent} and run.retries == 0
    with pytest.raises(ValueError):
        closed_loop("http://x/", WORK, 1, 1, retry="later")


def test_no_error_when_an_idle_connection_is_closed():
    """A server may close what it keeps too long, or say that it closes: then a new one is made."""
    with Known(steady(0), idle_s=0.02) as server:
        run = open_loop(server.url, WORK, 30, 1, connections=1, warmup_s=0)
    crossed = run.errors.pop(LOST, 0)  # sent in the very moment in which the server closed
    assert run.errors == {} and crossed <= 2 and run.sent > 20 and server.connections > 10
    closing = (RIGHT, http(LABELS[0], headers="Connection: close\r\n"), 0)
    with Known(lambda number, label: closing) as server:
        work = Workload([b"anything"], LABELS[:1])
        run = closed_loop(server.url, work, 2, 0.3, warmup_s=0)
    assert run.errors == {} and run.sent == server.connections > 10


def test_a_server_that_is_not_there():
    """Refused connections are counted, and not tried without end."""
    run = closed_loop(f"http://127.0.0.1:{free_port()}/", WORK, 2, 0.5, warmup_s=0)
    assert run.errors == {"connection refused": run.sent} and 2 <= run.sent <= 2 * 0.5 / 0.05 + 2
    assert run.throughput == 0 and math.isnan(run.quantile(0.5))


def test_requests_that_cannot_be_sent_are_counted_too():
    """A server that answers nothing: the run ends all the same, and no request drops out."""
    with Known(lambda number, label: (RIGHT, b"", 60)) as server:
        run = open_loop(server.url, WORK, 40, 1, connections=2, warmup_s=0, timeout_s=0.8)
    assert max(sample.done for sample in run.samples) < 1 + 0.8 + 0.2
    assert run.errors["timed out"] == run.sent == server.kinds[RIGHT] >= 4
    assert run.errors["never sent"] > 20 and run.requests == sum(run.errors.values())
    assert run.throughput == 0 and run.latencies == []


def test_the_open_loop_keeps_its_moments():
    """Poisson arrivals, the same for the same seed, and sent when due where nothing hinders."""
    with Known(lambda number, label: (RIGHT, http(label), 0.05)) as server:
        runs = [open_loop(server.url, WORK, 200, 0.5, warmup_s=0, seed=seed) for seed in (1, 1, 2)]
    dues = [sorted(sample.due for sample in run.samples) for run in runs]
    assert dues[0] == dues[1] != dues[2] and max(map(max, dues)) < 0.5
    for run, due in zip(runs, dues, strict=True):
        assert run.errors == {} and run.requests == len(due) == pytest.approx(100, abs=30)
        gaps = np.diff(due)
        assert np.std(gaps) / np.mean(gaps) == pytest.approx(1, abs=0.3)  # as exponential ones are
        assert run.quantile(0.5) == pytest.approx(run.quantile(0.5, from_sent=True), rel=0.2)
        assert run.quantile(0.5) < 3 * 0.05  # at once: one by one there are 20 a second


def test_a_stall_shows_from_the_intended_time_only():
    """One second in which the server does nothing: all that was due then waited, not just two."""
    stall = []

    def reply(number: int, label: str) -> tuple[str, bytes, float]:
        if number == 100:
            stall.append(time.time())
            time.sleep(1)
            stall.append(time.time())
        return RIGHT, http(label), 0

    with Known(reply) as server:
        run = open_loop(server.url, WORK, 150, 2, connections=2, warmup_s=0.2)
    assert run.errors == {}
    start, end = (moment - run.began for moment in stall)
    within = [sample for sample in run.samples if start < sample.due < end]
    assert len(within) == pytest.approx(150, abs=50)
    assert all(sample.done > end for sample in within)
    assert run.quantile(0.99) > 0.8 > 5 * run.quantile(0.99, from_sent=True)
    assert sum(latency > 0.8 for latency in run.latencies_from_sent) <= 2


def test_answers_are_compared_with_the_reference():
    """The largest difference of a label's probability, and another label than the reference's."""
    entries = [
        {"label": "red star", "probability": 0.7},
        {"label": "red circle", "probability": 0.2},
    ]
    work = Workload([b"p", b"q"], ["red star"] * 2, [entries, entries[::-1]])

    def judge(image: int, *answer: tuple[str, float]) -> tuple[str, float]:
        found = [{"label": label, "probability": number} for label, number in answer]
        return work.judge(image, json.dumps({"predictions": [found]}).encode())

    assert judge(0, ("red star", 0.7), ("red circle", 0.2)) == (RIGHT, 0)
    assert judge(0, ("red star", 0.6), ("red circle", 0.25)) == (RIGHT, pytest.approx(0.1))
    assert judge(0, ("red star", 0.7), ("blue star", 0.19)) == (RIGHT, pytest.approx(0.01))
    assert judge(0, ("blue star", 0.7)) == ("wrong label", pytest.approx(0.5))
    assert judge(1, ("red star", 0.7))[0] == "not the reference's label"
    for bad in (b"", b"[]", b"{}", b'{"predictions": [[]]}', b'{"predictions": [[], []]}'):
        assert work.judge(0, bad) == ("unreadable response", 0)


def test_answers_in_v2_are_read_as_in_v1():
    """Two images a request, for servers that speak V2 only."""
    names, values = ["red star", "blue star"], [0.75, 0.25]
    reference = [[{"label": n, "probability": v} for n, v in zip(names, values, strict=True)]] * 2
    work = Workload([b"p", b"q"], ["red star"] * 2, reference, images_per_request=2, v2=True)
    [image] = json.loads(work.bodies[1])["inputs"]
    assert image["shape"] == [2, 1] and image["data"] == ["cQ==", "cA=="]

    def response(labels: list[str], probabilities: list[float]) -> bytes:
        data = {"label": labels, "probability": probabilities}
        outputs = [{"name": name, "shape": [2, 2], "data": of} for name, of in data.items()]
        return json.dumps({"outputs": outputs}).encode()

    assert work.judge(0, response(names * 2, values * 2)) == (RIGHT, 0.0)
    other = work.judge(0, response([*names, *names[::-1]], values * 2))
    assert other == ("wrong label", 0.5)
    assert work.judge(0, b'{"predictions": []}')[0] == "unreadable response"


def test_arguments_that_make_no_sense_raise():
    """ValueError, before anything is sent."""
    for url, clients, seconds in (("https://x/", 1, 1), ("http://x/", 0, 1), ("http://x/", 1, 0)):
        with pytest.raises(ValueError):
            closed_loop(url, WORK, clients, seconds)
    with pytest.raises(ValueError):
        open_loop("http://x/", WORK, 0, 1)


def test_the_name_of_the_first_model_is_read_off_the_command_line():
    """`--model_name`, or NAME of NAME=MODULE:CLASS; what is set for a model is none."""
    assert _model_name(()) == "custom-model"
    assert _model_name(("--model_name", "mine", "app:Model", "--set", "a=b:c")) == "mine"
    assert _model_name(("--workers", "2", "a=app.models:Model", "b=app:Other")) == "a"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started this in the background, and had
    it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_generator_lives_apart():
    """It imports nothing heavy, works under a running event loop, and ends with its caller."""
    heavy = "{'torch', 'kserve', 'ray', 'requests'} & set(sys.modules)"
    code = f"import sys; from model.loadtest import load; load.main(); sys.exit(str({heavy} or ''))"
    load = pickle.dumps(Load("http://127.0.0.1:9/", WORK, 1, None, 0.1, warmup_s=0))
    done = subprocess.run([sys.executable, "-c", code], input=load, capture_output=True)
    assert done.stdout[:1] == b"!"  # it has begun
    assert pickle.loads(done.stdout[1:]).sent > 0 and done.stderr.strip() == b""

    async def in_a_loop() -> Run:
        return closed_loop(server.url, WORK, 1, 0.2, warmup_s=0)

    def alive(process: psutil.Process) -> bool:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

    def generators() -> list[psutil.Process]:
        ours = [process for process in me.children(recursive=True) if alive(process)]
        return [process for process in ours if "load.main()" in " ".join(process.cmdline())]

    me = psutil.Process()
    with Known(steady(0.001)) as server:
        assert asyncio.run(in_a_loop()).sent > 0
        threading.Timer(0.7, os.kill, (me.pid, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            closed_loop(server.url, WORK, 1, 60)
        assert until(lambda: not generators(), 5)
        code = "import pickle, sys; from model.loadtest.generator import closed_loop; url, work = "
        code += "pickle.load(sys.stdin.buffer); closed_loop(url, work, 1, 60)"
        caller = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        caller.stdin.write(pickle.dumps((server.url, WORK)))
        caller.stdin.close()
        (generator,) = until(generators, 60)
        caller.kill()
        caller.wait(10)
        assert until(lambda: not alive(generator), 5)


def test_records_of_a_real_server(tmp_path):
    """The plain server: all responses right, and as many requests as it counts itself."""
    with ServerProcess("model.basics.kserve_server") as plain:
        _check_records(plain, tmp_path)


def _check_records(plain: ServerProcess, tmp_path: Path) -> None:
    def count() -> float:
        name = r'request_predict_seconds_count\{model_name="custom-model"\} (.*)'
        return float(re.search(name, requests.get(f"{plain.url}/metrics").text)[1])

    work, before = with_reference(Workload.drawn(4), plain), count()
    more = {"seconds": 1.2, "warmup_s": 0.3}
    found = [records.measure(plain, "plain", work, clients=2, **more)]
    found += [records.measure(plain, "plain", work, rate=5, **more)]
    assert count() - before == sum(record["sent"] for record in found)
    for record in found:
        assert record["errors"] == record["wrong"] == 0 and record["distance"] < 1e-5
        assert record["settings"] == plain.module and record["kserve"].startswith("0.")
        assert record["memory"] > 1e8 and record["replicas_cpu"] == record["ray_cpu"] == 0
        assert 0 < record["client_cpu"] < record["server_cpu"] / 10
        assert record["p50_ms"] <= record["p95_ms"] <= record["p99_ms"]
    assert found[0]["in_flight"] == pytest.approx(2, rel=0.05)
    path = tmp_path / "records.jsonl"
    records.append(path, found[:1])
    records.append(path, found[1:])
    assert records.read(path) == found
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert private not in path.read_text()
    with pytest.raises(TypeError):
        records.measure(plain, "plain", work)


def test_headers_of_a_server_that_tells_what_it_did(replicas):
    """With keep_headers a run has those of every right response, on the clock of its own times."""
    run = closed_loop(replicas.predict, Workload.drawn(4), 2, 1, warmup_s=0, keep_headers=True)
    assert len(run.headers) == len(run.latencies) > 0
    for kept in run.headers:
        assert kept["x-worker"]
        assert kept["sent"] < float(kept["x-started"]) < float(kept["x-finished"]) < kept["done"]


def test_cpu_of_replicas_is_told_apart(replicas):
    """Behind Ray, the work is that of the replicas; KServe's process and Ray use some as well."""
    record = records.measure(replicas, "two", Workload.drawn(4), 1, clients=4, warmup_s=0.5)
    assert record["errors"] == 0 and record["distance"] is None
    assert "--num_replicas 2" in record["settings"] and "port" not in record["settings"]
    assert record["replicas_cpu"] > record["server_cpu"] > 0 and record["ray_cpu"] > 0


def test_throughput_by_share():
    """A request that lies in the window with a half of its time is half of one."""
    spans = [(0.0, 2.0, RIGHT), (1.5, 2.0, RIGHT), (2.5, 3.5, RIGHT), (1.0, 2.0, LOST)]
    samples = [Sample(sent, sent, done, outcome, {}) for sent, done, outcome in spans]
    run = Run(2.0, 0, 4, {}, 0, 0, [], [], 0, 0, 0, 0, {}, 0.0, samples, [], warmup_s=1.0)
    assert run.throughput_by_share() == pytest.approx((0.5 + 1 + 0.5) / 2)


def test_summary_and_interval():
    """Medians of runs that belong together, with an interval that more runs make narrower."""
    draw = np.random.default_rng(1)
    keys = ("throughput", "p50_ms", "p95_ms", "p99_ms", "p95_from_sent_ms")

    def record(variant: str, middle: float) -> dict:
        made = {"variant": variant, "kind": "closed_loop", "clients": 8, "rate": None}
        made |= {"requests": 10, "errors": 1, "wrong": 0}
        return made | dict.fromkeys(keys, draw.normal(middle, 5))

    few, many = ([record("a", 100) for _ in range(n)] for n in (7, 40))
    rows = summary(few + [record("b", 50)])
    assert [(row["variant"], row["runs"], row["errors"]) for row in rows] == [
        ("a", 7, 7),
        ("b", 1, 1),
    ]
    (wide, single), (narrow,) = rows, summary(many, key=("variant", "clients"))
    assert "rate" in wide and "rate" not in narrow
    for name in keys:
        for row in (wide, narrow, single):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert wide[name] == np.median([record[name] for record in few])
        assert narrow[f"{name}_low"] <= 100 <= narrow[f"{name}_high"]
        widths = [row[f"{name}_high"] - row[f"{name}_low"] for row in (single, narrow, wide)]
        assert 0 == widths[0] < widths[1] < widths[2]


def test_interleaved():
    """Each round holds every variant, every second round backwards."""
    order = [f"{number}{variant}" for number, variant in interleaved("abc", 3)]
    assert order == ["0a", "0b", "0c", "1c", "1b", "1a", "2a", "2b", "2c"]


SCRIPT = """
local number, texts = 0, {}
for i = 1, COUNT do
  local file = io.open("FOLDER/" .. i, "rb")
  texts[i] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, file:read("*a"))
  file:close()
end
request = function()
  number = number + 1
  return texts[(number - 1) % COUNT + 1]
end
done = function(summary, latency)
  local errors = summary.errors.status + summary.errors.read + summary.errors.timeout
  print("MEASURED", summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e6, errors)
end
"""


def test_agrees_with_wrk(tmp_path):
    """The same requests of 115 kB to the same server: throughput and p50 as wrk measures them."""
    needs_tool("wrk")
    images = [label.encode().ljust(86_000, b"\0") for label in LABELS]
    work = Workload(images, LABELS)
    for i, body in enumerate(work.bodies, 1):
        (tmp_path / str(i)).write_bytes(body)
    script = tmp_path / "wrk.lua"
    script.write_text(SCRIPT.replace("COUNT", str(len(LABELS))).replace("FOLDER", str(tmp_path)))

    def wrk() -> tuple[float, float]:
        command = ["wrk", "-t1", "-c4", "-d1s", "-s", script, server.url]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        throughput, p50, errors = map(float, re.search("MEASURED(.*)", said)[1].split())
        assert errors == 0
        return throughput, p50

    def ours() -> tuple[float, float]:
        run = closed_loop(server.url, work, 4, 0.7, warmup_s=0.1)
        assert run.errors == {}
        return run.throughput, run.quantile(0.5)

    found = {wrk: [], ours: []}
    with Known(steady(0.01)) as server:
        for _, tool in interleaved([wrk, ours], 7):
            found[tool].append(tool())
    differences = np.log(np.array(found[ours]) / np.array(found[wrk])).T  # pair by pair
    for name, values in zip(("throughput", "p50"), differences, strict=True):
        low, high = interval(values)
        print(f"{name}: {np.median(values):+.1%} from wrk's, interval {low:+.1%} to {high:+.1%}")
        assert abs(np.median(values)) < 0.05 or low <= 0 <= high
