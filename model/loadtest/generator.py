"""Loads a server as many clients would, checks every response, and records what was measured.

A closed loop has N clients, each of which sends its next request when it has the response to the
last: it finds how much a server can do. In an open loop requests arrive at a rate of their own,
whether the server keeps up or not: it finds how long a user waits at that rate.

A process of its own sends the requests, so that the caller's work does not disturb it and its CPU
time can be told apart. It imports neither torch nor KServe nor Ray, and ends with its caller.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from model.loadtest.load import Load
from model.loadtest.run import Run
from model.loadtest.workload import Workload

SLACK_S = 30  # for the generator's process to start, and to hand over what it has measured


def closed_loop(
    url: str,
    work: Workload,
    clients: int,
    seconds: float,
    *,
    begins: Callable[[], object] = lambda: None,
    **more,
) -> Run:
    """Load `url` (of V1 predict) with `clients` that each wait for a response before they go on.

    begins: is called as the load begins, a moment after the generator's process has started.
    more: `warmup_s` (2) before the `seconds` that are measured; `timeout_s` (30) of a request,
    and for all that is not done at the end; `retry` (""): "at once" or "as told", when a request
    that is rejected with 503 is retried, as told by its `Retry-After`; `keep_headers` (False);
    `watch`: process id -> name of a group of processes, whose CPU time is measured too. Whatever
    goes wrong with a request is counted. Raises ValueError for arguments that make no sense, and
    RuntimeError when the generator itself fails.
    """
    return _generate(Load(url, work, clients, None, seconds, **more), begins)


@contextlib.contextmanager
def loading(
    url: str, work: Workload, clients: int, seconds: float, **more
) -> Iterator[Future[Run]]:
    """A closed loop in a thread, beside what the block does, which begins when the load has begun.

    Or when the load has failed to: ask its future for the Run. more: as for `closed_loop`.
    """
    begun = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(closed_loop, url, work, clients, seconds, begins=begun.set, **more)
        load.add_done_callback(lambda _: begun.set())
        begun.wait()
        yield load


def open_loop(
    url: str,
    work: Workload,
    rate: float,
    seconds: float,
    *,
    connections: int = 256,
    begins: Callable[[], object] = lambda: None,
    **more,
) -> Run:
    """Load `url` with `rate` requests a second at random moments (Poisson).

    connections: at most so many requests are in flight; what is due beyond them is sent late.
    begins, more, errors: as for `closed_loop`, and `seed` (0) of the moments. asyncio's clock sends
    a request up to 1 ms after it is due, which counts as latency.
    """
    return _generate(Load(url, work, connections, rate, seconds, **more), begins)


def _generate(load: Load, begins: Callable[[], object]) -> Run:
    """Run the load in a process of its own, which an exception here (an interrupt) ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from model.loadtest import load; load.main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # an interrupt in the notebook is for the caller only
    )
    too_long = threading.Timer(load.end + load.timeout_s + SLACK_S, process.kill)
    too_long.start()
    with process:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has failed, and says below why
                process.stdin.write(pickle.dumps(load))
                process.stdin.flush()
            if os.read(process.stdout.fileno(), 1):
                begins()
            run, said = process.communicate()
        except BaseException:
            process.kill()
            raise
        finally:
            too_long.cancel()
    if process.returncode:
        ended = f"status {process.returncode}: {said.decode()[-2000:]}"
        raise RuntimeError(f"the load generator failed, with {ended}")
    return pickle.loads(run)
