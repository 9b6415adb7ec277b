"""Draws the images that the demo weights know: one coloured shape on a noisy background.

The repository draws its own images, so that everything runs offline and a person can check every
prediction by looking.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (205, 45, 45), "green": (45, 150, 60), "blue": (50, 80, 200)}
SHAPES = ("circle", "square", "triangle", "star")
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def _corners(shape: str, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of `shape` around (0, 0), turned by `turn` radians; a circle has 48."""
    points, inner = {"circle": (48, 1), "square": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}[
        shape
    ]
    radii = [radius if i % 2 == 0 else radius * inner for i in range(points)]
    angles = [turn + 2 * math.pi * i / points for i in range(points)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def draw(label: str, seed: int = 0, width: int = 600, height: int = 512) -> Image.Image:
    """Draw one image of `label` (one of `LABELS`); the same arguments give the same pixels.

    Position, size, rotation, tint and background change with `seed`. The shape lies inside the
    square that the model's centre crop keeps. Returns an RGB image of `width` x `height` pixels;
    raises ValueError for another label.
    """
    if label not in LABELS:
        raise ValueError(f"{label!r} is not one of the labels: {', '.join(LABELS)}")
    colour, shape = label.split(" ")
    rng = np.random.default_rng([seed, LABELS.index(label), width, height])

    # The background: greyish blotches; below, some noise on every pixel.
    blotches = rng.integers(70, 220, (4, 4, 1)) + rng.integers(-25, 26, (4, 4, 3))
    background = Image.fromarray(blotches.clip(0, 255).astype(np.uint8), "RGB")
    image = background.resize((width, height), Image.Resampling.BICUBIC)

    side = min(width, height)
    radius = side * rng.uniform(0.14, 0.30)
    room = side * 0.42 - radius
    x, y = width / 2 + rng.uniform(-room, room), height / 2 + rng.uniform(-room, room)
    tint = tuple(int(c + rng.integers(-30, 31)) for c in COLOURS[colour])
    corners = _corners(shape, radius, rng.uniform(0, 2 * math.pi))
    ImageDraw.Draw(image).polygon([(x + dx, y + dy) for dx, dy in corners], fill=tint)

    noise = rng.integers(-18, 19, (height, width, 3), dtype=np.int16)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8), "RGB")


def jpeg(label: str, seed: int = 0, **size: int) -> bytes:
    """The same image as `draw`, encoded as a JPEG of about 100 kB (600 x 512 pixels)."""
    buffer = io.BytesIO()
    draw(label, seed, **size).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()
