"""KServe's gRPC service as Ray Serve's gRPC ingress calls it: a method of the replica for each."""

from typing import NamedTuple

import grpc
from kserve.protocol.grpc.servicer import InferenceServicer
from ray.serve.grpc_util import RayServegRPCContext

from model.serving.application import Application
from model.serving.errors import log_refusal, logged, sentence, statuses
from model.serving.grpc_server import AdmissionInterceptor


class GrpcMethods:
    """The methods of KServe's service; for a replica that has called `serve_grpc`."""

    def serve_grpc(self, application: Application) -> None:
        """From now on its models answer calls."""
        self._servicer = InferenceServicer(application.dataplane, application.repository)
        self._admission = AdmissionInterceptor(application.admission, application.receiving)

    async def ModelInfer(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("ModelInfer", request, grpc_context)

    async def ModelMetadata(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("ModelMetadata", request, grpc_context)

    async def ModelReady(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("ModelReady", request, grpc_context)

    async def ServerLive(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("ServerLive", request, grpc_context)

    async def ServerReady(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("ServerReady", request, grpc_context)

    async def ServerMetadata(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("ServerMetadata", request, grpc_context)

    async def RepositoryModelLoad(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("RepositoryModelLoad", request, grpc_context)

    async def RepositoryModelUnload(self, request, grpc_context: RayServegRPCContext):
        return await self._answer("RepositoryModelUnload", request, grpc_context)

    async def _answer(self, method: str, request, grpc_context: RayServegRPCContext):
        context, call = _Context(grpc_context), getattr(self._servicer, method)

        async def answer(request, context: _Context):
            try:
                return await call(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                if known := statuses(error):
                    log_refusal(error)
                    await context.abort(known[1], sentence(error))
                await context.abort(grpc.StatusCode.INTERNAL, sentence(logged(error)))

        if method == "ModelInfer":
            return await self._admission.admitted(answer, request, context)
        return await answer(request, context)


class _Metadatum(NamedTuple):
    key: str
    value: str


class _Context:
    """Ray Serve's context, with what gRPC's own has besides. (Deadlines do not come through.)"""

    def __init__(self, context: RayServegRPCContext) -> None:
        self._context = context

    def __getattr__(self, name: str):
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[_Metadatum]:
        return [_Metadatum(*pair) for pair in self._context.invocation_metadata()]

    def trailing_metadata(self) -> list:
        return []

    def time_remaining(self) -> float | None:
        return None

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._context.set_code(code)
        self._context.set_details(details)
        raise grpc.aio.AbortError(details)
