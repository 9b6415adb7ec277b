"""Imports what `MODULE:NAME` names."""

import importlib
import sys
from typing import Any

from model.serving.config import CannotStart


def imported(target: str, folder: str) -> Any:
    """What MODULE:NAME names, looked for in `folder` first, unless that is "".

    Raises CannotStart when there is no such module, or nothing of that name in it; whatever the
    module itself raises comes out as it is.
    """
    module, _, name = target.partition(":")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CannotStart(f"{target} cannot be imported: {error}") from error
    if not hasattr(found, name):
        raise CannotStart(f"{target}: the module {module} has no {name}")
    return getattr(found, name)
