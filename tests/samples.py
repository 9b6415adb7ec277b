"""Pictures for the tests, among them broken ones, and a PNG writer for what Pillow cannot write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from model import shapes

# Four flat quarters of different colours and no symmetry: any turn or mix-up shows.
SCENE = np.zeros((300, 400, 3), np.uint8)
SCENE[:130, :180], SCENE[:130, 180:] = (250, 20, 10), (30, 200, 40)
SCENE[130:, :180], SCENE[130:, 180:] = (20, 40, 220), (240, 230, 60)


def encoded(picture: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """The picture as Pillow writes it in a format."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def framed(picture: bytes) -> bytes:
    """A picture with its length before it, as BYTES are sent raw."""
    return len(picture).to_bytes(4, "little") + picture


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file; colour: 0 grey, 2 RGB; rows: each a zero byte, then the row's numbers."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def png16(picture: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel that holds the same colours as the 8-bit `picture`."""
    wide = (picture.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    return png(picture.shape[1], picture.shape[0], 16, 2 if picture.ndim == 3 else 0, rows)


GOOD = shapes.jpeg("red star", 7)
BROKEN = {
    "empty": b"",
    "text": b"this is not a picture",
    "truncated JPEG": GOOD[: len(GOOD) // 2],
    "truncated PNG": encoded(SCENE, "PNG")[:-60],
    "very thin": encoded(np.zeros((1, 100_000), np.uint8), "PNG"),
    "a bomb": png(30_000, 30_000, 1, 0, bytes(30_000 * 3_751)),
    "32-bit TIFF": encoded(np.ones((300, 300), np.float32), "TIFF"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}
