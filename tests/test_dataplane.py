"""What a model is given of a V2 REST request with binary data, and what KServe sends back."""

import asyncio
import json
import pickle

import numpy as np
import pytest
from kserve import InferRequest, Model
from kserve.errors import InvalidInput, ModelNotReady
from kserve.model_repository import ModelRepository
from kserve.protocol.infer_type import serialize_byte_tensor
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.utils.numpy_codec import to_np_dtype

from model.serving.admission import Admission
from model.serving.dataplane import StrictDataPlane

DATATYPES = ["BOOL", *(f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64))]
DATATYPES += ["FP16", "FP32", "FP64"]
TEXTS = ["one", "", "größer"]


class Echo(Model):
    """Explains with what it was given."""

    async def explain(self, payload, headers=None):
        return {"explanations": payload["instances"]}


def plane() -> StrictDataPlane:
    """Of one model."""
    registry, model = ModelRepository(), Echo("m")
    model.load()
    registry.update(model)
    return StrictDataPlane(registry, Admission(["m"], 1))


def body(behind: bytes, **changes) -> tuple[bytes, dict]:
    """A V2 request with one input, whose data lies behind the JSON, and its headers."""
    found = {"name": "x", "parameters": {"binary_data_size": len(behind)}} | changes
    text = json.dumps({"inputs": [found]}).encode()
    headers = {"inference-header-content-length": str(len(text))}
    return text + behind, headers


def decoded(behind: bytes, **changes) -> InferRequest:
    """What the model gets, by way of a replica."""
    sent, headers = body(behind, **changes)
    found, _ = plane().decode(sent, headers, protocol_version="v2", model_name="m")
    return pickle.loads(pickle.dumps(found))


def by_kserve(behind: bytes, **changes) -> InferRequest:
    """What KServe itself gives it."""
    sent, headers = body(behind, **changes)
    return InferRequest.from_bytes(sent, int(headers["inference-header-content-length"]), "m")


def framed(texts: list[bytes]) -> bytes:
    return serialize_byte_tensor(np.array(texts, dtype=object)).item()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_numbers_behind_the_json_are_what_kserve_makes_of_them(datatype):
    """A list, an array that may be written to, a table; whichever the model asks for first."""
    data = np.array([[1, 0, 1], [0, 1, 1]], to_np_dtype(datatype))
    sent = {"behind": data.tobytes(), "shape": [2, 3], "datatype": datatype}
    expected = by_kserve(**sent)
    assert decoded(**sent).inputs == expected.inputs
    assert decoded(**sent).inputs[0].data == expected.inputs[0].data
    assert decoded(**sent).as_dataframe().equals(expected.as_dataframe())
    for request in (decoded(**sent), decoded(**sent)):
        array = request.inputs[0].as_numpy()
        assert array.dtype == data.dtype and (array == data).all()
        array += array[0, 0]  # it belongs to the model
        assert (request.inputs[0].as_numpy() == data).all()
        assert request.inputs[0].data == data.flatten().tolist()


def test_a_model_may_change_what_it_was_given():
    """Its own data count from then on, and are passed on as KServe would."""
    sent = {"behind": np.array([1, 2], np.int64).tobytes(), "shape": [2], "datatype": "INT64"}
    for request in (decoded(**sent), by_kserve(**sent)):
        [given] = request.inputs
        given.data = [3, 4]
        assert given.as_numpy().tolist() == [3, 4]
        given.set_data_from_numpy(np.array([5, 6]))
        assert given.data is None and given.as_numpy().tolist() == [5, 6]
        assert request.to_rest()[0].endswith(np.array([5, 6]).tobytes())
    forwarded, length = decoded(**sent).to_rest()
    assert length is None and forwarded["inputs"][0]["data"] == [1, 2]


def test_texts_behind_the_json_are_what_kserve_makes_of_them():
    """Text, where the bytes are UTF-8."""
    sent = {"behind": framed([text.encode() for text in TEXTS]), "shape": [3], "datatype": "BYTES"}
    expected = by_kserve(**sent)
    request = decoded(**sent)
    assert request.inputs == expected.inputs and request.inputs[0].data == TEXTS
    assert request.inputs[0].as_numpy().tolist() == TEXTS
    assert request.as_dataframe().equals(expected.as_dataframe())
    none = {"behind": b"", "shape": [0], "datatype": "BYTES"}
    assert decoded(**none).inputs == by_kserve(**none).inputs


def test_bytes_that_are_no_text_stay_bytes():
    """KServe refuses them, with a 500."""
    images = [b"\xff\xd8 an image", b"a text"]
    [given] = decoded(framed(images), shape=[2], datatype="BYTES").inputs
    assert given.as_numpy().tolist() == images


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"parameters": {}}, "'data' field is missing"),
        ({"parameters": None}, "'data' field is missing"),
        ({"parameters": {"binary_data_size": None}}, "binary_data_size"),
        ({"shape": [-1]}, "shape"),
        ({"shape": [3]}, "shape"),
        ({"shape": [2**70]}, "cannot be read"),
        ({"datatype": "FP13"}, "FP13"),
    ],
)
def test_data_that_are_not_there_or_do_not_fit(changes, part):
    """400, before the model sees them."""
    sent = {"shape": [2], "datatype": "INT64"} | changes
    with pytest.raises(InvalidInput, match=part):
        decoded(np.array([1, 2], np.int64).tobytes(), **sent)


def test_data_in_the_json_count_beside_an_input_with_binary_data():
    """Each input has its own; where both are given KServe takes those in the JSON."""
    for parameters in ({}, {"binary_data_size": 8}):
        more = {"data": [7], "parameters": parameters, "shape": [1], "datatype": "INT64"}
        [given] = decoded(b"", **more).inputs
        assert given.data == by_kserve(b"", **more).inputs[0].data == [7]


SECRETS = {
    "authorization": "Bearer x",
    "cookie": "a=b",
    "host": "h",
    "transfer-encoding": "chunked",
}
EVENT = {"ce-specversion": "1.0", "ce-source": "s", "ce-type": "t", "ce-id": "1"}


def test_an_explanation_does_not_send_the_requests_headers_back():
    """KServe's own does: with a token, a cookie and an encoding that the response has not."""
    explained, headers = asyncio.run(plane().explain("m", {"instances": [1]}, SECRETS))
    assert explained == {"explanations": [1]} and headers == {}


@pytest.mark.parametrize("event", [EVENT, {"content-type": "application/cloudevents+json"}])
def test_an_explanation_of_a_cloud_event_is_one(event):
    """As KServe's is, with the event's headers and no others."""
    body, headers = asyncio.run(plane().explain("m", {"instances": [1]}, SECRETS | event))
    answered, more = plane().encode("m", body, headers, {})
    assert headers == event and headers.keys() <= more.keys()
    assert b"explanations" in answered


def test_an_unloaded_model_cannot_be_loaded_again():
    """KServe's `load` does nothing: docs/serving.md says so of --repository_api."""
    registry, model = ModelRepository(), Echo("m")
    registry.update(model)
    repository = ModelRepositoryExtension(registry)

    async def main() -> None:
        await repository.unload("m")
        with pytest.raises(ModelNotReady):
            await repository.load("m")

    asyncio.run(main())
