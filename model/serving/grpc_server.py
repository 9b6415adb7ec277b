"""The way in over gRPC: KServe's servicer behind admission control, a status for each error."""

import asyncio
import contextlib
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as grpc_v2
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension

from model.serving.admission import FULL, Admission
from model.serving.arrival import arrived
from model.serving.config import EndpointConfig
from model.serving.errors import log_refusal, sentence, statuses
from model.serving.receiving import TOO_MUCH, Receiving

# A connection is closed after so long, as gRPC recommends: the next one may go to another server,
# and who sends a message slowly is not there forever.
CONNECTION_S = 600
LAST_CALLS_S = 0.3  # in which those who call are told that the server stops
TOO_LARGE = "the message is larger than --max_body_memory_mb: send less"
STOPPING = "the server stops: send the request again, to another one if there is one"
OUTCOMES = {  # of a call that was aborted; all others failed
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.NOT_FOUND: "invalid",
    grpc.StatusCode.UNAVAILABLE: "rejected",
}


class GrpcServer:
    """KServe's gRPC service on one host (KServe: on every address).

    With a certificate, which may be renewed, it speaks TLS, as HTTP does (KServe: never).
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        call_s: float,
        dataplane: DataPlane,
        repository: ModelRepositoryExtension,
        admission: Admission,
        receiving: Receiving,
    ) -> None:
        """call_s: what a call on a connection that is to be closed may still take."""
        self._admission = AdmissionInterceptor(admission, receiving)
        self._server = grpc.aio.server(
            interceptors=(self._admission, StatusInterceptor()),
            options=[
                ("grpc.max_send_message_length", endpoint.grpc_max_send_bytes),
                ("grpc.max_receive_message_length", endpoint.grpc_max_receive_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.max_connection_age_ms", int(1000 * CONNECTION_S)),
                ("grpc.max_connection_age_grace_ms", int(1000 * call_s)),
            ],
        )
        servicer = InferenceServicer(dataplane, repository)
        grpc_v2.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        address = f"{endpoint.host_of_address}:{endpoint.grpc_port}"
        if endpoint.certificate:
            self._server.add_secure_port(address, _credentials(endpoint.certificate))
        else:
            self._server.add_insecure_port(address)

    async def start(self) -> None:
        """It fails when the port is taken (KServe: shares it silently with another server)."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Answer what is in flight, for so long at most.

        A call that arrives while gRPC shuts down ends with CANCELLED, which no client sends again.
        So calls get UNAVAILABLE first, and clients that obey it are silent by then.
        """
        self._admission.stopping = True
        await asyncio.sleep(LAST_CALLS_S)
        await self._server.stop(grace_s)


def _credentials(files: tuple[str, str]) -> grpc.ServerCredentials:
    """For a key and a certificate, which are read again for each new connection.

    gRPC goes on with the last ones while a file is not there, or the two do not belong together.
    """

    def read() -> list[tuple[bytes, bytes]]:
        return [(Path(files[0]).read_bytes(), Path(files[1]).read_bytes())]

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal known
        with contextlib.suppress(OSError):
            if (found := read()) != known:
                known = found
                return grpc.ssl_server_certificate_configuration(found)
        return None

    known = read()
    first = grpc.ssl_server_certificate_configuration(known)
    return grpc.dynamic_ssl_server_credentials(first, changed)


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Admission control for gRPC's ModelInfer: UNAVAILABLE when it is full, or `stopping`."""

    def __init__(self, admission: Admission, receiving: Receiving) -> None:
        self._admission, self._receiving = admission, receiving
        self.stopping = False

    async def intercept_service(self, continuation, details):
        """The handler of a call, behind admission control; a rejected message is not parsed."""
        handler = await continuation(details)
        if handler is None or not details.method.endswith("/ModelInfer"):
            return handler
        if self.stopping:
            return _rejection(STOPPING, 1)
        if self._admission.all_full:
            self._admission.reject_unread()
            return _rejection(FULL, self._admission.retry_after_s())

        async def infer(request, context):
            return await self.admitted(handler.unary_unary, request, context)

        return grpc.unary_unary_rpc_method_handler(
            infer, handler.request_deserializer, handler.response_serializer
        )

    async def admitted(self, infer, request, context):
        """What `infer` answers, with a place in the admission control of the request's model."""
        controller = self._admission.of(getattr(request, "model_name", ""))
        if controller is None:
            return await infer(request, context)
        if controller.full:
            controller.count("rejected")
            context.set_trailing_metadata(_pushback(controller.retry_after_s()))
            await context.abort(grpc.StatusCode.UNAVAILABLE, FULL)
        size = request.ByteSize()
        if size > self._receiving.limit:
            controller.count("invalid")
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_LARGE)
        arrived(size, context.time_remaining())
        with controller.admitted() as counted, self._receiving.body() as body:
            body.complete()
            try:
                if not self._receiving.has_room(size):  # before it counts, which ends others
                    context.set_trailing_metadata(_pushback(controller.retry_after_s()))
                    await context.abort(grpc.StatusCode.UNAVAILABLE, TOO_MUCH)
                body.grew(size)
                response = await infer(request, context)
            except grpc.aio.AbortError:
                counted["outcome"] = OUTCOMES.get(context.code(), "failed")
                raise
            counted["outcome"] = "answered"
            return response


def _pushback(seconds: int) -> tuple[tuple[str, str]]:
    """What gRPC's own clients obey where their service config has a retry policy."""
    return (("grpc-retry-pushback-ms", str(1000 * seconds)),)


def _rejection(why: str, seconds: int) -> grpc.RpcMethodHandler:
    """A handler that answers UNAVAILABLE and parses nothing."""

    async def reject(_: bytes, context) -> None:
        context.set_trailing_metadata(_pushback(seconds))
        await context.abort(grpc.StatusCode.UNAVAILABLE, why)

    return grpc.unary_unary_rpc_method_handler(reject)


class StatusInterceptor(ExceptionToStatusInterceptor):
    """Gives every error its gRPC status, with one plain sentence."""

    async def intercept_service(self, continuation, handler_call_details):
        """Bytes that are no message are handed on as an error (gRPC itself: UNKNOWN)."""
        handler = await super().intercept_service(continuation, handler_call_details)
        if handler is None:  # there is no such method
            return None
        read = handler.request_deserializer

        def read_or_error(data: bytes):
            try:
                return read(data)
            except DecodeError as error:
                return error

        return handler._replace(request_deserializer=read_or_error)

    async def intercept(self, method, request_or_iterator, context, method_name):
        """Answer a call, unless it is one of those errors."""
        if isinstance(request_or_iterator, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence(request_or_iterator))
        return await super().intercept(method, request_or_iterator, context, method_name)

    async def handle_exception(self, ex, request_or_iterator, context, method_name):
        """KServe's logs a traceback and reads `.reason`, which ModelNotReady and others lack."""
        known = statuses(ex)
        if known:
            log_refusal(ex)
            await context.abort(known[1], sentence(ex))
        await super().handle_exception(ex, request_or_iterator, context, method_name)
