"""How a command ends before it serves: by a signal, or because it cannot start.

It imports nothing that takes time, so that it can be set up first.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model.serving.config import CannotStart

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SENTENCE = "stopped before it was ready"


class Stopped(BaseException):
    """A signal has come before the server was there to be ended by one."""


def run(main: Callable[[], None]) -> None:
    """Call `main`, which imports what it needs; end the process with one sentence if it must.

    Status 1 when the command cannot start; 128 + the signal's number when a signal ends it first.
    """
    _obey(_end_now)
    try:
        main()
    except Stopped as stopped:
        _leave(SENTENCE, 128 + stopped.args[0])
    except CannotStart as error:
        _leave(str(error), 1)
    # All is done. Python still waits for a model that is stuck in its thread, and then tidies up.
    _obey(lambda *_: os._exit(0))
    atexit.register(_obey, signal.SIG_IGN)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """In this block the first signal raises Stopped, so that what was started there is ended.

    Further ones change nothing. Outside of it there is nothing to end, and a signal ends the
    process at once: an exception would be lost when it is raised in the wrong place, as in what
    Cython runs while its modules are imported.
    """
    stopped = False

    def stop(number: int, _: object) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stopped(number)

    _obey(stop)
    yield


def _obey(handler: Callable | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _end_now(number: int, _: object) -> None:
    os.write(2, f"{SENTENCE}\n".encode())  # print may be at work already
    os._exit(128 + number)


def _leave(sentence: str, status: int) -> None:
    _obey(signal.SIG_IGN)  # what is left to do is short
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(status)
