"""The simulation agrees with queueing theory and with the real batcher; plans keep their word."""

import asyncio
import math
import selectors
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from model.batcher import Batcher
from model.bench import capacity
from model.bench.capacity import Machine, extrapolate, figure, fit, needed, per_million, validate
from model.bench.simulation import Service, Setting, erlang_b, erlang_c, one_front, simulate

REAL = Service(front_s=0.0015, fixed_s=0.008, picture_s=0.015, cv=0.1)
ONE_BY_ONE = {"size": 1, "limit": math.inf}


def test_erlang_formulas_give_the_textbooks_values():
    assert erlang_b(1, 2.0) == pytest.approx(2 / 3)
    assert erlang_b(10, 5.0) == pytest.approx(0.018385, abs=1e-6)
    assert erlang_c(1, 0.6) == pytest.approx(0.6)  # M/M/1: who comes while it is busy waits
    assert erlang_c(10, 8.0) == pytest.approx(0.409180, abs=1e-6)
    assert erlang_c(3, 3.0) == 1


@pytest.mark.parametrize("servers,load", [(1, 0.5), (4, 2.4), (10, 7.0)])
def test_requests_wait_as_erlang_c_says(servers, load):
    """M/M/c: exponential service of 1 s, one picture at a time."""
    service = Service(front_s=0, picture_s=1, cv=1)
    found = simulate(service, Setting(servers, rate=load, **ONE_BY_ONE), 40_000 / load, 100)
    waited = erlang_c(servers, load) / (servers - load)
    assert found.mean_ms / 1e3 - 1 == pytest.approx(waited, rel=0.1)
    assert found.replicas_busy == pytest.approx(load / servers, rel=0.02)
    assert found.throughput == pytest.approx(load, rel=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("where", ["replica", "front"])
def test_requests_wait_as_pollaczek_and_khinchine_say(where):
    """M/D/1: a constant 1 s, at the one replica or at the front before many idle ones."""
    load = 0.7
    if where == "replica":
        service, setting = Service(0, picture_s=1), Setting(1, rate=load, **ONE_BY_ONE)
    else:
        service, setting = Service(1, picture_s=1e-9), Setting(50, rate=load, **ONE_BY_ONE)
    found = simulate(service, setting, 20_000 / load, 100)
    assert found.mean_ms / 1e3 - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    busy = found.replicas_busy if where == "replica" else found.front_busy
    assert busy == pytest.approx(load, rel=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("servers,load,cv", [(1, 2.0, 1), (10, 8.0, 1), (10, 9.0, 0)])
def test_a_gate_without_a_queue_refuses_as_erlang_b_says(servers, load, cv):
    """Whatever the spread of the service times: the formula needs only their mean."""
    setting = Setting(servers, size=1, limit=servers, rate=load)
    found = simulate(Service(0, picture_s=1, cv=cv), setting, 20_000 / load, 100)
    assert found.refused == pytest.approx(erlang_b(servers, load), rel=0.06)
    assert found.under_way == pytest.approx(load * (1 - found.refused), rel=0.03)
    assert found.littles_law() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("size", [1, 16])
def test_a_closed_loop_gets_all_that_replicas_can_do(size):
    service = Service(front_s=0, fixed_s=0.008, picture_s=0.015)
    found = simulate(service, Setting(4, size, clients=2 * 4 * size), seconds=60, warmup_s=5)
    assert found.throughput == pytest.approx(4 * size / service.seconds(size), rel=0.02)
    assert found.replicas_busy == pytest.approx(1, abs=0.01)
    assert found.under_way == pytest.approx(8 * size)
    assert found.littles_law() == pytest.approx(1, abs=0.03)


def test_the_front_is_the_limit_where_replicas_are_many():
    service = Service(front_s=0.001, answer_s=0.001, picture_s=0.01)
    one = simulate(service, Setting(20, clients=64), seconds=10, warmup_s=1)
    two = simulate(service, Setting(20, clients=128, fronts=2), seconds=10, warmup_s=1)
    assert one.throughput == pytest.approx(500, rel=0.02) and one.front_busy > 0.99
    assert two.throughput == pytest.approx(1000, rel=0.02)


def test_one_front_stands_for_all():
    setting = Setting(8, rate=400, fronts=4)
    all_of_them = simulate(REAL, setting, 30, 5)
    one = one_front(REAL, setting)
    assert one.throughput == pytest.approx(all_of_them.throughput, rel=0.03)
    assert one.p95_ms == pytest.approx(all_of_them.p95_ms, rel=0.1)
    assert one.under_way == pytest.approx(all_of_them.under_way, rel=0.1)


def test_overload_is_refused_and_the_rest_answered():
    found = simulate(REAL, Setting(2, rate=300), 30, 10)
    assert found.throughput == pytest.approx(2 * 16 / REAL.seconds(16), rel=0.03)
    assert found.refused == pytest.approx(1 - found.throughput / 300, abs=0.02)
    assert found.littles_law() == pytest.approx(1, abs=0.05)


def test_the_same_seed_gives_the_same_outcome():
    again = [simulate(REAL, Setting(2, rate=50), 5, 1, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("replicas,size,rate", [(1, 16, 60), (3, 4, 170), (4, 16, 90)])
def test_batches_are_those_of_the_real_batcher(replicas, size, rate, monkeypatch):
    """The real one, on a clock that jumps ahead, seals the same batches at the same moments."""
    gaps = np.random.default_rng(0).exponential(1 / rate, 1000)
    service = Service(0, fixed_s=0.008, picture_s=0.015)
    real = _OnVirtualClock.run(_batches(service, replicas, size, gaps))

    draws, fronts = iter(gaps), []
    monkeypatch.setattr("random.Random.expovariate", lambda self, rate: next(draws, math.inf))
    monkeypatch.setattr("model.bench.simulation._outcome", lambda found, *_: fronts.extend(found))
    simulate(service, Setting(replicas, size, limit=math.inf, rate=rate), 1e9, 0)
    simulated = [(start, pictures) for start, _, pictures in fronts[0].batches]
    assert [n for _, n in simulated] == [n for _, n in real]
    assert [at for at, _ in simulated] == pytest.approx([at for at, _ in real])


async def _batches(service, replicas, size, gaps) -> list[tuple[float, int]]:
    """(moment, pictures) of the real batcher's batches, for requests with these gaps between."""
    now, batches = asyncio.get_running_loop().time, []

    async def work(batch, place):
        batches.append((now(), len(batch)))
        await asyncio.sleep(service.seconds(len(batch)))
        return batch

    async def request(due):
        await asyncio.sleep(due - now())
        await batcher("x")

    batcher = Batcher(work, lambda: replicas, size)
    await asyncio.gather(*map(request, np.cumsum(gaps)))
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
    with pytest.raises(ValueError, match="two sizes"):
        fit([(4, 0.1), (4, 0.2)])


def test_a_measured_table_goes_before_the_line():
    service = Service(0, 9.0, 9.0, measured={1: 0.02, 4: 0.05, 8: 0.09})
    assert [service.seconds(n) for n in (1, 2, 8, 16)] == pytest.approx([0.02, 0.03, 0.09, 0.18])


def test_service_times_are_read_from_loads():
    """Of the server, the call of a replica and the way there, from what headers and CPU tell."""

    def run(size: int, batches: int = 10) -> SimpleNamespace:
        headers = []
        for sent in range(batches):
            times = {"x-started": sent + 0.01, "x-finished": sent + 0.018 + 0.015 * size}
            told = {"x-worker": "w", **{name: f"{at:.6f}" for name, at in times.items()}}
            headers += size * [told | {"sent": sent, "done": sent + 0.024 + 0.015 * size}]
        cpu = {"front": batches * (0.001 + 0.002 * size) / 20}
        return SimpleNamespace(headers=headers, cpu=cpu, seconds=20, under_way=size)

    found = capacity.measured([run(4), run(1), run(9, batches=3)])
    assert found.measured == pytest.approx({1: 0.023, 4: 0.068})  # of 9 too few were seen
    parts = found.front_s, found.answer_s, found.call_s, found.hop_s
    assert parts == pytest.approx((0.001, 0.001, 0.001, 0.013))
    assert found.alone_s() == pytest.approx(0.039)


def test_a_call_takes_the_fronts_time_and_the_hop_the_replicas():
    service = Service(0.001, picture_s=0.01, call_s=0.003, hop_s=0.006)
    alone = simulate(service, Setting(1, clients=1), seconds=10, warmup_s=1)
    assert alone.mean_ms == pytest.approx(1e3 * service.alone_s()) == pytest.approx(20)
    assert alone.front_busy == pytest.approx(0.2, rel=0.02)
    assert alone.replicas_busy == pytest.approx(0.95, rel=0.02)
    many = simulate(service, Setting(40, size=1, clients=80), seconds=10, warmup_s=1)
    assert many.throughput == pytest.approx(1 / service.front_cpu_s(1), rel=0.02)


def test_the_fewest_replicas_that_keep_p99():
    need = needed(REAL, 200, 0.12, requests=4_000)
    assert need.outcome.p99_ms <= 120 and need.used <= 0.8 and need.fronts == 1
    fewer = Setting(need.replicas - 1, rate=200)
    assert one_front(REAL, fewer, 4_000).p99_ms > 120 or 0.8 * fewer.replicas * 64 < 200


@pytest.mark.parametrize("rate,replicas", [(500, 10), (5_000, 100), (50_000, 1_000)])
def test_large_systems_are_planned(rate, replicas):
    need = needed(
        REAL, rate, 1, requests=2_000, replicas_per_node=14, cores_per_node=16, replicas_per_pod=8
    )
    assert replicas <= need.replicas <= 1.5 * replicas
    assert need.fronts >= max(rate * 0.0015 / 0.8, need.replicas / 8)
    assert need.nodes >= max(need.replicas / 14, (need.replicas + need.fronts) / 16)
    assert need.outcome.throughput == pytest.approx(rate, rel=0.1)


def test_what_cannot_be_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="even where nothing is busy"):
        needed(REAL, 10, 0.02, requests=500)
    with pytest.raises(ValueError, match="either a rate or"):
        Setting(1, rate=1, clients=1)
    with pytest.raises(ValueError, match="needs a replica"):
        Setting(1, fronts=2, rate=1)
    with pytest.raises(ValueError, match="above 0"):
        simulate(Service(0.001), Setting(1, rate=1))


def test_a_million_pictures_cost_their_share_of_an_hour():
    assert per_million(Machine("m", 100, 3.6), 0.5) == pytest.approx(20)
    assert Machine.read("a:b:100:3.6") == Machine("a:b", 100, 3.6)


def test_predictions_stand_beside_what_was_measured():
    setting = Setting(1, clients=8)
    found = one_front(REAL, setting, 500)
    record = {"throughput": found.throughput, "p50_ms": found.p50_ms / 2, "p95_ms": 1.0}
    (row,) = validate([(setting, record)], REAL, 500)
    assert row["setting"] == "1 replica, batches to 16, 8 clients"
    assert row["throughput_error"] == 0 and row["p50_ms_error"] == pytest.approx(1)
    rows = extrapolate(REAL, (1, 40), (1, 4), requests=200)
    assert [(row["fronts"], row["replicas"]) for row in rows] == [(1, 1), (1, 40), (4, 40)]
    assert rows[1]["throughput"] == pytest.approx(rows[1]["front_limit"], rel=0.1)
    assert len(figure([row], rows, "demo").axes) == 2


def test_the_command_prints_a_table():
    argv = "--rate 20 --p99_ms 500 --front_ms 1.5 --fixed_ms 8 --picture_ms 15 --machine m:9:1"
    done = subprocess.run(
        [sys.executable, "-m", capacity.__name__, *argv.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "requests/s  replicas" in done.stdout and "3 machines" in done.stdout
