"""The model without a server: its weights and its answers."""

import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import AlexNet_Weights, alexnet

from model import shapes, weights
from model.alexnet import AlexNetModel


def test_draw_is_reproducible():
    """The same arguments give the same pixels, another seed gives others."""
    once, again, other = (np.asarray(shapes.draw("red star", seed)) for seed in (3, 3, 4))
    assert (once == again).all() and (once != other).any() and once.shape == (512, 600, 3)


def test_draw_refuses_an_unknown_label():
    """The error lists the labels there are."""
    with pytest.raises(ValueError, match="pink star.*red circle.*blue star"):
        shapes.draw("pink star")


def test_accuracy():
    """At least 98 % of held-out pictures get the right label."""
    assert weights.accuracy(120) >= 0.98


def test_the_file_is_small_and_the_network_is_alexnet():
    """Under 8 MB; parameters named, shaped and counted as torchvision's AlexNet has them."""
    ours, labels = weights.build("shapes")
    theirs = alexnet(num_classes=12)
    assert weights.FILE.stat().st_size < 8e6 and labels == list(shapes.LABELS)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert {v.dtype for v in ours.state_dict().values()} == {torch.float32}


def test_hidden_layers_are_the_documented_matrices():
    """The first wide layer averages 6 x 6 to 4 x 4, the second passes on; both are dense."""
    layers = weights.build("shapes")[0].classifier
    maps = torch.rand(2, 256, 6, 6)
    pooled = F.adaptive_avg_pool2d(maps, 4).flatten(1)
    torch.testing.assert_close(layers[1](maps.flatten(1)), pooled)
    torch.testing.assert_close(layers[4](pooled), pooled)
    assert not layers[1].weight.is_sparse and layers[1].weight.numel() == 9216 * 4096


def test_answers_are_probabilities(local, pictures):
    """Five a picture, highest first, their sum at most one and near it for a clear picture."""
    for answer in local.classify(pictures):
        numbers = [entry["probability"] for entry in answer]
        assert len(numbers) == 5 and numbers == sorted(numbers, reverse=True)
        assert 0.5 < sum(numbers) <= 1 + 1e-6 and numbers[-1] > 0


def test_a_batch_answers_as_one_at_a_time(local, pictures):
    """The pictures of a request do not change each other's numbers."""
    batch = local.classify(pictures[:12])
    alone = [local.classify([picture])[0] for picture in pictures[:12]]
    for together, single in zip(batch, alone, strict=True):
        assert [entry["label"] for entry in together] == [entry["label"] for entry in single]
        assert [entry["probability"] for entry in together] == pytest.approx(
            [entry["probability"] for entry in single], abs=1e-5
        )


def test_imagenet_offline_names_the_default(monkeypatch, tmp_path):
    """Without network MODEL_WEIGHTS=imagenet is a clear error, never a silent fall-back."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(RuntimeError, match="Unset MODEL_WEIGHTS to use the embedded demo weights"):
        weights.build("imagenet")


def test_imagenet_weights():
    """Where torch hub has the ImageNet weights, they load with the labels of their metadata."""
    if not Path(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth").exists():
        pytest.skip("AlexNet's ImageNet weights are not in torch hub's cache on this machine")
    network, labels = weights.build("imagenet")
    assert labels == AlexNet_Weights.IMAGENET1K_V1.meta["categories"] and len(labels) == 1000
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_cuda_where_there_is_none():
    """Asking for a GPU that torch cannot use is an error that says what to do."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="--device cpu"):
        AlexNetModel("m", device="cuda").load()
