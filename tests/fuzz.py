"""Sends a server thousands of requests that no client should send, and checks every response.

Hypothesis makes them up, the same ones every time: `python -m tests.fuzz --help`
"""

import argparse
import http.client
import json
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import torch
from hypothesis import HealthCheck, Phase, configuration, given, seed, settings
from hypothesis import strategies as st
from kserve import InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from model.alexnet.model import AlexNetModel
from model.alexnet.shapes import jpeg
from model.loadtest import client
from model.loadtest.bodies import v1_body, v2_body
from model.loadtest.server_process import ServerProcess
from tests.malformed_images import HARMFUL, WHOLE

Classify = Callable[[list[bytes]], client.Predictions]


class Rest(NamedTuple):
    """An HTTP request, to the byte; where `images` are given the response must be theirs."""

    data: bytes
    images: list[bytes] | None = None
    method: str = "POST"
    complete: bool = True  # False: the server may well wait for more


class Grpc(NamedTuple):
    """A call's method and message; where `images` are given the response must be theirs."""

    method: str
    data: bytes
    images: list[bytes] | None = None


# Parts of requests -------------------------------------------------------------------------------

# Few letters, but awkward ones: Hypothesis would first sort all of Unicode, for seconds.
_LETTERS = 'aA1 _-./\\%"<{\0\n\x1b\x7fé\u202e\u2028\ufeffß中😀'
_text = st.text(_LETTERS + "\ud800", max_size=12) | st.sampled_from(
    ["", "é" * 40_000, "a" * 9_000, "%0d%0a", "../../etc/passwd"]
)
_number = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**31, 2**63, 1e308, 0.5])
_deep: list = []
for _ in range(300):
    _deep = [_deep]
_odd = st.recursive(
    st.none() | st.booleans() | _number | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=5,
) | st.just(_deep)


@st.composite
def _corrupted(draw, whole: bytes) -> bytes:
    """Some bytes others than they were, and perhaps the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


_image = st.one_of(
    st.sampled_from(sorted(WHOLE.values())),
    st.sampled_from(sorted(HARMFUL.values())),
    st.sampled_from(sorted(WHOLE.values())).flatmap(_corrupted),
    st.binary(max_size=40),
)
_images = st.lists(st.sampled_from(sorted(WHOLE.values())), min_size=1, max_size=2) | st.lists(
    _image, min_size=1, max_size=2
)


def _spoiled(whole: Any) -> st.SearchStrategy:
    """`whole`, JSON, with one odd thing in it, in any place."""
    places = [_odd]
    if isinstance(whole, dict):
        places.append(st.dictionaries(_text, _odd, max_size=2).map(lambda new: whole | new))
        for key, value in whole.items():
            places.append(st.just({k: v for k, v in whole.items() if k != key}))
            places.append(_spoiled(value).map(lambda new, key=key: whole | {key: new}))
    elif isinstance(whole, list):
        places.append(st.integers(0, 70).map(lambda n: (whole * 70)[:n]))
        for i, value in enumerate(whole[:2]):
            places.append(_spoiled(value).map(lambda new, i=i: whole[:i] + [new] + whole[i + 1 :]))
    return st.one_of(places)


_DAMAGE = [  # ways to make JSON text wrong, or at least unusual
    lambda text: text.replace(b'"data"', b'"data": [], "data"'),
    lambda text: text.replace(b'{"', b'{"inputs": [], "instances": 7, "', 1),  # keys twice
    lambda text: text.replace(b"[", b"[" * 900).replace(b"]", b"]" * 900),
    lambda text: b'{"a":' * 1_100 + text + b"}" * 1_100,
    lambda text: b"[" * 200_000,
    lambda text: b'{"inputs":' * 50_000,
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text.decode("utf-8", "replace").encode("utf-16"),
    lambda text: text + text,
    lambda text: text + b"\0",
    lambda text: b" " * 100_000 + text,
    lambda text: text.replace(b"1", b"1" * 5_000),
    lambda text: text.replace(b'"', b"'"),
]


@st.composite
def _json(draw, value: Any) -> bytes:
    """The value as JSON text; one in four not quite."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)):
        return text
    damaged = st.sampled_from(_DAMAGE).map(lambda damage: damage(text))
    return draw(damaged | _corrupted(text) | st.binary(max_size=30))


_header = st.sampled_from(
    [
        b"content-type: application/json",
        b"content-type: application/json; charset=utf-16",
        b"content-type: application/cloudevents+json",
        b"content-type: application/octet-stream",
        b"content-type: multipart/form-data",
        b"content-type: multipart/form-data; boundary=x",
        b"content-type: image/jpeg",
        b"content-type: \xff\xfe",
        b"content-type:",
        b"content-encoding: gzip",
        b"ce-specversion: 1.0",
        b"ce-specversion: 9",
        b"ce-id: \xe9\xff",
        b"ce-source: \xff",
        b"ce-type: x",
        b"ce-time: yesterday",
        b"ce-contenttype: application/json",
        b"inference-header-content-length: 7",
        b"accept: text/html;q=x",
        b"accept-encoding: nothing",
        b"upgrade: websocket\r\nconnection: upgrade",
        b"upgrade: h2c\r\nconnection: upgrade",
        b"expect: 100-continue",
        b"x-request-id: " + b"y" * 9_000,
        b"cookie: " + b"z" * 9_000,
        b"host: elsewhere",
        b"origin: null",
    ]
)
_headers = st.lists(_header, max_size=3)


def _rest(
    path: bytes, body: bytes = b"", headers: list[bytes] = (), method: str = "POST", **more
) -> Rest:
    """A request with its length; `headers` go before."""
    lines = [f"{method} ".encode() + path + b" HTTP/1.1", b"host: fuzz", *headers]
    lines += [b"content-length: %d" % len(body), b"", body]
    return Rest(b"\r\n".join(lines), method=method, **more)


_WHOLE_REQUEST = st.sampled_from([True, False, False])  # odd only in its images


# The ways in: strategies that make up requests for the model of a name ---------------------------


_TWO = [WHOLE["JPEG"], WHOLE["GIF"]]
_spoiled_v1 = _spoiled(v1_body(_TWO))


@st.composite
def _v1(draw, name: str) -> Rest:
    path = f"/v1/models/{name}:predict".encode()
    if draw(_WHOLE_REQUEST):
        images = draw(_images)
        return _rest(path, json.dumps(v1_body(images)).encode(), images=images)
    return _rest(path, draw(_json(draw(_spoiled_v1))), draw(_headers))


def _v2_body(images: list[bytes]) -> dict:
    body = v2_body(images)
    body["inputs"][0]["parameters"] = {"content_type": "image"}
    outputs = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "probability"}]
    return body | {"id": "of mine", "parameters": {"binary_data_output": False}, "outputs": outputs}


_spoiled_v2 = _spoiled(_v2_body(_TWO))


@st.composite
def _v2(draw, name: str) -> Rest:
    path, headers = f"/v2/models/{name}/infer".encode(), [b"content-type: application/json"]
    if draw(_WHOLE_REQUEST):
        images = draw(_images)
        return _rest(path, json.dumps(_v2_body(images)).encode(), headers, images=images)
    body = draw(_json(draw(_spoiled_v2)))
    return _rest(path, body, headers if draw(st.booleans()) else draw(_headers))


def _framed(images: list[bytes]) -> bytes:
    """Pictures as BYTES are sent raw."""
    return b"".join(len(image).to_bytes(4, "little") + image for image in images)


def _v2_binary_json(images: list[bytes], datatype: str = "BYTES") -> dict:
    body = _v2_body(images)
    image = {"name": "image", "shape": [len(images)], "datatype": datatype}
    image["parameters"] = {"binary_data_size": len(_framed(images))}
    return body | {"inputs": [image]}


_spoiled_v2_binary = st.one_of(
    [_spoiled(_v2_binary_json(_TWO, kind)) for kind in ("BYTES", "FP32", "FP16", "INT64", "BF16")]
)
_LENGTHS = [b"", b"x", b"1e3", b"+7", b" 7 ", b"1_0", b"9" * 5_000, b"\xb2"]


@st.composite
def _v2_binary(draw, name: str) -> Rest:
    path, kind = f"/v2/models/{name}/infer".encode(), b"content-type: application/octet-stream"
    before = b"inference-header-content-length: "
    if draw(_WHOLE_REQUEST):
        images = draw(_images)
        text = json.dumps(_v2_binary_json(images)).encode()
        headers = [kind, before + b"%d" % len(text)]
        return _rest(path, text + _framed(images), headers, images=images)
    text, data = draw(_json(draw(_spoiled_v2_binary))), _framed(_TWO)
    data = draw(st.just(data) | _corrupted(data))
    odd = st.sampled_from(_LENGTHS) | st.integers(-2, len(text + data) + 2).map(b"%d".__mod__)
    length = b"%d" % len(text) if draw(st.integers(0, 2)) else draw(odd)
    return _rest(path, text + data, [kind, before + length, *draw(_headers)])


_KINDS = "BOOL UINT8 UINT64 INT8 INT64 FP16 FP32 FP64 BYTES BF16 bytes"
_grpc_text = st.text(_LETTERS, max_size=12) | st.sampled_from(["\n", "é" * 9_000, "a" * 100_000])
_parameter = st.one_of(
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
    st.builds(pb.InferParameter, string_param=_grpc_text),
    st.builds(pb.InferParameter),
)
_parameters = st.dictionaries(_grpc_text, _parameter, max_size=2)
_contents = st.builds(
    pb.InferTensorContents,
    bytes_contents=st.lists(_image, max_size=2),
    fp32_contents=st.lists(st.floats(width=32), max_size=2),
    int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=1),
)
_tensor = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.just("image") | _grpc_text,
    datatype=st.just("BYTES") | st.sampled_from(_KINDS.split()) | _grpc_text,
    shape=st.just([1]) | st.lists(st.integers(-2, 65) | st.integers(-(2**63), 2**63 - 1)),
    parameters=_parameters,
    contents=st.none() | _contents,
)
_output = st.builds(
    pb.ModelInferRequest.InferRequestedOutputTensor,
    name=st.sampled_from(["label", "probability"]) | _grpc_text,
    parameters=_parameters,
)
_METHODS = [name for name in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name]


@st.composite
def _grpc(draw, name: str) -> Grpc:
    images = draw(_images)
    image = pb.ModelInferRequest.InferInputTensor(
        name="image", datatype="BYTES", shape=[len(images)]
    )
    request = pb.ModelInferRequest(
        model_name=name, inputs=[image], raw_input_contents=[_framed(images)]
    )
    if draw(_WHOLE_REQUEST):
        if draw(st.booleans()):
            request.ClearField("raw_input_contents")
            request.inputs[0].contents.bytes_contents.extend(images)
        return Grpc("ModelInfer", request.SerializeToString(), images)
    kind = draw(st.sampled_from(["request", "request", "bytes", "method"]))
    if kind == "request":
        request = draw(
            st.builds(
                pb.ModelInferRequest,
                model_name=st.just(name) | st.just(name) | _grpc_text,
                model_version=st.just("") | _grpc_text,
                id=_grpc_text,
                parameters=_parameters,
                inputs=st.lists(_tensor, max_size=2),
                outputs=st.lists(_output, max_size=2),
                raw_input_contents=st.just([_framed(images)]) | st.lists(_image, max_size=2),
            )
        )
        return Grpc("ModelInfer", request.SerializeToString())
    data = draw(_corrupted(request.SerializeToString()) | st.binary(max_size=40))
    if kind == "bytes":
        return Grpc("ModelInfer", data)
    named = pb.ModelReadyRequest(name=name, version=draw(_grpc_text)).SerializeToString()
    method = draw(st.sampled_from(_METHODS) | st.sampled_from(["", "Nothing", "ModelInfer/x"]))
    return Grpc(method, draw(st.sampled_from([b"", data, named])))


_METHODS_OF_HTTP = "GET POST PUT DELETE HEAD OPTIONS PATCH TRACE CONNECT BREW"


@st.composite
def _paths(draw, name: str) -> Rest:
    known = ["v1", "v2", "models", name, f"{name}:predict", f"{name}:explain", "infer", "ready"]
    known += ["versions", "1", "repository", "load", "unload", "index", "health", "live", "metrics"]
    known += ["docs", "openapi.json", "openai", "timeseries", "", ".", "..", "%2e%2e", "%00", "%0a"]
    known += ["%ff", "%ed%a0%80", "x" * 9_000, "%F0%9F%98%80", "?a=b", "#", ":predict", "*", "%"]
    parts = st.sampled_from([part.encode() for part in known]) | st.binary(max_size=6)
    right = [f"v2/repository/models/{name}/{what}" for what in ("load", "unload")]
    right += [
        f"v2/models/{name}/versions/1/infer",
        f"v1/models/{name}:explain",
        f"v2/models/{name}",
    ]
    path = b"/" + draw(
        st.lists(parts, max_size=5).map(b"/".join)
        | st.sampled_from([part.encode() for part in right])
    )
    method = draw(st.sampled_from(["GET", "POST"]) | st.sampled_from(_METHODS_OF_HTTP.split()))
    body = draw(st.just(b"") | _json(v1_body([])))
    request = _rest(path, body, draw(_headers), method)
    if draw(st.integers(0, 7)):
        return request._replace(complete=b" " not in path and b"\n" not in path)
    return request._replace(
        data=draw(
            st.sampled_from(
                [
                    request.data.replace(b"content-length: ", b"content-length: 1"),
                    request.data.replace(b"content-length: ", b"content-length: 9999999999999"),
                    request.data.replace(b"content-length: ", b"content-length: -"),
                    request.data.replace(b"content-length: ", b"transfer-encoding: chunked\r\nx: "),
                    request.data.replace(b"content-length: ", b"transfer-encoding: "),
                    request.data.replace(b"HTTP/1.1", b"HTTP/9.9"),
                    request.data.replace(b"HTTP/1.1", b"HTTP/1.0"),
                    request.data.replace(b"\r\n", b"\n"),
                    request.data.replace(b"host: ", b"host\0: "),
                    request.data.replace(b"host: ", b": "),
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(30),  # TLS
                ]
            )
            | _corrupted(request.data)
            | st.binary(max_size=40)
        ),
        complete=False,
    )


_NO_HTTP = b"Invalid HTTP request received."  # uvicorn itself says so

SERVERS = {"in_process": ["--in_process"], "replicas": []}  # options of model.serving
WAYS = {"V1": _v1, "V2": _v2, "V2 binary": _v2_binary, "gRPC": _grpc, "paths": _paths}


# Sending and checking ----------------------------------------------------------------------------


class Sender:
    """Sends requests to one server over connections it keeps, counts and checks the responses.

    `statuses` counts them, `wrong` says of each response that breaks the rules what it was.
    """

    def __init__(self, server: ServerProcess, classify: Classify) -> None:
        """classify: what the model predicts for images; raises InvalidInput."""
        host, port = server.url.removeprefix("http://").split(":")
        self._address, self._socket = (host, int(port)), None
        self._channel = grpc.insecure_channel(server.grpc)
        self._classify, self._known = classify, {}
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []

    def close(self) -> None:
        """Close the connections."""
        self._channel.close()
        if self._socket:
            self._socket.close()

    def send(self, request: Rest | Grpc) -> None:
        """Send one request; whatever comes back is counted, and remembered if it is wrong."""
        ask = self._ask_grpc if isinstance(request, Grpc) else self._ask_rest
        status, response = ask(request)
        self.statuses[status] += 1
        try:
            self._check(request, status, response)
        except AssertionError as error:
            what = f"{request.data[:400]!r} ... ({len(request.data)} bytes)"
            self.wrong.append(f"{status}, {error}: {str(response)[:300]!r} to {what}")

    def _ask_rest(self, request: Rest) -> tuple[str, Any]:
        if self._socket is None or not request.complete:
            self._forget()
            self._socket = socket.create_connection(self._address)
        self._socket.settimeout(10 if request.complete else 0.1)
        response = http.client.HTTPResponse(self._socket, method=request.method)
        try:
            self._socket.sendall(request.data)
            response.begin()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._forget()
            return "none", None
        # After an Upgrade header uvicorn no longer listens on the connection.
        if response.will_close or not request.complete or b"upgrade: " in request.data:
            self._forget()
        try:
            return str(response.status), json.loads(body)
        except ValueError:
            return str(response.status), body

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask_grpc(self, request: Grpc) -> tuple[str, Any]:
        call = self._channel.unary_unary(f"/inference.GRPCInferenceService/{request.method}")
        try:
            return "OK", call(request.data, timeout=60)
        except grpc.RpcError as error:
            return error.code().name, error.details()

    def _check(self, request: Rest | Grpc, status: str, response: Any) -> None:
        if request.images is not None:
            self._check_right(request, status, response)
        if isinstance(request, Grpc):
            allowed = "OK INVALID_ARGUMENT NOT_FOUND UNIMPLEMENTED PERMISSION_DENIED"
            assert status in allowed.split(), "not to be sent"
            assert status == "OK" or _plain(response), "no plain sentence"
            return
        allowed = "200 307 400 403 404 405 413 501" + ("" if request.complete else " none 426")
        assert status in allowed.split(), "not to be sent"
        if "4" <= status < "n" and request.method != "HEAD" and response != _NO_HTTP:
            assert isinstance(response, dict) and _plain(response.get("error")), "no plain sentence"

    def _check_right(self, request: Rest | Grpc, status: str, response: Any) -> None:
        expected = self._expected(tuple(request.images))
        if expected is None:
            assert status in ("400", "INVALID_ARGUMENT"), "the images cannot be read"
            return
        assert status in ("200", "OK"), "the images can be read"
        found = _predictions(response)
        assert len(found) == len(expected), "as many predictions as images"
        for ours, theirs in zip(found, expected, strict=True):
            for (label, number), right in zip(ours, theirs, strict=True):
                assert abs(number - right["probability"]) < 1e-4, "not the model's probability"
                assert label == right["label"], "not the model's label"

    def _expected(self, images: tuple[bytes, ...]) -> client.Predictions | None:
        predictions = []
        for image in images:
            if image not in self._known:
                try:
                    self._known[image] = self._classify([image])[0]
                except InvalidInput:
                    self._known[image] = None
            predictions.append(self._known[image])
        return None if None in predictions else predictions


def _plain(sentence: object) -> bool:
    """Whether it is one line for a person, with nothing of the server's inside."""
    inside = r"Traceback|Error\(|0x[0-9a-f]{6}|ray::|\.py\b|site-packages"
    whole = isinstance(sentence, str) and re.fullmatch(r"[^\x00-\x1f\x7f]{5,400}", sentence)
    return bool(whole) and not re.search(inside, sentence)


def _predictions(response: Any) -> list[list[tuple[str, float]]]:
    """For each image its labels with their probabilities, whatever the protocol."""
    if isinstance(response, dict) and "predictions" in response:
        return [
            [(top["label"], top["probability"]) for top in row] for row in response["predictions"]
        ]
    if isinstance(response, bytes):
        message = pb.ModelInferResponse.FromString(response)
        outputs = {out.name: out.as_numpy() for out in InferResponse.from_grpc(message).outputs}
        labels = [label.decode() for label in outputs["label"].ravel()]
        numbers = outputs["probability"].ravel().tolist()
    else:
        outputs = {out["name"]: out["data"] for out in response["outputs"]}
        labels, numbers = outputs["label"], outputs["probability"]
    flat = list(zip(labels, numbers, strict=True))
    return [flat[i : i + 5] for i in range(0, len(flat), 5)]


def _make_up(
    requests: st.SearchStrategy, count: int, number: int, send: Callable[[Any], None]
) -> None:
    """Send `count` of the requests, one after the other."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests)
    def each(request: Rest | Grpc) -> None:
        send(request)

    each()


def fuzz(
    server: ServerProcess, classify: Classify, count: int, ways: list[str] = tuple(WAYS), number=0
) -> dict[str, Counter]:
    """Send `count` requests in each way; returns how many responses had which status.

    number: another one makes up other requests. Raises AssertionError with what was wrong: a
    response, a process of the server that has gone, or a red star that is no longer recognised.
    """
    processes, statuses, wrong = set(server.processes()), {}, []
    # Hypothesis writes what it has worked out, about Unicode for one, into a folder.
    with tempfile.TemporaryDirectory() as folder:
        configuration.set_hypothesis_home_dir(folder)
        for way in ways:
            sender = Sender(server, classify)
            _make_up(WAYS[way](server.name), count, number, sender.send)
            sender.close()
            statuses[way] = sender.statuses
            wrong += [f"{way}: {what}" for what in sender.wrong]
    assert not wrong, f"{len(wrong)} wrong responses: " + "\n".join(wrong[:20])
    assert set(server.processes()) == processes, "the server's processes are others than before"
    assert client.v1(server, [jpeg("red star", 7)])[0][0]["label"] == "red star"
    return statuses


def main() -> None:
    """Send a server so many requests in each way; print the statuses and the memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--only", choices=SERVERS, help="one of the two servers, not both")
    parser.add_argument("--count", type=int, default=2_500, help="requests in each way")
    parser.add_argument("--number", type=int, default=0, help="another makes up other requests")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the other cores are the server's
    local = AlexNetModel("local")
    local.load()
    for name in [options.only] if options.only else SERVERS:
        with ServerProcess("model.serving", *SERVERS[name]) as server:
            print(f"{name}: takes {server.memory() / 1e6:.0f} MB")
            for way in WAYS:
                started = time.monotonic()
                try:
                    [statuses] = fuzz(
                        server, local.classify, options.count, [way], options.number
                    ).values()
                except AssertionError as error:
                    sys.exit(str(error))
                seconds, memory = time.monotonic() - started, server.memory() / 1e6
                counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
                print(f"{way}: {statuses.total()} in {seconds:.0f} s, {memory:.0f} MB: {counts}")


if __name__ == "__main__":
    main()
