"""How the model reads images: colours, orientation, preprocessing, and what it refuses."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import AlexNet_Weights

from model.alexnet.images import MAX_PIXELS, STD, ImageError, preprocess
from tests.malformed_images import encoded, png16
from tests.samples import BROKEN, GOOD, SCENE

reference = AlexNet_Weights.IMAGENET1K_V1.transforms()


def expected(image: np.ndarray) -> torch.Tensor:
    """What torchvision's own preprocessing makes of an upright RGB image."""
    return reference(torch.from_numpy(image.copy()).permute(2, 0, 1))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, mean: float = 0.01) -> None:
    """On average at most `mean`, and nowhere more than two, of 255 brightness levels apart.

    torchvision's two ways to scale an image round differently: a level here and there.
    """
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.mean() <= mean and levels.max() < 2.1


def test_preprocessing_is_torchvisions():
    """A JPEG is prepared as torchvision's transforms for AlexNet do it, up to rounding."""
    decoded = decode_image(torch.frombuffer(bytearray(GOOD), dtype=torch.uint8), ImageReadMode.RGB)
    assert_close(preprocess(GOOD), reference(decoded), mean=0.25)


GREY = np.repeat(SCENE[..., :1], 3, axis=2)
ALPHA = np.where(np.arange(400) < 250, 255, 100)[None, :, None].repeat(300, 0).astype(np.uint8)
OVER_WHITE = np.rint(SCENE * (ALPHA / 255) + 255 * (1 - ALPHA / 255)).astype(np.uint8)
image = Image.fromarray(SCENE)
animation = {"save_all": True, "append_images": [Image.new("RGB", image.size)], "duration": 99}
FORMS = {  # name: what is sent, and the colours that are seen
    "PNG": (encoded(SCENE, "PNG"), SCENE),
    "BMP": (encoded(SCENE, "BMP"), SCENE),
    "TIFF": (encoded(SCENE, "TIFF"), SCENE),
    "WebP": (encoded(SCENE, "WEBP", lossless=True), SCENE),
    "GIF": (encoded(image.quantize(8), "GIF"), SCENE),
    "palette": (encoded(image.quantize(8), "PNG"), SCENE),
    "animated GIF": (encoded(image.quantize(8), "GIF", **animation), SCENE),
    "animated WebP": (encoded(image, "WEBP", lossless=True, **animation), SCENE),
    "16-bit RGB": (png16(SCENE), SCENE),
    "16-bit grey": (png16(SCENE[..., 0]), GREY),
    "grey PNG": (encoded(SCENE[..., 0], "PNG"), GREY),
    "grey JPEG": (encoded(SCENE[..., 0], "JPEG", quality=100), GREY),
    "MPO, a JPEG of two": (encoded(SCENE[..., 0], "MPO", quality=100, **animation), GREY),
    "CMYK JPEG": (encoded(image.convert("CMYK"), "JPEG", quality=100), SCENE),
    "RGBA": (encoded(np.dstack([SCENE, ALPHA]), "PNG"), OVER_WHITE),
    "grey + alpha": (
        encoded(np.dstack([SCENE[..., :1], ALPHA]), "PNG"),
        OVER_WHITE[..., :1].repeat(3, 2),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_image_shows_its_colours(form):
    """Whatever the encoding, the model gets the colours that a person would see."""
    sent, seen = FORMS[form]
    assert_close(preprocess(sent), expected(seen))


TURNS = {  # EXIF orientation: how the stored rows and columns become the upright image
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(form, orientation):
    """Each of EXIF's eight orientations gives the image as it was seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True}
    sent = encoded(SCENE, form, exif=exif, **options)
    assert_close(
        preprocess(sent), expected(TURNS[orientation](SCENE)), 0.5 if form == "JPEG" else 0.01
    )


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_image_is_refused(kind):
    """ImageError with one line that says why."""
    with pytest.raises(ImageError) as refusal:
        preprocess(BROKEN[kind])
    assert re.fullmatch(r"[^\n]{10,250}", str(refusal.value))
    assert not re.search(r"\.cpp|\.py|operator|/\w+/\w+/", str(refusal.value))
    if kind in ("very thin", "a bomb"):
        assert f"{MAX_PIXELS:,}" in str(refusal.value)


def test_a_png_with_too_few_rows_is_read_as_far_as_it_goes():
    """The rows that are there count; torchvision's decoder would end the process (SIGSEGV)."""
    script = (
        "from tests.malformed_images import png; from model.alexnet.images import preprocess; "
        "white = png(224, 224, 8, 2, (b'\\0' + b'\\xff' * 672) * 112); "
        "seen = preprocess(white); "
        "print((seen[:, 0] > 2).all().item(), (seen[:, -1] < 0).all().item())"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "True True\n")


def test_the_limit_of_pixels_can_be_set():
    """An image of as many pixels is read, also scaled; one more is refused, with the limit."""
    assert SCENE.shape[:2] == (300, 400)
    assert preprocess(encoded(SCENE, "PNG"), max_pixels=300 * 400).shape == (3, 224, 224)
    with pytest.raises(ImageError, match="at most 119,999 pixels"):
        preprocess(encoded(SCENE, "PNG"), max_pixels=300 * 400 - 1)
    thin = encoded(np.zeros((2, 40), np.uint8), "PNG")  # scaled it is 256 x 5120
    with pytest.raises(ImageError, match="at most 1,310,719 pixels"):
        preprocess(thin, max_pixels=256 * 5120 - 1)
