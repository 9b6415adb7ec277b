"""Which server pays: the model that only computes, the advice, its table and figure."""

import json
import math
import time

import pytest

from model.loadtest import records as kept
from model.loadtest.pays.advice import advice, table_of, throughputs
from model.loadtest.pays.figure import figure
from model.loadtest.pays.measure import RECORDS, SERVERS
from model.loadtest.pays.timed_model import TimedModel
from model.loadtest.workload import JsonWorkload

PLAIN, THREAD, WORKERS, STOCK, OURS, IN_EACH = SERVERS


def records(rates: dict[str, float], ms: float = 3, shared: float = 0.0, clients: int = 8):
    """A record of each server that is named, with its requests a second."""
    latencies = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "p95_from_sent_ms"), 1.0)
    about = {"ms": ms, "shared": shared, "clients": clients, "requests": 9, "errors": 0, "wrong": 0}
    return [about | latencies | {"variant": n, "throughput": rate} for n, rate in rates.items()]


@pytest.mark.parametrize(
    ("rates", "choice"),
    [
        ({PLAIN: 100, THREAD: 105, WORKERS: 109, STOCK: 90, OURS: 110}, PLAIN),
        ({PLAIN: 100, THREAD: 300, WORKERS: 200, STOCK: 150, OURS: 310}, THREAD),
        ({PLAIN: 100, THREAD: 110, WORKERS: 200, STOCK: 150, OURS: 195}, WORKERS),
        ({PLAIN: 100, THREAD: 110, WORKERS: 120, STOCK: 130, OURS: 400}, OURS),
        ({PLAIN: 100, OURS: 200, IN_EACH: 400}, IN_EACH),
        ({OURS: 400, PLAIN: 399}, PLAIN),
    ],
)
def test_the_simplest_server_that_is_fast_enough(rates, choice):
    """The first in the order of their parts that is within 10 % of the best."""
    (case,) = advice(records(rates))
    assert case["choice"] == choice
    assert case["ratios"][OURS] == pytest.approx(rates[OURS] / rates[PLAIN])
    (row,) = table_of(records(rates))
    assert row["simplest within 10 % of the best"] == choice


def test_medians_of_the_rounds_and_a_panel_for_each_model():
    """Three rounds of two models with two numbers of clients."""
    measured = [
        record
        for rate in (100, 400, 200)
        for ms in (0.3, 30)
        for clients in (1, 8)
        for record in records({PLAIN: 100, OURS: rate}, ms=ms, clients=clients)
    ]
    assert [case["ratios"][OURS] for case in advice(measured)] == [2.0] * 4
    drawn = figure(measured, "demo")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [
        "0.3 ms, a batch saves nothing",
        "30 ms, a batch saves nothing",
    ]
    assert all(len(axes.get_lines()) == 2 for axes in drawn.axes)


def test_the_model_computes_as_long_as_it_is_told():
    """In seconds of CPU, so that a busy machine changes nothing; a batch shares a part."""
    model = TimedModel("timed")

    def cpu_ms(requests: int, shared: float) -> float:
        began = time.thread_time()
        found = model.predict_batch([[{"ms": 20, "shared": shared}]] * requests)
        assert found == [[20]] * requests
        return 1000 * (time.thread_time() - began)

    assert 20 <= cpu_ms(1, 0.8) < 30
    assert 80 <= cpu_ms(4, 0.0) < 100
    assert 32 <= cpu_ms(4, 0.8) < 45


def test_responses_of_any_model_are_compared_as_a_whole():
    """Right, another, unreadable."""
    work = JsonWorkload([{"instances": [1]}, {"instances": [2]}], [{"a": 1}, {"a": 2}])
    assert [json.loads(body)["instances"] for body in work.bodies] == [[1], [2]]
    assert work.judge(1, b'{"a": 2}') == ("right", 0.0)
    assert work.judge(0, b'{"a": 2}')[0] == "wrong response"
    assert work.judge(0, b"{")[0] == "unreadable response"
    with pytest.raises(ValueError, match="a response for each"):
        JsonWorkload([1], [])


def test_a_server_that_was_not_measured_has_no_ratio():
    """Without the plain server there is nothing to compare with."""
    (case,) = advice(records({OURS: 100}))
    assert math.isnan(case["ratios"][OURS]) and case["choice"] == OURS


def chosen(ms: float, shared: float, clients: int) -> str:
    """What the decision table at the end of notebook 8 says of a model that TimedModel stands for.

    Its lowest row that is true counts; rows that are not about speed are left out here.
    """
    if clients == 1:
        return PLAIN
    if not shared:
        return WORKERS
    return THREAD if ms < 1 else IN_EACH if ms < 10 else OURS


def test_the_decision_table_of_notebook_8_agrees_with_what_was_measured():
    """Its servers do nine tenths of the best throughput on average, and nowhere less than 0.8."""
    cases = throughputs(kept.read(RECORDS))
    shares = {case: rates[chosen(*case)] / max(rates.values()) for case, rates in cases.items()}
    assert len(shares) == 24
    assert sum(shares.values()) / len(shares) > 0.9
    assert min(shares.values()) > 0.8, shares
