"""The simulation agrees with queueing theory and with the real batcher; plans keep their word."""

import asyncio
import math
import selectors
import subprocess
import sys
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest

from model.capacity import planning
from model.capacity.extrapolation import extrapolate
from model.capacity.fitting import fit, fit_service_times, turnaround
from model.capacity.growth import measure
from model.capacity.planning import (
    Machine,
    in_each_replica,
    needed,
    needed_in_each,
    per_million,
)
from model.capacity.plots import figure
from model.capacity.queueing import erlang_b, erlang_c
from model.capacity.scenario import Scenario, ServiceTimes
from model.capacity.simulation import one_frontend, simulate
from model.capacity.validation import compare, repeated
from model.serving.batcher import Batcher

REAL = ServiceTimes(frontend_s=0.0015, fixed_s=0.008, image_s=0.015, cv=0.1)
ONE_BY_ONE = {"max_batch_size": 1, "admission_limit": math.inf}


def test_erlang_formulas_give_the_textbooks_values():
    assert erlang_b(1, 2.0) == pytest.approx(2 / 3)
    assert erlang_b(10, 5.0) == pytest.approx(0.018385, abs=1e-6)
    assert erlang_c(1, 0.6) == pytest.approx(0.6)  # M/M/1: who comes while it is busy waits
    assert erlang_c(10, 8.0) == pytest.approx(0.409180, abs=1e-6)
    assert erlang_c(3, 3.0) == 1


@pytest.mark.parametrize("servers,load", [(1, 0.5), (4, 2.4), (10, 7.0)])
def test_requests_wait_as_erlang_c_says(servers, load):
    """M/M/c: exponential service of 1 s, one image at a time."""
    times = ServiceTimes(frontend_s=0, image_s=1, cv=1)
    found = simulate(times, Scenario(servers, rate=load, **ONE_BY_ONE), 40_000 / load, 100)
    waited = erlang_c(servers, load) / (servers - load)
    assert found.mean_ms / 1e3 - 1 == pytest.approx(waited, rel=0.1)
    assert found.replicas_busy == pytest.approx(load / servers, rel=0.02)
    assert found.throughput == pytest.approx(load, rel=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("where", ["replica", "frontend"])
def test_requests_wait_as_pollaczek_and_khinchine_say(where):
    """M/D/1: a constant 1 s, at the one replica or at the frontend before many idle ones."""
    load = 0.7
    if where == "replica":
        times, scenario = ServiceTimes(0, image_s=1), Scenario(1, rate=load, **ONE_BY_ONE)
    else:
        times, scenario = ServiceTimes(1, image_s=1e-9), Scenario(50, rate=load, **ONE_BY_ONE)
    found = simulate(times, scenario, 20_000 / load, 100)
    assert found.mean_ms / 1e3 - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    busy = found.replicas_busy if where == "replica" else found.frontends_busy
    assert busy == pytest.approx(load, rel=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("servers,load,cv", [(1, 2.0, 1), (10, 8.0, 1), (10, 9.0, 0)])
def test_admission_without_a_queue_rejects_as_erlang_b_says(servers, load, cv):
    """Whatever the spread of the service times: the formula needs only their mean."""
    scenario = Scenario(servers, max_batch_size=1, admission_limit=servers, rate=load)
    found = simulate(ServiceTimes(0, image_s=1, cv=cv), scenario, 20_000 / load, 100)
    assert found.rejected == pytest.approx(erlang_b(servers, load), rel=0.06)
    assert found.in_flight == pytest.approx(load * (1 - found.rejected), rel=0.03)
    assert found.littles_law() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("size", [1, 16])
def test_a_closed_loop_gets_all_that_replicas_can_do(size):
    times = ServiceTimes(frontend_s=0, fixed_s=0.008, image_s=0.015)
    found = simulate(times, Scenario(4, size, clients=2 * 4 * size), seconds=60, warmup_s=5)
    assert found.throughput == pytest.approx(4 * size / times.seconds(size), rel=0.02)
    assert found.replicas_busy == pytest.approx(1, abs=0.01)
    assert found.in_flight == pytest.approx(8 * size)
    assert found.littles_law() == pytest.approx(1, abs=0.03)


def test_the_frontend_is_the_limit_where_replicas_are_many():
    times = ServiceTimes(frontend_s=0.001, response_s=0.001, image_s=0.01)
    one = simulate(times, Scenario(20, clients=64), seconds=10, warmup_s=1)
    two = simulate(times, Scenario(20, clients=128, frontends=2), seconds=10, warmup_s=1)
    assert one.throughput == pytest.approx(500, rel=0.02) and one.frontends_busy > 0.99
    assert two.throughput == pytest.approx(1000, rel=0.02)


def test_one_frontend_stands_for_all_that_have_replicas_of_their_own():
    scenario = Scenario(8, rate=400, frontends=4)
    all_of_them = simulate(REAL, scenario, 30, 5)
    one = one_frontend(REAL, scenario)
    assert one.throughput == pytest.approx(all_of_them.throughput, rel=0.03)
    assert one.p95_ms == pytest.approx(all_of_them.p95_ms, rel=0.1)
    assert one.in_flight == pytest.approx(all_of_them.in_flight, rel=0.1)
    with pytest.raises(ValueError, match="simulated together"):
        one_frontend(REAL, Scenario(8, rate=400, frontends=4, shared_replicas=True))


def test_replicas_that_frontends_share():
    """One replica for two frontends is one server (M/D/1), and all replicas serve either."""
    load, times = 0.7, ServiceTimes(0, image_s=1)
    scenario = Scenario(1, frontends=2, shared_replicas=True, rate=load, **ONE_BY_ONE)
    found = simulate(times, scenario, 20_000 / load, 100)
    assert found.mean_ms / 1e3 - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    assert found.replicas_busy == pytest.approx(load, rel=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.01)
    alone = {"replicas": 4, "clients": 64}  # one frontend: sharing changes nothing
    assert simulate(REAL, Scenario(**alone)) == simulate(
        REAL, Scenario(**alone, shared_replicas=True)
    )
    # All clients at one of two frontends: of four replicas it has two of its own, or all.
    busy = {"replicas": 4, "frontends": 2, "max_batch_size": 1}
    lone = [
        _throughput_of_the_first_frontend(Scenario(**busy, shared_replicas=shared, clients=8))
        for shared in (False, True)
    ]
    assert lone[1] == pytest.approx(2 * lone[0], rel=0.05)


def _throughput_of_the_first_frontend(scenario: Scenario) -> float:
    """With all clients at it, and none at the other."""
    times = ServiceTimes(0, image_s=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.capacity.simulation.cycle", lambda frontends: cycle(frontends[:1]))
        return simulate(times, scenario, 20, 2).throughput


def test_overload_is_rejected_and_the_rest_answered():
    found = simulate(REAL, Scenario(2, rate=300), 30, 10)
    assert found.throughput == pytest.approx(2 * 16 / REAL.seconds(16), rel=0.03)
    assert found.rejected == pytest.approx(1 - found.throughput / 300, abs=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.05)


def test_the_same_seed_gives_the_same_outcome():
    found = [simulate(REAL, Scenario(2, rate=50), 5, 1, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "replicas,size,rate,frontends",
    [(1, 16, 60, 1), (3, 4, 170, 1), (4, 16, 90, 1), (3, 4, 150, 2), (2, 16, 100, 3)],
)
def test_batches_are_those_of_the_real_batcher(replicas, size, rate, frontends, monkeypatch):
    """The real one, on a clock that jumps ahead, dispatches the same batches at the same moments.

    Several frontends, each with a batcher, share the replicas.
    """
    gaps = np.random.default_rng(0).exponential(1 / rate, 1000)
    times = ServiceTimes(0, fixed_s=0.008, image_s=0.015)
    real = _OnVirtualClock.run(_batches(times, replicas, size, gaps, frontends))

    draws, turns, found = iter(gaps), cycle(range(frontends)), []
    monkeypatch.setattr("random.Random.expovariate", lambda self, rate: next(draws, math.inf))
    monkeypatch.setattr("random.Random.randrange", lambda self, count: next(turns))
    monkeypatch.setattr("random.Random.choice", lambda self, idle: idle[0])
    monkeypatch.setattr("model.capacity.simulation._outcome", lambda those, *_: found.extend(those))
    shared = {"frontends": frontends, "shared_replicas": True, "admission_limit": math.inf}
    simulate(times, Scenario(replicas, size, rate=rate, **shared), 1e9, 0)
    for frontend, batches in zip(found, real, strict=True):
        assert [n for _, n in frontend.batches] == [n for _, n in batches]
        moments = [at for at, _ in frontend.batches]
        assert moments == pytest.approx([at for at, _ in batches])


async def _batches(times, replicas, size, gaps, frontends) -> list[list[tuple[float, int]]]:
    """(moment, images) of each real batcher's batches, for requests with these gaps between."""
    now, batches = asyncio.get_running_loop().time, [[] for _ in range(frontends)]
    busy, calls = [asyncio.Lock() for _ in range(replicas)], [0] * replicas

    def batcher(mine):
        last = {}

        def least_busy(worker_index):  # as AssignedReplicaRouter
            idle = [i for i in range(replicas) if calls[i] == min(calls)]
            if last.get(worker_index) not in idle:
                last[worker_index] = idle[0]
            return last[worker_index]

        async def work(batch, worker_index, backlog):
            mine.append((now(), len(batch)))
            replica = worker_index if frontends == 1 else least_busy(worker_index)
            calls[replica] += 1
            async with busy[replica]:
                await asyncio.sleep(times.seconds(len(batch)))
            calls[replica] -= 1
            return batch

        return Batcher(work, lambda: replicas, size)

    async def request(due, frontend):
        await asyncio.sleep(due - now())
        await frontend("x")

    turns = cycle([batcher(mine) for mine in batches])
    await asyncio.gather(*map(request, np.cumsum(gaps), turns))
    return batches


class _OnVirtualClock(asyncio.SelectorEventLoop):
    """An event loop that does not sleep: its clock jumps to when there is something to do."""

    class _Selector(selectors.SelectSelector):
        jump = 0.0

        def select(self, timeout=None):
            self.jump += timeout or 0.0
            return super().select(0)

    @classmethod
    def run(cls, work):
        with asyncio.Runner(loop_factory=lambda: cls(cls._Selector())) as runner:
            return runner.run(work)

    def time(self):
        return self._selector.jump


def test_times_are_fitted_and_never_negative():
    assert fit([(n, 0.008 + 0.015 * n) for n in (1, 4, 16)]) == pytest.approx((0.008, 0.015))
    assert fit([(1, 0.01), (2, 0.03)]) == pytest.approx((0, 0.014))
    assert fit([(1, 0.03), (2, 0.01)]) == pytest.approx((0.02, 0))
    assert fit([(1, -0.01), (2, -0.03)]) == fit([(1, -0.03), (2, -0.01)]) == (0, 0)
    with pytest.raises(ValueError, match="two sizes"):
        fit([(4, 0.1), (4, 0.2)])


def test_a_measured_table_goes_before_the_line():
    times = ServiceTimes(0, 9.0, 9.0, measured={1: 0.02, 4: 0.05, 8: 0.09})
    assert [times.seconds(n) for n in (1, 2, 8, 16)] == pytest.approx([0.02, 0.03, 0.09, 0.18])


def test_service_times_are_read_from_loads():
    """Of the server, the call of a replica and the way there, from what headers and CPU tell."""

    def run(size: int, batches: int = 10) -> SimpleNamespace:
        headers = []
        for sent in range(batches):
            times = {"x-started": sent + 0.01, "x-finished": sent + 0.018 + 0.015 * size}
            found = {"x-worker": "w", **{name: f"{at:.6f}" for name, at in times.items()}}
            headers += size * [found | {"sent": sent, "done": sent + 0.024 + 0.015 * size}]
        cpu = {"frontend": batches * (0.001 + 0.002 * size) / 20}
        return SimpleNamespace(headers=headers, cpu=cpu, seconds=20, in_flight=size)

    found = fit_service_times([run(4), run(1), run(9, batches=3), run(2, batches=0)])
    assert found.measured == pytest.approx({1: 0.023, 4: 0.068})  # of 9 too few were seen
    parts = found.frontend_s, found.response_s, found.call_s, found.hop_s
    assert parts == pytest.approx((0.001, 0.001, 0.001, 0.013))
    assert found.alone_s() == pytest.approx(0.039)
    with pytest.raises(ValueError, match="measure for longer"):
        fit_service_times([run(9, batches=3), run(2, batches=0)])
    runs = [run(4), run(1)]
    for each in runs:  # its process is the replica, and computes the model as well
        each.cpu["frontend"] += 10 * (0.008 + 0.015 * each.in_flight) / 20
    found = fit_service_times(runs, in_each=True)
    assert found.measured == pytest.approx({1: 0.023 + 0.003, 4: 0.068 + 0.009})
    assert (found.frontend_s, found.response_s, found.call_s) == (0, 0, 0)


def test_what_is_waited_for_is_read_from_the_clock():
    """It stands in for CPU times where processes share cores; the simulation has the same wait."""

    def run(size: int, clients: int) -> SimpleNamespace:
        headers, at = [], 0.0
        for _ in range(12):
            times = {"x-started": f"{at:.6f}", "x-finished": f"{at + 0.1:.6f}", "x-worker": "w"}
            headers += size * [times | {"sent": at - 0.004, "done": at + 0.104}]
            at += 0.1 + 0.006 + 0.002 * size
        cpu = {"frontend": 12 * (0.002 + 0.001 * size) / 20}
        return SimpleNamespace(headers=headers, cpu=cpu, seconds=20, in_flight=clients)

    runs = [run(1, 1), run(2, 2), run(4, 4), run(4, 9)]  # in the last, five requests wait
    assert turnaround(runs) == pytest.approx((0.006, 0.002))
    several = [(8, run(1, 1))]
    found = fit_service_times(runs, several, by_clock=True)
    assert found.measured == pytest.approx(dict.fromkeys((1, 2, 4, 8), 0.1))
    parts = found.frontend_s, found.response_s, found.call_s, found.hop_s
    assert parts == pytest.approx((0.001, 0.001, 0.004, 0.002))
    closed = simulate(found, Scenario(1, 4, clients=4), seconds=60, warmup_s=5)
    assert closed.throughput == pytest.approx(4 / (0.1 + 0.006 + 4 * 0.002), rel=0.02)
    each = fit_service_times(runs, in_each=True, by_clock=True)
    assert each.measured == pytest.approx({1: 0.102, 2: 0.104, 4: 0.108})
    assert each.hop_s == pytest.approx(0.006)


def test_a_call_takes_the_frontends_time_and_the_hop_the_replicas():
    times = ServiceTimes(0.001, image_s=0.01, call_s=0.003, hop_s=0.006)
    alone = simulate(times, Scenario(1, clients=1), seconds=10, warmup_s=1)
    assert alone.mean_ms == pytest.approx(1e3 * times.alone_s()) == pytest.approx(20)
    assert alone.frontends_busy == pytest.approx(0.2, rel=0.02)
    assert alone.replicas_busy == pytest.approx(0.95, rel=0.02)
    many = simulate(times, Scenario(40, max_batch_size=1, clients=80), seconds=10, warmup_s=1)
    assert many.throughput == pytest.approx(1 / times.frontend_cpu_s(1), rel=0.02)


def test_the_fewest_replicas_that_keep_p99():
    need = needed(REAL, 200, 0.12, requests=4_000)
    assert need.outcome.p99_ms <= 120 and need.used <= 0.8 and need.frontends == 1
    fewer = Scenario(need.replicas - 1, rate=200)
    assert one_frontend(REAL, fewer, 4_000).p99_ms > 120 or 0.8 * fewer.replicas * 64 < 200


@pytest.mark.parametrize("rate,replicas", [(500, 10), (5_000, 100), (50_000, 1_000)])
def test_large_systems_are_planned(rate, replicas):
    need = needed(
        REAL, rate, 1, requests=2_000, replicas_per_node=14, cores_per_node=16, replicas_per_pod=8
    )
    assert replicas <= need.replicas <= 1.5 * replicas
    assert need.frontends >= max(rate * 0.0015 / 0.8, need.replicas / 8)
    assert need.nodes >= max(need.replicas / 14, (need.replicas + need.frontends) / 16)
    assert need.outcome.throughput == pytest.approx(rate, rel=0.1)


def test_what_cannot_be_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="even where nothing is busy"):
        needed(REAL, 10, 0.02, requests=500)
    with pytest.raises(ValueError, match="either a rate or"):
        Scenario(1, rate=1, clients=1)
    with pytest.raises(ValueError, match="needs a replica"):
        Scenario(1, frontends=2, rate=1)
    with pytest.raises(ValueError, match="above 0"):
        simulate(ServiceTimes(0.001), Scenario(1, rate=1))


def test_a_million_images_cost_their_share_of_an_hour():
    assert per_million(Machine("m", 100, 3.6), 0.5) == pytest.approx(20)
    assert Machine.read("a:b:100:3.6") == Machine("a:b", 100, 3.6)


def test_predictions_stand_beside_what_was_measured():
    scenario = Scenario(1, clients=8)
    found = one_frontend(REAL, scenario, 500)
    record = {"throughput": found.throughput, "p50_ms": found.p50_ms / 2, "p95_ms": 1.0}
    record["server_cpu"] = 0.002 * found.throughput
    (row,) = compare([(scenario, record)], REAL, 500)
    assert row["scenario"] == "1 replica, batches to 16, 8 clients"
    assert row["throughput_error"] == 0 and row["p50_ms_error"] == pytest.approx(1)
    assert row["front_cpu_s"] == pytest.approx(0.002)
    came = record | {"throughput": 18.0, "requests": 36, "seconds": 2.0}  # of 40, by chance
    (row,) = compare([(Scenario(1, rate=20), came)], REAL, 500)
    assert row["throughput_measured"] == pytest.approx(20)
    (nothing,) = compare([(scenario, record | {"throughput": 0.0})], REAL, 500)
    assert math.isnan(nothing["throughput_error"])
    assert figure([nothing], extrapolate(REAL, (1,), (1,), requests=200), "nothing answered")
    rows = extrapolate(REAL, (1, 40), (1, 4), requests=200)
    assert [(row["frontends"], row["replicas"]) for row in rows] == [(1, 1), (1, 40), (4, 40)]
    assert rows[1]["throughput"] == pytest.approx(rows[1]["frontend_limit"], rel=0.1)
    assert len(figure([row], rows, "demo").axes) == 2


def test_repeats_tell_how_often_a_prediction_is_good():
    def row(load: str, throughput: float, p95: float) -> dict:
        errors = {"throughput_error": throughput, "p95_ms_error": p95}
        return {"scenario": f"2 replicas, batches to 16, {load}"} | errors

    repeats = [
        [row("8 clients", 0.02, -0.1), row("30 a second", 0.2, 0.0)],
        [row("8 clients", -0.06, 0.3), row("32 a second", 0.01, math.nan)],
        [row("8 clients", 0.1, 0.2), row("31 a second", 0.05, -0.19)],
    ]
    first, second = repeated(repeats)
    assert first["load"] == "8 clients" and second["load"] == "30 to 32 a second"
    assert first["throughput off by: median (least, most)"] == "+2% (-6%, +10%)"
    assert first["within 10% and 20%"] == "2 of 3" and second["within 10% and 20%"] == "1 of 3"


@pytest.mark.parametrize("rate,replicas", [(60, 2), (500, 10), (5_000, 100)])
def test_replicas_with_kserve_in_each_are_planned(rate, replicas):
    times = in_each_replica(REAL)
    assert times.alone_s() == pytest.approx(REAL.alone_s()) and times.frontend_s == 0
    need = needed_in_each(times, rate, 1, proxy_s=0.00025, requests=2_000)
    assert replicas <= need.replicas <= 1.6 * replicas
    assert need.frontends == math.ceil(need.replicas / planning.REPLICAS_PER_POD)
    assert need.cores == need.replicas + need.frontends
    assert need.outcome.throughput * need.frontends == pytest.approx(rate, rel=0.1)
    busy = needed_in_each(times, rate, 1, proxy_s=0.8 * 10 / rate, requests=2_000)
    assert busy.frontends == 10  # HAProxies, which have no time for more


def test_more_pods_where_full_ones_wait_too_long():
    """And no more replicas in them than p99 takes."""
    times, loose = in_each_replica(REAL), 1.0
    few = needed_in_each(times, 870, loose, proxy_s=0.00025, requests=2_000)
    tight = 1.1 * few.outcome.p50_ms / 1e3
    more = needed_in_each(times, 870, tight, proxy_s=0.00025, requests=2_000)
    assert more.outcome.p99_ms <= 1e3 * tight and few.replicas < more.replicas
    fewer = more.replicas // more.frontends - 1
    scenario = Scenario(fewer, frontends=fewer, least_connections=True, rate=870 / more.frontends)
    assert simulate(times, scenario, 30).p99_ms > 0.95e3 * tight


def test_a_wait_that_cannot_be_is_refused_in_each_replica_too():
    with pytest.raises(ValueError, match="even where nothing is busy"):
        needed_in_each(in_each_replica(REAL), 10, 0.02, proxy_s=0.00025, requests=500)


@pytest.mark.parametrize("topology", ["front", "ingress"])
def test_the_command_prints_a_table(topology):
    argv = "--rate 20 --p99_ms 500 --frontend_ms 1.5 --fixed_ms 8 --image_ms 15 --machine m:9:1"
    argv += f" --core_dollars_h 0.04 --topology {topology}"
    done = subprocess.run(
        [sys.executable, "-m", planning.__name__, *argv.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| requests/s | replicas |" in done.stdout and "3 machines" in done.stdout
    assert "| dollars an hour | dollars a million |" in done.stdout


@pytest.mark.long
@pytest.mark.alone
def test_replicas_that_sleep_are_used_alike():
    """As growth measures it: no more is answered than could be, and by every replica."""
    row = measure("front", 2, 1, seconds=2, frontends=2)
    assert row["errors"] == 0 and 0 < float(row["share"]) <= 1.05
    least, most = map(int, row["least, most of a replica"].split(", "))
    assert 0 < most <= 2 * least


def test_the_fewest_connections_keep_replicas_busy():
    """With KServe in each replica: less waiting than at random, and never less throughput."""
    how = {"frontends": 4, "rate": 0.8 * 4 / 0.02, **ONE_BY_ONE}
    times = ServiceTimes(0.0, image_s=0.02, cv=1.0)
    least = simulate(times, Scenario(4, **how, least_connections=True), seconds=120)
    random = simulate(times, Scenario(4, **how), seconds=120)
    assert least.p95_ms < 0.7 * random.p95_ms
    assert least.throughput > 0.98 * random.throughput
    with pytest.raises(ValueError):
        one_frontend(times, Scenario(4, **how, least_connections=True))


def test_clients_of_the_least_busy_frontend():
    """As many clients as frontends: each frontend has one of them, and nobody waits."""
    times = ServiceTimes(0.0, image_s=0.02)
    found = simulate(times, Scenario(4, frontends=4, clients=4, least_connections=True))
    assert found.p99_ms == pytest.approx(20, rel=0.01)
    assert found.throughput == pytest.approx(200, rel=0.02)
