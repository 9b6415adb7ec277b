"""A model of the reader's own, packaged: the Dockerfile and the manifest say what was asked for."""

import joblib
import pytest
import yaml

from model.course import package
from model.course.command_line import accepted
from model.serving import cli

MODEL = "class Tickets:\n    pass\n"


@pytest.fixture
def folder(tmp_path):
    """With the file of a model."""
    (tmp_path / "tickets.py").write_text(MODEL)
    return tmp_path


def packaged(folder, *options: str) -> tuple[str, dict]:
    """The Dockerfile and the container of the manifest."""
    file, into = str(folder / "tickets.py"), folder / "image"
    package.main(
        ["tickets:Tickets", file, "--image", "registry/tickets:1", "--into", str(into), *options]
    )
    assert (into / "tickets.py").read_text() == MODEL
    manifest = yaml.safe_load((into / "inferenceservice.yaml").read_text())
    name = options[options.index("--name") + 1] if "--name" in options else "custom-model-ray"
    assert manifest["metadata"]["name"] == name
    (container,) = manifest["spec"]["predictor"]["containers"]
    return (into / "Dockerfile").read_text(), container


@pytest.mark.parametrize(
    ("options", "replicas", "cpus", "limit"),
    [
        (["--name", "tickets-2"], 2, 1, "2750m"),
        (["--num_replicas", "3", "--cpus_per_replica", "2"], 3, 2, "6750m"),
        (["--num_replicas", "2", "--cpus_per_replica", "0.5"], 2, 0.5, "1750m"),
    ],
)
def test_the_manifest_starts_what_was_asked_for(
    folder, options, replicas, cpus, limit, monkeypatch
):
    """The server accepts its command line, and the replicas fit into the pod's whole cores."""
    dockerfile, container = packaged(folder, *options, "--memory_mib", "2048")
    assert container["image"] == "registry/tickets:1"
    assert "tickets:Tickets" in container["command"]
    assert container["resources"]["limits"] == {"cpu": limit, "memory": "2048Mi"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    words = container["command"][container["command"].index("model.serving") + 1 :]
    whole = int(limit.removesuffix("m")) // 1000
    monkeypatch.setattr(cli, "cores", lambda: whole)
    config = accepted(lambda: [word for word in words if word != "tickets:Tickets"])
    assert (config.replicas.num_replicas, config.replicas.cpus) == (replicas, cpus)
    assert replicas * cpus <= whole
    assert "COPY tickets.py /models/" in dockerfile and "pip install" not in dockerfile


def test_packages_are_installed_by_root_and_the_server_is_not_root(folder):
    """The user of the image is the one before again."""
    dockerfile, _ = packaged(folder, "--packages", "joblib", "no-such-package", "numpy>=2")
    lines = dockerfile.splitlines()
    pinned = f"'joblib=={joblib.__version__}' 'no-such-package' 'numpy>=2'"
    at = lines.index(f"RUN pip install --no-cache-dir {pinned}")
    assert lines[at - 1 : at + 2 : 2] == ["USER root", "USER 1000"]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["tickets.py", "tickets.py"], "is not MODULE:CLASS"),
        (["tickets:Tickets", "nothing.py"], "there is no file nothing.py"),
        (["other:Tickets", "tickets.py"], "none of the files is the module of other:Tickets"),
        (["tickets:Tickets", "tickets.py", "--name", "My_Model"], "--name My_Model"),
        (["tickets:Tickets", "tickets.py", "--num_replicas", "0"], "above 0"),
    ],
)
def test_mistakes_get_a_sentence(folder, argv, part, monkeypatch, capsys):
    """And status 2."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        package.main([*argv, "--image", "i:1"])
    assert end.value.code == 2 and part in capsys.readouterr().err
