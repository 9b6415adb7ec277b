"""Ray for as long as it is needed: a cluster of our own on loopback, or one that runs already."""

import argparse
import atexit
import contextlib
import ctypes
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import ray
from ray import serve
from ray._private import auto_init_hook, ray_constants
from ray._private.services import get_node_ip_address
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from model import SHARED, STAY_ON_LOOPBACK, CannotStart
from model.options import age, cores

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
# load; who fails the health check is ended at once, not asked to finish what it will not finish.
PROMPT = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
NOT_COUNTED = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
OBJECT_STORE_BYTES = 200 * 2**20  # requests and answers pass through; nothing is kept


class Cluster:
    """This process's connection to Ray, from construction to `stop`; also a context manager.

    Without `address` a cluster is started on loopback, apart from any other on the machine, and
    `stop` leaves nothing of it. With `address` that cluster is joined; `stop` leaves it running.
    """

    def __init__(
        self,
        num_cpus: int | None = None,
        address: str | None = None,
        application: str | None = None,
        dashboard: int | None = None,
        proxy: int | None = None,
        node: str | None = None,
    ) -> None:
        """num_cpus: what replicas may reserve of a new cluster, in all.

        address: of the cluster to join. application: the name of the Serve application that this
        process will run, and that `stop` deletes; CannotStart when the cluster has one of that
        name. dashboard, proxy: the ports of Ray's dashboard and of Serve's own HTTP proxy on a
        new cluster, 0 for any free one; None: not started. node: the address of the node to join
        through, where several of the cluster are on this machine; default: its head, if it is here.
        """
        if ray.is_initialized():
            raise CannotStart("this process is connected to Ray already: stop that cluster first")
        self._folder, self._application, self._serve_was_there = None, application, True
        self._joined = False
        atexit.register(self.stop)
        _one_heap()
        # Serve's threads go on for a moment after `stop`; a call by them would start Ray anew.
        auto_init_hook.enable_auto_connect = False
        quiet = dict(log_to_driver=False, logging_level=logging.WARNING)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        try:
            if address:
                with _environment(**_check_reachable(address)):
                    ray.init(address=address, _node_ip_address=node, **quiet)
                self._serve_was_there = _serve_runs()
                if self._serve_was_there and application in serve.status().applications:
                    raise CannotStart(
                        f"an application {application!r} already runs on this Ray cluster: "
                        "choose another --model_name"
                    )
                self._joined = True
                _start_serve(None)
                return
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Who has the token can run code on the cluster. Ray would keep one in the home folder.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            # Ray's sockets lie in this folder, and their paths must stay short.
            self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
            environment = {"TMPDIR": self._folder, SHARED: self._folder}
            environment |= STAY_ON_LOOPBACK | KEEP_MEMORY | PROMPT
            lean = contextlib.nullcontext()
            if dashboard is None:
                environment, lean = environment | NOT_COUNTED, _only_what_is_needed()
            with _environment(**environment), lean:
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=dashboard is not None,
                    dashboard_host=LOOPBACK,
                    dashboard_port=dashboard,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=self._folder,
                    **quiet,
                )
            _start_serve(proxy)
        except BaseException:
            self.stop()
            raise

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Cluster":
        """The cluster that the options of `model.ray_server` ask for."""
        joins = "joining Ray" if args.address else "starting Ray"
        print(f"{joins} after {age():.1f} s", flush=True)
        cluster = cls(
            cores(),
            args.address,
            args.model_name,
            args.dashboard,
            args.proxy,
            args.node_address,
        )
        print(f"Ray at {cluster.address}, Serve on it after {age():.1f} s", flush=True)
        if cluster._folder:
            print(f"replicas log to {cluster._folder}/session_latest/logs/serve", flush=True)
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
                if self._application:
                    serve.delete(self._application)
                if not self._serve_was_there and not serve.status().applications:
                    serve.shutdown()
        finally:
            ray.shutdown()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _why_not_deployed(self) -> str | None:
        """What a replica of our application raised as it was made; None when that is not it.

        `serve.run` itself says only which deployment failed.
        """
        application = serve.status().applications.get(self._application)
        for deployment in application.deployments.values() if application else ():
            if deployment.status == "DEPLOY_FAILED":
                raised = re.findall(r"^\S*(?:Error|CannotStart): (.*)", deployment.message, re.M)
                return raised[-1] if raised else deployment.message
        return None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        cause = self._why_not_deployed() if isinstance(error, RuntimeError) else None
        self.stop()
        if cause:
            raise CannotStart(cause) from error


def _one_heap() -> None:
    """As MALLOC_ARENA_MAX of KEEP_MEMORY, for this process, which runs already."""
    with contextlib.suppress(AttributeError):  # it is not GNU's library
        ctypes.CDLL(None).mallopt(-8, 1)  # -8 is M_ARENA_MAX


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for Ray in this block, and for the processes it starts there."""
    before, flag = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(variables)
    if STAY_ON_LOOPBACK.items() <= variables.items():
        ray_constants.ENABLE_RAY_CLUSTER = False  # in this process ray has read it already
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = flag
        for name in variables:
            del os.environ[name]
        os.environ.update({name: before[name] for name in variables if name in before})


@contextmanager
def _only_what_is_needed() -> Iterator[None]:
    """In this block Ray starts no dashboard, autoscaler monitor or log monitor.

    `ray.init` starts them even when it is told that no dashboard is wanted: 190 MB, and seconds
    until they have imported what they need. Serve uses none of them.
    """
    params = partial(ray._private.parameter.RayParams, no_monitor=True, include_log_monitor=False)
    services = "ray._private.services.start_api_server"
    with (
        mock.patch("ray._private.parameter.RayParams", params),
        mock.patch(services, return_value=(None, None)),
    ):
        yield


def _serve_runs() -> bool:
    """Whether the cluster joined has Serve on it."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


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
        socket.create_connection((get_node_ip_address(), int(port)), timeout=5).close()
    except OSError:
        return STAY_ON_LOOPBACK
    return {}


def _start_serve(proxy: int | None) -> None:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if proxy is None:
        serve.start(proxy_location="Disabled")
    else:
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": proxy})
