"""Servers of the models in foreign_models.py, started in a folder that holds nothing but it."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from model.loadtest.server_process import ServerProcess

FILE = Path(__file__).with_name("foreign_models.py")
TEXTS, COUNTS = ["one", "one and two", ""], [1, 3, 0]


def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models' file and nothing else."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copy(FILE, folder)
    return folder


def notes(folder: Path, file: str) -> list[list[str]]:
    """What the models have noted: the process and a text in each line."""
    path = folder / file
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


class Served(NamedTuple):
    """A server with several models, and the folder that it was started in."""

    server: ServerProcess
    folder: Path

    def url(self, model: str, verb: str = "predict") -> str:
        """Of V1."""
        return f"{self.server.url}/v1/models/{model}:{verb}"

    def v1(self, model: str, instances: list, verb: str = "predict", **more) -> requests.Response:
        """A V1 request."""
        more = {"timeout": 60} | more
        return requests.post(self.url(model, verb), json={"instances": instances}, **more)

    def ready(self, model: str) -> int:
        """The status of its readiness."""
        url = f"{self.server.url}/v2/models/{model}/ready"
        return requests.get(url, timeout=10).status_code
