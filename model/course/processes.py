"""The processes below a notebook, by role: those of Ray, of Ray Serve, and our servers."""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import ray

from model.course import ray_state

# Part of a process's command line -> its role. Ray's own processes, then our servers.
ROLES = {
    "gcs_server": "GCS (cluster state)",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "_private/monitor.py": "autoscaler monitor",
    "log_monitor.py": "log monitor",
    "DashboardAgent": "dashboard agent",
    "RuntimeEnvAgent": "runtime agent",
    "ray::IDLE": "idle worker",
    "model.serving": "KServe server",
    "model.basics": "KServe server",
    "model.loadtest.stock": "KServe server",
}


def running() -> dict[str, psutil.Process]:
    """The living processes below this notebook, by role; several of one role are numbered.

    The actors of Serve are told apart by Ray's state API, where this notebook is on a cluster.
    """
    actors = _actors()
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            line = " ".join(process.cmdline())
            role = actors.get(process.pid) or next((r for k, r in ROLES.items() if k in line), None)
            if role in found:
                role = next(f"{role} {i}" for i in range(2, 100) if f"{role} {i}" not in found)
            if role:
                found[role] = process
    return found


def grouped(roles: Iterable[str]) -> dict[str, list[str]]:
    """The roles by where they belong on a cluster of one node, for figures.processes."""
    roles, actors = list(roles), set(_actors().values())
    drivers = [role for role in roles if role.startswith("KServe server")]
    serve = [role for role in roles if role in actors]
    return {
        "programs that joined the cluster": drivers,
        "head node: actors of Serve": serve,
        "head node: Ray's housekeeping": [r for r in roles if r not in drivers + serve],
    }


def cpu_used(action: Callable[[], Any]) -> dict[str, float]:
    """The CPU seconds that each process used while `action` ran, largest first."""
    processes = running()
    before = {role: sum(process.cpu_times()[:2]) for role, process in processes.items()}
    action()
    used = {}
    for role, process in processes.items():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            used[role] = sum(process.cpu_times()[:2]) - before[role]
    return dict(sorted(used.items(), key=lambda item: -item[1]))


def cores_used(seconds: float) -> float:
    """The cores that all processes below this notebook use together, over so many seconds."""
    return sum(cpu_used(lambda: time.sleep(seconds)).values()) / seconds


def _actors() -> dict[int, str]:
    """pid -> role of Serve's actors; empty where this notebook is on no cluster."""
    if not ray.is_initialized():
        return {}
    return ray_state.actors(ray.get_runtime_context().gcs_address)
