"""torchvision's AlexNet with its weights: the embedded demo weights, or torchvision's ImageNet.

`MODEL_WEIGHTS=shapes` (the default) is a file in this package and needs no internet; see
`model.alexnet.training`. `MODEL_WEIGHTS=imagenet` downloads torchvision's weights (233 MB) once.
"""

import contextlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from model import SHARED_FOLDER
from model.alexnet.shapes import LABELS
from model.alexnet.vision import AlexNet, AlexNet_Weights, alexnet

WEIGHTS = ("shapes", "imagenet")  # the first is the default
FILE = Path(__file__).with_name("shapes.safetensors")


def weights_name(weights: str | None = None) -> str:
    """The name of the weights to use: `weights`, else MODEL_WEIGHTS, else `shapes`.

    Raises ValueError when there are no weights of that name.
    """
    name = weights or os.environ.get("MODEL_WEIGHTS") or WEIGHTS[0]
    if name not in WEIGHTS:
        raise ValueError(
            f"the weights {name!r} are not known: set MODEL_WEIGHTS to {' or '.join(WEIGHTS)}"
        )
    return name


def load_network(weights: str | None = None) -> tuple[AlexNet, list[str]]:
    """AlexNet, ready to predict, and the labels of its outputs.

    weights: `shapes` or `imagenet`; None: what MODEL_WEIGHTS says, else `shapes`.
    Raises ValueError for other weights, RuntimeError when they cannot be downloaded.
    """
    return build(weights_name(weights))


def build(name: str) -> tuple[AlexNet, list[str]]:
    """AlexNet with the weights `name`, `shapes` or `imagenet`, and its labels.

    The network is float32, on the CPU, in eval mode, and maps [N, 3, 224, 224] to [N, labels].
    Raises RuntimeError when `imagenet` is not on this machine and cannot be downloaded.
    """
    if name == "imagenet":
        try:
            state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(
                progress=False, check_hash=True, weights_only=True
            )
        except OSError as error:
            raise RuntimeError(
                f"AlexNet's ImageNet weights could not be downloaded ({error}). "
                "Unset MODEL_WEIGHTS to use the embedded demo weights, which need no network."
            ) from error
        labels = list(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        state = {key: value.float() for key, value in load_file(FILE).items()}
        state.update(_fixed_layers())
        labels = list(LABELS)
    with torch.device("meta"):  # no time spent on random numbers that are replaced at once
        network = alexnet(num_classes=len(labels))
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False), labels


def share(network: AlexNet, name: str) -> None:
    """Keep one copy of the weights in memory for all processes that call this with `name`.

    The first process writes its weights to a file in the folder that the environment variable
    MODEL_SHARED_FOLDER names; all map that file into memory, which the system then holds once.
    Without that variable nothing is done.
    """
    if SHARED_FOLDER not in os.environ:
        return
    version = FILE.stat().st_mtime_ns  # so that weights trained anew are another file
    file = Path(os.environ[SHARED_FOLDER]) / f"{name}-{version}.pt"
    if not file.exists():
        own = file.with_suffix(f".{os.getpid()}")
        torch.save(network.state_dict(), own)
        with contextlib.suppress(FileExistsError):
            os.link(own, file)  # atomic; another process may have been faster
        own.unlink()
    state = torch.load(file, mmap=True, weights_only=True)
    network.load_state_dict(state, assign=True)
    network.requires_grad_(False)


def _fixed_layers() -> dict[str, Tensor]:
    """The two wide hidden layers of the demo weights, which are not trained and not stored.

    The first averages each channel's 6 x 6 map to 4 x 4 (256 channels: 9216 -> 4096), the second
    passes everything on. As dense matrices they cost what AlexNet's always cost.
    """
    units = torch.eye(36).reshape(36, 1, 6, 6)
    pool = F.adaptive_avg_pool2d(units, 4).reshape(36, 16).T  # [16, 36]
    return {
        "classifier.1.weight": torch.block_diag(*[pool] * 256),
        "classifier.1.bias": torch.zeros(4096),
        "classifier.4.weight": torch.eye(4096),
        "classifier.4.bias": torch.zeros(4096),
    }
