"""Finding a model's class and making it: arguments by its signature, a sentence for what is wrong.

See foreign_models.py for the classes.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from model.serving.cli import server_config
from model.serving.config import CannotStart, ModelConfig
from model.serving.deployment import deployment_options, plan
from model.serving.machine import free_port
from model.serving.model_class import make_model
from tests.served import FILE, empty_folder
from tests.ways import assert_plain


@pytest.fixture(scope="module")
def foreign_models(tmp_path_factory) -> Any:
    """The module with the classes, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(empty_folder(tmp_path_factory)))
        yield importlib.import_module("foreign_models")
        del sys.modules["foreign_models"]


GIVEN = {  # how an argument is given: what the model gets
    "threshold=1": 1.0,
    "unit=letters": "letters",
    "top=5": 5,
    "top=null": None,
    "sizes=[3, 4]": [3, 4],
    "loud=true": True,
    "folder=/a": "/a",
    "untyped=7": 7,
}
WRONG = {  # how it is given: what the sentence says
    "threshold=high": "--set threshold=high: give a valid number",
    "unit=pages": "--set unit=pages: give 'words' or 'letters'",
    "top=1.5": "--set top=1.5: give a valid integer",
    "sizes=three": "--set sizes=three: give a valid array",
    "loud=very": "--set loud=very: give a valid boolean",
    "untyped=x": "--set untyped=x: give a valid integer",
    "nobody=1": "--set nobody: Typed has no such argument; it has threshold, unit, top",
    "weights=1": "--set weights=1",
    "": "Typed needs threshold: give --set threshold=VALUE",
}


def typed(foreign_models: Any, *given: str) -> list:
    """What the model Typed is made with."""
    arguments = tuple(tuple(text.split("=")) for text in given if text)
    folder = str(Path(foreign_models.__file__).parent)
    return make_model(ModelConfig("typed", "foreign_models:Typed", arguments, folder)).made_with


@pytest.mark.parametrize("given", GIVEN)
def test_an_argument_of_each_type(foreign_models, given):
    """The text becomes a value of the annotated type, or of the default's."""
    assert GIVEN[given] in typed(foreign_models, "threshold=1", given)


@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_argument_gets_a_sentence(foreign_models, given):
    """It names the argument and what it may be."""
    more = ["threshold=1"] if given and "threshold" not in given else []
    with pytest.raises(CannotStart) as error:
        typed(foreign_models, *more, given)
    assert str(error.value).startswith(WRONG[given])
    assert_plain(str(error.value))


NO_MODELS = {
    "foreign_models:Nothing": "the module foreign_models has no Nothing",
    "foreign_models:note": "is not a class derived from kserve.Model",
    "json:JSONDecoder": "is not a class derived from kserve.Model",
    "foreign_models.sub:Typed": "cannot be imported",
}


@pytest.mark.parametrize("target", NO_MODELS)
def test_what_is_no_model(foreign_models, target):
    """A sentence says so."""
    with pytest.raises(CannotStart, match=NO_MODELS[target]):
        make_model(ModelConfig("x", target, (), str(Path(foreign_models.__file__).parent)))


def test_what_a_module_raises_comes_out_as_it_is(tmp_path):
    """An AttributeError in it is not taken for a class that is missing."""
    (tmp_path / "raising.py").write_text("None.something")
    with pytest.raises(AttributeError, match="something"):
        make_model(ModelConfig("x", "raising:Model", (), str(tmp_path)))


def test_the_version_of_a_deployment_covers_the_models_own_file(tmp_path_factory, monkeypatch):
    """A changed class is another version, whose replicas are replaced; else they stay."""
    folder = empty_folder(tmp_path_factory)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ray.cluster_resources", dict)

    def version(*options: str) -> str:
        ports = ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
        ports += ["--cpus_per_replica", "0.5"]
        config = server_config([*ports, "foreign_models:WordCount", *options])
        [application] = plan(config)
        return deployment_options(application, config)["version"]

    before = version("--num_replicas", "1")
    assert version("--num_replicas", "2") == before
    assert version("--num_replicas", "1", "--set", "seconds=1") != before
    within = version("--topology", "ingress")
    assert version("--topology", "ingress", "--num_replicas", "2", "--drain_s", "1") == within
    assert version("--topology", "ingress", "--max_queued_requests", "9") != within
    (folder / "foreign_models.py").write_text(FILE.read_text() + "\nCHANGED = True\n")
    assert version("--num_replicas", "1") != before
