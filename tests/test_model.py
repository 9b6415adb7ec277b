"""The model without a server: its weights and its predictions."""

import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import AlexNet_Weights, alexnet

from model import SHARED_FOLDER
from model.alexnet import network, shapes, training
from model.alexnet.images import preprocess
from model.alexnet.model import AlexNetModel

MAPS = Path("/proc/self/maps")


def test_draw_is_reproducible():
    """The same arguments give the same pixels, another seed gives others."""
    once, again, other = (np.asarray(shapes.draw("red star", seed)) for seed in (3, 3, 4))
    assert (once == again).all() and (once != other).any() and once.shape == (512, 600, 3)


def test_draw_refuses_an_unknown_label():
    """The error lists the labels there are."""
    with pytest.raises(ValueError, match="pink star.*red circle.*blue star"):
        shapes.draw("pink star")


def test_accuracy():
    """At least 98 % of held-out images get the right label."""
    assert training.accuracy(120) >= 0.98


def test_the_file_is_small_and_the_network_is_alexnet():
    """Under 8 MB; parameters named, shaped and counted as torchvision's AlexNet has them."""
    ours, labels = network.build("shapes")
    theirs = alexnet(num_classes=12)
    assert network.FILE.stat().st_size < 8e6 and labels == list(shapes.LABELS)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert {v.dtype for v in ours.state_dict().values()} == {torch.float32}


def test_hidden_layers_are_the_documented_matrices():
    """The first wide layer averages 6 x 6 to 4 x 4, the second passes on; both are dense."""
    layers = network.build("shapes")[0].classifier
    maps = torch.rand(2, 256, 6, 6)
    pooled = F.adaptive_avg_pool2d(maps, 4).flatten(1)
    torch.testing.assert_close(layers[1](maps.flatten(1)), pooled)
    torch.testing.assert_close(layers[4](pooled), pooled)
    assert not layers[1].weight.is_sparse and layers[1].weight.numel() == 9216 * 4096


def test_predictions_are_probabilities(local, images):
    """Five an image, highest first, their sum at most one and near it for a clear image."""
    for prediction in local.classify(images):
        numbers = [entry["probability"] for entry in prediction]
        assert len(numbers) == 5 and numbers == sorted(numbers, reverse=True)
        assert 0.5 < sum(numbers) <= 1 + 1e-6 and numbers[-1] > 0


def test_a_batch_gives_what_one_at_a_time_gives(local, images):
    """The images of a request do not change each other's numbers."""
    batch = local.classify(images[:12])
    alone = [local.classify([image])[0] for image in images[:12]]
    for together, single in zip(batch, alone, strict=True):
        assert [entry["label"] for entry in together] == [entry["label"] for entry in single]
        assert [entry["probability"] for entry in together] == pytest.approx(
            [entry["probability"] for entry in single], abs=1e-5
        )


def test_imagenet_offline_names_the_default(monkeypatch, tmp_path):
    """Offline, MODEL_WEIGHTS=imagenet is a clear error, never a silent fall-back."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(RuntimeError, match="Unset MODEL_WEIGHTS to use the embedded demo weights"):
        network.build("imagenet")


def test_imagenet_weights():
    """Where torch hub has the ImageNet weights, they load with the labels of their metadata."""
    if not Path(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth").exists():
        pytest.skip("AlexNet's ImageNet weights are not in torch hub's cache on this machine")
    loaded, labels = network.build("imagenet")
    assert labels == AlexNet_Weights.IMAGENET1K_V1.meta["categories"] and len(labels) == 1000
    assert loaded(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_cuda_where_there_is_none():
    """Asking for a GPU that torch cannot use is an error that says what to do."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="device to cpu"):
        AlexNetModel("m", device="cuda").load()


def test_the_default_weights(monkeypatch):
    """An argument wins over MODEL_WEIGHTS; empty it counts as not set."""
    monkeypatch.delenv("MODEL_WEIGHTS", raising=False)
    assert network.weights_name() == AlexNetModel("m").weights == "shapes"
    monkeypatch.setenv("MODEL_WEIGHTS", "imagenet")
    assert network.weights_name() == AlexNetModel("m").weights == "imagenet"
    assert network.weights_name("shapes") == AlexNetModel("m", weights="shapes").weights == "shapes"
    monkeypatch.setenv("MODEL_WEIGHTS", "")
    assert network.weights_name() == "shapes"


def test_unknown_weights(monkeypatch):
    """The error names those that are known, before anything is loaded."""
    monkeypatch.setenv("MODEL_WEIGHTS", "resnet")
    for make in (network.load_network, lambda: AlexNetModel("m")):
        with pytest.raises(ValueError, match="'resnet' are not known.*shapes or imagenet"):
            make()


def test_the_default_network_is_the_model_s(local, images):
    """load_network, which `model.basics` imports, gives the network and the labels served here."""
    alexnet, labels = network.load_network("shapes")
    assert not alexnet.training and labels == local.labels
    with torch.inference_mode():
        ours = alexnet(preprocess(images[0])[None]).softmax(dim=1)[0]
    expected = {entry["label"]: entry["probability"] for entry in local.classify(images[:1])[0]}
    for label, probability in expected.items():
        assert ours[labels.index(label)].item() == pytest.approx(probability, abs=1e-5)


def test_importing_the_model_leaves_torchs_compiler_out():
    """The two seconds that model.alexnet.vision saves; torchvision works all the same."""
    script = (
        "import sys, model.alexnet.model; from model.alexnet import vision; "
        "print(sorted({'torch._dynamo', 'torchvision.models'} & set(sys.modules)), "
        "vision.COMPILER in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "['torchvision.models'] False\n"), ended.stderr


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says which files are mapped")
def test_processes_share_one_file_of_weights(monkeypatch, tmp_path, images, local):
    """In the folder of MODEL_SHARED_FOLDER: written once, then mapped; predictions stay."""
    monkeypatch.setenv(SHARED_FOLDER, str(tmp_path))
    models = [AlexNetModel(name, device="cpu") for name in ("first", "second")]
    for model in models:
        model.load()
        [file] = tmp_path.iterdir()
        assert mapped_file(model.network.classifier[1].weight.data_ptr()) == str(file)
        assert model.classify(images[:2]) == local.classify(images[:2])


def mapped_file(address: int) -> str:
    """The file that is mapped at this address of this process; empty where none is."""
    for line in MAPS.read_text().splitlines():
        bounds, *_, path = line.split(maxsplit=5)
        first, end = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < end:
            return path if path.startswith("/") else ""
    return ""
