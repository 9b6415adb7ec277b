"""The two programs that readers copy: short, in public API, and they respond as the model does."""

import ast
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import requests
import torch
from kserve import InferInput, InferRequest
from kserve.errors import InvalidInput
from PIL import Image

from model.basics.kserve_server import AlexNetModel
from model.loadtest import client
from model.loadtest.bodies import v1_body
from model.loadtest.server_process import ServerProcess
from model.serving.machine import free_port
from tests.conftest import ROOT, Traces, long, until
from tests.malformed_images import WHOLE, encoded
from tests.samples import BROKEN, GOOD, SCENE
from tests.ways import WAYS, assert_equal, assert_plain, prepared, v2_binary, v2_post

LINES = {"kserve_server": 80, "ray_server": 40}
PUBLIC = {"kserve", "ray", "torch", "torchvision", "PIL", *sys.stdlib_module_names}
# What the basics read as model.alexnet does; they show what is transparent, cut 16 bits of grey
# off, and take no other formats.
PLAIN = [kind for kind in WHOLE if re.search("JPEG|PNG|one", kind)]
PLAIN = [kind for kind in PLAIN if not re.search("alpha|grey PNG of 16 bits", kind)]


# The files -----------------------------------------------------------------------------------


def source(name: str) -> str:
    """The text of one of the two files."""
    return (ROOT / "model" / "basics" / f"{name}.py").read_text()


def not_public(text: str) -> list[str]:
    """The imports from elsewhere in a program, and the private names that it uses."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in modules if name.split(".")[0] not in PUBLIC]
        names = [part for name in modules for part in name.split(".")]
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        if isinstance(node, ast.keyword):
            names.append(node.arg or "")
        found += [name for name in names if re.match("_(?!_)", name)]
    return found


def imports_from_model(text: str) -> list[str]:
    """The lines that import something of this repository."""
    return re.findall(r"^ *(?:from model\b|import model\b).*$", text, re.M)


@pytest.mark.parametrize("name", LINES)
def test_it_is_short(name):
    """As many lines as a page of a book holds, or half of it."""
    assert len(source(name).splitlines()) <= LINES[name]


@pytest.mark.parametrize("name", LINES)
def test_it_uses_public_api_and_one_import_of_ours(name):
    """KServe, Ray, torch, torchvision, Pillow, the standard library; no private name of theirs."""
    [line] = imports_from_model(source(name))
    assert not_public(source(name).replace(line, "")) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ray.serve._private import replica",
        "import kserve.protocol._x",
        "handle._by_reference",
        "serve.deployment(_internal=True)",
        "import psutil",
        "from model.alexnet import images",
    ],
)
def test_the_check_of_names_finds_what_is_not_public(line):
    """A private module, attribute or argument, a package of somebody else, or more of ours."""
    assert not_public(line)


# A reader copies them ------------------------------------------------------------------------

UNTRAINED = """
from torchvision.models import AlexNet_Weights, alexnet


def load_network():
    torch.manual_seed(0)
    return alexnet().eval(), AlexNet_Weights.DEFAULT.meta["categories"]
"""
INSTEAD = {  # of the import from this repository
    "kserve_server": ("from model.alexnet.network import load_network", UNTRAINED),
    "ray_server": (
        "from model.basics.kserve_server import AlexNetModel",
        "from kserve_server import AlexNetModel",
    ),
}


def copy(name: str, folder: Path) -> None:
    """Copy one of the programs into a folder and replace its import from this repository."""
    line, replacement = INSTEAD[name]
    assert imports_from_model(source(name)) == [line]
    (folder / f"{name}.py").write_text(source(name).replace(line, replacement))


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder for Ray's logs and sockets, with a name that is short enough for these."""
    folder = tempfile.mkdtemp(prefix="basics-", dir="/tmp")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["kserve_server", long("ray_server")])
def test_a_copy_runs_by_itself(name, tmp_path, ray_folder, traces: Traces):
    """In an empty folder, as a reader starts it; Ctrl-C ends it and all that it started."""
    copy("kserve_server", tmp_path)
    if name == "ray_server":
        copy(name, tmp_path)
    (tmp_path / "model.py").write_text("raise ImportError('the copy uses the repository')\n")
    http_port, grpc_port = free_port(), free_port()
    url = f"http://127.0.0.1:{http_port}/v1/models/custom-model"
    command = [sys.executable, f"{name}.py", "--http_port", f"{http_port}"]
    with open(tmp_path / "log", "w") as log:
        process = psutil.Popen(
            [*command, "--grpc_port", f"{grpc_port}"],
            cwd=tmp_path,
            env=os.environ | traces.env | {"RAY_TMPDIR": ray_folder},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert until(lambda: process.poll() is not None or is_ready(url), 120)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        response = requests.post(f"{url}:predict", json=v1_body([GOOD, WHOLE["PNG"]]), timeout=60)
        for prediction in response.json()["predictions"]:
            numbers = [entry["probability"] for entry in prediction]
            assert len({entry["label"] for entry in prediction}) == 5
            assert numbers == sorted(numbers, reverse=True) and 0 < sum(numbers) < 1
        bad = requests.post(f"{url}:predict", json=v1_body([b"no image"]), timeout=60)
        assert bad.status_code == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, (tmp_path / "log").read_text()[-3000:]
        assert until(lambda: not traces.processes(), 10), traces.processes()
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=5)
    finally:
        for left in traces.processes():
            left.kill()


def is_ready(url: str) -> bool:
    """Whether the model at a V1 address says that it is ready."""
    try:
        return requests.get(url, timeout=5).json()["ready"]
    except requests.RequestException:
        return False


# They respond as the model of model.alexnet ------------------------------------------------------


@pytest.fixture(scope="module")
def basic() -> AlexNetModel:
    """The model of the two programs, in this process."""
    model = AlexNetModel("basic")
    model.load()
    return model


def predict(model: AlexNetModel, payload: dict | InferRequest | bytes):
    """What KServe gets when it calls the model."""
    return asyncio.run(model(payload, headers={}))[0]


@pytest.mark.parametrize("kind", PLAIN)
def test_every_plain_jpeg_and_png_is_read_the_same(basic, local, kind):
    """Grey, CMYK, palette, progressive, turned ...: predictions equal to 1e-5."""
    [image] = [WHOLE[kind]]
    assert_equal(predict(basic, v1_body([image]))["predictions"], local.classify([image]))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_all_orientations_are_read_the_same(basic, local, form):
    """EXIF's eight, in one request: predictions equal to 1e-5."""
    turned = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned.append(encoded(SCENE, form, exif=exif))
    assert_equal(predict(basic, v1_body(turned))["predictions"], local.classify(turned))


def v2_request(shape: list, datatype: str, data: list, name: str = "image") -> InferRequest:
    """A V2 request as KServe hands it to a model."""
    return InferRequest("basic", [InferInput(name, shape, datatype, data)])


BAD = {
    "bytes": GOOD,
    "a list": [],
    "no instances": {},
    "instances null": {"instances": None},
    "no instance": {"instances": []},
    "no image": {"instances": [{"photo": 7}]},
    "b64 a number": {"instances": [{"image": {"b64": 7}}]},
    "not base64": {"instances": [{"image": {"b64": "no base64!"}}]},
    "V2: no inputs": InferRequest("basic", []),
    "V2: another name": v2_request([1], "BYTES", [GOOD], "photo"),
    "V2: shape empty": v2_request([], "FP32", [0.5]),
    "V2: shape zero": v2_request([0], "BYTES", []),
    "V2: shape zero of FP32": v2_request([0, 3, 224, 224], "FP32", []),
    "V2: shape too large": v2_request([2], "BYTES", [GOOD]),
    "V2: two dimensions": v2_request([1, 1], "BYTES", [GOOD]),
    "V2: not base64": v2_request([1], "BYTES", ["no base64!"]),
    "V2: FP32 of another size": v2_request([1, 3, 2, 2], "FP32", [0.5] * 12),
    "V2: INT64": v2_request([1], "INT64", [7]),
    "V2: unknown datatype": v2_request([1], "FP13", [7]),
} | {f"{kind} as image": v1_body([data]) for kind, data in BROKEN.items() if kind != "very thin"}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence(basic, kind, monkeypatch):
    """InvalidInput, which KServe answers with 400 or INVALID_ARGUMENT."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**30 // 12)  # Pillow's own, which ours lifts
    with pytest.raises(InvalidInput) as refusal:
        predict(basic, BAD[kind])
    assert_plain(str(refusal.value))


def test_a_very_thin_image_does_not_become_huge(basic):
    """Scaled to a short side of 256, one row of 100,000 pixels would take 20 GB."""
    row = torch.zeros(3, 1, 2_000, dtype=torch.uint8)
    _, resize, *_ = basic.transform.transforms
    assert max(resize(row).shape) <= 50_000


@pytest.fixture(scope="module", params=["kserve_server", long("ray_server")])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """Each of the two programs as a server."""
    module = f"model.basics.{request.param}"
    with (
        tempfile.TemporaryDirectory(prefix="basics-", dir="/tmp") as folder,  # short, for sockets
        ServerProcess(module, RAY_TMPDIR=folder) as server,
    ):
        yield server


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_model_s_predictions(server, way, local, images):
    """All instances, in order, equal to 1e-5; but for two that KServe itself does not get through.

    It cannot read raw BYTES behind the JSON of V2 when they are no text, and its RayModel cannot
    pickle requests that came over gRPC.
    """
    sent = [*images[:2], WHOLE["PNG"], WHOLE["turned JPEG"]]
    if way is v2_binary:
        with pytest.raises(requests.HTTPError) as failure:
            way(server, sent)
        assert failure.value.response.status_code == 500
        assert "Failed to encode" in failure.value.response.text
    elif server.module.endswith("ray_server") and "grpc" in way.__name__:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            way(server, sent)
        assert failure.value.code() is grpc.StatusCode.INTERNAL
    else:
        assert_equal(way(server, sent), local.classify(sent))
        assert_equal(way(server, sent[::-1]), local.classify(sent[::-1]))


def test_the_id_of_a_v2_request_comes_back(server):
    """Or a fresh one, where the request has none."""
    body = {"inputs": [{"name": "image", "shape": [1], "datatype": "FP32"}]}
    body["inputs"][0] |= {"shape": [1, 3, 224, 224], "data": prepared([GOOD]).ravel().tolist()}
    assert v2_post(server, body | {"id": "of mine"}).json()["id"] == "of mine"
    first, second = (v2_post(server, body).json()["id"] for _ in range(2))
    assert first and second and first != second


def test_bad_input_is_400(server):
    """Over REST, from either program; in front of Ray the body is a traceback of the replica."""
    response = requests.post(server.predict, json={"instances": []}, timeout=60)
    assert response.status_code == 400
    assert "the request has no instances" in response.json()["error"]
    assert client.v1(server, [GOOD])[0][0]["label"] == "red star"
