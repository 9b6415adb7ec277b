"""What a gRPC message does to HTTP bodies that arrive: it comes at once, and may be too much."""

import asyncio
import contextlib
from types import SimpleNamespace

import grpc
import pytest

from model.serving.admission import Admission
from model.serving.grpc_server import AdmissionInterceptor
from model.serving.receiving import Receiving


def context() -> SimpleNamespace:
    """Of a call without a deadline; a status ends it."""

    async def abort(code: grpc.StatusCode, why: str) -> None:
        raise grpc.aio.AbortError(why)

    return SimpleNamespace(
        abort=abort,
        code=lambda: grpc.StatusCode.UNAVAILABLE,
        set_trailing_metadata=lambda _: None,
        time_remaining=lambda: None,
    )


async def called(receiving: Receiving, size: int, call: SimpleNamespace | None = None) -> str:
    """What becomes of a gRPC call with a message of a size."""
    request = SimpleNamespace(model_name="m", ByteSize=lambda: size)

    async def infer(request, context) -> str:
        return f"answered beside {receiving.total - size}"

    return await AdmissionInterceptor(Admission(["m"], 1), receiving).admitted(
        infer, request, call or context()
    )


def test_a_message_too_large_throws_nobody_out():
    """Where it does not fit even without the bodies that arrive, they stay; else they give way."""

    async def main() -> None:
        receiving = Receiving(100)
        with receiving.body() as complete:
            complete.grew(95)
            complete.complete()
            with receiving.body() as first, receiving.body() as second:
                arriving = [first, second]
                for body in arriving:
                    body.grew(1)
                with pytest.raises(grpc.aio.AbortError):
                    await called(receiving, 50)
                with pytest.raises(grpc.aio.AbortError):
                    await called(receiving, 6)
                assert not any(body.gave_way for body in arriving) and receiving.total == 97
                assert await called(receiving, 3) == "answered beside 97"
                assert not any(body.gave_way for body in arriving)
                assert await called(receiving, 4) == "answered beside 96"
                assert [body.gave_way for body in arriving] == [True, False]
                assert await called(receiving, 5) == "answered beside 95"
                assert [body.gave_way for body in arriving] == [True, True]
        assert receiving.total == 0

    asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize("size, status", [(100, None), (101, grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_a_message_that_can_never_fit_is_not_to_be_sent_again(size, status):
    """UNAVAILABLE would have its client try for ever."""
    said = []

    async def main() -> None:
        call = context()

        async def abort(code: grpc.StatusCode, why: str) -> None:
            said.append(code)
            raise grpc.aio.AbortError(why)

        call.abort = abort
        await called(Receiving(100), size, call)

    with contextlib.suppress(grpc.aio.AbortError):
        asyncio.run(main())
    assert said == [status] * (status is not None)


def test_only_bodies_that_free_something_give_way():
    """One of which nothing has arrived stays, however old it is."""

    async def main() -> None:
        receiving = Receiving(100)
        with receiving.body() as empty, receiving.body() as old, receiving.body() as new:
            old.grew(60)
            new.grew(50)
            assert (empty.gave_way, old.gave_way, new.gave_way) == (False, True, False)

    asyncio.run(main())
