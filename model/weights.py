"""The weights AlexNet runs with: the embedded demo weights, or torchvision's for ImageNet.

`MODEL_WEIGHTS=shapes` (the default) is a file in this package and needs no network; this module
also trains it: `python -m model.weights` draws, trains and writes it again.
`MODEL_WEIGHTS=imagenet` downloads torchvision's weights (233 MB) once.
"""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import SHARED, CannotStart, shapes
from model.vision import AlexNet, AlexNet_Weights, alexnet

FILE = Path(__file__).with_name("shapes.safetensors")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; used for both weights


def build(name: str) -> tuple[AlexNet, list[str]]:
    """AlexNet with the weights `name`, `shapes` or `imagenet`, and its labels.

    The network is float32, on the CPU, ready to predict.
    Raises CannotStart when `imagenet` is not on this machine and cannot be downloaded.
    """
    if name == "imagenet":
        try:
            state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(
                progress=False, check_hash=True, weights_only=True
            )
        except OSError as error:
            raise CannotStart(
                f"AlexNet's ImageNet weights could not be downloaded ({error}). "
                "Unset MODEL_WEIGHTS to use the embedded demo weights, which need no network."
            ) from error
        labels = list(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        state = {key: value.float() for key, value in load_file(FILE).items()}
        state.update(_fixed_layers())
        labels = list(shapes.LABELS)
    with torch.device("meta"):  # no time spent on random numbers that are replaced at once
        network = alexnet(num_classes=len(labels))
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False), labels


def share(network: AlexNet, name: str) -> None:
    """Have the network use one copy of its weights with all processes that have it as `name`.

    The first to come writes them to a file in the folder that the environment names, as they are;
    all map that file into memory, which the system then holds once. Where no folder is named,
    nothing is done.
    """
    if SHARED not in os.environ:
        return
    version = FILE.stat().st_mtime_ns  # so that weights trained anew are another file
    file = Path(os.environ[SHARED]) / f"{name}-{version}.pt"
    if not file.exists():
        mine = file.with_suffix(f".{os.getpid()}")
        torch.save(network.state_dict(), mine)
        with contextlib.suppress(FileExistsError):
            os.link(mine, file)  # whole, or not at all; another may have been faster
        mine.unlink()
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


class _Trained(nn.Module):
    """The part of AlexNet that is trained, with pooling in place of the fixed hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        network = alexnet(num_classes=len(shapes.LABELS))
        self.features, self.last = network.features, network.classifier[6]
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # without this a plain AlexNet is slow to start
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [N, 12] of preprocessed pictures [N, 3, 224, 224]."""
        return self.last(F.adaptive_avg_pool2d(self.features(pictures), 4).flatten(1))

    def state(self) -> dict[str, Tensor]:
        """What the file holds: half precision, under the names AlexNet uses."""
        parts = {f"features.{key}": value for key, value in self.features.state_dict().items()}
        parts |= {f"classifier.6.{key}": value for key, value in self.last.state_dict().items()}
        return {key: value.detach().half().contiguous() for key, value in parts.items()}


def _batch(seed: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """`size` freshly drawn, normalised pictures [size, 3, 224, 224] and their labels [size]."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, len(shapes.LABELS), size)
    drawn = [
        shapes.draw(shapes.LABELS[a], 1_000_000 + seed * size + i, width=256, height=256)
        for i, a in enumerate(answers)
    ]
    pixels = np.stack([np.asarray(image)[16:240, 16:240] for image in drawn])
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2), torch.from_numpy(answers)


def train(batches: int = 500) -> dict[str, Tensor]:
    """Train on `batches` batches of freshly drawn pictures and return what the file holds."""
    torch.manual_seed(0)
    network = _Trained().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-4, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=batches, pct_start=0.2)
    started, right, seen = time.monotonic(), 0, 0
    with ThreadPoolExecutor(1) as artist:  # draws the next batch while this one is trained on
        ahead = artist.submit(_batch, 0)
        for step in range(batches):
            pictures, answers = ahead.result()
            ahead = artist.submit(_batch, step + 1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(pictures)
            loss = F.cross_entropy(logits.float(), answers, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            right, seen = right + int((logits.argmax(1) == answers).sum()), seen + len(answers)
            if (step + 1) % 25 == 0:
                minutes = (time.monotonic() - started) / 60
                print(
                    f"batch {step + 1}/{batches}: loss {loss.item():.3f}, "
                    f"{right / seen:.3f} right, {minutes:.1f} minutes",
                    flush=True,
                )
                right, seen = 0, 0
    return network.state()


def main() -> None:
    """Draw, train and write the file, then say how many held-out pictures it gets right."""
    save_file(train(), FILE)
    print(f"wrote {FILE.name}, {FILE.stat().st_size / 1e6:.1f} MB")
    print(f"{accuracy():.4f} of the held-out pictures are right")


def accuracy(pictures: int = 600) -> float:
    """The share of `pictures` held-out pictures, as JPEG and preprocessed as served, put right."""
    from model.alexnet import AlexNetModel  # which imports this module

    model = AlexNetModel("shapes", weights="shapes")
    model.load()
    right = 0
    for i in range(pictures):
        label = shapes.LABELS[i % len(shapes.LABELS)]
        right += model.classify([shapes.jpeg(label, i)])[0][0]["label"] == label
    return right / pictures


if __name__ == "__main__":
    main()
