"""KServe's server with what it leaves out: the host, limits, strict reading, a line when ready."""

import argparse
import asyncio
import functools
import logging
import re
import struct
import sys
import warnings
from concurrent import futures
from pathlib import Path

import grpc
from kserve import InferRequest, ModelServer
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER, PredictorProtocol
from kserve.errors import InvalidInput, ModelNotReady
from kserve.logging import trace_logger
from kserve.model import BaseKServeModel
from kserve.model_server import args as kserve_args
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as grpc_v2
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.v2_datamodels import InferenceRequest, RequestInput
from pydantic import ValidationError

from model import options
from model.gate import GrpcGate, gate
from model.refusals import ClosedRepository, StatusInterceptor, application, first


class StrictModelServer(ModelServer):
    """KServe's ModelServer on one host for HTTP and gRPC, with one line when it is ready."""

    def __init__(self, args: argparse.Namespace) -> None:
        """args: from model.options; KServe's ModelServer reads its own from the command line."""
        super().__init__()
        scheme = "https" if self.ssl_certfile else "http"
        at = f"[{args.host}]" if ":" in args.host else args.host
        self.ready_line = f"{options.described(args)}; REST {scheme}://{at}:{self.http_port}"
        if self.enable_grpc:
            self.ready_line += f", gRPC {at}:{self.grpc_port}"
        self.host = args.host
        gate.limit = options.most_inside(args)
        self._application = functools.partial(application, args.max_body_mb)
        self._grpc_max_receive = args.grpc_max_receive_message_length
        self._certificate = (args.ssl_keyfile, args.ssl_certfile) if args.ssl_certfile else None
        if args.repository_api == "off":
            self.model_repository_extension = ClosedRepository(self.registered_models)
        if args.request_log == "off":
            trace_logger.setLevel(logging.WARNING)
            access = logging.getLogger("uvicorn.access")
            access.handlers, access.propagate = [], False  # so uvicorn does not write them at all
        self.dataplane = StrictDataPlane(model_registry=self.registered_models)

    def start(self, models: list[BaseKServeModel]) -> None:
        """Serve the models until SIGTERM or Ctrl-C; requests in flight are finished first."""
        if self.enable_grpc:
            self.enable_grpc = False  # KServe's own would listen on every address
            self._grpc_server = StrictGRPCServer(
                self.host,
                self.grpc_port,
                self.dataplane,
                self.model_repository_extension,
                self.grace_period,
                self._grpc_max_receive,
                self._certificate,
            )
            self.servers.append(self._grpc_server.start(self.max_threads))
        try:
            super().start(models)
        finally:
            for model in models:
                model.stop()

    def stop(self, sig: int) -> None:
        """End both servers; KServe's lets REST go on when the signal came as it was starting."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # nothing is served yet
            # An event loop that is only half made complains as it goes.
            sys.unraisablehook = lambda _: None
            warnings.simplefilter("ignore")
            sys.exit("stopped before it was ready")
        if self._rest_server:
            self._rest_server._server.should_exit = True
        super().stop(sig)

    async def _serve(self) -> None:
        rest = self._rest_server or self._rest_multiprocess_server._rest_server
        rest.config.host = self.host
        rest.config.app, rest.config.factory = self._application, True
        rest.config.ws = "none"  # or who asks for a WebSocket never gets an answer
        announcement = asyncio.create_task(self._announce())
        try:
            await super()._serve()
        finally:
            announcement.cancel()

    async def _announce(self) -> None:
        """Print the ready line once a connection is taken."""
        while True:
            try:
                _, writer = await asyncio.open_connection(self.host, self.http_port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                print(f"ready after {options.age():.1f} s: {self.ready_line}", flush=True)
                return


class StrictDataPlane(DataPlane):
    """KServe's data plane that refuses where KServe's fails."""

    def decode(self, body, headers, *args, **kwargs):  # as DataPlane.decode
        """A request that KServe cannot read raises InvalidInput (KServe: a 500 for some).

        V2 JSON is read whatever its content type (KServe: only application/json), and raw BYTES
        behind it too.
        """
        v2 = kwargs.get("protocol_version") == PredictorProtocol.REST_V2.value
        try:
            if v2 and isinstance(body, bytes):
                length = headers.get(INFERENCE_CONTENT_LENGTH_HEADER)
                if length is None:
                    body = InferenceRequest.model_validate_json(body)
                else:
                    body = _with_data_behind(body, length, kwargs.get("model_name"))
            return super().decode(body, headers, *args, **kwargs)
        except InvalidInput:
            raise
        except ValidationError as error:
            raise InvalidInput(first(error.errors())) from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidInput(f"the request cannot be read: {what}") from None

    async def ready(self) -> bool:
        """Whether every model is (KServe: always true)."""
        models = self.model_registry.get_models().values()
        return bool(models) and all([await model.healthy() for model in models])

    async def get_model(self, name: str) -> BaseKServeModel:
        """The model, or ModelNotReady (KServe: calls its `load` inside the request)."""
        model = self.get_model_from_registry(name)
        if not await model.healthy():
            raise ModelNotReady(name)
        return model


class _Input(RequestInput):
    data: list = []  # it may lie behind the JSON


class _Inputs(InferenceRequest):
    inputs: list[_Input]


def _with_data_behind(body: bytes, json_length: str, model_name: str) -> InferRequest:
    """A V2 request of JSON and, behind it, the raw data of inputs (KServe: not of BYTES)."""
    start = int(json_length) if re.fullmatch("[0-9]{1,12}", json_length) else len(body) + 1
    if start > len(body):
        raise InvalidInput(f"{INFERENCE_CONTENT_LENGTH_HEADER} is not the length of the JSON")
    content = _Inputs.model_validate_json(body[:start])
    request = InferRequest.from_inference_request(content, model_name)
    for item in request.inputs:
        size = item.parameters.pop("binary_data_size", None)
        if size is None:
            continue
        if type(size) is not int or not 0 <= size <= len(body) - start:
            raise InvalidInput(f"binary_data_size of {item.name} is not the length of its data")
        item._raw_data, start = body[start : start + size], start + size
    return request


class StrictGRPCServer(GRPCServer):
    """KServe's gRPC server on one host, with a status for every error KServe knows.

    Starting fails when the port is taken (KServe: shares it silently with another server). With a
    certificate it speaks TLS, as HTTP does (KServe: never).
    """

    def __init__(
        self, host, port, data_plane, repository_extension, grace_period, max_receive, certificate
    ):
        super().__init__(port, data_plane, repository_extension, {}, grace_period)
        self._max_receive, self._certificate = max_receive, certificate
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self, max_workers: int) -> None:
        """Listen until stopped; `max_workers` threads serve what is not a coroutine."""
        self._server = grpc.aio.server(
            futures.ThreadPoolExecutor(max_workers),
            interceptors=(GrpcGate(), StatusInterceptor()),
            options=[
                ("grpc.max_send_message_length", kserve_args.grpc_max_send_message_length),
                ("grpc.max_receive_message_length", self._max_receive),
                ("grpc.so_reuseport", 0),
            ],
        )
        grpc_v2.add_GRPCInferenceServiceServicer_to_server(
            InferenceServicer(self._data_plane, self._model_repository_extension), self._server
        )
        if self._certificate:
            pair = tuple(Path(file).read_bytes() for file in self._certificate)
            self._server.add_secure_port(self._address, grpc.ssl_server_credentials([pair]))
        else:
            self._server.add_insecure_port(self._address)
        await self._server.start()
        await self._server.wait_for_termination()


warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # KServe's affair
