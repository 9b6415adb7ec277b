"""Our gRPC server on the wire: clients that send half a message, and connections that are old."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

import grpc
from kserve.model_repository import ModelRepository
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.serving import grpc_server
from model.serving.admission import Admission
from model.serving.config import EndpointConfig
from model.serving.dataplane import ClosedRepository, StrictDataPlane
from model.serving.grpc_server import GrpcServer
from model.serving.machine import free_port
from model.serving.receiving import Receiving
from tests.certificates import write_certificate

HEADERS_FRAME = 1
MESSAGE = 16_000  # bytes; one frame, and within what may be sent unasked
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/inference.GRPCInferenceService/ModelInfer",
    ":authority": "localhost",
    "te": "trailers",
    "content-type": "application/grpc",
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of HTTP/2 (RFC 9113, section 4.1)."""
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


def half_a_message() -> bytes:
    """A call of ModelInfer, of whose message ten bytes come."""
    text = b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in HEADERS.items()
    )  # literal fields without indexing (RFC 7541, section 6.2.2)
    begun = struct.pack(">BI", 0, MESSAGE) + b"0123456789"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    return preface + frame(1, 4, 1, text) + frame(0, 0, 1, begun)


@contextlib.asynccontextmanager
async def running(
    call_s: float,
    admission: Admission | None = None,
    certificate: tuple[str, str] | None = None,
) -> AsyncIterator:
    """A server without models, which admits one request, and its port."""
    registry, admission = ModelRepository(), admission or Admission(["x"], 1)
    dataplane, repository = StrictDataPlane(registry, admission), ClosedRepository(registry)
    endpoint = EndpointConfig(grpc_port=free_port(), certificate=certificate)
    rpc = GrpcServer(endpoint, call_s, dataplane, repository, admission, Receiving(2**20))
    await rpc.start()
    try:
        yield rpc, endpoint.grpc_port
    finally:
        await rpc.stop(0)


@contextlib.asynccontextmanager
async def served(call_s: float, admission: Admission | None = None) -> AsyncIterator[int]:
    """The port of such a server."""
    async with running(call_s, admission) as (_, port):
        yield port


async def live(channel: grpc.aio.Channel) -> bool:
    """Whether the server says that it is, within two seconds."""
    call = GRPCInferenceServiceStub(channel).ServerLive
    return (await call(pb.ServerLiveRequest(), timeout=2)).live


def test_who_calls_as_it_ends_is_told_so():
    """UNAVAILABLE, after which gRPC's clients send a request again; not gRPC's own CANCELLED."""

    async def main() -> tuple[grpc.StatusCode, str]:
        async with (
            running(call_s=0.5) as (rpc, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            assert await live(channel)
            stopping = asyncio.create_task(rpc.stop(5))
            await asyncio.sleep(0)  # it has begun
            try:
                call = GRPCInferenceServiceStub(channel).ModelInfer
                await call(pb.ModelInferRequest(model_name="x"), timeout=5)
            except grpc.RpcError as error:
                return error.code(), error.details()
            finally:
                await stopping

    assert asyncio.run(main()) == (grpc.StatusCode.UNAVAILABLE, grpc_server.STOPPING)


def test_half_a_message_keeps_nobody_out(monkeypatch):
    """A hundred connections that send no more: others are answered, and they are closed in time."""
    monkeypatch.setattr(grpc_server, "CONNECTION_S", 1)

    async def main() -> None:
        async with served(call_s=0.5) as port:
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
            for _, writer in slow:
                writer.write(half_a_message())
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                assert all([await live(channel) for _ in range(20)])
            async with asyncio.timeout(10):
                for reader, writer in slow:
                    await reader.read()  # until it is closed
                    writer.close()

    asyncio.run(main())


def test_old_connections_are_closed_without_loss(monkeypatch):
    """A client that calls all the while notices nothing."""
    monkeypatch.setattr(grpc_server, "CONNECTION_S", 0.2)

    async def main() -> int:
        async with served(call_s=5) as port:
            answered, end = 0, asyncio.get_running_loop().time() + 2
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                while asyncio.get_running_loop().time() < end:
                    answered += await live(channel)
        return answered

    assert asyncio.run(main()) > 50


def test_a_rejection_says_when_to_come_back():
    """As gRPC's own clients read it: in milliseconds, in the trailing metadata."""

    async def main() -> dict[str, str]:
        admission = Admission(["x"], 1)
        async with (
            served(call_s=5, admission=admission) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            with admission.of("x").admitted():
                try:
                    await GRPCInferenceServiceStub(channel).ModelInfer(pb.ModelInferRequest())
                except grpc.aio.AioRpcError as error:
                    rejected = error
        assert rejected.code() is grpc.StatusCode.UNAVAILABLE
        return dict(rejected.trailing_metadata())

    assert int(asyncio.run(main())["grpc-retry-pushback-ms"]) >= 1000


def test_a_certificate_that_is_renewed(tmp_path):
    """It counts for new connections, once its key is there too, and those that are there go on."""
    files = write_certificate(tmp_path)

    async def trusts(port: int, certificate: bytes) -> bool:
        credentials = grpc.ssl_channel_credentials(certificate)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            try:
                return await live(channel)
            except grpc.RpcError:
                return False

    async def main() -> None:
        first = files[0].read_bytes()
        of_both = str(files[1]), str(files[0])
        async with running(call_s=5, certificate=of_both) as (_, port):
            credentials = grpc.ssl_channel_credentials(first)
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as early:
                assert await live(early) and await trusts(port, first)
                (tmp_path / "new").mkdir()
                new = write_certificate(tmp_path / "new")
                second = new[0].read_bytes()
                assert not await trusts(port, second)
                new[0].rename(files[0])  # the key is still the old one
                assert await trusts(port, first)
                files[1].unlink()
                assert await trusts(port, first)
                new[1].rename(files[1])
                assert await trusts(port, second) and not await trusts(port, first)
                assert await live(early)

    asyncio.run(main())


def test_the_frames_are_right():
    """What the slow clients begin is a call: with the rest of its message it gets an answer."""

    async def main() -> None:
        async with served(call_s=5) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(half_a_message())
            writer.write(frame(0, 0, 1, bytes(MESSAGE - 20)) + frame(0, 1, 1, bytes(10)))
            async with asyncio.timeout(10):
                kind = None
                while kind != HEADERS_FRAME:
                    head = await reader.readexactly(9)
                    kind = head[3]
                    await reader.readexactly(int.from_bytes(head[:3], "big"))
            writer.close()

    asyncio.run(main())
