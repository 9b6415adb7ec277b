"""The table of promises, in short: each is kept by our server, with evidence of the fault.

What `python -m model.faults` prints, with smaller numbers. Ratios have slack here.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from model.faults import clients, promises
from model.faults.grpc_clients import REFUSED
from model.faults.observe import wait_for_replicas
from model.faults.outcome import Outcome
from model.faults.servers import HALVES, ours
from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload
from tests import taken_out
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def served() -> Iterator[ServerProcess]:
    """AlexNet in two replicas."""
    with ours(*HALVES) as server:
        yield server


@pytest.fixture(scope="module")
def started() -> Iterator[promises.Start]:
    """What stands for the start of a server with four replicas: the one that runs, once all do."""
    with promises.fragile(4, **fresh_token()) as server:

        def start(*_, **__) -> AbstractContextManager[ServerProcess]:
            wait_for_replicas(server, 4)
            return nullcontext(server)

        yield start


@pytest.fixture(scope="module")
def work() -> Workload:
    """Images to send."""
    return Workload.drawn(16)


@pytest.fixture(scope="module")
def eight(work: Workload) -> Workload:
    """Requests that take long: eight images each."""
    return Workload(work.images, work.labels, images_per_request=8)


def assert_kept(outcome: Outcome) -> None:
    """The fault has happened, somebody was answered, and the promise is kept."""
    assert outcome.evidence and outcome.requests["answered"] > 0
    assert outcome.kept, outcome


@pytest.mark.long
def test_malformed_requests(served, work):
    """A 4xx for each, and the next good one is answered."""
    outcome = clients.malformed(served.predict, work)
    assert outcome.kept, outcome


@pytest.mark.long
def test_slow_senders(served, work):
    """They keep nobody out; how long others take is measured by the command, not here."""
    outcome = clients.slow_senders(served.predict, work, seconds=3, connections=400)
    assert set(outcome.requests) == {"answered"}, outcome
    assert "connections made: 4" in outcome.evidence


@pytest.mark.long
@pytest.mark.alone
def test_clients_that_give_up(served, eight):
    """Most of the goodput stays (0.02 where requests are not cancelled, or the oldest go first)."""
    outcome = clients.impatient(served.predict, eight, seconds=8)
    assert outcome.facts["goodput"] > 0.5, outcome


@pytest.mark.long
@pytest.mark.alone
def test_overload(served, eight):
    """What can be answered is, in time."""
    outcome = clients.overload(served.predict, eight, seconds=8)
    assert outcome.facts["goodput"] > 0.5, outcome


@pytest.mark.long
def test_killed_replicas(started):
    """One of them, and what was in flight on it is answered."""
    assert_kept(promises.killed(started, seconds=8))


@pytest.mark.long
def test_mass_failure(started):
    """All, all but one, one by one."""
    for outcome in promises.mass_failure(started, 4, seconds=8):
        assert_kept(outcome)


@pytest.mark.long
def test_poison(started):
    """At most three replicas for a request that crashes them, and nobody else loses his."""
    assert_kept(promises.poison(started, seconds=12))


@pytest.mark.long
def test_a_server_that_is_told_to_end():
    """It loses nothing."""
    for outcome in promises.stopped(promises.fragile, times=1, seconds=8):
        assert_kept(outcome)


@pytest.mark.long
def test_a_server_that_is_told_to_end_over_grpc():
    """Nor there."""
    for outcome in promises.stopped_over_grpc(promises.fragile, times=1):
        assert_kept(outcome)
        assert outcome.requests.get(REFUSED, 0) > 0, "the server had no clients when it ended"


@pytest.mark.long
def test_an_update_that_fails():
    """The old version goes on, with all its replicas."""
    for outcome in promises.failing_update(promises.fragile, seconds=8):
        assert_kept(outcome)


@pytest.mark.long
def test_two_frontends():
    """One client at each: they keep out of each other's way."""
    outcome = promises.two_frontends(promises.fragile, seconds=5)
    assert outcome.facts["shared"] < 0.3, outcome  # all of them, where they know nothing of it


@pytest.mark.long
def test_large_bodies():
    """Their memory is bounded, and the server goes on."""
    outcome = promises.large_bodies(promises.fragile, clients=96)
    assert outcome.kept, outcome


@pytest.mark.long
def test_the_command_at_any_server(served, work, tmp_path):
    """`--url`: the half of the table that needs clients only."""
    body = tmp_path / "body.json"
    body.write_bytes(work.bodies[0])
    command = [sys.executable, "-m", "model.faults", "malformed", "--url", served.url]
    for more in ([], ["--body", str(body)]):
        ran = subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=90
        )
        assert ran.returncode == 0, ran.stderr
        *_, row = ran.stdout.splitlines()
        assert row.startswith("| a bad request") and "| yes |" in row, row


@pytest.mark.parametrize("promise", taken_out.EDITS)
def test_the_code_behind_a_promise_is_where_it_is_taken_out(promise):
    """`python -m tests.taken_out` can be run: the text is there, and so is the test."""
    edit = taken_out.EDITS[promise]
    assert (ROOT / "model" / "serving" / edit.file).read_text().count(edit.old) == 1
    file, name = edit.test.split("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text()
