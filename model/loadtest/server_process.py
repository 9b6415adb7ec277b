"""Starts a server as a user would, waits until it is ready, and stops all its processes."""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import psutil
import requests
from tqdm import tqdm

from model.serving.machine import WITH_PARENT, held_ports

READY_WITHIN_S = 120
STOP_WITHIN_S = 75  # model.serving gives what is in flight 61


class ServerProcess:
    """A running server process: `ServerProcess("model.serving", "--num_replicas", "2")`.

    It listens on free ports, logs to a file, and ends with `stop`, with the `with` block, or with
    this Python process, whichever comes first. `url` (http://host:port), `grpc` (host:port),
    `name` (of its first model), `predict` (the address of V1 predict) and `infer` (of V2's) are
    what a client needs.
    """

    def __init__(
        self,
        module: str,
        *options: str,
        python: str | Path = sys.executable,
        folder: str | Path | None = None,
        **env: str,
    ) -> None:
        """Start it and wait until the model is ready.

        options: of its command line. python: the interpreter to run it with. folder: the one to
        start it in; default: the current one. env: environment variables to add. Raises
        RuntimeError with the end of the log when the process ends early or the model is not ready
        within two minutes.
        """
        with held_ports(2) as (http_port, grpc_port):
            self.module, self.name = module, _model_name(options)
            self.url, self.grpc = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
            self.predict = f"{self.url}/v1/models/{self.name}:predict"
            self.infer = f"{self.url}/v2/models/{self.name}/infer"
            ports = ["--http_port", str(http_port), "--grpc_port", str(grpc_port)]
            handle, name = tempfile.mkstemp(prefix=f"{module}-", suffix=".log")
            self.log = Path(name)
            started = time.monotonic()
            with open(handle, "w") as log:
                self.process = psutil.Popen(
                    [*WITH_PARENT, python, "-m", module, *ports, *options],
                    cwd=folder,
                    env=os.environ | env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # an interrupt in the notebook is not for the server
                )
            self._end = weakref.finalize(self, _end, self.process, self.log)
            try:
                self._wait_until_ready()
            except BaseException:
                self.stop()
                raise
        self.seconds_to_ready = time.monotonic() - started

    def _wait_until_ready(self) -> None:
        bar = tqdm(desc=f"{self.module} starts", bar_format="{desc} {elapsed}", file=sys.stdout)
        with bar:
            deadline = time.monotonic() + READY_WITHIN_S
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise RuntimeError(f"{self.module} ended: {self._tail()}")
                with contextlib.suppress(requests.RequestException):
                    health = f"{self.url}/v2/models/{self.name}/ready"
                    if requests.get(health, timeout=5).status_code == 200 and self._all_there():
                        bar.set_description_str(f"{self.module} is ready after")
                        return
                bar.update()
                time.sleep(0.2)
        raise RuntimeError(f"{self.module} is not ready in {READY_WITHIN_S} s: {self._tail()}")

    def _all_there(self) -> bool:
        """Whether nothing of it is still to come: model.serving says so when all replicas serve."""
        return self.module != "model.serving" or "ready after" in self.log.read_text()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-15:])

    def processes(self) -> list[psutil.Process]:
        """The server's process and all its descendants."""
        return [self.process, *self.process.children(recursive=True)]

    def memory(self) -> int:
        """Bytes that all its processes take together; what they share is counted once.

        On Linux that is PSS; elsewhere what is shared is left out (USS).
        """
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                info = process.memory_full_info()
                total += getattr(info, "pss", info.uss)
        return total

    def stop(self) -> None:
        """SIGTERM, then wait until all its processes are gone; a second call does nothing."""
        self._end()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _model_name(options: tuple[str, ...]) -> str:
    """The name of the first model: NAME of an option NAME=MODULE:CLASS, or `--model_name`."""
    named = argparse.ArgumentParser(allow_abbrev=False)
    named.add_argument("--model_name", default="custom-model")
    named.add_argument("--set", action="append")  # KEY=VALUE, which is no model
    known, others = named.parse_known_args(options)
    models = (re.fullmatch(r"([^=:]+)=[\w.]+:\w+", option) for option in others)
    return next((model[1] for model in models if model), known.model_name)


def _end(process: psutil.Popen, log: Path) -> None:
    tree = _tree(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
    _, left = psutil.wait_procs(tree, timeout=STOP_WITHIN_S)
    for survivor in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(left, timeout=STOP_WITHIN_S)
    log.unlink(missing_ok=True)


def _tree(process: psutil.Popen) -> list[psutil.Process]:
    """The process, its descendants, and those left in its session when it has ended."""
    found = {process}
    with contextlib.suppress(psutil.NoSuchProcess):
        found |= set(process.children(recursive=True))
    for other in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(other.pid) == process.pid:
                found.add(other)
    return list(found)
