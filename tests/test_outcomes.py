"""What counts as lost, as recovered, and as not tested at all: from runs that are known."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest

from model.faults import clients, promises
from model.faults.__main__ import tried
from model.faults.experiment import Experiment, Injected, NotTested
from model.faults.outcome import Outcome, nothing_lost, recovery_s
from model.loadtest.run import REFUSED, REJECTED, RIGHT, WRONG, Run, Sample
from model.loadtest.workload import AnyResponse, Workload

BEGAN = 1000.0
SECONDS = 20.0


def experiment(
    *samples: tuple[float, float, str], faults: tuple = ((10, 0),), ends: bool = False
) -> Experiment:
    """samples: (when it ended, how long it took, outcome). faults: (when, how long it took)."""
    made = [Sample(at - s, at - s, at, outcome, {}) for at, s, outcome in samples]
    errors = Counter(sample.outcome for sample in made if sample.outcome != RIGHT)
    wrong = sum(errors[kind] for kind in WRONG)
    run = Run(SECONDS, 0, len(made), errors, wrong, 0, [], [], 0, 0, 0, 0, {}, BEGAN, made, [])
    injected = [Injected("", BEGAN + at, took, "it happened") for at, took in faults]
    return Experiment("", run, faults=injected, ends=ends)


def rights(begin: float, end: float, latency_s: float = 0.1) -> list[tuple[float, float, str]]:
    """Ten right responses a second."""
    return [(i / 10, latency_s, RIGHT) for i in range(int(10 * begin), int(10 * end))]


def errors(begin: float, end: float, outcome: str, latency_s: float = 0.01) -> list[tuple]:
    """A hundred a second that are not answered."""
    return [(i / 100, latency_s, outcome) for i in range(int(100 * begin), int(100 * end))]


@pytest.mark.parametrize(
    "samples, recovered_s",
    [
        (rights(1, 20), 0),
        (rights(1, 10) + rights(10, 13, 0.3) + rights(13, 20, 0.11), 3.5),
        (rights(1, 10) + rights(10, 20, 0.3), math.inf),
        (rights(1, 10) + errors(10, 14, REJECTED) + rights(14, 20), 4.9),  # nobody was answered
        (rights(1, 10), math.inf),
        (rights(11, 20), math.nan),
    ],
)
def test_recovery(samples, recovered_s):
    """Until the median of a second is within 1.2 times that before; errors take for ever."""
    found = recovery_s(experiment(*samples))
    assert found == pytest.approx(recovered_s, abs=0.5, nan_ok=True)


def test_recovery_from_several_faults():
    """The longest; what comes after the next fault is that one's."""
    slow = rights(1, 5) + rights(5, 6, 0.3) + rights(6, 12) + rights(12, 14, 0.3) + rights(14, 20)
    found = recovery_s(experiment(*slow, faults=((5, 0), (12, 0))))
    assert found == pytest.approx(2.5, abs=0.5)
    never = rights(1, 5) + rights(5, 12, 0.3) + rights(12, 20)
    assert recovery_s(experiment(*never, faults=((5, 0), (12, 0)))) == math.inf


@pytest.mark.parametrize(
    "sample, lost, lost_if_it_may_reject",
    [
        ((11, 0.1, RIGHT), 0, 0),
        ((11, 0.1, "HTTP 500"), 1, 1),
        ((11, 0.1, REJECTED), 1, 0),
        ((15, 4.0, REJECTED), 1, 1),  # it had been admitted
        ((11, 0.1, WRONG[0]), 0, 0),  # which is not lost, and breaks the promise all the same
    ],
)
def test_what_is_lost(sample, lost, lost_if_it_may_reject):
    """A 503 at once is for whom there is no room; one after a wait is not."""
    strict = nothing_lost("", experiment(*rights(1, 20), sample))
    lax = nothing_lost("", experiment(*rights(1, 20), sample), may_reject=True)
    assert (strict.facts["lost"], lax.facts["lost"]) == (lost, lost_if_it_may_reject)
    right = sample[2] != WRONG[0]
    assert (strict.kept, lax.kept) == (right and not lost, right and not lost_if_it_may_reject)


def test_a_connection_may_be_refused_once_the_server_ends():
    """Not before."""
    before, after = (9, 0, REFUSED), (11, 0, REFUSED)
    how = {"ends": True}
    assert nothing_lost("", experiment(*rights(1, 10), after, **how), may_reject=True).kept
    assert not nothing_lost("", experiment(*rights(1, 10), before, **how), may_reject=True).kept


@pytest.mark.parametrize("faults, why", [((), "no fault"), (((10, 11),), "longer than the load")])
def test_a_fault_that_the_load_has_not_seen(faults, why):
    """Says nothing of the promise."""
    with pytest.raises(NotTested, match=why):
        nothing_lost("", experiment(*rights(1, 20), faults=faults))


def test_what_could_not_be_tested_is_told_apart():
    """From what is kept, and from what is not, as where the server does not come back."""

    def outcomes(error: Exception):
        yield Outcome("a promise", "", "", {}, "", True)
        raise error

    cases = {"not tested": NotTested("no client gave up"), "**no**": RuntimeError("it is gone")}
    for verdict, error in cases.items():
        kept, other = tried("name", outcomes(error))
        assert (kept.verdict, other.verdict, other.found) == ("yes", verdict, str(error))
    with pytest.raises(ValueError):  # a mistake of ours
        list(tried("name", outcomes(ValueError())))


def fake_loops(monkeypatch, calm: float, latencies: list[float]) -> None:
    """Loads that find so many responses a second, and these latencies under overload."""
    few = SimpleNamespace(throughput=calm, latencies=[0.1], errors={})
    flood = SimpleNamespace(requests=300, latencies=latencies, errors={}, samples=[], sent=300)
    monkeypatch.setattr(clients, "closed_loop", lambda *_, **__: few)
    monkeypatch.setattr(clients, "open_loop", lambda *_, **__: flood)


def test_overload_that_is_none(monkeypatch):
    """A server that answers all of it in time was not overloaded, however little it is."""
    fake_loops(monkeypatch, 10, [0.1] * 290)
    with pytest.raises(NotTested, match="no overload"):
        clients.overload("", None, seconds=10)
    fake_loops(monkeypatch, 0, [])
    with pytest.raises(NotTested, match="no right response"):
        clients.overload("", None, seconds=10)


def test_answers_that_come_too_late_are_no_goodput(monkeypatch):
    """Their clients wait from when they meant to send, not from when a connection was free."""
    fake_loops(monkeypatch, 10, [0.1] * 50 + [5.0] * 100)
    found = clients.overload("", None, seconds=10)
    assert found.facts["goodput"] == 0.5 and not found.kept


def test_an_update_that_fails_for_another_reason_is_no_test(monkeypatch):
    """That no server was found, say, tells nothing of versions."""

    def fails(said: str):
        def redeploy(*_: object) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr(promises.inject, "redeploy", redeploy)

    fails("model.serving.redeploy failed: no server runs at this address")
    with pytest.raises(NotTested, match="another reason"):
        promises._refused(None, "broken")
    fails("model.serving.redeploy failed: custom-model: the weights are broken. It goes on")
    assert "the weights are broken" in promises._refused(None, "broken")


def test_any_model_gets_what_is_malformed_for_any():
    """Images are for a model of images."""
    assert set(clients.NO_V1) < set(clients.MALFORMED)
    assert not any(b"image" in body for body in clients.NO_V1.values())
    assert json.loads(AnyResponse({"instances": [1]}).bodies[0]) == {"instances": [1]}
    assert not isinstance(AnyResponse({}), Workload)
