"""The check of notebook 6's exercise, which kills the replicas of the learner's server.

It prints "right: …" or "not yet: …".
"""

import re
import time
from collections.abc import Callable
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

PROBE_S = 8  # more than the five seconds that the task gives a replica
BACK_S = 60  # for new replicas to start


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
            what, wrong = _kill_replicas(server, seconds)
        except RuntimeError as error:
            return print(f"not yet: {error}")
    print(f"not yet: {wrong}" if wrong else _praise(what))
    return plots.outcomes_over_time({"yours": what}, f"Your server: {what.failed} requests failed")


def _kill_replicas(server: ServerProcess, seconds: float) -> tuple[Experiment, str]:
    """Kill one under load and, where that failed no request, both; and what is wrong, or ""."""
    kill = partial(inject.kill_one_at_work, server)
    steps = [Fault(seconds / 3, "a replica is killed", kill)]
    what = run_experiment(server, "yours", Workload.drawn(), seconds, steps, timeout_s=30)
    lost = what.run.sent - what.answered
    if lost:
        how = ", ".join(f"{count} × {kind}" for kind, count in what.run.errors.items())
        return what, f"a replica was killed, and {lost} of {what.run.sent} requests failed: {how}"
    wait_for_replicas(server, 2)
    with inject.nothing_restarted(server):
        inject.kill_all(server)
        without = [_readiness(server) for _ in range(2)]  # the first may meet dead replicas
    return what, _what_is_wrong(without, lambda: _readiness(server))


def _what_is_wrong(without: list[str], ask: Callable[[], str]) -> str:
    """With what readiness said while there was no replica, and says later; or ""."""
    if untrue := [said for said in without if said != "503"]:
        return f"no request failed; but without a replica the readiness endpoint says {untrue[0]}"
    end = time.monotonic() + BACK_S
    while (said := ask()) != "200":
        if time.monotonic() > end:
            return f"{BACK_S} s after new replicas may start, the readiness endpoint says {said}"
        time.sleep(0.2)
    return ""


def _praise(what: Experiment) -> str:
    return (
        f"right: a replica was killed and none of {what.run.sent} requests failed; without a "
        "replica the readiness endpoint says 503, and with new ones 200 again"
    )


def _readiness(server: ServerProcess) -> str:
    """The status that the readiness endpoint answers, or that it does not."""
    url = f"{server.url}/v2/models/{server.name}/ready"
    try:
        return str(requests.get(url, timeout=PROBE_S).status_code)
    except requests.Timeout:
        return f"nothing for {PROBE_S} s"
    except requests.RequestException as error:
        return f"nothing ({type(error).__name__})"
