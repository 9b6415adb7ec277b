"""The check of notebook 7's exercise on the cluster. It prints "right: …" or "not yet: …"."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from model.course import figures, ray_state
from model.course.placement import NAME
from model.faults.nodes import Nodes

WITHIN_S = 40
SETTLED_S = 4  # in which a second replica would have come

Placement = dict[str, list[str]]  # of each node the roles of its actors


def check_placed(folder: Path, cluster: Nodes) -> Figure | None:
    """Notebook 7: does a node never get two replicas of my_deployment.py, wherever there is room?

    cluster: with one worker node, that has room for both; another is added for a deployment that is
    right so far. Returns a figure of where the replicas are at last; None where it is not right.
    """
    file = folder / "my_deployment.py"
    if "max_replicas_per_node" not in file.read_text():
        print("not yet: nothing keeps both replicas off the same node")
        return None
    try:
        with _deployed(file, cluster):
            where = _when(cluster, lambda where: _count(where) >= 1)
            time.sleep(SETTLED_S)
            where = ray_state.actors_by_node(cluster)
            if _count(where) != 1:
                print(f"not yet: {_count(where)} replicas run, and there is one worker node")
                return None
            cluster.add(1)
            where = _when(cluster, lambda where: _count(where) >= 2)
    except RuntimeError as error:
        print(f"not yet: {error}")
        return None
    print("right: the second replica waited for a node of its own")
    return figures.processes(where, "A replica on each worker node")


def _when(cluster: Nodes, condition) -> Placement:
    """Where the actors are once the condition holds; RuntimeError when it does not in time."""
    end = time.monotonic() + WITHIN_S
    while not condition(where := ray_state.actors_by_node(cluster)):
        if time.monotonic() > end:
            raise RuntimeError(f"{_count(where)} of your replicas run after {WITHIN_S} s")
        time.sleep(0.5)
    return where


def _count(where: Placement) -> int:
    """How many replicas of the application run."""
    return sum(role.endswith(f" of {NAME}") for roles in where.values() for role in roles)


@contextlib.contextmanager
def _deployed(file: Path, cluster: Nodes) -> Iterator[None]:
    """In this block the file's application runs on the cluster, or waits for room there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "model.course.placement", cluster.address, str(file)],
        env=os.environ | cluster.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout.readline() != "deployed\n":
            _, said = process.communicate(timeout=WITHIN_S)
            last = said.strip().splitlines()[-1:] or ["it ended"]
            raise RuntimeError(f"{file.name}: {last[0]}")
        yield
    finally:
        process.communicate(timeout=WITHIN_S)
