"""Ray for as long as it is needed: a cluster of our own on loopback, or one that runs already."""

import atexit
import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import ray
from ray import serve

from model import SHARED_FOLDER
from model.serving.config import CannotStart, ClusterConfig, EndpointConfig
from model.serving.errors import reason
from model.serving.machine import process_age, ray_folder
from model.serving.upstream_ray import (
    STAY_ON_LOOPBACK,
    environment,
    join,
    never_start_by_itself,
    only_errors,
    serve_runs,
    without_helpers,
)

LOOPBACK = "127.0.0.1"
# The memory that a batch needed is kept for the next one: else the C library gives it back to the
# system and asks for it anew, page by page, for each batch. All threads take theirs from one heap:
# with several, each grows by what the others keep (GNU's library; others ignore this).
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_ARENA_MAX": "1",
}
# Where replicas report their queues: every second, not every ten, so that their number follows the
# load; a replica that fails the health check is killed at once, not asked to finish its work.
FAST_REACTIONS = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
# Ray starts its workers with the niceness 15: replicas would get a twenty-eighth of the time that
# any other busy process gets, and fail their health checks beside one.
NO_NICENESS = {"RAY_worker_niceness": "0"}
NO_METRICS = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
GRPC_SERVICE = (
    "kserve.protocol.grpc.grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
)
OBJECT_STORE_BYTES = 200 * 2**20  # requests and responses pass through; nothing is kept
# A batch of full-size requests fits into one message (gRPC's own default: 4 MB).
GRPC_MESSAGE_BYTES = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}


class Cluster:
    """This process's connection to Ray, from construction to `stop`; also a context manager.

    Without an address a cluster is started on loopback, apart from any other on the machine, and
    `stop` leaves nothing of it. With one that cluster is joined; `stop` leaves it running.
    """

    def __init__(self, config: ClusterConfig, applications: Iterable[str] = ()) -> None:
        """config: which cluster. applications: the names of the Serve applications that this
        process will run, and that `stop` deletes.

        Raises CannotStart when nobody answers at the address, when the cluster has an application
        of such a name, when this process is connected to Ray already, or when Ray itself fails.
        """
        if ray.is_initialized():
            raise CannotStart("this process is connected to Ray already: stop that cluster first")
        self._config, self._applications = config, tuple(applications)
        self._folder: Path | None = None
        self._joined, self._serve_was_there = False, True
        # Linux ends Ray's processes with the thread that started them, so it stays.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        atexit.register(self.stop)
        _one_heap()
        never_start_by_itself()
        only_errors()
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        try:
            _uninterrupted(self._thread, self._join if config.address else self._start)
        except BaseException as error:
            self.stop()
            if isinstance(error, CannotStart) or not isinstance(error, Exception):
                raise
            verb = "joined" if config.address else "started"
            raise CannotStart(f"Ray cannot be {verb}: {reason(error)}") from error

    def _join(self) -> None:
        quiet = dict(log_to_driver=False, logging_level=logging.WARNING)
        with environment(**_check_reachable(self._config.address)):
            join(self._config.address, self._config.node_address, **quiet)
        self._serve_was_there = serve_runs()
        running = serve.status().applications if self._serve_was_there else {}
        if taken := [name for name in self._applications if name in running]:
            raise CannotStart(
                f"an application {taken[0]!r} already runs on this Ray cluster: "
                "choose another --model_name"
            )
        self._joined = True
        _start_serve()

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Who has the token can run code on the cluster. Ray would keep one in the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self._folder = ray_folder()
        variables = dict.fromkeys(("TMPDIR", "RAY_TMPDIR", SHARED_FOLDER), str(self._folder))
        variables |= STAY_ON_LOOPBACK | KEEP_MEMORY | FAST_REACTIONS | GRPC_MESSAGE_BYTES
        variables |= NO_NICENESS
        lean = contextlib.nullcontext()
        if self._config.dashboard is None:
            variables, lean = variables | NO_METRICS, without_helpers()
        with environment(**variables), lean:
            join(
                "local",
                LOOPBACK,
                num_cpus=self._config.num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=self._config.dashboard is not None,
                dashboard_host=LOOPBACK,
                dashboard_port=self._config.dashboard,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        _start_serve(self._config.proxy, self._config.haproxy)

    @classmethod
    def announced(cls, config: ClusterConfig, applications: Iterable[str] = ()) -> "Cluster":
        """The same, with lines for the log that say when, where, and where replicas log to."""
        verb = "joining" if config.address else "starting"
        print(f"{verb} Ray after {process_age():.1f} s", flush=True)
        cluster = cls(config, applications)
        print(f"Ray at {cluster.address}, Serve on it after {process_age():.1f} s", flush=True)
        if cluster._folder:
            print(f"replicas log to {cluster._folder}/ray/session_latest/logs/serve", flush=True)
        return cluster

    @property
    def address(self) -> str:
        """Where other programs on this machine can join: host:port."""
        return ray.get_runtime_context().gcs_address

    def stop(self) -> None:
        """Leave the cluster; one of our own ends with all its processes and files."""
        atexit.unregister(self.stop)
        joined, self._joined = self._joined, False
        try:
            if joined:
                for name in self._applications:
                    serve.delete(name)
                if not self._serve_was_there and not serve.status().applications:
                    serve.shutdown()
        finally:
            ray.shutdown()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _uninterrupted(thread: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    """Call `work` in the thread and wait for its end, also when a signal raises meanwhile.

    A signal that interrupts Ray's start half way ends the process with a trace of C++: Ray's core
    takes over SIGTERM as it starts. So the handlers that count here are put back again and again.
    """
    main = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    job = thread.submit(work)
    try:
        while wait([job], timeout=0.02).not_done:
            restore()
    finally:
        wait([job])
        restore()
    job.result()


def _one_heap() -> None:
    """As MALLOC_ARENA_MAX of KEEP_MEMORY, for this process, which runs already."""
    with contextlib.suppress(AttributeError):  # it is not GNU's library
        ctypes.CDLL(None).mallopt(-8, 1)  # -8 is M_ARENA_MAX


def _check_reachable(address: str) -> dict[str, str]:
    """Refuse in seconds what Ray gives up after two minutes; `auto` finds a head by itself.

    Returns the environment to join with: a cluster that answers on loopback alone, as ours does,
    must be joined from there.
    """
    if address == "auto":
        return {}
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise CannotStart(f"--address {address}: give the host:port of a Ray cluster's head")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise CannotStart(f"no Ray cluster answers at {address} ({error})") from None
    if host not in (LOOPBACK, "localhost"):
        return {}
    try:
        outside = ray.util.get_node_ip_address()
        socket.create_connection((outside, int(port)), timeout=5).close()
    except OSError:
        return STAY_ON_LOOPBACK
    return {}


def _start_serve(proxy: int | None = None, haproxy: EndpointConfig | None = None) -> None:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if haproxy is not None:
        http = {"host": LOOPBACK, "port": haproxy.http_port}
        grpc = {"port": haproxy.grpc_port, "grpc_servicer_functions": [GRPC_SERVICE]}
        more = {"grpc_options": grpc} if haproxy.grpc_port is not None else {}
        serve.start(proxy_location="HeadOnly", http_options=http, **more)
    elif proxy is not None:
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": proxy})
    else:
        serve.start(proxy_location="Disabled")
