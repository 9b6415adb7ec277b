"""Reads the manifests of deploy/."""

from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def manifest(name: str) -> dict:
    """The one object of a file in deploy/. Raises OSError where there is no such file."""
    return yaml.safe_load((DEPLOY / name).read_text())
