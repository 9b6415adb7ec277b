"""The optimisations on real servers, and the ladder that measures them."""

from collections import Counter

import numpy as np
import pytest
from kserve import model_server
from matplotlib.figure import Figure

from model.loadtest import configurations, ladder, plots, records, stock
from model.loadtest.client import with_reference
from model.loadtest.generator import closed_loop
from model.loadtest.limit import limit, one_alone
from model.loadtest.run import Run
from model.loadtest.server_process import ServerProcess
from model.loadtest.summary import summary
from model.loadtest.workload import Workload
from model.serving import cli
from model.serving.machine import free_port

pytestmark = [pytest.mark.long, pytest.mark.alone]


@pytest.fixture(scope="module")
def plain():
    """The stock server, in one process."""
    with ServerProcess(configurations.PLAIN) as server:
        yield server


@pytest.fixture(scope="module")
def work(plain):
    """Images, and what the plain server predicts for each alone."""
    return with_reference(Workload.drawn(24), plain)


def batches(run: Run) -> Counter:
    """(worker, when it began) -> how many requests were in that batch."""
    return Counter((headers["x-worker"], headers["x-started"]) for headers in run.headers)


def assert_batched_and_exact(run: Run):
    """Every response is the plain server's to 1e-5, and most requests shared a batch."""
    assert run.errors == {} and run.requests > 20
    assert run.distance < 1e-5
    assert 0.8 < run.littles_law() < 1.25
    sizes = batches(run).values()
    assert sum(size for size in sizes if size > 1) > 0.8 * sum(sizes)


def test_replicas_share_the_work_in_batches(replicas, work):
    """By default: batches of the frontend, exact, no replica with much more than the other."""
    run = closed_loop(replicas.predict, work, 16, 4, warmup_s=1.5, keep_headers=True)
    assert_batched_and_exact(run)
    shares = Counter(headers["x-worker"] for headers in run.headers)
    assert len(shares) == 2 and min(shares.values()) > 0.5 * max(shares.values())


def test_the_moments_of_a_request_are_in_order(replicas, work):
    """Sent, received, read, started, preprocessed, finished, done: on one clock."""
    run = closed_loop(replicas.predict, work, 2, 1, warmup_s=0.5, keep_headers=True)
    assert run.headers
    for headers in run.headers:
        names = ("x-received", "x-read", "x-started", "x-preprocessed", "x-finished")
        moments = [headers["sent"], *(float(headers[name]) for name in names), headers["done"]]
        assert (np.diff(moments) > -0.002).all(), moments


def test_health_checks_are_not_held_up_by_the_load(plain, replicas, work):
    """With replicas a health check takes a small part of what it takes in the plain server."""
    slow, fast = (records.health_checks(s, work, clients=8, seconds=2) for s in (plain, replicas))
    assert fast["health_p99_ms"] < 0.5 * slow["health_p99_ms"]


def test_replicas_share_their_weights(plain, replicas):
    """Two replicas, KServe and Ray take less than three plain servers would."""
    assert replicas.memory() < 3 * plain.memory()


def test_batches_in_process(work):
    """Without Ray: in each of the processes of KServe's `--workers`."""
    options = ("--in_process", "--workers", "2", "--threads", "1")
    with ServerProcess("model.serving", *options) as server:
        run = closed_loop(server.predict, work, 8, 2, warmup_s=1, keep_headers=True)
    # The kernel deals out connections as it likes: a worker may have one client, always alone.
    together = {worker for (worker, _), size in batches(run).items() if size > 1}
    run.headers = [headers for headers in run.headers if headers["x-worker"] in together]
    assert_batched_and_exact(run)


def test_batches_in_the_replica(work):
    """Each replica makes batches of what reaches it."""
    options = ("--num_replicas", "1", "--batching", "replica")
    with ServerProcess("model.serving", *options) as server:
        run = closed_loop(server.predict, work, 8, 2, warmup_s=1, keep_headers=True)
    assert_batched_and_exact(run)


@pytest.mark.parametrize("name", configurations.CONFIGURATIONS)
def test_every_configuration_is_a_command_line_that_is_accepted(name):
    """So that an option that changes its name is missed here, not after minutes of measuring."""
    configuration = configurations.CONFIGURATIONS[name]
    argv = [f"--http_port={free_port()}", f"--grpc_port={free_port()}"]
    argv += configuration.options.split()
    if configuration.module == configurations.OURS:
        assert [model.name for model in cli.server_config(argv).models] == ["custom-model"]
    elif configuration.module == configurations.STOCK:
        assert stock.options(argv).max_ongoing_requests in (5, 64)
    else:
        model_server.parser.parse_args(argv)


def test_the_limit_is_above_one_bare_process():
    """And a batch of 8 does more images a second than 8 batches of one."""
    rates = limit(batches=(1, 8), seconds=1, processes=1)
    assert rates[8] > 1.1 * rates[1] > 0
    assert one_alone() == pytest.approx(1 / rates[1], rel=0.5)


def test_table_and_figures_of_records(plain, work):
    """What `make bench` prints and draws, from one configuration measured for a moment."""
    how = {"seconds": 1, "warmup_s": 0.3}
    measured = [records.measure(plain, "plain", work, clients=n, **how) for n in (8, 32)]
    about = {"variant": "plain", "seconds_to_ready": 4.0, "memory": 10**9}
    measured.append(about | {"kind": "health"} | records.health_checks(plain, work, 2, 0.5))
    bound = {"kind": "limit", "variant": "limit float32", "throughput": 123.0, "alone_ms": 9.0}
    measured.append(records.machine() | bound)
    table = ladder.table(measured)
    assert "| plain | " in table and "123 a second" in table and "9.0 ms" in table
    assert isinstance(ladder.figure(measured), Figure)
    rows = summary(measured[:2])
    assert isinstance(plots.against_clients(rows, 123.0, "title"), Figure)
    open_ = [records.measure(plain, "plain", work, rate=5, seconds=1, warmup_s=0.2)]
    assert isinstance(plots.against_rate(summary(open_), "title"), Figure)
