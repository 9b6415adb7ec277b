"""Images for the tests, among them broken ones."""

import numpy as np

from model.alexnet import shapes
from tests.malformed_images import encoded, png

# Four flat quarters of different colours and no symmetry: any turn or mix-up shows.
SCENE = np.zeros((300, 400, 3), np.uint8)
SCENE[:130, :180], SCENE[:130, 180:] = (250, 20, 10), (30, 200, 40)
SCENE[130:, :180], SCENE[130:, 180:] = (20, 40, 220), (240, 230, 60)


def framed(image: bytes) -> bytes:
    """An image with its length before it, as BYTES are sent raw."""
    return len(image).to_bytes(4, "little") + image


GOOD = shapes.jpeg("red star", 7)
BROKEN = {
    "empty": b"",
    "text": b"this is not an image",
    "truncated JPEG": GOOD[: len(GOOD) // 2],
    "truncated PNG": encoded(SCENE, "PNG")[:-60],
    "very thin": encoded(np.zeros((1, 100_000), np.uint8), "PNG"),
    "a bomb": png(30_000, 30_000, 1, 0, bytes(30_000 * 3_751)),
    "32-bit TIFF": encoded(np.ones((300, 300), np.float32), "TIFF"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}
