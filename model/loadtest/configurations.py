"""The configurations that the ladder compares, from a plain server to the fastest, and peers.

After the stock servers comes ours with what they have; from then on each configuration adds one
optimisation. Then two that do without Ray.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from model.loadtest.server_process import ServerProcess
from model.serving.machine import cores

N = min(cores(), 8)
PLAIN, STOCK, OURS = "model.basics.kserve_server", "model.loadtest.stock", "model.serving"
PEERS_FOLDER = Path(__file__).parents[2] / ".venv-peers"
WARMUP_S = 1.2
ONE_THREAD = MappingProxyType({"OMP_NUM_THREADS": "1"})  # torch's, a process


class Configuration(NamedTuple):
    """A server: its module, the options of its command line, and how it is run and loaded."""

    module: str
    options: str = ""
    env: Mapping[str, str] = MappingProxyType({})  # environment variables to add
    python: str | Path = sys.executable
    v2: bool = False  # whether it speaks V2 only
    warmup_s: float = WARMUP_S  # of each load

    @property
    def command(self) -> str:
        """As a user would type it."""
        variables = [f"{name}={value}" for name, value in self.env.items()]
        return " ".join([*variables, f"python -m {self.module}", *shlex.split(self.options)])

    def start(self) -> ServerProcess:
        """Start the server and wait until it is ready; errors as of ServerProcess."""
        options = shlex.split(self.options)
        return ServerProcess(self.module, *options, python=self.python, **self.env)


def peer_python(peer: str) -> Path:
    """The interpreter of a peer's environment, which model/loadtest/peers/setup.sh makes."""
    return PEERS_FOLDER / peer / "bin" / "python"


AS_STOCK = "--set memory_format=contiguous --access_log on"  # AlexNet's and KServe's own defaults
DEFAULT = "no access log: the default"
IN_EACH = "KServe in each replica"
IN_PROCESS = "in process with the batcher"
CONFIGURATIONS = {
    "plain": Configuration(PLAIN),
    "plain, one thread": Configuration(PLAIN, env=ONE_THREAD),
    f"plain, {N} workers": Configuration(PLAIN, f"--workers {N}", ONE_THREAD),
    "1 replica": Configuration(STOCK, "--num_replicas 1"),
    f"{N} replicas": Configuration(STOCK, f"--num_replicas {N}"),
    "64 requests at a replica": Configuration(
        STOCK, f"--num_replicas {N} --max_ongoing_requests 64"
    ),
    "our serving layer": Configuration(OURS, f"--batching off {AS_STOCK}"),
    "batches in the replica": Configuration(OURS, f"--batching replica {AS_STOCK}"),
    "one call a batch": Configuration(OURS, AS_STOCK),
    "channels last": Configuration(OURS, "--access_log on"),
    DEFAULT: Configuration(OURS),
    "bfloat16": Configuration(OURS, "--set precision=bfloat16"),
    IN_EACH: Configuration(OURS, "--topology ingress"),
    f"{IN_EACH}, bfloat16": Configuration(OURS, "--topology ingress --set precision=bfloat16"),
    IN_PROCESS: Configuration(OURS, "--in_process"),
    f"in process, {N} workers": Configuration(OURS, f"--in_process --workers {N}"),
}

ENVIRONMENTS = ("litserve", "bentoml", "mlserver", "triton")  # peers that need one of their own
ONLY_V2 = ("mlserver", "triton")
OPTIMIZED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # Ray Serve's own switch
BATCHES = "--max_batch_size 16 --batch_wait_ms"
LEARNS_S = 8.0  # BentoML finds out in so long how long its batches should wait


def peers(precision: str) -> dict[str, Configuration]:
    """Our two best, and other servers with the same network and as large batches.

    precision: float32 or bfloat16. How long a batch waits is 2 ms, as ours does at most; those that
    answer few or many clients better with another time have a line for each.
    """
    found = {
        "ours, KServe in front": Configuration(OURS, f"--set precision={precision}"),
        "ours, KServe in each replica": Configuration(
            OURS, f"--topology ingress --set precision={precision}"
        ),
    }
    for server, module, workers, more, wait_ms, env in (
        ("LitServe", "litserve", 1, "", 2, {}),
        ("LitServe", "litserve", N, "", 2, {}),
        ("BentoML", "bentoml", N, "", 2, {}),
        ("MLServer", "mlserver", N, ", 2 ms", 2, {}),
        ("MLServer", "mlserver", N, ", 10 ms", 10, {}),
        ("Triton", "triton", N, ", 0 ms", 0, {}),
        ("Triton", "triton", N, ", 2 ms", 2, {}),
        ("Ray Serve", "ray_serve", N, "", 2, OPTIMIZED),
        ("FastAPI", "fastapi", N, "", 2, {}),
    ):
        found[f"{server}, {workers} worker{'s' * (workers > 1)}{more}"] = Configuration(
            f"model.loadtest.peers.{module}_server",
            f"--workers {workers} --precision {precision} {BATCHES} {wait_ms}",
            MappingProxyType({"OMP_NUM_THREADS": str(max(1, cores() // workers))} | env),
            python=peer_python(module) if module in ENVIRONMENTS else sys.executable,
            v2=module in ONLY_V2,
            warmup_s=LEARNS_S if module == "bentoml" else WARMUP_S,
        )
    return {f"{name}, {precision}": configuration for name, configuration in found.items()}


PEERS = peers("float32") | peers("bfloat16")  # `make peers`
