"""Turns an encoded image into AlexNet's input; refuses what is no image, or too large a one."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from model.alexnet.vision import ImageReadMode, decode_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; used for both weights
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # of one image, unless the model is told otherwise
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is checked before anything is decoded

# To normalise is (x / 255 - MEAN) / STD. For the rows of an image, their colours interleaved, that
# is one product and one sum.
_SCALE = (1 / (255 * torch.tensor(STD))).repeat(224)
_SHIFT = (-torch.tensor(MEAN) / torch.tensor(STD)).repeat(224)


class ImageError(ValueError):
    """The data are no image that can be read; the message says what to send."""


def preprocess(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image, turn it upright and prepare it for AlexNet: float32 [3, 224, 224].

    This is torchvision's preprocessing for AlexNet: short side to 256, the middle 224 x 224,
    normalised. In memory it is channels last. Raises ImageError for data that are no image, are
    cut off, or are too large: more than `max_pixels` pixels as encoded, or once the short side is
    scaled to 256.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:  # reads only the header
            _check_size(*image.size, max_pixels)
            # MPO is a JPEG with more images behind it. torchvision reads JPEG faster than Pillow;
            # its PNG decoder ends the process (SIGSEGV) when a file lacks data.
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                decoded = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
            else:
                decoded = _decode_with_pillow(image)
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"the data is not an image: send one of {', '.join(FORMATS)}, whole"
        ) from None
    except Exception:  # decoders raise nearly anything when a file is broken
        raise ImageError("the image is broken or cut off") from None
    rows = _resize_and_crop(decoded).permute(1, 2, 0).reshape(224, 224 * 3)
    return torch.addcmul(_SHIFT, rows, _SCALE).reshape(224, 224, 3).permute(2, 0, 1)


def _resize_and_crop(image: Tensor) -> Tensor:
    """Scale the short side to 256 and cut out the middle: uint8 [3, H, W] to [3, 224, 224].

    torchvision's `resize` and `center_crop` call the same and return the same bytes; importing
    them would take each replica a second.
    """
    short, long = sorted(image.shape[1:])
    size = [256 if side == short else 256 * long // short for side in image.shape[1:]]
    scaled = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    top, left = (round((side - 224) / 2) for side in size)
    return scaled[:, top : top + 224, left : left + 224]


def _check_size(width: int, height: int, max_pixels: int) -> None:
    short, long = sorted((width, height))
    if short < 1 or max(short * long, 256 * 256 * long // short) > max_pixels:
        raise ImageError(
            f"the image is too large: at most {max_pixels:,} pixels, "
            "also when its short side is scaled to 256"
        )


def _decode_with_pillow(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an image that torchvision's decoder cannot read.

    CMYK is converted, 16 bits become 8, of an animation the first frame is taken, and transparent
    parts show white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8), "L")
    elif image.mode in ("I", "F"):
        raise ImageError("images of 32 bits a channel are not supported: send 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
