"""What this package uses of torchvision, imported without torch's compiler.

torchvision imports `torch._dynamo` to ask it one question: whether the compiler supports a device.
That import takes two seconds of CPU, a third of what a new replica computes until it is ready, and
nothing here is compiled. So the question is answered with no while torchvision is imported. If
torchvision stops asking, or asks elsewhere, this changes nothing but the time.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

COMPILER = "torch._dynamo.utils"


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Have a stand-in for the compiler imported, unless the compiler itself is there already."""
    if COMPILER in sys.modules:
        yield
        return
    sys.modules[COMPILER] = SimpleNamespace(is_compile_supported=lambda device: False)
    try:
        yield
    finally:
        del sys.modules[COMPILER]


with without_compiler():
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import AlexNet, AlexNet_Weights, alexnet

__all__ = ["AlexNet", "AlexNet_Weights", "ImageReadMode", "alexnet", "decode_image"]
