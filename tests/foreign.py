"""A Ray cluster that is not ours, to see that it stays as it was."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from model.serving.machine import free_port
from tests.conftest import Traces, until


class ForeignRay:
    """A Ray cluster that someone else started on this machine with `ray start --head`."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="other-", dir="/tmp")  # short, for Ray's sockets
        self.traces = Traces(Path(self.folder))
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f0" * 32}
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        ray = Path(sys.executable).with_name("ray")
        options = f"--port={port} --temp-dir={self.folder} --num-cpus=2 --disable-usage-stats"
        options += " --include-dashboard=false --object-store-memory=100000000"
        subprocess.run(
            [ray, "start", "--head", *options.split()],
            env=os.environ | self.traces.env | self.env,
            check=True,
            capture_output=True,
            timeout=60,
        )
        self.processes = set(self.traces.processes())

    def serve_processes(self) -> list[str]:
        """The processes of Ray Serve on this cluster."""
        names = [process.name() for process in self.traces.processes()]
        return [name for name in names if name.startswith("ray::Serve")]

    def is_as_it_was(self) -> bool:
        """Every process of the start still runs, and nothing of Serve beside them."""
        until(lambda: not self.serve_processes())
        return self.processes <= set(self.traces.processes()) and not self.serve_processes()

    def end(self) -> None:
        """End its own processes; `ray stop` would end every Ray on the machine."""
        processes = self.traces.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
        shutil.rmtree(self.folder)
