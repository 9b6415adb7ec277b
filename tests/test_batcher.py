"""The batcher by itself: what is in a batch, who gets it, and what happens when things fail."""

import asyncio
import time

import numpy as np
import pytest
from kserve.errors import InvalidInput, ModelNotReady

from model import shapes
from model.batcher import Batcher, GatheredModel, InThread
from model.protocol import Answer, Request
from model.replica import Replica
from tests.tiny_models import Stopping

pytestmark = pytest.mark.alone


class Work:
    """Takes `seconds` for a batch, or until released, and keeps what it was given."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.batches, self.seconds, self.at_once, self.most = [], seconds, 0, 0

    async def __call__(self, batch: list[str], place: int) -> list[str]:
        self.batches.append(list(batch))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        if "%" in batch:
            raise RuntimeError("the worker is gone")
        return [ValueError(item) if item == "?" else item.upper() for item in batch]


def sizes(work: Work) -> list[int]:
    """How many items each batch held."""
    return [len(batch) for batch in work.batches]


def test_a_lone_client_never_waits():
    """One request after another goes out at once, however long a batch may wait."""

    async def main():
        work = Work(0)
        batcher = Batcher(work, wait_s=5)
        began = time.monotonic()
        assert [await batcher(item) for item in "abc"] == ["A", "B", "C"]
        assert time.monotonic() - began < 1 and sizes(work) == [1, 1, 1]

    asyncio.run(main())


def test_what_comes_while_a_worker_is_busy_is_one_batch():
    """And the answers come back to those who asked."""

    async def main():
        work = Work()
        batcher = Batcher(work)
        assert await asyncio.gather(*map(batcher, "abcdefgh")) == list("ABCDEFGH")
        assert sizes(work) == [1, 7] and work.most == 1

    asyncio.run(main())


def test_a_batch_waits_for_as_many_as_the_last_one_held():
    """Clients that come one by one after their answers are gathered again; at most `wait_s`."""

    async def main():
        work = Work()
        batcher = Batcher(work, wait_s=0.5)
        await asyncio.gather(*map(batcher, "abcdefgh"))

        async def late(delay, item):
            await asyncio.sleep(delay)
            return await batcher(item)

        began = time.monotonic()
        await asyncio.gather(*(late(0.002 * i, "x") for i in range(7)))
        assert sizes(work)[2:] == [7] and time.monotonic() - began < 0.4  # full: no more waiting
        began = time.monotonic()
        await batcher("y")
        assert sizes(work)[3:] == [1] and 0.4 < time.monotonic() - began < 2

    asyncio.run(main())


@pytest.mark.parametrize("workers", [2, 4])
def test_what_waits_is_shared_evenly_among_the_free(workers):
    """No free worker stands idle while another takes all; who was just answered counts too."""

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

    asyncio.run(main())


def test_the_size_counts_pictures_not_requests():
    """A batch is full at `size`; what is longer by itself goes alone; the order stays."""

    async def main():
        work = Work()
        batcher = Batcher(work, size=4)
        items = ["x", "aa", "bb", "c", "dddddd", "ee"]
        assert await asyncio.gather(*map(batcher, items)) == [item.upper() for item in items]
        assert work.batches == [["x"], ["aa", "bb"], ["c"], ["dddddd"], ["ee"]]

    asyncio.run(main())


def test_an_error_is_for_its_own_request_or_its_batch_and_the_batcher_goes_on():
    """A result that is an exception is raised to one; a failing batch to all in it."""

    async def main():
        batcher = Batcher(Work())
        warm = asyncio.ensure_future(batcher("w"))
        answers = await asyncio.gather(warm, *map(batcher, ["?", "b"]), return_exceptions=True)
        assert isinstance(answers[1], ValueError) and answers[2] == "B"
        answers = await asyncio.gather(*map(batcher, ["%", "b"]), return_exceptions=True)
        assert [type(answer) for answer in answers] == [RuntimeError] * 2
        assert await batcher("after") == "AFTER"

    asyncio.run(main())


def test_a_worker_that_answers_too_few_fails_its_batch_only():
    """Nobody waits for ever, and nobody gets another's answer."""

    async def main():
        batcher = Batcher(lambda batch, place: asyncio.sleep(0.01, batch[:1]))
        asked = [asyncio.ensure_future(batcher(item)) for item in "abc"]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [str, RuntimeError, RuntimeError]
        assert "1 answers to 2" in str(answers[1]) and await batcher("d") == "d"

    asyncio.run(main())


def test_who_has_gone_is_not_worked_for():
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
        assert work.batches == [["busy"], ["stays"]]

    asyncio.run(main())


class Slow:
    """A model that takes half a second for a batch."""

    name, ready = "slow", True

    well = True

    async def answer_all(self, batch, place, ids, here):
        """One label for each picture."""
        await asyncio.sleep(0.5)
        return [Answer([["x"] * 5], np.zeros((1, 5)), "w", 0, 0, 0) for _ in batch]

    async def healthy(self):
        """As it is told."""
        return self.well


def test_the_time_limit():
    """Too long a wait is TimeoutError (504), or ModelNotReady (503) when nobody works at all."""

    async def main():
        slow = Slow()
        model = GatheredModel(slow, timeout_s=0.1)
        asked = [model.predict(Request([b"x"])) for _ in range(3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(a) for a in answers] == [TimeoutError] * 3
        assert "slow gave no answer within 0.1 seconds" in str(answers[0])
        slow.well = False
        with pytest.raises(ModelNotReady):
            await model.predict(Request([b"x"]))

    asyncio.run(main())


def test_a_thread_that_is_stuck_can_be_told():
    """Idle is who has a batch and makes no progress with it, and nobody else."""

    async def main():
        model = Stopping()
        thread = InThread(model)
        assert thread.idle_s() == 0
        busy = asyncio.ensure_future(thread(["batch"]))
        await asyncio.sleep(0.3)
        assert 0.2 < thread.idle_s() < 5
        model.progressed = time.monotonic()
        assert thread.idle_s() < 0.2
        model.go.set()
        assert await busy == ["batch"] and thread.idle_s() == 0

    asyncio.run(main())


def test_a_stuck_replica_is_not_well():
    """Its health check raises once its batch has made no progress for too long, not before."""

    async def main():
        replica = Replica("tests.tiny_models:Stopping", stuck_s=0.2)
        replica.check_health()
        busy = asyncio.ensure_future(replica.answer_all(["batch"], 0, ["id"], 1))
        await asyncio.sleep(0.05)
        replica.check_health()
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError, match="no progress"):
            replica.check_health()
        replica._loaded.go.set()
        assert await busy == ["batch"]
        replica.check_health()

    asyncio.run(main())


def test_a_replica_tells_what_waits_in_front():
    """For a while after a batch has told it so."""

    async def main():
        replica = Replica("tests.tiny_models:Stopping")
        assert replica.record_autoscaling_stats() == {"here": 0}
        replica._loaded.go.set()
        await replica.answer_all(["batch"], 0, ["id"], 17)
        assert replica.record_autoscaling_stats() == {"here": 17}
        replica._told -= 60
        assert replica.record_autoscaling_stats() == {"here": 0}

    asyncio.run(main())


def test_a_bad_picture_spoils_its_own_request_only(local, pictures):
    """Beside it, answers are what they are alone; to 1e-5."""

    async def main():
        model = GatheredModel(local)
        requests = [[pictures[0]], [b"no picture"], pictures[1:4], [pictures[4], b"none"]]
        asked = [model.predict(Request(images)) for images in requests]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(main())
    assert isinstance(answers[1], InvalidInput) and isinstance(answers[3], InvalidInput)
    assert "picture 1" in str(answers[3])
    for answer, images in ((answers[0], pictures[:1]), (answers[2], pictures[1:4])):
        for i, picture in enumerate(images):
            alone = local.predict(Request([picture]))
            assert answer.labels[i] == alone.labels[0]
            np.testing.assert_allclose(answer.probabilities[i], alone.probabilities[0], atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layout_changes_no_answer(local, pictures, layout):
    """float32 in either layout and in any batch: the same to 1e-5."""
    from model.alexnet import AlexNetModel

    model = AlexNetModel("other", layout=layout)
    model.load()
    for alone, batched in zip(
        [local.classify([p])[0] for p in pictures[:16]], model.classify(pictures[:16]), strict=True
    ):
        assert [it["label"] for it in alone] == [it["label"] for it in batched]
        assert (
            max(
                abs(a["probability"] - b["probability"])
                for a, b in zip(alone, batched, strict=True)
            )
            < 1e-5
        )


def test_bfloat16_gives_the_same_top_label(local):
    """On at least 99 of 100 demo pictures."""
    from model.alexnet import AlexNetModel

    model = AlexNetModel("half", precision="bfloat16", layout="channels_last")
    model.load()
    drawn = [shapes.jpeg(shapes.LABELS[i % 12], 1000 + i) for i in range(96)]
    pairs = zip(
        local.classify(drawn[:48]) + local.classify(drawn[48:]),
        model.classify(drawn[:48]) + model.classify(drawn[48:]),
        strict=True,
    )
    same = [a[0]["label"] == b[0]["label"] for a, b in pairs]
    assert sum(same) >= 0.99 * len(same)
