"""Turns encoded pictures into what AlexNet takes, and refuses what is no picture or too large."""

import io

import numpy as np
import torch
from kserve.errors import InvalidInput
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from model.vision import ImageReadMode, decode_image
from model.weights import MEAN, STD

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # of one picture, unless the server is told otherwise
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is checked before anything is decoded

# Normalised is (x / 255 - MEAN) / STD: for the rows of a picture, colour by colour, one product
# and one sum.
_SCALE = (1 / (255 * torch.tensor(STD))).repeat(224)
_SHIFT = (-torch.tensor(MEAN) / torch.tensor(STD)).repeat(224)


def pixels(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one picture, turn it upright and preprocess it: float32 [3, 224, 224].

    The preprocessing is torchvision's for AlexNet: short side to 256, the middle 224 x 224,
    normalised. In memory a point's colours lie together (channels last). Raises InvalidInput for
    what is no picture, is cut off, or is too large: has more than `max_pixels` as encoded, or
    would have when its short side is scaled to 256.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:  # reads only the header
            _check_size(*image.size, max_pixels)
            # MPO is a JPEG with more pictures behind it. torchvision reads JPEG several times as
            # fast as Pillow; its PNG decoder ends the process (SIGSEGV) when a file lacks data.
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                decoded = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
            else:
                decoded = _decode_with_pillow(image)
    except (InvalidInput, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise InvalidInput(
            f"the data is not a picture: send one of {', '.join(FORMATS)}, whole"
        ) from None
    except Exception:  # decoders raise nearly anything when a file is broken
        raise InvalidInput("the picture is broken or cut off") from None
    rows = _middle(decoded).permute(1, 2, 0).reshape(224, 224 * 3)
    return torch.addcmul(_SHIFT, rows, _SCALE).reshape(224, 224, 3).permute(2, 0, 1)


def _middle(picture: Tensor) -> Tensor:
    """The short side scaled to 256, the middle cut out: uint8 [3, H, W] to [3, 224, 224].

    torchvision's `resize` and `center_crop` call the same and come to the same bytes; importing
    them takes a replica a second.
    """
    short, long = sorted(picture.shape[1:])
    size = [256 if side == short else 256 * long // short for side in picture.shape[1:]]
    scaled = interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    top, left = (round((side - 224) / 2) for side in size)
    return scaled[:, top : top + 224, left : left + 224]


def _check_size(width: int, height: int, max_pixels: int) -> None:
    short, long = sorted((width, height))
    if short < 1 or max(short * long, 256 * 256 * long // short) > max_pixels:
        raise InvalidInput(
            f"the picture is too large: at most {max_pixels:,} pixels, "
            "also when its short side is scaled to 256"
        )


def _decode_with_pillow(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of what torchvision's decoder cannot read.

    CMYK is converted, 16 bits become 8, of an animation the first frame is taken, and what is
    transparent shows white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8), "L")
    elif image.mode in ("I", "F"):
        raise InvalidInput("pictures of 32 bits a channel are not supported: send 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
