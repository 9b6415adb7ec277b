"""Runs a server that is a program of its own, until this process is told to end."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from model.serving.machine import WITH_PARENT


def run(command: Sequence[str], **env: str) -> None:
    """Run it until SIGINT or SIGTERM, send it SIGTERM then, and wait until it has ended.

    env: environment variables to add. Exits with its status when it ends by itself.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = None
    try:
        server = subprocess.Popen([*WITH_PARENT, *command], env=os.environ | env)
        status = server.wait()
    except KeyboardInterrupt:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        if server is not None:
            server.terminate()
            server.wait()
        return
    sys.exit(status)
