"""The check of notebook 6's exercise, which kills the replicas of the learner's server.

It prints "right: …" or "not yet: …".
"""

import re
import time
from functools import partial
from pathlib import Path

import requests
from matplotlib.figure import Figure

from model.course.checks_basics import cannot_start
from model.faults import inject, plots
from model.faults.experiment import Experiment, Fault, run_experiment
from model.faults.observe import wait_for_replicas
from model.loadtest.joining import fresh_token
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

WITHIN_S = 10
PROBE_S = 2  # Kubernetes gives a probe one second, unless it is told otherwise


def check_resilient(folder: Path, seconds: float = 6) -> Figure | None:
    """Notebook 6: does a killed replica cost `my_server.py` a request, and is its readiness true?

    seconds: of load, with the kill after a third of them. Returns every request in a figure.
    """
    if not re.search(
        r"^\s*(except|with|async with)\b", (folder / "my_server.py").read_text(), re.M
    ):
        return print("not yet: nothing in my_server.py catches RayActorError")
    try:
        server = ServerProcess("my_server", folder=folder, **fresh_token())
    except RuntimeError as error:
        return print(f"not yet: {cannot_start(error)}")
    with server:
        try:
            what, not_ready_s = _kill_replicas(server, seconds)
        except RuntimeError as error:
            return print(f"not yet: {error}")
    print(_verdict(what, not_ready_s))
    return plots.outcomes_over_time({"yours": what}, f"Your server: {what.failed} requests failed")


def _kill_replicas(server: ServerProcess, seconds: float) -> tuple[Experiment, float | None]:
    """Kill one under load and, where that failed no request, both; then probe the readiness."""
    kill = partial(inject.kill_one_at_work, server)
    steps = [Fault(seconds / 3, "a replica is killed", kill)]
    what = run_experiment(server, "yours", Workload.drawn(), seconds, steps, timeout_s=30)
    if what.answered < what.run.sent:
        return what, None
    wait_for_replicas(server, 2)
    inject.kill_all(server)
    return what, _seconds_until_not_ready(server)


def _verdict(what: Experiment, not_ready_s: float | None) -> str:
    lost = what.run.sent - what.answered
    if lost:
        how = ", ".join(f"{count} × {kind}" for kind, count in what.run.errors.items())
        return (
            f"not yet: a replica was killed, and {lost} of {what.run.sent} requests failed: {how}"
        )
    if not_ready_s is None:
        return (
            f"not yet: no request failed, but {WITHIN_S} s after every replica was killed the "
            "server still said that it is ready"
        )
    return (
        f"right: a replica was killed and none of {what.run.sent} requests failed; "
        f"without a replica the server was not ready after {not_ready_s:.1f} s"
    )


def _seconds_until_not_ready(server: ServerProcess) -> float | None:
    """How long the readiness probe goes on saying 200; None if it does until the end.

    A probe that is not answered in PROBE_S has failed, as Kubernetes sees it: who answers late may
    have waited until there was a replica again.
    """
    began = time.monotonic()
    while time.monotonic() - began < WITHIN_S:
        url = f"{server.url}/v2/models/{server.name}/ready"
        try:
            said = requests.get(url, timeout=PROBE_S).status_code
        except requests.Timeout:
            said = None
        if said != 200:
            return time.monotonic() - began
        time.sleep(0.05)
    return None
