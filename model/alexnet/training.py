"""Trains the demo weights: `python -m model.alexnet.training` draws, trains and writes the file."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model.alexnet import shapes
from model.alexnet.images import MEAN, STD
from model.alexnet.model import AlexNetModel
from model.alexnet.network import FILE
from model.alexnet.vision import alexnet


class TrainedLayers(nn.Module):
    """The layers of AlexNet that are trained, with pooling in place of the fixed hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        network = alexnet(num_classes=len(shapes.LABELS))
        self.features, self.last = network.features, network.classifier[6]
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # without this a plain AlexNet is slow to start
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 12] of preprocessed images [N, 3, 224, 224]."""
        return self.last(F.adaptive_avg_pool2d(self.features(images), 4).flatten(1))

    def state(self) -> dict[str, Tensor]:
        """What the file holds: half precision, under the names AlexNet uses."""
        parts = {f"features.{key}": value for key, value in self.features.state_dict().items()}
        parts |= {f"classifier.6.{key}": value for key, value in self.last.state_dict().items()}
        return {key: value.detach().half().contiguous() for key, value in parts.items()}


def draw_batch(seed: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """`size` freshly drawn, normalised images [size, 3, 224, 224] and their classes [size]."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, len(shapes.LABELS), size)
    drawn = [
        shapes.draw(shapes.LABELS[c], 1_000_000 + seed * size + i, width=256, height=256)
        for i, c in enumerate(classes)
    ]
    pixels = np.stack([np.asarray(image)[16:240, 16:240] for image in drawn])
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2), torch.from_numpy(classes)


def train(batches: int = 500) -> dict[str, Tensor]:
    """Train on `batches` batches of freshly drawn images and return what the file holds."""
    torch.manual_seed(0)
    network = TrainedLayers().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-4, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=batches, pct_start=0.2)
    started, correct, seen = time.monotonic(), 0, 0
    with ThreadPoolExecutor(1) as artist:  # draws the next batch while this one is trained on
        ahead = artist.submit(draw_batch, 0)
        for step in range(batches):
            images, classes = ahead.result()
            ahead = artist.submit(draw_batch, step + 1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), classes, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            correct, seen = correct + int((logits.argmax(1) == classes).sum()), seen + len(classes)
            if (step + 1) % 25 == 0:
                minutes = (time.monotonic() - started) / 60
                print(
                    f"batch {step + 1}/{batches}: loss {loss.item():.3f}, "
                    f"accuracy {correct / seen:.3f}, {minutes:.1f} minutes",
                    flush=True,
                )
                correct, seen = 0, 0
    return network.state()


def accuracy(images: int = 600) -> float:
    """The share of `images` held-out images, as JPEG and preprocessed as served, labelled right."""
    model = AlexNetModel("shapes", weights="shapes")
    model.load()
    correct = 0
    for i in range(images):
        label = shapes.LABELS[i % len(shapes.LABELS)]
        correct += model.classify([shapes.jpeg(label, i)])[0][0]["label"] == label
    return correct / images


def main() -> None:
    """Draw, train and write the file, then print the accuracy on held-out images."""
    save_file(train(), FILE)
    print(f"wrote {FILE.name}, {FILE.stat().st_size / 1e6:.1f} MB")
    print(f"accuracy on held-out images: {accuracy():.4f}")


if __name__ == "__main__":
    main()
