"""KServe's data plane, which decodes requests and finds models, strict where KServe's is not."""

import re
import struct

import numpy as np
from kserve import InferInput, InferRequest
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER, PredictorProtocol
from kserve.errors import InferenceError, InvalidInput, ModelNotReady
from kserve.model import BaseKServeModel, InferenceVerb
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import deserialize_bytes_tensor
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_datamodels import InferenceRequest, RequestInput
from kserve.utils.numpy_codec import to_np_dtype
from pydantic import ValidationError

from model.serving.admission import Admission
from model.serving.errors import Forbidden, first_of
from model.serving.upstream_kserve import BinaryInput

# By which KServe knows that a request is a cloud event; of the other kind, by its content type.
EVENT_HEADERS = ("ce-specversion", "ce-source", "ce-type", "ce-id")
EVENT = "application/cloudevents+json"


class StrictDataPlane(DataPlane):
    """Refuses with a sentence where KServe's data plane fails, and tells the truth of readiness."""

    def __init__(self, model_registry: ModelRepository, admission: Admission) -> None:
        """admission: which knows whether the server is about to end."""
        super().__init__(model_registry=model_registry)
        self._admission = admission

    def decode(self, body, headers, *args, **kwargs):  # as DataPlane.decode
        """A request that cannot be read raises InvalidInput (KServe: a 500 for some).

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
                    body = _with_binary_data(body, length, kwargs.get("model_name"))
            return super().decode(body, headers, *args, **kwargs)
        except InvalidInput:
            raise
        except ValidationError as error:
            raise InvalidInput(first_of(error.errors())) from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidInput(f"the request cannot be read: {what}") from None

    async def explain(self, model_name, request, headers=None):  # as DataPlane.explain
        """The explanation, and headers: those of the model (KServe: and all of the request's).

        Those that make a request a cloud event stay; `encode` makes the response one, by them.
        """
        model = await self.get_model(model_name)
        response, found = await model(request, verb=InferenceVerb.EXPLAIN, headers=headers)
        given, event = headers or {}, {}
        if all(name in given for name in EVENT_HEADERS):
            event = {name: given[name] for name in EVENT_HEADERS}
        elif given.get("content-type") == EVENT:
            event = {"content-type": EVENT}
        return response, event | found

    async def ready(self) -> bool:
        """Whether every model is (KServe: always true)."""
        models = self.model_registry.get_models().values()
        healthy = [await model.healthy() for model in models]
        return bool(healthy) and all(healthy) and not self._admission.draining

    async def model_ready(self, model_name: str, disable_predictor_health_check=False) -> bool:
        """Whether a model is; before a prediction ModelNotReady says why it is not."""
        if disable_predictor_health_check:  # KServe asks so before each prediction
            await self.get_model(model_name)
            return True
        model = self.get_model_from_registry(model_name)
        return await model.healthy() and not self._admission.draining

    async def get_model(self, name: str) -> BaseKServeModel:
        """The model, or ModelNotReady (KServe: calls its `load` inside the request)."""
        model = self.get_model_from_registry(name)
        if not await model.healthy():
            raise ModelNotReady(name, getattr(model, "failure", None))
        return model


class ClosedRepository(ModelRepositoryExtension):
    """KServe's repository API when it is off: no caller can take the model away from the others."""

    async def load(self, model_name: str) -> None:
        """Refuse."""
        raise Forbidden("loading is off: start the server with --repository_api on")

    async def unload(self, model_name: str) -> None:
        """Refuse."""
        raise Forbidden("unloading is off: start the server with --repository_api on")


class _Input(RequestInput):
    data: list = []  # it may lie behind the JSON


class _Inputs(InferenceRequest):
    inputs: list[_Input]


def _with_binary_data(body: bytes, json_length: str, model_name: str) -> InferRequest:
    """A V2 request of JSON and, behind it, the raw data of inputs, as KServe reads it.

    (KServe fails for BYTES that are no text.)
    """
    start = int(json_length) if re.fullmatch("[0-9]{1,12}", json_length) else len(body) + 1
    if start > len(body):
        raise InvalidInput(f"{INFERENCE_CONTENT_LENGTH_HEADER} is not the length of the JSON")
    content = _Inputs.model_validate_json(body[:start])
    request = InferRequest.from_inference_request(content, model_name)
    for i, item in enumerate(request.inputs):
        if "data" in content.inputs[i].model_fields_set:
            continue
        size = item.parameters.pop("binary_data_size", None)
        if size is None:
            raise InvalidInput(f"'data' field is missing for input '{item.name}'")
        if type(size) is not int or not 0 <= size <= len(body) - start:
            raise InvalidInput(f"binary_data_size of {item.name} is not the length of its data")
        request.inputs[i] = _with_data(item, body[start : start + size])
        start += size
    return request


def _with_data(item: InferInput, raw: bytes) -> InferInput:
    """The input with its raw data; raises ValueError where they do not fit."""
    kind = to_np_dtype(item.datatype)
    if kind is None:
        raise ValueError(f"there is no datatype {item.datatype}")
    texts = item.datatype == "BYTES"
    flat = deserialize_bytes_tensor(raw) if texts else np.frombuffer(raw, kind)
    tensor = flat.reshape(item.shape)
    if list(tensor.shape) != item.shape:
        raise ValueError(f"{item.shape} is not the shape of {item.name}")
    if not texts:
        return BinaryInput(item, raw)
    try:
        item.set_data_from_numpy(tensor, binary_data=False)
    except InferenceError:  # they are no texts
        item.set_data_from_numpy(tensor)
    return item
