"""The check of notebook 7's exercise on the cluster. It prints "right: …" or "not yet: …"."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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

    cluster: with one worker node, that has room for both; while the check lasts there may be
    another one. Returns a figure of where the replicas are at last; None where they share a node.
    """
    file = folder / "my_deployment.py"
    if "max_replicas_per_node" not in file.read_text():
        print("not yet: nothing keeps both replicas off the same node")
        return None
    try:
        with _another_node(cluster) as add, _deployed(file, cluster) as wait_for:
            wait_for(1)
            time.sleep(SETTLED_S)
            if _together(ray_state.actors_by_node(cluster)):
                print("not yet: both replicas run on the same node")
                return None
            add()
            where = wait_for(2)
    except RuntimeError as error:
        print(f"not yet: {error}")
        return None
    if _together(where):
        print("not yet: both replicas run on the same node")
        return None
    print("right: the second replica waited for a node of its own")
    return figures.processes(where, "A replica on each worker node")


def _on_each(where: Placement) -> list[int]:
    """How many replicas of the application run on each node."""
    return [sum(role.endswith(f" of {NAME}") for role in roles) for roles in where.values()]


def _together(where: Placement) -> bool:
    return max(_on_each(where)) > 1


@contextlib.contextmanager
def _another_node(cluster: Nodes) -> Iterator[Callable[[], None]]:
    """Yields what adds a worker node to the cluster; it is gone after the block."""
    added = []

    def add() -> None:
        cluster.add(1)
        added.append(len(cluster.hosts) - 1)

    try:
        yield add
    finally:
        for number in added:
            cluster.lose(number)


@contextlib.contextmanager
def _deployed(file: Path, cluster: Nodes) -> Iterator[Callable[[int], Placement]]:
    """In this block the file's application runs on the cluster, or waits for room there.

    Yields what waits for so many of its replicas and returns where they are. It raises RuntimeError
    when they do not come, with what is wrong with the file.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "model.course.placement", cluster.address, str(file)],
            env=os.environ | cluster.env,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
        )

        def wait_for(count: int) -> Placement:
            end = time.monotonic() + WITHIN_S
            while sum(_on_each(where := ray_state.actors_by_node(cluster))) < count:
                if process.poll() is not None:
                    said.seek(0)
                    lines = said.read().strip().splitlines() or ["it ended"]
                    raise RuntimeError(f"{file.name}: {lines[-1]}")
                if time.monotonic() > end:
                    there = sum(_on_each(where))
                    raise RuntimeError(f"{there} of your replicas run after {WITHIN_S} s")
                time.sleep(0.5)
            return where

        try:
            yield wait_for
        finally:
            process.stdin.close()
            try:
                process.wait(WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
