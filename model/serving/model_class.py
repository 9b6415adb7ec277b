"""Finds a model's class by `MODULE:CLASS`, and makes it with arguments given as text."""

import contextlib
import importlib.machinery
import inspect
import re
import sys
import typing
from pathlib import Path

import kserve
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from model.serving.config import CannotStart, ModelConfig
from model.serving.imports import imported


def check_target(target: str, folder: str) -> None:
    """Raise CannotStart unless `target` has the form MODULE:CLASS and MODULE can be found.

    Nothing of the module is imported: the frontend does without a model's packages.
    """
    module, colon, name = target.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise CannotStart(f"{target} is not of the form MODULE:CLASS, as in sentiment:Classifier")
    if module.endswith(".py"):
        raise CannotStart(f"{target}: leave .py out, as in {module[:-3]}:{name}")
    if source_of(target, folder) is None:
        raise CannotStart(
            f"there is no module {module.split('.')[0]} in {folder or 'this environment'}: "
            "start in the folder of its file, or install it"
        )


def source_of(target: str, folder: str) -> Path | None:
    """The file of the module, or the folder of the package, that holds `target`; None: not here."""
    top = target.partition(":")[0].partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, [folder or ".", *sys.path])
    if spec is None:
        return None
    found = next(iter(spec.submodule_search_locations or ()), None) or spec.origin
    return Path(found) if found else None


def make_model(config: ModelConfig) -> kserve.Model:
    """Import the class, make the model as `CLASS(name, **arguments)`, load and start it.

    Raises CannotStart when there is no such class, it takes other arguments, or loading it does
    not make it ready; whatever its own constructor and `load` raise comes out as it is.
    """
    found = imported(config.target, config.folder)
    if not (inspect.isclass(found) and issubclass(found, kserve.Model)):
        raise CannotStart(f"{config.target} is not a class derived from kserve.Model")
    model = found(config.name, **_typed(found, config.arguments))
    if not model.ready:
        model.load()
    if not model.ready:
        raise CannotStart(f"{config.target} is not ready after load(): set self.ready = True there")
    model.start()
    return model


def _typed(model_class: type, arguments: tuple[tuple[str, str], ...]) -> dict[str, object]:
    """The arguments as the constructor's annotations want them."""
    parameters = dict(list(inspect.signature(model_class.__init__).parameters.items())[2:])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameters = {
        n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    hints = _hints(model_class)
    typed: dict[str, object] = {}
    for name, text in arguments:
        if name not in parameters and not takes_any:
            has = f"it has {', '.join(parameters)}" if parameters else "it has none"
            raise CannotStart(f"--set {name}: {model_class.__name__} has no such argument; {has}")
        kind = _type_of(name, parameters, hints)
        try:
            typed[name] = _value(TypeAdapter(kind), text)
        except ValidationError as error:
            why = re.sub(r"^(Input should be|Value error,) ", "", error.errors()[0]["msg"])
            raise CannotStart(f"--set {name}={text}: give {why}") from None
        except PydanticUserError:
            raise CannotStart(f"--set {name}={text}: no text can be a {kind}") from None
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in typed]
    if missing:
        raise CannotStart(
            f"{model_class.__name__} needs {', '.join(missing)}: give --set {missing[0]}=VALUE"
        )
    return typed


def _hints(model_class: type) -> dict[str, object]:
    """The constructor's annotations; none if one of them is imported for type checkers only."""
    try:
        return typing.get_type_hints(model_class.__init__)
    except NameError:
        return {}


def _value(kind: TypeAdapter, text: str) -> object:
    """The text as a value of a type, or else the JSON that it is; raises ValidationError."""
    try:
        return kind.validate_strings(text)
    except ValidationError:
        with contextlib.suppress(ValidationError):
            return kind.validate_json(text, strict=True)
        raise


def _type_of(name: str, parameters: dict[str, inspect.Parameter], hints: dict) -> object:
    """What an argument is to be: its annotation, else the type of its default, else text."""
    if name in hints:
        return hints[name]
    default = getattr(parameters.get(name), "default", inspect.Parameter.empty)
    return str if default in (inspect.Parameter.empty, None) else type(default)
