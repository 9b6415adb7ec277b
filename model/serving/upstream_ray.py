"""Every use of what Ray and Ray Serve call private, each with its reason and its upstream place.

tests/test_upstream.py fails when one of these places changes. Read in Ray 2.60.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray._private import auto_init_hook, parameter, ray_constants, services
from ray.serve._private import default_impl
from ray.serve._private import replica as serve_replica
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle

# The environment of a cluster that is not to be reached from other machines. Ray has the variable
# for Macs and Windows; there is no documented one.
STAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

ADD_ADDRESS = "add_grpc_address"
QUIET = ("ray._private.authentication", "ray._private.worker")


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for Ray in this block, and for the processes it starts there.

    Private: `ray._private.ray_constants.ENABLE_RAY_CLUSTER`, which Ray computes from
    STAY_ON_LOOPBACK's variable as it is imported, and that may have been long ago.
    """
    before, flag = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(variables)
    if STAY_ON_LOOPBACK.items() <= variables.items():
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = flag
        for name in variables:
            del os.environ[name]
        os.environ.update({name: before[name] for name in variables if name in before})


@contextmanager
def without_helpers() -> Iterator[None]:
    """In this block Ray starts no dashboard server, autoscaler monitor or log monitor.

    `ray.init` starts them even when no dashboard is wanted, and Serve uses none of them. The
    public way, `ray start --head --include-dashboard=false --include-log-monitor=false`, starts
    the dashboard's server too, beside a process of its own, and measured 7.7 s and 390 MB here
    where this takes 3 s and 75 MB.

    Private: `ray._private.parameter.RayParams`, `ray._private.services.start_api_server`.
    """
    params, start = parameter.RayParams, services.start_api_server
    parameter.RayParams = partial(params, no_monitor=True, include_log_monitor=False)
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = params, start


def never_start_by_itself() -> None:
    """Keep Ray from starting a cluster in a call that comes after `ray.shutdown`.

    Serve's threads go on for a moment then. Private: `auto_init_hook.enable_auto_connect`.
    """
    auto_init_hook.enable_auto_connect = False


def only_errors() -> None:
    """Silence what Ray logs of its token and, as it is not started in the main thread, of signals.

    Private: the names of its loggers.
    """
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def join(address: str, node: str | None, **more: Any) -> None:
    """`ray.init` through a node of one's choice, where several of a cluster are on this machine.

    Private: its argument `_node_ip_address`.
    """
    ray.init(address=address, _node_ip_address=node, **more)


def serve_runs() -> bool:
    """Whether Serve runs on the cluster joined; `serve.status` would start it to find out.

    Private: the name of Serve's controller and of its namespace.
    """
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def end_controller() -> None:
    """Kill Serve's controller: nothing that ends from now on is started again.

    Replicas and HAProxy go on without it. With it, a HAProxy that is ending would be found ill, be
    killed with what is in flight, and be started again. Private: as of `serve_runs`.
    """
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE))


def versioned(version: str) -> dict[str, Any]:
    """Options of a deployment that give it a version of our own.

    Ray makes up another one at each `serve.run`, and so replaces every replica also when only
    their number is to change. Private: `Deployment.options(version=…)` asks for `_internal`.
    """
    return {"version": version, "_internal": True}


def over_grpc(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle with arguments and results sent by gRPC from process to process.

    By default they go by way of Ray's object store, at more than twice the CPU time. Public is
    only the environment variable RAY_SERVE_USE_GRPC_BY_DEFAULT, which would count for all of a
    cluster's deployments. Private: the option `_by_reference`.
    """
    return handle.options(_by_reference=False)


def listen_on_loopback() -> None:
    """Keep off the network the ports that Ray Serve opens in each replica for calls by gRPC: of
    other replicas, and where it is an ingress, of clients.

    Serve listens on all addresses. Only where the cluster itself stays on loopback. Private:
    `ray.serve._private.replica.add_port_to_grpc_server`,
    `ray.serve._private.default_impl.add_grpc_address`.
    """
    if not os.environ.items() >= STAY_ON_LOOPBACK.items():
        return
    for module, name in ((serve_replica, "add_port_to_grpc_server"), (default_impl, ADD_ADDRESS)):
        add = getattr(module, name)
        if not getattr(add, "on_loopback", False):
            setattr(module, name, _on_loopback(add))


def _on_loopback(add: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def add_on_loopback(server: Any, address: str) -> Any:
        return add(server, address.replace("[::]", "127.0.0.1"))

    add_on_loopback.on_loopback = True
    return add_on_loopback
