"""The levers on real servers, and the ladder that measures them."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.figure import Figure

from model import options
from model.bench import ladder, load, plots, results
from model.bench.limit import limit
from model.bench.server import ServerProcess

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def work(plain):
    """Pictures, and what the plain server says to each alone."""
    return load.Workload.drawn(24).referenced(plain)


def batches(run: load.Run) -> Counter:
    """(worker, when it began) -> how many requests were in that batch."""
    return Counter((headers["x-worker"], headers["x-started"]) for headers in run.headers)


def assert_gathered_and_exact(run: load.Run):
    """Every answer is the plain server's to 1e-5, and most requests shared a batch."""
    assert run.errors == {} and run.requests > 20
    assert run.distance < 1e-5
    assert 0.8 < run.littles_law() < 1.25
    sizes = batches(run).values()
    assert sum(size for size in sizes if size > 1) > 0.8 * sum(sizes)


def test_replicas_share_the_work_in_batches(replicas, work):
    """By default: gathered in front, answers exact, no replica with much more than the other."""
    run = load.closed_loop(replicas.predict, work, 16, 4, warmup_s=1.5, keep_headers=True)
    assert_gathered_and_exact(run)
    shares = Counter(headers["x-worker"] for headers in run.headers)
    assert len(shares) == 2 and min(shares.values()) > 0.5 * max(shares.values())


def test_the_moments_of_a_request_are_in_order(replicas, work):
    """Sent, received, read, started, decoded, finished, done: on one clock."""
    run = load.closed_loop(replicas.predict, work, 2, 1, warmup_s=0.5, keep_headers=True)
    for headers in run.headers:
        names = ("x-received", "x-read", "x-started", "x-decoded", "x-finished")
        moments = [headers["sent"], *(float(headers[name]) for name in names), headers["done"]]
        assert (np.diff(moments) > -0.002).all(), moments


def test_health_checks_pass_by_the_load(plain, replicas, work):
    """With replicas a health check takes a small part of what it takes in the plain server."""
    slow, fast = (results.health_checks(s, work, clients=8, seconds=2) for s in (plain, replicas))
    assert fast["health_p99_ms"] < 0.5 * slow["health_p99_ms"]


def test_replicas_share_their_weights(plain, replicas):
    """Two replicas, KServe and Ray take less than three plain servers would."""
    assert replicas.memory() < 3 * plain.memory()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_plain_server_can_gather_too(work, workers):
    """In one process, and in those of KServe's `--workers`."""
    options = f"--batching server --layout channels_last --workers {workers} --threads 1"
    with ServerProcess("model.kserve_server", *options.split()) as server:
        run = load.closed_loop(server.predict, work, 8, 2, warmup_s=1, keep_headers=True)
    # The kernel deals out connections as it likes: a worker may have one client, always alone.
    together = {worker for (worker, _), size in batches(run).items() if size > 1}
    run.headers = [headers for headers in run.headers if headers["x-worker"] in together]
    assert_gathered_and_exact(run)


def test_batches_in_the_replica(work):
    """Each replica gathers what reaches it."""
    with ServerProcess(
        "model.ray_server", "--num_replicas", "1", "--batching", "replica"
    ) as server:
        run = load.closed_loop(server.predict, work, 8, 2, warmup_s=1, keep_headers=True)
    assert_gathered_and_exact(run)


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_every_rung_is_a_command_line_that_is_accepted(name):
    """So that an option that changes its name is missed here, not after minutes of measuring."""
    module, line = ladder.RUNGS[name]
    parse = options.ray_options if module == ladder.RAY else options.kserve_options
    ports = [f"--http_port={options.free_port()}", f"--grpc_port={options.free_port()}"]
    assert parse([*ports, *line.split()]).model_name == "custom-model"


def test_the_limit_is_above_one_bare_process():
    """And a batch of 8 does more pictures a second than 8 batches of one."""
    rates = limit(batches=(1, 8), seconds=1, processes=1)
    assert rates[8] > 1.1 * rates[1] > 0


def test_table_and_figures_of_records(plain, work):
    """What `make bench` prints and draws, from one rung measured for a moment."""
    run = {"clients": 8, "seconds": 1, "warmup_s": 0.3}
    records = [results.measure(plain, "plain", work, **run | {"clients": n}) for n in (8, 32)]
    about = {"variant": "plain", "seconds_to_ready": 4.0, "memory": 10**9}
    records.append(about | {"kind": "health"} | results.health_checks(plain, work, 2, 0.5))
    records.append(
        results.machine()
        | {"kind": "limit", "variant": "limit float32", "throughput": 123.0, "alone_ms": 9.0}
    )
    table = ladder.table(records)
    assert "| plain | " in table and "123 a second" in table and "9.0 ms" in table
    assert isinstance(ladder.figure(records), Figure)
    rows = results.summary(records[:2])
    assert isinstance(plots.against_clients(rows, 123.0, "title"), Figure)
    open_ = [results.measure(plain, "plain", work, rate=5, seconds=1, warmup_s=0.2)]
    assert isinstance(plots.against_rate(results.summary(open_), "title"), Figure)
