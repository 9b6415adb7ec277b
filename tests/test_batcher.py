"""Batches without a server: what is in one, which worker gets it, and what happens on failure."""

import asyncio
import contextlib
import dataclasses
import enum
import logging
import os
import pickle
import selectors
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from kserve import InferInput, InferRequest, Model
from kserve.errors import (
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    UnsupportedProtocol,
)
from kserve.model import InferenceVerb

from model.alexnet import shapes
from model.alexnet.model import AlexNetModel
from model.loadtest.bodies import v1_body
from model.serving.arrival import arrived
from model.serving.batched_model import BatchedModel
from model.serving.batcher import FRESH_S, LONG_S, OVERLOAD_S, Batcher
from model.serving.config import BatchingConfig, ModelConfig
from model.serving.dispatch import Waiting
from model.serving.errors import ERRORS
from model.serving.protocol import Description, Request, Response, count_instances
from model.serving.replica import Replica
from model.serving.worker_thread import WorkerThread
from tests.conftest import until
from tests.tiny_models import Stopping


class Jumping(selectors.SelectSelector):
    """A selector that does not wait: its clock jumps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        """What is ready. RuntimeError when nothing ever will be."""
        if timeout is None:
            raise RuntimeError("everybody waits, and for nothing")
        self.now += timeout
        return super().select(0)


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time; for tests without threads."""

    def __init__(self) -> None:
        self._clock = Jumping()
        super().__init__(self._clock)

    def time(self) -> float:
        """In seconds, as the timers so far add up."""
        return self._clock.now


def in_virtual_time(main: Coroutine) -> Any:
    """Run a test, whose seconds are those of VirtualTime."""
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(main)


def now() -> float:
    """The seconds of the event loop."""
    return asyncio.get_running_loop().time()


class Work:
    """Takes `seconds` for a batch, and keeps what it was given."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.batches, self.seconds, self.at_once, self.most = [], seconds, 0, 0
        self.workers, self.backlogs = [], []

    async def __call__(self, batch: list[str], worker_index: int, backlog: int) -> list:
        self.batches.append(list(batch))
        self.workers.append(worker_index)
        self.backlogs.append(backlog)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        if "%" in batch:
            raise RuntimeError("the worker is lost")
        return [ValueError(item) if item == "?" else item.upper() for item in batch]


def sizes(work: Work) -> list[int]:
    """How many items each batch held."""
    return [len(batch) for batch in work.batches]


def test_a_lone_client_never_waits():
    """One request after another goes out at once, however long a batch may wait."""

    async def main():
        work = Work(0)
        batcher = Batcher(work, wait_s=5)
        assert [await batcher(item) for item in "abc"] == ["A", "B", "C"]
        assert now() == 0 and sizes(work) == [1, 1, 1]

    in_virtual_time(main())


def test_what_arrives_while_a_worker_is_busy_is_one_batch():
    """And each result goes to whoever sent its item; the work is told of all that is there."""

    async def main():
        work = Work()
        batcher = Batcher(work)
        assert await asyncio.gather(*map(batcher, "abcdefgh")) == list("ABCDEFGH")
        assert sizes(work) == [1, 7] and work.most == 1
        assert work.backlogs == [8, 7] and batcher.queued == batcher.backlog == 0

    in_virtual_time(main())


def test_a_batch_waits_for_as_many_as_the_last_one_held():
    """Clients that send the next request one by one are batched again; at most for `wait_s`."""

    async def main():
        work = Work()
        batcher = Batcher(work, wait_s=0.5)
        await asyncio.gather(*map(batcher, "abcdefgh"))

        async def late(delay, item):
            await asyncio.sleep(delay)
            return await batcher(item)

        began = now()
        await asyncio.gather(*(late(0.002 * i, "x") for i in range(7)))
        assert sizes(work)[2:] == [7]
        assert now() - began == pytest.approx(0.012 + work.seconds)  # full: it waits no longer
        began = now()
        await batcher("y")
        assert sizes(work)[3:] == [1] and now() - began == pytest.approx(0.5 + work.seconds)

    in_virtual_time(main())


@pytest.mark.parametrize("workers", [2, 4])
def test_what_waits_is_shared_evenly_among_free_workers(workers):
    """None is idle while another has it all; who was just answered counts too."""

    async def main():
        work, free = Work(), 1
        batcher = Batcher(work, workers=lambda: free)
        first = asyncio.ensure_future(batcher("f"))
        await asyncio.sleep(0)
        asked = [asyncio.ensure_future(batcher("a")) for _ in range(4 * workers - 1)]
        await asyncio.sleep(0)
        free = workers
        await asyncio.gather(first, *asked)
        assert sizes(work) == [1] + [4] * (workers - 1) + [3] and work.most == workers
        assert set(work.workers) == set(range(workers))

    in_virtual_time(main())


def test_a_rule_says_when_and_how_much():
    """It is asked whenever something waits and a worker is free; what it is told is true."""

    async def main():
        told = []

        def rule(waiting):
            told.append(waiting)
            return 2 if waiting.queued >= 3 else 0

        work = Work()
        batcher = Batcher(work, workers=lambda: 2, max_size=8, wait_s=0.5, rule=rule)
        await asyncio.gather(*map(batcher, "abcd"))
        assert work.batches == [["a", "b"], ["c", "d"]]  # the second after 0.5 s without arrivals
        assert told[0] == Waiting(1, 1, 0, workers=2, max_size=8, waited=False)
        assert told[-1] == Waiting(2, 4, 0, workers=2, max_size=8, waited=True)
        assert now() == pytest.approx(0.5 + 2 * work.seconds, abs=0.03)

    in_virtual_time(main())


@pytest.mark.parametrize("wrong", [lambda waiting: waiting.nothing, lambda waiting: None])
def test_a_rule_that_fails_fails_requests_and_nobody_waits_for_ever(wrong):
    """The error says what is wrong; later requests are tried again."""

    async def main():
        batcher = Batcher(Work(), rule=wrong)
        for _ in range(2):
            with pytest.raises((AttributeError, TypeError)):
                await batcher("x")
        assert batcher.queued == batcher.backlog == 0

    in_virtual_time(main())


def test_no_rule_exceeds_the_largest_batch():
    """However much it says."""

    async def main():
        work = Work()
        batcher = Batcher(work, max_size=4, rule=lambda waiting: 1000)
        await asyncio.gather(*map(batcher, "abcdefghij"))
        assert max(sizes(work)) == 4

    in_virtual_time(main())


def test_workers_that_come_later_need_not_wait():
    """While the only worker has a long batch others come: what waits goes to them."""

    async def main():
        work, workers = Work(seconds=30), [1]
        batcher = Batcher(work, lambda: workers[0], max_size=2)
        asked = [asyncio.ensure_future(batcher(item)) for item in "abc"]
        await asyncio.sleep(1)
        assert work.workers == [0]
        workers[0] = 2
        await asyncio.sleep(1)
        assert work.workers == [0, 1]
        await asyncio.gather(*asked)
        assert now() < 35

    in_virtual_time(main())


def test_the_size_counts_instances_not_requests():
    """A batch is full at `max_size`; what is larger by itself goes alone; the order stays."""

    async def main():
        work = Work()
        batcher = Batcher(work, max_size=4)
        items = ["x", "aa", "bb", "c", "dddddd", "ee"]
        assert await asyncio.gather(*map(batcher, items)) == [item.upper() for item in items]
        assert work.batches == [["x"], ["aa", "bb"], ["c"], ["dddddd"], ["ee"]]

    in_virtual_time(main())


@pytest.mark.parametrize("size", [2**63 - 1, 10**400])
def test_a_size_beyond_all_bounds_fails_nobody(size):
    """It goes alone, and the others are answered."""

    async def main():
        work = Work()
        batcher = Batcher(work, max_size=4, size=lambda item: size if item == "big" else 1)
        assert await asyncio.gather(*map(batcher, ["a", "b", "big", "c"])) == ["A", "B", "BIG", "C"]

    in_virtual_time(main())


@pytest.mark.parametrize("first", [10**6, 2**63 - 1, 10**400])
def test_a_request_has_no_more_instances_than_bytes(first):
    """Its shape is what the client says."""
    body = InferRequest("m", [InferInput("x", [first, 3], "FP32", [1.0])])
    assert count_instances(body, 120) == 120
    assert count_instances(body) <= 2**20
    few = InferRequest("m", [InferInput("x", [2], "FP32", [1.0, 2.0])])
    assert count_instances(few, 120) == 2


def test_an_error_is_for_its_own_request_or_its_batch_and_the_batcher_goes_on():
    """A result that is an exception is raised to one; a failing batch to all in it."""

    async def main():
        batcher = Batcher(Work())
        warm = asyncio.ensure_future(batcher("w"))
        results = await asyncio.gather(warm, *map(batcher, ["?", "b"]), return_exceptions=True)
        assert isinstance(results[1], ValueError) and results[2] == "B"
        results = await asyncio.gather(*map(batcher, ["%", "b"]), return_exceptions=True)
        assert [type(result) for result in results] == [RuntimeError] * 2
        assert await batcher("after") == "AFTER"

    in_virtual_time(main())


def test_a_worker_that_answers_too_few_fails_its_batch_only():
    """Nobody waits forever, and nobody gets another's response."""

    async def main():
        batcher = Batcher(lambda batch, worker_index, backlog: asyncio.sleep(0.01, batch[:1]))
        asked = [asyncio.ensure_future(batcher(item)) for item in "abc"]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(result) for result in results] == [str, RuntimeError, RuntimeError]
        assert "1 results for 2" in str(results[1]) and await batcher("d") == "d"

    in_virtual_time(main())


def test_clients_that_have_gone_are_not_worked_for():
    """A cancelled request that still waits is in no batch."""

    async def main():
        work = Work()
        batcher = Batcher(work)
        busy = asyncio.ensure_future(batcher("busy"))
        await asyncio.sleep(0)
        gone, stays = (asyncio.ensure_future(batcher(item)) for item in ("gone", "stays"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(busy, stays)
        assert work.batches == [["busy"], ["stays"]] and batcher.backlog == 0

    in_virtual_time(main())


def test_a_batch_that_nobody_waits_for_is_cancelled():
    """And its worker is free for the next one; while one client still waits, it goes on."""

    async def main():
        work = Work(seconds=10)
        batcher = Batcher(work)
        first = asyncio.ensure_future(batcher("first"))
        await asyncio.sleep(0)
        a, b, stays = (asyncio.ensure_future(batcher(item)) for item in ("a", "b", "stays"))
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.sleep(0.1)
        assert list(map(sorted, work.batches)) == [["first"], ["a", "b", "stays"]]
        assert batcher.backlog == len("abstays")
        assert a.cancel() and b.cancel()
        assert await stays == "STAYS"
        assert now() == pytest.approx(11, abs=0.2)

    in_virtual_time(main())


@pytest.mark.parametrize("deadline", [None, 1.5])
def test_a_client_that_goes_as_its_batch_is_made(deadline):
    """In the same turn of the event loop: it is in no batch, too late or not, and the worker goes
    on with the next one."""

    async def main():
        work = Work(seconds=1)
        batcher = Batcher(work, max_size=1)
        first = asyncio.ensure_future(batcher("first"))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(batcher("gone", deadline))
        stays = asyncio.ensure_future(batcher("stays"))
        await asyncio.sleep(0.5)
        # The first batch ends at 1 too, and takes the next one in the turn in which this is told.
        asyncio.get_running_loop().call_at(1, gone.cancel)
        async with asyncio.timeout(20):
            assert await first == "FIRST" and await stays == "STAYS"
            assert await batcher("after") == "AFTER"
        assert gone.cancelled() and ["gone"] not in work.batches
        assert batcher.queued == batcher.backlog == 0

    in_virtual_time(main())


def test_the_newest_go_first_once_clients_give_up():
    """Whoever waits longest is about to give up, so work for them would be lost."""

    async def main():
        work = Work(seconds=1)
        batcher = Batcher(work, max_size=1)

        async def patient(item, seconds):
            async with asyncio.timeout(seconds):
                return await batcher(item)

        asked = []
        for item in "abcde":
            asked.append(asyncio.ensure_future(patient(item, 2.5 if item == "c" else 9)))
            await asyncio.sleep(0.1)
        await asyncio.gather(*asked, return_exceptions=True)
        # b: in the order in which they came; c gives up at 2.7, while d is worked on or before.
        assert [batch[0] for batch in work.batches[:2]] == ["a", "b"]
        assert "e" in [batch[0] for batch in work.batches]
        order = [batch[0] for batch in work.batches]
        assert order.index("e") < order.index("d")

    in_virtual_time(main())


def test_whoever_has_waited_for_long_is_not_passed_over_forever():
    """While others go on giving up, and newer ones go on coming."""

    async def main():
        batcher = Batcher(Work(seconds=1), max_size=1)
        others = [asyncio.ensure_future(batcher("busy"))]
        await asyncio.sleep(0.1)
        came, waited = now(), []
        old = asyncio.ensure_future(batcher("old"))
        old.add_done_callback(lambda _: waited.append(now() - came))
        gone = asyncio.ensure_future(batcher("gone"))
        await asyncio.sleep(0.1)
        gone.cancel()
        for i in range(30):  # a newer one for each batch, and one that gives up
            others.append(asyncio.ensure_future(batcher(f"newer {i}")))
            gone = asyncio.ensure_future(batcher("gone"))
            await asyncio.sleep(0.9)
            gone.cancel()
        await asyncio.gather(old, *others)
        assert LONG_S <= waited[0] < LONG_S + 3

    in_virtual_time(main())


def test_the_order_returns_when_nobody_gives_up():
    """After OVERLOAD_S without anybody: as they came."""

    async def main():
        work = Work(seconds=1)
        batcher = Batcher(work, max_size=1)
        gone = asyncio.ensure_future(batcher("gone"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(OVERLOAD_S + 1)
        await asyncio.gather(*map(batcher, "abc"))
        assert work.batches[-3:] == [["a"], ["b"], ["c"]]

    in_virtual_time(main())


def test_batches_are_no_larger_than_clients_wait_for():
    """A full one takes longer than they do; half of one does not. When they wait, full ones again.

    Each client sends again as soon as it has an answer, or has given up.
    """

    async def main():
        async def work(batch, worker_index, backlog):
            taken.append(len(batch))
            await asyncio.sleep(0.02 * len(batch))
            return batch

        async def client(patience, until):
            while now() < until:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await batcher("x")
                    answered.append(now())

        batcher, taken, answered = Batcher(work), [], []
        await asyncio.gather(*(client(0.25, 20) for _ in range(64)))
        assert len(answered) > 0.7 * 50 * 20 and max(taken[-20:]) < 16
        taken.clear()
        await asyncio.gather(*(client(9, 40) for _ in range(64)))
        assert taken[-1] == 16

    in_virtual_time(main())


def test_a_deadline_that_cannot_be_met():
    """TimeoutError at once, and no work: at its arrival, or when its turn comes too late."""

    async def main():
        work = Work(seconds=1)
        batcher = Batcher(work, max_size=1)
        await batcher("known")  # a batch takes a second
        began = now()
        with pytest.raises(TimeoutError, match="deadline"):
            await batcher("hopeless", now() + 0.5)
        assert now() == began
        first = asyncio.ensure_future(batcher("first"))
        await asyncio.sleep(0)
        late, fine = (
            asyncio.ensure_future(batcher(x, now() + y)) for x, y in (("l", 1.5), ("f", 3))
        )
        assert await fine == "F" and now() == began + 2
        assert isinstance(late.exception(), TimeoutError)
        assert work.batches == [["known"], ["first"], ["f"]] and await first == "FIRST"

    in_virtual_time(main())


def test_a_slow_batch_is_forgotten():
    """A deadline that was too short for it is not so for ever, though nothing else is learnt."""

    async def main():
        work = Work(seconds=3)
        batcher = Batcher(work, max_size=1)
        await batcher("cold")
        work.seconds = 0.1
        with pytest.raises(TimeoutError):
            await batcher("warm", now() + 1)
        await asyncio.sleep(FRESH_S)
        for _ in range(3):
            assert await batcher("warm", now() + 1) == "WARM"

    in_virtual_time(main())


class Slow:
    """A backend that takes half a second for a batch."""

    workers = 1
    description = Description([], [], True, True, ModelConfig("slow"))
    well = True

    def load(self):
        """It is there."""

    async def predict_batch(self, requests, worker_index, backlog):
        """A response for each."""
        await asyncio.sleep(0.5)
        return [Response(request.body, {}) for request in requests]

    async def healthy(self):
        """As it is told."""
        return self.well


def test_the_request_timeout():
    """A longer wait raises TimeoutError (504), or ModelNotReady (503) when nothing can answer."""

    async def main():
        slow = Slow()
        model = BatchedModel("slow", slow, BatchingConfig(), timeout_s=0.1)
        model.load()
        asked = [model.predict({"instances": [1]}) for _ in range(3)]
        errors = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(error) for error in errors] == [TimeoutError] * 3
        assert str(errors[0]) == "slow gave no response within 0.1 seconds."
        slow.well = False
        with pytest.raises(ModelNotReady):
            await model.predict({"instances": [1]})

    in_virtual_time(main())


class Long(Model):
    """Has no predict_batch, and takes until it may go on."""

    go = threading.Event()
    seen: list = []

    def predict(self, payload, headers=None):
        """Wait."""
        self.seen.append(payload)
        self.go.wait(20)
        return payload


def test_the_request_timeout_of_a_model_without_batches():
    """The request that runs and the one behind it: neither waits for the thread, and the second is
    never begun."""

    async def main():
        thread = WorkerThread(ModelConfig("long", f"{__name__}:Long"), 1)
        model = BatchedModel("long", thread, BatchingConfig(), timeout_s=0.2)
        model.load()
        asked = [model.predict({"instances": [i]}) for i in range(2)]
        errors = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
        assert [type(error) for error in errors] == [TimeoutError] * 2
        Long.go.set()
        assert await model.predict({"instances": [2]}) == {"instances": [2]}
        assert [body["instances"] for body in Long.seen] == [[0], [2]]

    asyncio.run(main())


def test_what_goes_into_logs_is_one_line():
    """The id that a client gives its request."""
    model = BatchedModel("slow", Slow(), BatchingConfig(), timeout_s=1)
    ids = ["plain-17", "two\nlines", "x" * 1000]
    made = [model._request({}, {"x-request-id": given}).id for given in ids]
    assert made[0] == "plain-17" and made[1].isprintable() and len(made[2]) <= 128


def test_the_clients_deadline():
    """It ends a request before the server's own limit does, with a sentence that says so."""

    async def main():
        model = BatchedModel("slow", Slow(), BatchingConfig(), timeout_s=60)
        model.load()
        arrived(2, timeout_s=0.2)
        with pytest.raises(TimeoutError, match="^slow gave no response by the deadline.$"):
            await model.predict({"instances": [1]})
        assert now() == pytest.approx(0.2)

    in_virtual_time(main())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A WorkerThread sets the number of threads; the next test finds it as it was."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    Stopping.go.clear()


def loaded(model_class: type[Model], name: str = "tiny") -> WorkerThread:
    """A thread with a model of this file or of tests.tiny_models."""
    thread = WorkerThread(ModelConfig(name, f"{model_class.__module__}:{model_class.__name__}"), 1)
    thread.load()
    return thread


def predict(thread: WorkerThread, *bodies: Any) -> list[Any]:
    """The bodies of the responses to one batch; exceptions as they are."""
    results = asyncio.run(thread.predict_batch([Request(body, {"a": "header"}) for body in bodies]))
    return [getattr(result, "body", result) for result in results]


class Handlers(Model):
    """Some handlers are coroutines, as KServe allows; says which thread each runs in."""

    async def preprocess(self, payload, headers=None):
        """On the event loop."""
        if payload == "bad":
            raise InvalidInput("it is bad")
        return payload, headers, threading.current_thread().name

    def predict(self, payload, headers=None):
        """In the model's thread."""
        if payload[0] == "fails":
            raise OSError("disk")
        return *payload, threading.current_thread().name

    async def postprocess(self, result, headers=None, response_headers=None):
        """What the others gave."""
        return {"seen": result}


def test_handlers_of_both_kinds():
    """Coroutines are awaited on the event loop, functions run in a thread, errors stay apart."""
    good, bad, fails = predict(loaded(Handlers), "x", "bad", "fails")
    body, headers, loop, thread = good["seen"]
    assert (body, headers, loop) == ("x", {"a": "header"}, "MainThread")
    assert thread.startswith("model tiny")
    assert isinstance(bad, InvalidInput) and str(bad) == "it is bad"
    assert type(fails) is InferenceError and str(fails) == "OSError: disk"


class Exits(Model):
    """Calls sys.exit, in a function or a coroutine, as the request says."""

    async def preprocess(self, payload, headers=None):
        """On the event loop."""
        if payload == "at once":
            sys.exit()
        return payload

    def predict(self, payload, headers=None):
        """In the thread."""
        if payload == "exit":
            sys.exit(3)
        return payload


class Panic(BaseException):
    """As what extensions written in Rust raise; no Exception."""


class Panics(Model):
    """Panics, or cancels itself, in a function or a coroutine, as the request says."""

    async def preprocess(self, payload, headers=None):
        """On the event loop."""
        if payload == "coroutine":
            raise Panic("in Rust")
        if payload == "cancelled coroutine":
            raise asyncio.CancelledError
        return payload

    def predict(self, payload, headers=None):
        """In the thread."""
        if payload == "function":
            raise Panic("in Rust")
        if payload == "cancelled function":
            raise asyncio.CancelledError
        return payload


def test_whatever_a_model_raises_fails_its_own_request():
    """Also what is no Exception; the others of its batch are answered."""
    bodies = ["coroutine", "cancelled coroutine", "function", "cancelled function", "x"]
    *errors, good = predict(loaded(Panics), *bodies)
    assert good == "x"
    assert [type(error) for error in errors] == [InferenceError] * 4
    assert [str(error) for error in errors[::2]] == ["RuntimeError: Panic: in Rust"] * 2


def test_a_model_that_calls_exit_fails_its_own_request():
    """The server goes on."""
    at_once, left, good = predict(loaded(Exits), "at once", "exit", "x")
    assert "sys.exit()" in str(at_once) and "sys.exit(3)" in str(left) and good == "x"


class Careless(Model):
    """Returns from predict_batch what the request says, and streams what it explains."""

    idempotent = False  # so a batch that fails is not tried in parts

    def predict_batch(self, inputs: list) -> Any:
        """Whatever it is."""
        return inputs[0]

    async def explain(self, payload, headers=None) -> AsyncIterator[str]:
        """Piece by piece."""
        yield "piece"


@pytest.mark.parametrize("results", [["one"], "xy", None, ("x", "y")])
def test_a_batch_with_the_wrong_results_fails_as_a_whole(results):
    """Each gets the sentence that says what predict_batch must return."""
    errors = predict(loaded(Careless), results, "second")
    assert [type(error) for error in errors] == [InferenceError] * 2
    assert "one result for each request, which is 2 here, not " in str(errors[0])


class Steps(Model):
    """Each call of preprocess takes a moment, and is remembered."""

    seen: list = []

    def preprocess(self, payload, headers=None):
        """Remember it."""
        time.sleep(0.05)
        self.seen.append(payload)
        return payload

    def predict(self, payload, headers=None):
        """Never reached."""
        raise AssertionError


def test_a_cancelled_batch_ends_with_the_call_that_is_under_way():
    """The thread makes no other call, and the cancellation is done when the thread is free."""

    async def main():
        thread = loaded(Steps)
        batch = asyncio.ensure_future(thread.predict_batch([Request(i, {}) for i in range(100)]))
        await asyncio.sleep(0.12)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert 0 < len(Steps.seen) < 50 and thread.stalled_for() == 0

    asyncio.run(main())


class Strict(Model):
    """Its batches fail for one bad input."""

    def predict_batch(self, inputs: list) -> list:
        """The inputs, unless one is bad."""
        if "bad" in inputs:
            raise ValueError("it is bad")
        return inputs


def test_a_batch_that_fails_is_tried_in_parts():
    """So one bad input fails its own request only, where a model may be asked twice."""
    first, bad, second = predict(loaded(Strict), "first", "bad", "second")
    assert (first, second) == ("first", "second")
    assert isinstance(bad, InferenceError) and str(bad) == "ValueError: it is bad"


class Returning(Model):
    """Returns errors from predict_batch."""

    def predict_batch(self, inputs: list) -> list:
        """One for the first."""
        return [KeyError("weights"), *inputs[1:]]


def test_an_error_that_predict_batch_returns_is_logged(caplog, monkeypatch):
    """As one that it raises: its author wants to see it."""
    monkeypatch.setattr(logging.getLogger("kserve"), "propagate", True)
    error, good = predict(loaded(Returning), "first", "second")
    assert isinstance(error, InferenceError) and good == "second"
    assert "the model raised" in caplog.text and "KeyError: 'weights'" in caplog.text


def test_a_streamed_response_is_refused():
    """With 501, as it cannot be gathered."""
    call = loaded(Careless).call(Request("x", {}), InferenceVerb.EXPLAIN)
    with pytest.raises(NotImplementedError, match="streamed"):
        asyncio.run(call)


class Raising(Model):
    """Raises what the request says."""

    def predict(self, payload, headers=None):
        """Raise it."""
        raise payload


class OwnError(InvalidInput):
    """Of a model's module, which a frontend does not import."""


KNOWN = [InvalidInput("no"), InferenceError("no"), NotImplementedError("no"), TimeoutError("no")]
KNOWN += [ModelNotReady("m", "no"), ModelNotFound("m"), UnsupportedProtocol("v3"), OwnError("no")]


@pytest.mark.parametrize("raised", KNOWN, ids=repr)
def test_errors_that_kserve_knows_keep_their_kind_and_sentence(raised):
    """In any process, with no class of the model's own."""
    [error] = predict(loaded(Raising), raised)
    error = pickle.loads(pickle.dumps(error))
    assert type(error) in ERRORS and type(error) in type(raised).__mro__
    assert str(error) == str(raised)


def test_a_step_of_a_batch_has_a_duration():
    """A thread with nothing to do has none; it is what a watchdog looks at."""

    async def main():
        thread = loaded(Stopping)
        assert thread.stalled_for() == 0
        busy = asyncio.ensure_future(thread.predict_batch([Request("body", {})]))
        await asyncio.to_thread(until, lambda: thread.stalled_for() > 0.2)
        assert thread.stalled_for() > 0.2
        Stopping.go.set()
        assert [response.body for response in await busy] == ["body"]
        assert thread.stalled_for() == 0

    asyncio.run(main())


def replica(**more: Any) -> Replica:
    """A replica in this process."""
    return Replica(ModelConfig("stopping", "tests.tiny_models:Stopping"), **more)


def batch(*bodies: Any) -> bytes:
    """As the frontend sends it."""
    return pickle.dumps([Request(body, {}) for body in bodies])


def test_a_stuck_replica_is_not_healthy():
    """Its health check raises once a step has taken longer than the watchdog waits, not before."""

    async def main():
        stuck, slow = replica(watchdog_timeout_s=0.2), replica(watchdog_timeout_s=600)
        await stuck.check_health()
        busy = [asyncio.ensure_future(r.predict_batch(batch("body"), 0, 1)) for r in (stuck, slow)]
        await asyncio.to_thread(until, lambda: min(stuck.stalled_for(), slow.stalled_for()) > 0.2)
        with pytest.raises(RuntimeError, match="a step of the batch has taken"):
            await stuck.check_health()
        await slow.check_health()
        Stopping.go.set()
        assert [pickle.loads((await b)[0])[0].body for b in busy] == ["body"] * 2
        await stuck.check_health()

    asyncio.run(main())


class Waits(Model):
    """A coroutine that waits for what never comes."""

    async def predict(self, payload, headers=None):
        """For ever."""
        await asyncio.Event().wait()


def test_a_coroutine_that_is_stuck_is_not_healthy():
    """The watchdog looks at coroutines as at functions; one that is given up no longer counts."""

    async def main():
        thread = loaded(Waits)
        busy = asyncio.ensure_future(thread.call(Request("body", {})))
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError, match="a step of the batch has taken"):
            await thread.check(watchdog_timeout_s=0.2)
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
        await thread.check(watchdog_timeout_s=0.2)

    asyncio.run(main())


class LoadsOnce(Model):
    """The second `load` says that it has failed, as KServe's models may: by not being ready."""

    loads = 0

    def load(self) -> bool:
        """Ready at the first."""
        type(self).loads += 1
        self.ready = self.loads == 1
        return self.ready


def test_a_reload_that_fails_leaves_the_model_ready():
    """It goes on as it was, and the failure is told."""
    thread = loaded(LoadsOnce)
    with pytest.raises(RuntimeError, match="not ready after load"):
        thread.reload()
    assert asyncio.run(thread.healthy())


def test_a_replica_whose_model_is_ill_is_not_healthy():
    """As the model itself says."""

    async def main():
        ill = replica()
        ill._model.ready = False
        with pytest.raises(RuntimeError, match="not healthy"):
            await ill.check_health()

    asyncio.run(main())


def test_a_replica_tells_the_backlog_of_each_frontend(monkeypatch):
    """For a while after a batch has brought it along."""

    async def main():
        told = replica()
        assert told.record_autoscaling_stats() == {"backlog": 0}
        Stopping.go.set()
        await told.predict_batch(batch("body"), 0, 17, "one")
        await told.predict_batch(batch("body"), 0, 4, "another")
        stats = told.record_autoscaling_stats()
        assert stats == {"backlog one": 17, "backlog another": 4}
        monkeypatch.setattr("model.serving.replica.FRESH_S", -1)
        assert told.record_autoscaling_stats() == {"backlog": 0}

    asyncio.run(main())


class Odd(Model):
    """Answers with what only this process can hold, when it is asked to."""

    def predict(self, payload, headers=None):
        """A function without a name, or the payload."""
        return (lambda: 0) if payload == "odd" else payload


def test_a_response_that_cannot_be_pickled_is_an_error_of_its_own_request():
    """The others of its batch are answered; in process there is nothing to pickle."""
    odd = Replica(ModelConfig("odd", f"{__name__}:Odd"))
    good, wrong = pickle.loads(asyncio.run(odd.predict_batch(batch("good", "odd"), 0, 1))[0])
    assert good.body == "good"
    assert isinstance(wrong, RuntimeError) and "cannot leave the replica" in str(wrong)
    [function] = predict(loaded(Odd), "odd")
    assert function() == 0


@dataclasses.dataclass
class Box:
    """Of a model's module."""

    label: "Colour"
    corners: list


class Colour(enum.Enum):
    """Of a model's module."""

    RED = "red"


class Own:
    """Of a model's module, and nothing that JSON has."""


class Returns(Model):
    """Answers with classes of its own module."""

    def predict(self, payload, headers=None):
        """A dataclass, an object, or the payload."""
        return {"box": Box(Colour.RED, [1, 2]), "own": Own()}.get(payload, payload)


def test_a_frontend_needs_no_class_of_the_models_modules():
    """A dataclass and an Enum arrive as in JSON; another class is the error of its request."""
    made = Replica(ModelConfig("own", f"{__name__}:Returns"))
    answer, _ = asyncio.run(made.predict_batch(batch("box", "own", "x"), 0, 1))
    assert __name__.encode() not in answer.replace(f"Own of {__name__}".encode(), b"")
    box, own, good = pickle.loads(answer)
    assert box.body == {"label": "red", "corners": [1, 2]} and good.body == "x"
    assert isinstance(own, RuntimeError) and "which only the model knows" in str(own)


def test_a_bad_image_spoils_its_own_request_only(local, images):
    """Beside it, responses are what they are alone; to 1e-5."""
    model = BatchedModel(
        "alexnet",
        WorkerThread(ModelConfig("alexnet"), 2),
        BatchingConfig(),
        timeout_s=60,
    )
    model.load()
    sent = [[images[0]], [b"no image"], images[1:4], [images[4], b"none"]]

    async def main():
        asked = [model.predict(v1_body(each)) for each in sent]
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results[1], InvalidInput) and isinstance(results[3], InvalidInput)
    assert "image 1" in str(results[3])
    for result, own in ((results[0], sent[0]), (results[2], sent[2])):
        assert_same(result["predictions"], [local.classify([image])[0] for image in own])


def assert_same(found: list[list[dict]], expected: list[list[dict]]) -> None:
    """The same labels, and probabilities equal to 1e-5."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [it["label"] for it in ours] == [it["label"] for it in theirs]
        assert [it["probability"] for it in ours] == pytest.approx(
            [it["probability"] for it in theirs], abs=1e-5
        )


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_memory_format_changes_no_response(local, images, memory_format):
    """float32 in either, and in any batch: the same to 1e-5."""
    model = AlexNetModel("other", memory_format=memory_format)
    model.load()
    alone = [local.classify([image])[0] for image in images[:16]]
    assert_same(model.classify(images[:16]), alone)


def test_bfloat16_gives_the_same_top_label(local):
    """On at least 99 of 100 drawn images."""
    model = AlexNetModel("half", precision="bfloat16")
    model.load()
    drawn = [shapes.jpeg(shapes.LABELS[i % 12], 1000 + i) for i in range(96)]
    pairs = zip(
        local.classify(drawn[:48]) + local.classify(drawn[48:]),
        model.classify(drawn[:48]) + model.classify(drawn[48:]),
        strict=True,
    )
    same = [a[0]["label"] == b[0]["label"] for a, b in pairs]
    assert sum(same) >= 0.99 * len(same)
