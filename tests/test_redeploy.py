"""`python -m model.serving.redeploy` where the files of a model change, good and bad."""

from pathlib import Path

import pytest
import requests

from model.faults import inject
from model.faults.observe import wait_for_replicas
from model.faults.promises import LEAN
from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess
from tests.conftest import until

pytestmark = pytest.mark.long
MODEL = """
from kserve import Model

class Versioned(Model):
    def load(self):
        {load}
        self.ready = True
        return True

    def predict(self, payload, headers=None):
        return {{"predictions": ["{name}"]}}
"""


def write(folder: Path, name: str, load: str = "pass") -> None:
    """The model's file: its name is what it answers, and `load` is done as it loads."""
    (folder / "versioned.py").write_text(MODEL.format(name=name, load=load))


def answers(server: ServerProcess) -> set[str]:
    """What some requests in a row get."""
    body = {"instances": [1]}
    responses = [requests.post(server.predict, json=body, timeout=30) for _ in range(12)]
    return {each.json()["predictions"][0] if each.ok else each.text for each in responses}


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_that_was_changed(count, tmp_path, monkeypatch):
    """A good one is in all replicas afterwards. A bad one is in none: those that run go on, and the
    command says that the file has to be mended; once it is, there are as many replicas as before.
    (Of one replica none is left until then: Ray Serve has stopped it for the new one.)
    """
    monkeypatch.chdir(tmp_path)  # where the command looks for the class
    write(tmp_path, "first")
    options = ("versioned:Versioned", "--num_replicas", str(count), *LEAN)
    with ServerProcess("model.serving", *options, folder=tmp_path, **fresh_token()) as server:
        assert answers(server) == {"first"}
        write(tmp_path, "second")
        inject.redeploy(server, *options)
        assert until(lambda: answers(server) == {"second"})
        inject.redeploy(server, *options, "--reload")
        write(tmp_path, "third", load="raise ValueError('no weights')")
        with pytest.raises(RuntimeError, match="no weights.*put them back"):
            inject.redeploy(server, *options)
        if count > 1:
            assert answers(server) == {"second"}
        write(tmp_path, "second")
        inject.redeploy(server, *options)
        wait_for_replicas(server, count)
        assert answers(server) == {"second"}
