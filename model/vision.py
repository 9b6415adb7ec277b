"""What we use of torchvision, without torch's compiler, which it imports to ask it one question.

The question is whether the compiler supports a device. It is answered here, no, before it is asked:
the compiler takes two seconds to import, a third of what a new replica computes until it is ready.
"""

import sys
from types import SimpleNamespace

COMPILER = "torch._dynamo.utils"

_imported = COMPILER in sys.modules
if not _imported:
    sys.modules[COMPILER] = SimpleNamespace(is_compile_supported=lambda device: False)

from torchvision.io import ImageReadMode, decode_image  # noqa: E402
from torchvision.models import AlexNet, AlexNet_Weights, alexnet  # noqa: E402

if not _imported:
    del sys.modules[COMPILER]

__all__ = ["AlexNet", "AlexNet_Weights", "ImageReadMode", "alexnet", "decode_image"]
