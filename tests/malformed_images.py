"""Images as few clients send them, small: rare but whole ones, and ones made to do harm."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from model.alexnet import shapes


def encoded(image: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """The image as Pillow writes it in a format."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file; colour: 0 grey, 2 RGB; rows: each a zero byte, then the row's numbers."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def png16(image: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel that holds the same colours as the 8-bit `image`."""
    wide = (image.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    return png(image.shape[1], image.shape[0], 16, 2 if image.ndim == 3 else 0, rows)


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


_STAR = shapes.draw("red star", 7, width=56, height=48)
_CIRCLE = shapes.draw("blue circle", 3, width=40, height=60)
_ALPHA = _STAR.copy()
_ALPHA.putalpha(Image.linear_gradient("L").resize(_STAR.size))
_FRAMES = {"save_all": True, "append_images": [_CIRCLE.resize(_STAR.size)], "duration": 99}

WHOLE = {
    "JPEG": encoded(_STAR, "JPEG"),
    "progressive JPEG": encoded(_CIRCLE, "JPEG", progressive=True),
    "grey JPEG": encoded(_STAR.convert("L"), "JPEG"),
    "CMYK JPEG": encoded(_STAR.convert("CMYK"), "JPEG"),
    "turned JPEG": encoded(_CIRCLE, "JPEG", exif=_turned(6)),
    "mirrored PNG": encoded(_CIRCLE, "PNG", exif=_turned(5)),
    "MPO, a JPEG of two": encoded(_STAR, "MPO", **_FRAMES),
    "PNG": encoded(_CIRCLE, "PNG"),
    "palette PNG": encoded(_STAR.quantize(16), "PNG"),
    "black and white PNG": encoded(_STAR.convert("1"), "PNG"),
    "PNG with alpha": encoded(_ALPHA, "PNG"),
    "PNG of grey and alpha": encoded(_ALPHA.convert("LA"), "PNG"),
    "PNG of 16 bits": png16(np.asarray(_STAR)),
    "grey PNG of 16 bits": png16(np.asarray(_CIRCLE.convert("L"))),
    "animated PNG": encoded(_STAR, "PNG", **_FRAMES),
    "GIF": encoded(_CIRCLE.quantize(16), "GIF"),
    "animated GIF": encoded(_STAR.quantize(16), "GIF", **_FRAMES),
    "WebP": encoded(_CIRCLE, "WEBP"),
    "WebP with alpha": encoded(_ALPHA, "WEBP", lossless=True),
    "animated WebP": encoded(_STAR, "WEBP", **_FRAMES),
    "BMP": encoded(_CIRCLE, "BMP"),
    "palette BMP": encoded(_STAR.quantize(16), "BMP"),
    "TIFF": encoded(_STAR, "TIFF"),
    "compressed TIFF": encoded(_CIRCLE, "TIFF", compression="tiff_lzw"),
    "CMYK TIFF": encoded(_STAR.convert("CMYK"), "TIFF"),
    "one pixel": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
    "one row": encoded(Image.new("RGB", (90, 1), "blue"), "PNG"),
}

HARMFUL = {
    "empty": b"",
    "text": b"this is not an image",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "zip": b"PK\x05\x06" + bytes(18),
    "only a JPEG's first bytes": b"\xff\xd8\xff\xe0",
    "only a PNG's first bytes": b"\x89PNG\r\n\x1a\n",
    "a bomb": png(30_000, 30_000, 1, 0, bytes(30_000 * 3_751)),
    "a row of 100,000": encoded(np.zeros((1, 100_000), np.uint8), "PNG"),
    "a column of 100,000": encoded(np.zeros((100_000, 1), np.uint8), "PNG"),
    "a PNG that claims 2**31 - 1": png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"),
    "a PNG of nothing": png(0, 0, 8, 2, b""),
    "a PNG that claims 49 million": png(7_000, 7_000, 8, 2, b"\0"),
    "a GIF that claims 65535": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b"\x2c",
    "a BMP that claims much": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, -1,
                                                  1, 24, 0, 0, 0, 0, 0, 0),
    "a BMP of a negative width": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, -5, 5,
                                                     1, 24, 0, 0, 0, 0, 0, 0),
    "a TIFF that points to itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "a TIFF of 32 bits": encoded(np.ones((30, 30), np.float32), "TIFF"),
}  # fmt: skip
