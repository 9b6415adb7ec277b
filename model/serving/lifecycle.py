"""How a command ends before it serves: by a signal, or because it cannot start.

It imports nothing that takes time, so that it can be set up first.
"""

import signal
import sys
from collections.abc import Callable

from model.serving.config import CannotStart


class Stopped(BaseException):
    """A signal has come before the server was there to be ended by one."""


def run(main: Callable[[], None]) -> None:
    """Call `main`, which imports what it needs; end the process with one sentence if it must.

    Status 1 when the command cannot start; 128 + the signal's number when a signal ends it first.
    """

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        main()
    except Stopped as stopped:
        _leave("stopped before it was ready", 128 + stopped.args[0])
    except CannotStart as error:
        _leave(str(error), 1)


def _leave(sentence: str, status: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # what is left to do is short
        signal.signal(number, signal.SIG_IGN)
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(status)
