"""A server under load for hours, with faults all the while: `python -m model.faults.endurance`.

Clients send at random moments and wait for their responses. Beside them others give up or send what
is no request, replicas are killed, and other versions deployed. Does anybody who waits lose a
request, and does anything grow?
"""

import argparse
import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import psutil

from model.faults import inject
from model.faults.clients import MALFORMED, status_of
from model.faults.experiment import Experiment, Fault, run_experiment
from model.faults.observe import snapshots
from model.faults.report import report
from model.faults.servers import HALVES, OTHER, ours
from model.loadtest.generator import open_loop
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload

HOUR_S = 3600
STEADY, IMPATIENT = 0.6, 0.1  # of what the server can do: 70 % together
KILL_EVERY_S, REDEPLOY_EVERY_S = 300, 1200
MALFORMED_EVERY_S, LOOK_EVERY_S = 10, 10
SETTLED = 1 / 3  # of the time; caches and pools fill first
MOST_MB_AN_HOUR = 10
PART_MINUTES = 10  # of which the least memory is told: what a process has without a queue

Sizes = dict[psutil.Process, tuple[float, int]]  # of each process: MB of its own, open files


def endurance(
    server: ServerProcess, work: Workload, hours: float = 1.0, options: Sequence[str] = HALVES
) -> Experiment:
    """Load a server for so many hours, with faults, and follow every process's memory and files.

    server: of `ours`, with these options, and room for a third replica. The experiment counts the
    waiting clients' requests; what became of the others, and what grew, is among its facts. Raises
    ValueError when no replica would be killed in that time, and RuntimeError when nobody gave up.
    """
    seconds = hours * HOUR_S
    faults = list(_faults(server, seconds, options))
    if not faults:
        raise ValueError(f"give {KILL_EVERY_S / HOUR_S:.2g} hours or more: else there is no fault")
    calm = run_experiment(server, "", work, min(10.0, seconds / 10))
    capacity, usual_s = calm.run.throughput, calm.latency_s(0.5)
    name = f"{hours:g} hours at 70 % of what it can do, with faults"
    how = {"seed": 1, "warmup_s": 0, "timeout_s": usual_s / 2}
    with (
        ThreadPoolExecutor(1) as thread,
        snapshots(server, _malformed, MALFORMED_EVERY_S) as answers,
        snapshots(server, _sizes, LOOK_EVERY_S) as seen,
    ):
        others = thread.submit(
            open_loop, server.predict, work, IMPATIENT * capacity, seconds, **how
        )
        found = run_experiment(server, name, work, seconds, faults, rate=STEADY * capacity)
    impatient = others.result()
    if not impatient.errors.get("timed out"):
        raise RuntimeError("no client gave up: the load was too small")
    statuses = sum((each for _, each in answers), Counter())
    found.facts |= {
        "evidence: requests given up": str(impatient.errors.get("timed out", 0)),
        "others' requests": ", ".join(f"{n} {what}" for what, n in impatient.errors.items()),
        "evidence: malformed requests": ", ".join(f"{n} got {s}" for s, n in statuses.items()),
    }
    settled = [(when, sizes) for when, sizes in seen if when > found.run.began + SETTLED * seconds]
    found.facts |= growth(settled)
    return found


def growth(seen: Sequence[tuple[float, Sizes]]) -> dict[str, str]:
    """What became of the memory and the open files of each process that is there all the time.

    seen: (when, in seconds; sizes). The line is through the medians of each minute, as neighbours
    among the single values resemble each other; ± is half of its 95 % interval, by Student's t.
    Both are nan where there are less than four minutes. What grows does so by more than that
    interval. A queue takes memory and gives it back; what leaks raises the least of each ten
    minutes, too. Processes that come and go, as replicas do, are not followed, only counted.
    """
    if not seen:
        return {}
    lasting = [process for process in seen[0][1] if all(process in sizes for _, sizes in seen)]
    minutes: dict[int, list[Sizes]] = {}
    for when, sizes in seen:
        minutes.setdefault(int((when - seen[0][0]) / 60), []).append(sizes)
    hours = np.array([minute / 60 for minute in minutes])
    others = set().union(*(sizes for _, sizes in seen)).difference(lasting)
    found, titles = {"processes that came or went": str(len(others))}, Counter()
    for process in lasting:
        memory = [statistics.median(s[process][0] for s in each) for each in minutes.values()]
        files = [statistics.median(s[process][1] for s in each) for each in minutes.values()]
        least: dict[int, float] = {}
        for minute, mb in zip(minutes, memory, strict=True):
            part = minute // PART_MINUTES
            least[part] = min(mb, least.get(part, mb))
        slope, half = _slope(hours, np.array(memory))
        verdict = " **grows**" if slope - half > MOST_MB_AN_HOUR else ""
        title = _title(process)
        titles[title] += 1
        found[f"{title} {titles[title]}"] = (
            f"{memory[-1]:.0f} MB, {slope:+.1f} ± {half:.1f} MB an hour{verdict}; least of each "
            f"{PART_MINUTES} minutes {', '.join(f'{mb:.0f}' for mb in least.values())}; open files "
            f"{files[0]:.0f} at first, {files[-1]:.0f} at last, {max(files):.0f} at most"
        )
    return found


def _faults(server: ServerProcess, seconds: float, options: Sequence[str]) -> Iterator[Fault]:
    """Kills, and another version and the first by turns; none at the very end."""
    kill = partial(_or_say_why_not, partial(inject.kill_one, server))
    for at in np.arange(KILL_EVERY_S / 2, seconds - KILL_EVERY_S / 4, KILL_EVERY_S):
        yield Fault(float(at), "a replica killed", kill)
    versions = [(*options, *OTHER), options]
    moments = np.arange(REDEPLOY_EVERY_S / 2, seconds - REDEPLOY_EVERY_S / 4, REDEPLOY_EVERY_S)
    for turn, at in enumerate(moments):
        change = partial(inject.change, server, *versions[turn % 2])
        yield Fault(float(at), "another version", partial(_or_say_why_not, change))


def _or_say_why_not(inject_fault: Callable[[], str]) -> str:
    """Its evidence. One fault that cannot be injected does not end the hours."""
    try:
        return inject_fault()
    except RuntimeError as error:
        return f"NOT DONE: {error}"


def _malformed(server: ServerProcess) -> Counter[str]:
    """Send bodies that no model can answer; returns how many got what."""
    return Counter(status_of(server.predict, body) for body in MALFORMED.values())


def _sizes(server: ServerProcess) -> Sizes:
    found, there = {}, []
    with contextlib.suppress(psutil.Error):
        there = server.processes()
    for process in there:
        with contextlib.suppress(psutil.Error):  # it has ended
            found[process] = _own_mb(process), process.num_fds()
    return found


def _own_mb(process: psutil.Process) -> float:
    """The memory that a process has filled itself.

    What it maps of files is left out: that is its own or shared, as other processes of the same
    program come and go.
    """
    info = process.memory_info()
    own = info.rss - info.shared if hasattr(info, "shared") else process.memory_full_info().uss
    return own / 1e6


def _title(process: psutil.Process) -> str:
    """What a process is, without what differs from machine to machine."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return "ended"
    if command and command[0].startswith("ray::"):
        return command[0].split()[0]
    return "KServe's process" if "model.serving" in command else process.name()


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a straight line through the points, and half of its 95 % interval."""
    if len(x) < 4:
        return math.nan, math.nan
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), _t(len(x) - 2) * math.sqrt(covariance[0, 0])


def _t(freedom: int) -> float:
    """Within ± this are 95 % of Student's t with so many degrees of freedom, two or more.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, for the normal distribution's
    1.96. It is too small by 0.8 % with two degrees of freedom, by 0.1 % with three.
    """
    terms = (1.95996, 2.37227, 2.82250, 2.55585, 1.58953)
    return sum(term / freedom**power for power, term in enumerate(terms))


def main(argv: list[str] | None = None, work: Callable[[], Workload] = Workload.drawn) -> None:
    """Print what became of the requests, and what grew."""
    parser = argparse.ArgumentParser(
        prog="python -m model.faults.endurance", description=__doc__.split(":")[0]
    )
    parser.add_argument("hours", nargs="?", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--topology", choices=("front", "ingress"), default="front")
    args = parser.parse_args(argv)
    options = (*HALVES, "--topology", args.topology)
    with ours(*options) as server:
        try:
            report([endurance(server, work(), args.hours, options)])
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
