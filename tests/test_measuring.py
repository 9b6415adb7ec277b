"""What measures a server under faults and load: it counts all there is, and nothing besides."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests

from model.faults import clients, endurance, grpc_clients
from model.faults.experiment import Experiment, NotTested
from model.faults.observe import snapshots
from model.loadtest import generator, records
from model.loadtest.run import REFUSED, RIGHT, Sample

MS = 5.0


def experiment(*answered: float, ends: bool = False) -> Experiment:
    """Ten seconds of load, with right responses at these moments; all others were refused."""
    done = [*((at, RIGHT) for at in answered), (5.0, REFUSED), (10.1, REFUSED)]
    samples = [Sample(at, at, at, outcome, {}) for at, outcome in done]
    return Experiment("", SimpleNamespace(seconds=10.0, samples=samples), ends=ends)


@pytest.mark.parametrize(
    "answered, ends, longest_s",
    [
        ((1, 2, 4, 6, 8), False, 2),
        ((1, 2, 3), False, 7),  # it died, and did not come back
        ((6, 8, 9), False, 6),  # nobody was answered at first
        ((6, 8, 9), True, 6),
        ((1, 2, 3), True, 1),  # it was to end
        ((3, 6, 9, 14), False, 3),  # the last one came after the load
        ((3, 6, 9, 14), True, 3),
        ((3, 14), False, 7),
        ((1, 2, 14), True, 1),
        ((14,), False, math.inf),
        ((), False, math.inf),
        ((), True, math.inf),
    ],
)
def test_the_longest_time_without_a_success(answered, ends, longest_s):
    """From the load's begin to its end, unless the server was to end before."""
    assert experiment(*answered, ends=ends).longest_without_success_s == longest_s


class Writer:
    """Of a connection that takes all that is written, or is closed after the first byte."""

    def __init__(self, closed: bool) -> None:
        self.closed = closed

    def write(self, data: bytes) -> None:
        """Take it."""

    async def drain(self) -> None:
        """Tell whether it is closed."""
        if self.closed:
            raise ConnectionResetError

    def close(self) -> None:
        """Nothing is there to close."""


@pytest.fixture
def network(monkeypatch) -> SimpleNamespace:
    """In place of the network: whether it `refuses` or `closes`; `asked` for these addresses."""
    there = SimpleNamespace(refuses=False, closes=False, asked=[])

    async def connect(*address: object) -> tuple[None, Writer]:
        there.asked.append(address)
        if there.refuses:
            raise ConnectionRefusedError
        return None, Writer(there.closes)

    monkeypatch.setattr(clients.asyncio, "open_connection", connect)
    monkeypatch.setattr(clients, "closed_loop", lambda *_, **__: None)
    monkeypatch.setattr(clients, "CONNECTED_WITHIN_S", 0.3, raising=False)
    return there


@pytest.mark.parametrize("host, port", [("somewhere", 80), ("somewhere:81", 81)])
def test_slow_senders_connect_to_the_port_of_http(network, host, port):
    """Where the address names none: as the load generator does."""
    with clients.trickling(f"http://{host}/v1", 3) as seen:
        assert network.asked == [("somewhere", port)] * 3
    assert (seen.made, seen.most, seen.open) == (3, 3, 0)


def test_slow_senders_that_cannot_connect_give_up(network):
    network.refuses = True
    with pytest.raises(NotTested, match="only 0 of 3 connections"):
        clients.slow_senders("http://somewhere", None, connections=3)


def test_connections_that_are_made_again_count_once(network):
    """What counts is how many there are at a time."""
    network.closes = True
    with pytest.raises(NotTested, match="only 1 of 2 connections"):
        clients.slow_senders("http://somewhere", None, connections=2)


def checked(monkeypatch, status: int) -> list[str]:
    """Check the health of a server that answers so; returns what the load did at each check."""
    now, seen, pause = ["starts"], [], threading.Event().wait

    def load(*_: object, warmup_s: float, begins=lambda: None, **__: object) -> None:
        pause(0.1)
        now[0] = "warms up"
        begins()
        pause(warmup_s - 0.1)  # both wait from the same moment, and either may wake up first
        now[0] = "runs"
        pause(0.5)
        now[0] = "has ended"
        pause(0.3)

    class Session(requests.Session):
        def get(self, *_: object, **__: object) -> requests.Response:
            seen.append(now[0])
            response = requests.Response()
            response.status_code = status
            return response

    monkeypatch.setattr(generator, "closed_loop", load)
    monkeypatch.setattr(records.requests, "Session", Session)
    server = SimpleNamespace(url="", name="", predict="")
    found = records.health_checks(server, SimpleNamespace(v2=False), 1, seconds=0.2)
    assert 0 <= found["health_p50_ms"] <= found["health_p99_ms"]
    return seen


def test_health_is_checked_under_load(monkeypatch):
    """Not before the load, nor as it warms up, nor after it."""
    assert set(checked(monkeypatch, 200)) == {"runs"}


def test_a_failed_health_check_is_none(monkeypatch):
    with pytest.raises(requests.HTTPError, match="503"):
        checked(monkeypatch, 503)


def test_health_is_not_checked_without_a_load():
    """A load that fails before it begins."""
    server = SimpleNamespace(url="", name="", predict="no address")
    with pytest.raises(ValueError, match="'no address' is no address"):
        records.health_checks(server, SimpleNamespace(v2=False), 1)


class Process:
    """As much of a psutil.Process as is asked for."""

    def cmdline(self) -> list[str]:
        """A replica."""
        return ["ray::ServeReplica:x"]


@pytest.mark.parametrize("freedom, expected", [(2, 4.303), (4, 2.776), (10, 2.228), (28, 2.048)])
def test_students_t(freedom, expected):
    """Beside the table of the NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2."""
    assert endurance._t(freedom) == pytest.approx(expected, rel=0.01)


def test_few_minutes_do_not_say_that_it_grows():
    """31 ± 11 MB an hour with the normal distribution's 1.96, ± 24 with Student's t."""
    process = Process()
    values = [(60.0 * i, {process: (mb, 40)}) for i, mb in enumerate((100, 100.3, 101.2, 101.4))]
    _, fact = endurance.growth(values).values()
    assert "grows" not in fact, fact


def test_calls_are_counted_whatever_happens(monkeypatch):
    """What nobody expects is raised once all clients are done, with what became of the calls."""
    good = SimpleNamespace(raw_output_contents=[np.float32([MS]).tobytes()])
    none = SimpleNamespace(raw_output_contents=[])
    calls = iter([good, good, good, none])
    stub = SimpleNamespace(ModelInfer=lambda *_, **__: next(calls))
    monkeypatch.setattr(grpc_clients, "GRPCInferenceServiceStub", lambda _: stub)
    server = SimpleNamespace(grpc="127.0.0.1:1", name="")
    with pytest.raises(IndexError) as raised:
        grpc_clients.call(server, MS, clients=1, seconds=10)
    assert "{'answered': 3, 'IndexError': 1}" in raised.value.__notes__[0]


def test_a_snapshot_that_fails_is_not_kept_back():
    """An error that nobody expects ends the snapshots; it is raised at the end of the block."""
    looked = threading.Event()

    def take(server: None) -> dict:
        if taken:
            looked.set()
            raise psutil.NoSuchProcess(1)
        return {}

    with pytest.raises(psutil.NoSuchProcess), snapshots(None, take, 0.01) as taken:
        assert looked.wait(10)
    assert len(taken) == 1
