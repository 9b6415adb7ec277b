"""REST requests that are wrong: a 4xx, one plain sentence, and the server goes on."""

import base64
import json
from collections.abc import Callable

import pytest
import requests

from model.loadtest.bodies import v1_body, v2_body
from tests.conftest import BOTH
from tests.samples import BROKEN, GOOD, framed
from tests.ways import assert_answers, assert_plain

TEXT = base64.b64encode(GOOD).decode()

V1 = {  # what is sent: JSON, or the body itself as bytes
    "no body": b"",
    "no JSON": b'{"instances": [',
    "not UTF-8": b'{"instances": "\xff\xfe"}',
    "an image itself": GOOD,
    "a list": [],
    "a number": 7,
    "null": None,
    "no instances": {"inputs": []},
    "instances no list": {"instances": {"image": {"b64": TEXT}}},
    "no instance": {"instances": []},
    "too many": {"instances": [{"image": {"b64": TEXT}}] * 65},
    "an instance no dict": {"instances": [TEXT]},
    "an instance null": {"instances": [None]},
    "no image": {"instances": [{"photo": {"b64": TEXT}}]},
    "image a text": {"instances": [{"image": TEXT}]},
    "no b64": {"instances": [{"image": {"jpeg": TEXT}}]},
    "b64 a number": {"instances": [{"image": {"b64": 7}}]},
    "not base64": {"instances": [{"image": {"b64": "no base64!"}}]},
    "one of two bad": {"instances": [{"image": {"b64": TEXT}}, {"image": {"b64": "AAAA"}}]},
    "a cloud event of nothing": {"specversion": "1.0", "id": "1", "source": "x", "type": "y"},
}
V1 |= {f"{kind} as image": v1_body([data]) for kind, data in BROKEN.items()}


@BOTH
@pytest.mark.parametrize("kind", V1)
def test_v1(server, kind):
    """V1: status 400 and the sentence under `error`."""
    body = V1[kind] if isinstance(V1[kind], bytes) else json.dumps(V1[kind])
    response = requests.post(f"{server.url}/v1/models/{server.name}:predict", body)
    assert response.status_code == 400, response.text
    assert_plain(response.json()["error"])
    assert_answers(server)


@BOTH
def test_v1_an_image_that_says_so(server):
    """A JPEG as the body, with its own content type: 400, and the form that is expected."""
    url = f"{server.url}/v1/models/{server.name}:predict"
    response = requests.post(url, GOOD, headers={"content-type": "image/jpeg"})
    assert response.status_code == 400 and '{"instances": [' in response.json()["error"]


def v2(**changes) -> dict:
    """A V2 request with some fields of its input changed."""
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    return {"inputs": [image | changes]}


def fp32(shape: list[int], data: list) -> dict:
    """A V2 request of numbers."""
    return v2(datatype="FP32", shape=shape, data=data)


def binary(shape: list[int], datatype: str, size: object, data: bytes) -> tuple[bytes, str]:
    """A V2 body with its data behind the JSON, and the header that says where they begin."""
    image = {"name": "image", "shape": shape, "datatype": datatype}
    text = json.dumps({"inputs": [image | {"parameters": {"binary_data_size": size}}]}).encode()
    return text + data, str(len(text))


SIZE = 3 * 224 * 224
V2 = {  # what is sent: JSON, or (bytes, the header that says how much of them is JSON)
    "no JSON": (b"{", None),
    "no inputs": {"outputs": []},
    "empty inputs": {"inputs": []},
    "inputs null": {"inputs": None},
    "two inputs": {"inputs": v2()["inputs"] * 2},
    "another name": v2(name="photo"),
    "no data": v2(data=None),
    "no shape": {"inputs": [{"name": "image", "datatype": "BYTES", "data": [TEXT]}]},
    "shape empty": v2(shape=[]),
    "shape of text": v2(shape=["one"]),
    "shape zero": v2(shape=[0], data=[]),
    "shape negative": v2(shape=[-1]),
    "shape too large": v2(shape=[2]),
    "shape too small": v2(data=[TEXT, TEXT]),
    "too many": v2(shape=[65], data=[TEXT] * 65),
    "two dimensions": v2(shape=[1, 1]),
    "BYTES of numbers": v2(data=[7]),
    "not base64": v2(data=["no base64!"]),
    "no image": v2(data=["AAAA"]),
    "INT64": v2(datatype="INT64", data=[1]),
    "unknown datatype": v2(datatype="FP13"),
    "FP32 of text": fp32([1, 3, 224, 224], ["x"] * SIZE),
    "FP32 too few": fp32([1, 3, 224, 224], [0.5, 0.5]),
    "FP32 not finite": fp32([1, 3, 224, 224], [1e39] * SIZE),
    "FP32 another size": fp32([1, 3, 2, 2], [0.5] * 12),
    "unknown output": v2() | {"outputs": [{"name": "logits"}]},
    "bytes without header": (b"\0\1\2", None),
    "header no number": (b"{}", "many"),
    "header negative": (b"{}", "-3"),
    "header beyond": (b"{}", "99999"),
    "binary not there": binary([1], "BYTES", None, b""),
    "binary too short": binary([1, 3, 224, 224], "FP32", 8, b"12345678"),
    "binary odd": binary([1, 3, 224, 224], "FP32", 7, b"1234567"),
    "binary size a text": binary([1], "BYTES", "many", b"1234"),
    "binary size beyond": binary([1], "BYTES", 9999, framed(GOOD)[:100]),
    "binary lies": binary([1], "BYTES", 8, b"\xff\xff\xff\x7f1234"),
}


@BOTH
@pytest.mark.parametrize("kind", V2)
def test_v2_rest(server, kind):
    """V2 over REST: status 400 and the sentence under `error`."""
    url = f"{server.url}/v2/models/{server.name}/infer"
    if isinstance(V2[kind], dict):
        response = requests.post(url, json=V2[kind])
    else:
        body, length = V2[kind]
        headers = {"inference-header-content-length": length} if length else {}
        kind_of_body = "application/octet-stream" if length else "application/json"
        response = requests.post(url, body, headers=headers | {"content-type": kind_of_body})
    assert response.status_code == 400, response.text
    assert_plain(response.json()["error"])
    assert_answers(server)


SEND: dict[str, Callable] = {
    "v1": lambda url: requests.post(f"{url}/v1/models/nobody:predict", json=v1_body([GOOD])),
    "v2": lambda url: requests.post(f"{url}/v2/models/nobody/infer", json=v2_body([GOOD])),
    "explain": lambda url: requests.post(f"{url}/v1/models/nobody:explain", json={}),
    "ready": lambda url: requests.get(f"{url}/v2/models/nobody/ready"),
    "metadata": lambda url: requests.get(f"{url}/v2/models/nobody"),
}


@BOTH
@pytest.mark.parametrize("way", SEND)
def test_unknown_model(server, way):
    """A model that is not there: 404 and a sentence that names it."""
    response = SEND[way](server.url)
    assert response.status_code == 404 and "nobody" in response.json()["error"]
    assert_plain(response.json()["error"])


@BOTH
@pytest.mark.parametrize(("method", "status"), [("GET", 405), ("POST", 404)])
def test_no_such_path(server, method, status):
    """What there is no path or method for: KServe's form of an error, too."""
    path = "v2/models/x/infer" if method == "GET" else "v3/models"
    response = requests.request(method, f"{server.url}/{path}")
    assert response.status_code == status
    assert_plain(response.json()["error"])


@BOTH
def test_an_endless_name(server):
    """The sentence has an end."""
    response = requests.get(f"{server.url}/v2/models/{'nobody' * 1_000}")
    assert response.status_code == 404
    assert_plain(response.json()["error"])


@BOTH
def test_a_request_for_a_websocket_gets_a_response(server):
    """There are none here: the request is treated as any other."""
    headers = {"connection": "upgrade", "upgrade": "websocket"}
    response = requests.post(f"{server.url}/v1/models/nobody:predict", headers=headers, timeout=10)
    assert response.status_code == 404
