"""Runs a server that is a program of its own, until this process is told to end."""

import os
import signal
import subprocess
from collections.abc import Sequence


def run(command: Sequence[str], **env: str) -> None:
    """Run it until SIGINT or SIGTERM, then send it SIGTERM, and wait until it has ended.

    env: environment variables to add.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = subprocess.Popen(command, env=os.environ | env)
    try:
        server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
