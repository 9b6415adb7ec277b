"""gRPC requests that are wrong: a status, one plain sentence, and the server goes on."""

import grpc
import numpy as np
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from model.loadtest.server_process import ServerProcess
from tests.conftest import BOTH
from tests.samples import BROKEN, GOOD, framed
from tests.ways import assert_answers, assert_plain


def v2_grpc(
    data: bytes | None = GOOD, shape=(1,), kind: str = "BYTES", name: str = "image", **more
) -> pb.ModelInferRequest:
    """A gRPC request with one input of raw data, or of none."""
    image = pb.ModelInferRequest.InferInputTensor(name=name, datatype=kind, shape=shape)
    raw = [] if data is None else [data]
    return pb.ModelInferRequest(inputs=[image], raw_input_contents=raw, **more)


PREPARED = np.zeros((1, 3, 224, 224), np.float32)
PAIR = pb.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])
GRPC: dict[str, pb.ModelInferRequest] = {
    "nothing": pb.ModelInferRequest(),
    "two inputs": pb.ModelInferRequest(inputs=[PAIR] * 2, raw_input_contents=[framed(GOOD)] * 2),
    "more data than inputs": pb.ModelInferRequest(inputs=[PAIR], raw_input_contents=[b""] * 2),
    "another name": v2_grpc(framed(GOOD), name="photo"),
    "no data": v2_grpc(None),
    "no shape": v2_grpc(framed(GOOD), shape=()),
    "shape negative": v2_grpc(framed(GOOD), shape=[-1]),
    "shape too large": v2_grpc(framed(GOOD), shape=[2]),
    "shape enormous": v2_grpc(framed(GOOD), shape=[2**40]),
    "too many": v2_grpc(framed(GOOD) * 65, shape=[65]),
    "BYTES without length": v2_grpc(GOOD),
    "BYTES cut off": v2_grpc(framed(GOOD)[:-1000]),
    "no image": v2_grpc(framed(b"hello")),
    "truncated JPEG": v2_grpc(framed(BROKEN["truncated JPEG"])),
    "a bomb": v2_grpc(framed(BROKEN["a bomb"])),
    "FP32 too few": v2_grpc(b"\0" * 8, [1, 3, 224, 224], "FP32"),
    "FP32 odd bytes": v2_grpc(b"\0" * 7, [1, 3, 224, 224], "FP32"),
    "FP32 not a number": v2_grpc((PREPARED * np.nan).tobytes(), PREPARED.shape, "FP32"),
    "FP32 another size": v2_grpc(b"\0" * 48, [1, 3, 2, 2], "FP32"),
    "INT64": v2_grpc(b"\0" * 8, [1], "INT64"),
    "unknown datatype": v2_grpc(framed(GOOD), kind="FP13"),
    "unknown output": v2_grpc(
        framed(GOOD), outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]
    ),
}


def refused(server: ServerProcess, request: pb.ModelInferRequest) -> grpc.RpcError:
    """The error of a gRPC call."""
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as refusal:
        GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
    return refusal.value


@BOTH
@pytest.mark.parametrize("kind", GRPC)
def test_v2_grpc(server, kind):
    """V2 over gRPC: INVALID_ARGUMENT and the sentence as its details."""
    request = pb.ModelInferRequest()
    request.CopyFrom(GRPC[kind])
    request.model_name = server.name
    error = refused(server, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert_plain(error.details())
    assert_answers(server)


@BOTH
def test_unknown_model_over_grpc(server):
    """NOT_FOUND, with the name."""
    error = refused(server, v2_grpc(framed(GOOD), model_name="nobody"))
    assert error.code() is grpc.StatusCode.NOT_FOUND and "nobody" in error.details()
    assert_answers(server)


@BOTH
def test_bytes_that_are_no_message(server):
    """INVALID_ARGUMENT, not gRPC's own UNKNOWN."""
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as refusal:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff", timeout=30)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_plain(refusal.value.details())
    assert_answers(server)


@BOTH
def test_an_endless_name_of_several_lines_over_grpc(server):
    """The sentence has one line and an end; whole it would be more than gRPC can send back."""
    error = refused(server, v2_grpc(framed(GOOD), model_name="nobody\n\0" * 20_000))
    assert error.code() is grpc.StatusCode.NOT_FOUND and "nobody" in error.details()
    assert_plain(error.details())
