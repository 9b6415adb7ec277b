"""Faults that can be injected into a server, and changes that operators make.

Each function returns the evidence that it had an effect, in words, and raises NotTested when it had
none: an experiment whose fault did nothing proves nothing.
"""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import psutil

from model.faults.experiment import NotTested
from model.faults.observe import replicas
from model.loadtest.joining import ray_address
from model.loadtest.server_process import ServerProcess

GONE_WITHIN_S = 10
CHANGED_WITHIN_S = 60
ENDED_WITHIN_S = 75


def kill_one(server: ServerProcess) -> str:
    """SIGKILL to one of its replicas, at random."""
    there = replicas(server)
    return kill(random.sample(there, min(1, len(there))), f"replica of {len(there)}")


def kill_one_at_work(server: ServerProcess) -> str:
    """SIGKILL to one of its replicas in the middle of its work: it has just used the CPU.

    (A replica may also hold requests that cost it nothing, like those for its health.)
    """
    there = replicas(server)
    used = {replica: sum(replica.cpu_times()[:2]) for replica in there}
    end = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < end:
        time.sleep(0.03)
        for replica, before in used.items():
            used[replica] = sum(replica.cpu_times()[:2])
            if used[replica] - before >= 0.02:  # seconds; the clock has steps of 0.01
                return kill([replica], f"replica of {len(there)}, at work")
    raise NotTested("no replica works on anything")


def kill_all(server: ServerProcess) -> str:
    """SIGKILL to all its replicas at once."""
    there = replicas(server)
    return kill(there, f"replica of {len(there)}")


def kill_helper(server: ServerProcess, name: str) -> str:
    """SIGKILL to its `helpers` of that name."""
    return kill(helpers(server, name), name)


def helpers(server: ServerProcess, name: str) -> list[psutil.Process]:
    """The processes of Ray or Serve with that name in their command line's beginning."""
    found = []
    for process in server.processes():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(process.cmdline())[:200]:
                found.append(process)
    return found


def kill(processes: Iterable[psutil.Process], what: str) -> str:
    """SIGKILL to processes, and wait until they are gone. what: they are, for the evidence."""
    processes = list(processes)
    if not processes:
        raise NotTested(f"there is no process to kill: {what}")
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if not _within(GONE_WITHIN_S, lambda: all(map(is_gone, processes))):
        raise NotTested(f"processes live on after SIGKILL: {what}")
    return f"processes gone: {len(processes)} ({what})"


def stop_one(server: ServerProcess) -> str:
    """SIGSTOP to one of its replicas, at random: it lives, and answers nothing ever again."""
    there = replicas(server)
    if not there:
        raise NotTested("there is no replica to stop")
    victim = random.choice(there)
    victim.send_signal(signal.SIGSTOP)
    if not _within(GONE_WITHIN_S, lambda: victim.status() == psutil.STATUS_STOPPED):
        raise NotTested("the replica runs on after SIGSTOP")
    return f"processes stopped: 1 (replica of {len(there)})"


def slow_down(server: ServerProcess, over: threading.Event) -> str:
    """Give one of its replicas a third of the time that it would take, until `over` is set."""
    there, stops = replicas(server), 0
    if not there:
        raise NotTested("there is no replica to slow down")
    victim = there[0]
    while not over.wait(0.1):
        victim.suspend()
        try:
            over.wait(0.2)
            stops += victim.status() == psutil.STATUS_STOPPED
        finally:
            victim.resume()
    if not stops:
        raise NotTested("the replica was not slowed down")
    return f"process stopped for 0.2 s: {stops} times (replica of {len(there)})"


@contextlib.contextmanager
def nothing_restarted(server: ServerProcess) -> Iterator[None]:
    """In this block Serve's controller stands still: it starts nothing in place of what dies."""
    [controller] = helpers(server, "ray::ServeController")
    controller.suspend()
    try:
        yield
    finally:
        controller.resume()


def terminate(server: ServerProcess) -> str:
    """SIGTERM to the server, as a kubelet does; waits until its process has ended."""
    if server.process.poll() is not None:
        raise RuntimeError("the server had ended before it was told to")
    server.process.terminate()
    status = server.process.wait(ENDED_WITHIN_S)
    return f"the server's process ended with status {status}"


def change(server: ServerProcess, *options: str) -> str:
    """`redeploy` a server, and wait until replicas have started or ended."""
    before = {process.pid for process in replicas(server)}
    redeploy(server, *options)
    if not _within(CHANGED_WITHIN_S, lambda: {p.pid for p in replicas(server)} != before):
        raise NotTested(f"no replica has started or ended: {' '.join(options)}")
    after = {process.pid for process in replicas(server)}
    return f"replica processes: {len(after - before)} started, {len(before - after)} ended"


def redeploy(server: ServerProcess, *options: str) -> None:
    """`python -m model.serving.redeploy` for a server that was started with a token of ours.

    Raises RuntimeError when the command fails; that anything has changed it does not say.
    """
    address = ray_address(server)
    command = [sys.executable, "-m", "model.serving.redeploy", "--address", address, *options]
    env = server.process.environ()  # with the token that lets others join its cluster
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        raise RuntimeError(f"model.serving.redeploy failed: {ran.stderr[-1000:]}")


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; its parent may not have taken notice yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in that time."""
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return true
