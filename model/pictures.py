"""Turns encoded pictures into what AlexNet takes, and refuses what is no picture or too large."""

import io

import numpy as np
import torch
from kserve.errors import InvalidInput
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from model.weights import MEAN, STD

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # of one picture, as encoded and when its short side is scaled to 256

# Normalised is (x / 255 - MEAN) / STD: for the rows of a picture, colour by colour, one product
# and one sum.
_SCALE = (1 / (255 * torch.tensor(STD))).repeat(224)
_SHIFT = (-torch.tensor(MEAN) / torch.tensor(STD)).repeat(224)


def pixels(encoded: bytes) -> Tensor:
    """Decode one picture, turn it upright and preprocess it: float32 [3, 224, 224].

    The preprocessing is torchvision's for AlexNet: short side to 256, the middle 224 x 224,
    normalised. In memory a point's colours lie together (channels last). Raises InvalidInput for
    what is no picture, is cut off, or is too large.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:  # reads only the header
            _check_size(*image.size)
            # MPO is a JPEG with more pictures behind it; byte 24 of a PNG is its bits a channel.
            plain = image.format in ("JPEG", "MPO") or (image.format == "PNG" and encoded[24] == 8)
            if plain and image.mode in ("RGB", "L") and "transparency" not in image.info:
                data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                decoded = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
            else:
                decoded = _decode_with_pillow(image)
    except (InvalidInput, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise InvalidInput(_TOO_LARGE) from None
    except Image.UnidentifiedImageError:
        raise InvalidInput(
            f"the data is not a picture: send one of {', '.join(FORMATS)}, whole"
        ) from None
    except Exception:  # decoders raise nearly anything when a file is broken
        raise InvalidInput("the picture is broken or cut off") from None
    cropped = F.center_crop(F.resize(decoded, [256], antialias=True), [224, 224])
    rows = cropped.permute(1, 2, 0).reshape(224, 224 * 3)
    return torch.addcmul(_SHIFT, rows, _SCALE).reshape(224, 224, 3).permute(2, 0, 1)


_TOO_LARGE = (
    f"the picture is too large: at most {MAX_PIXELS:,} pixels, "
    "also when its short side is scaled to 256"
)


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < 1 or max(short * long, 256 * 256 * long // short) > MAX_PIXELS:
        raise InvalidInput(_TOO_LARGE)


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
