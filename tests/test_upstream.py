"""What model/ uses of others' private parts is still there; a failure says what upstream changed.

Where a public way has come, the test says so too. What KServe's RayModel leaves out is shown in
test_replica_pool.py, by the tests of "stock".
"""

import ast
import asyncio
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import ray
from kserve import InferInput
from ray import serve
from ray._private import auto_init_hook, node, parameter, ray_constants, services, worker
from ray.serve._private import constants as serve_constants
from ray.serve._private import grpc_util, haproxy_templates, http_util, replica
from ray.serve._private import haproxy as serve_haproxy
from ray.serve._private.handle_options import DynamicHandleOptions
from ray.serve.handle import DeploymentHandle

from model.serving import haproxy, ingress_connection, upstream_kserve, upstream_ray
from tests.conftest import ROOT


def parameters(function) -> set[str]:
    """The names of a function's parameters."""
    return set(inspect.signature(function).parameters)


def test_loopback_flag():
    """Ray reads its environment variable, and the flag made of it, where we set them."""
    [name] = upstream_ray.STAY_ON_LOOPBACK
    assert name == ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "Ray renamed the variable"
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), "Ray's flag is something else now"
    before, outside = ray_constants.ENABLE_RAY_CLUSTER, dict(os.environ)
    with upstream_ray.environment(**upstream_ray.STAY_ON_LOOPBACK, TEST_MARK="x"):
        assert os.environ[name] == "0" and os.environ["TEST_MARK"] == "x"
        found = services.get_node_ip_address()
    assert found == "127.0.0.1", "Ray's services no longer obey the flag"
    assert before == ray_constants.ENABLE_RAY_CLUSTER and outside == dict(os.environ)


def test_helpers_can_be_left_out():
    """`ray.init` makes its parameters and its dashboard by the names that we replace."""
    wanted = {"no_monitor", "include_log_monitor"}
    assert wanted <= parameters(parameter.RayParams), "RayParams lost one of its switches"
    init, start = inspect.getsource(worker.init), inspect.getsource(node.Node.start_api_server)
    assert "ray._private.parameter.RayParams(" in init, "ray.init makes its parameters otherwise"
    made = re.search(r"_webui_url, \w+ = ray\._private\.services\.start_api_server\(", start)
    assert made, "Ray's node starts the dashboard's server otherwise"
    before = parameter.RayParams, services.start_api_server
    with upstream_ray.without_helpers():
        params = parameter.RayParams()
        assert params.no_monitor and params.include_log_monitor is False
        assert services.start_api_server(True, port=1) == (None, None)
    assert before == (parameter.RayParams, services.start_api_server)


def test_ray_does_not_start_by_itself(monkeypatch):
    """The hook that starts a cluster in any call of Ray obeys our switch."""
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    started = []
    monkeypatch.setattr(ray, "init", lambda: started.append("by itself"))
    auto_init_hook.auto_init_ray()
    assert started, "Ray's hook starts a cluster in another way, or no longer"
    upstream_ray.never_start_by_itself()
    auto_init_hook.auto_init_ray()
    assert len(started) == 1, "Ray's hook no longer obeys the switch"


@pytest.mark.parametrize("name", ["_node_ip_address", "_temp_dir"])
def test_arguments_of_init(name):
    """`ray.init` takes them; it refuses those that it does not know by their names."""
    with pytest.raises(RuntimeError) as error:
        ray.init(address="local", _no_such_argument=1, **{name: "/x"})
    assert "_no_such_argument" in str(error.value), "ray.init refuses unknown arguments otherwise"
    assert name not in str(error.value), f"ray.init takes no {name} any more"
    assert name not in parameters(ray.init), f"ray.init's {name} is public now: use it"


@pytest.mark.parametrize("name", upstream_ray.QUIET)
def test_loggers(name):
    """Ray has modules of these names, by which its loggers go."""
    assert importlib.util.find_spec(name), "what Ray logs goes by another name"


def test_serve_is_found_by_its_controller():
    """Serve's own client looks for it by the same two names."""
    own = upstream_ray.SERVE_CONTROLLER_NAME, upstream_ray.SERVE_NAMESPACE
    assert own == (serve.context.SERVE_CONTROLLER_NAME, serve.context.SERVE_NAMESPACE)
    wanted = r"ray\.get_actor\(\s*SERVE_CONTROLLER_NAME,\s*namespace=SERVE_NAMESPACE"
    found = re.search(wanted, inspect.getsource(serve.context))
    assert found, "Serve finds its controller otherwise"


def test_a_version_of_our_own():
    """A deployment takes one with `_internal`, and from others it does not."""

    @serve.deployment
    class Any:
        """Anything."""

    made = Any.options(**upstream_ray.versioned("of-ours"))
    assert made.version == "of-ours", "Deployment.options(version=...) no longer sets it"
    with pytest.raises(ValueError, match="version"):  # else: it is public now, use it
        Any.options(version="of-ours")


def test_calls_by_grpc():
    """A handle says how it sends its arguments; by default by the object store."""
    assert "_by_reference" in parameters(DeploymentHandle.options), "the option has another name"
    assert DynamicHandleOptions()._by_reference, "gRPC is the default now: over_grpc can go"
    changed = DynamicHandleOptions().copy_and_update(_by_reference=False)
    assert changed._by_reference is False


def test_replicas_listen_on_loopback(monkeypatch):
    """Serve opens a replica's port by the function that we replace, on all addresses."""
    opened = re.findall(r"add_port_to_grpc_server\((.*)\)", inspect.getsource(replica))
    assert opened == ['self._server, "[::]:0"'], "Serve opens a replica's port otherwise"
    assert list(inspect.signature(replica.add_port_to_grpc_server).parameters) == [
        "server",
        "address",
    ], "Serve's function takes other arguments"
    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)
    for name, value in upstream_ray.STAY_ON_LOOPBACK.items():
        monkeypatch.setenv(name, value)
    upstream_ray.listen_on_loopback()
    upstream_ray.listen_on_loopback()  # a second replica in this process changes nothing
    server = grpc.server(ThreadPoolExecutor(1))
    port = replica.add_port_to_grpc_server(server, "[::]:0")
    server.start()
    try:
        found = [c.laddr for c in psutil.Process().connections() if c.laddr.port == port]
        assert {at.ip.removeprefix("::ffff:") for at in found} == {"127.0.0.1"}
    finally:
        server.stop(None)


def test_an_ingress_listens_on_loopback():
    """Serve opens its port for gRPC by the function that we replace; HAProxy's as we rewrite it."""
    opened = re.findall(r"add_grpc_address\((.*)\)", inspect.getsource(grpc_util))
    assert opened == ['server, f"[::]:{grpc_options.port}"'], "Serve opens the port otherwise"
    binds = re.findall(r"^ *bind (.*)", haproxy_templates.HAPROXY_CONFIG_TEMPLATE, re.M)
    everywhere = [bind for bind in binds if bind.startswith((":", "*:"))]
    assert len(everywhere) == 2, f"HAProxy listens otherwise: {binds}"


def test_ray_shares_ports_for_grpc():
    """It means to open that of a replica for one process, and says so to gRPC in a string."""
    source = inspect.getsource(grpc_util.start_grpc_server)
    shared = '("grpc.so_reuseport", str(int(enable_so_reuseport)))' in source
    assert shared, "Ray may open them for one process now: haproxy.py has half a reason less"


def test_haproxy_answers_as_we_rewrite_it():
    """Serve names a file for each answer of HAProxy's own, and that says 500."""
    files = re.findall(r"^ *errorfile (\d+) ", haproxy_templates.HAPROXY_CONFIG_TEMPLATE, re.M)
    assert files == ["502", "503", "504"], f"HAProxy answers otherwise: {files}"


def test_what_else_we_rewrite_of_haproxy():
    """sed says nothing when a line is not there."""
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    assert len(re.findall(r"^ *log .* local0 ", template, re.M)) == 1, "it logs otherwise"
    assert "timeout client {{ config.timeout_client_s }}" in template, "clients have other limits"
    fronts = re.findall(r"bind \{\{ config\.(\w+) \}\}:\{\{ config\.(\w+) \}\}", template)
    hosts = [("frontend_host", "frontend_port"), ("grpc_frontend_host", "grpc_frontend_port")]
    assert fronts == hosts, f"HAProxy's frontends listen otherwise: {fronts}"


def test_haproxy_names_applications():
    """Ray Serve gives HAProxy's backends the names in which haproxy.servers looks for them."""
    source = inspect.getsource(serve_haproxy.HAProxyManager._generate_backend_name)
    name = "{target_group.protocol.value.lower()}-{target_group.app_name}"
    assert name in source, "HAProxy's backends are called otherwise"


def test_haproxy_has_the_variables():
    """Ray Serve reads each of those that we set."""
    names = set(haproxy.PORTS) | set(ingress_connection.HOOK)
    names |= set(haproxy._ports_of_replicas(range(9)))
    source = inspect.getsource(serve_constants)
    names |= set(re.findall(r'"(RAY_SERVE_\w+)":', inspect.getsource(haproxy)))
    names |= {"RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S"}  # which a test slows down
    assert len(names) > 15
    assert [name for name in sorted(names) if f'"{name}"' not in source] == []


def test_ray_hands_over_connections():
    """It knows the header that our middleware sets, and calls what the variable names."""
    header = ingress_connection.HEADER
    assert serve_constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode() == header
    [added] = http_util.validate_http_proxy_callback_return(ingress_connection.middlewares())
    scope = {"type": "http", "headers": [(header, b"?0")]}

    async def app(scope, receive, send):
        assert http_util.parse_disconnect_disabled_header(dict(scope["headers"]))

    asyncio.run(added.cls(app, **added.kwargs)(scope, None, None))


def dynamo_after(statement: str) -> bool:
    """Whether torch's compiler is loaded after an import, in a process of its own."""
    code = f"import sys; {statement}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.strip() == "True"


def test_torchvision_without_the_compiler():
    """torchvision asks torch's compiler one question as it is imported; our import answers it."""
    assert dynamo_after("import torchvision.models"), "torchvision asks no more: vision.py can go"
    assert not dynamo_after("import model.alexnet.vision"), "torchvision asks in another place"


def test_where_an_input_keeps_its_data():
    """BinaryInput makes the list only when it is asked for."""
    given = InferInput("x", [2], "FP32", [1.0, 2.0])
    assert (given._data, given._raw_data) == ([1.0, 2.0], None), "KServe keeps them elsewhere"
    read = upstream_kserve.BinaryInput(given, np.array([3, 4], np.float32).tobytes())
    assert read.as_numpy().tolist() == [3, 4] and read._unlisted
    assert read.data == [3, 4] and not read._unlisted, "KServe asks otherwise for the list"


FOREIGN = ("ray", "kserve", "torch", "torchvision", "uvicorn", "grpc", "fastapi", "starlette")
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of named tuples, and os._exit
WITH_PRIVATE_USES = {"upstream_ray.py", "upstream_kserve.py", "vision.py"}


def private_uses(code: str) -> list[str]:
    """What a module uses of others that begins with an underscore.

    Modules, attributes and keyword arguments; also where a name stands in a text, as for
    importlib, logging or mock.
    """
    tree, found = ast.parse(code), []
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef)}
    targets = [n for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Store)]
    own |= {getattr(n, "attr", None) or getattr(n, "id", None) for n in targets} | PUBLIC
    own |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in n.kwonlyargs}
    for each in ast.walk(tree):
        names = []
        if isinstance(each, ast.Import):
            names = [alias.name for alias in each.names]
        elif isinstance(each, ast.ImportFrom):
            names = [f"{each.module}.{alias.name}" for alias in each.names]
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            names = re.findall(rf"^(?:{'|'.join(FOREIGN)})\.[\w.]+", each.value)
        elif isinstance(each, ast.Attribute):
            names = [f".{each.attr}"]
        elif isinstance(each, ast.keyword) and each.arg:
            names = [f".{each.arg}"]
        for name in names:
            parts = [part for part in name.split(".") if re.match(r"_(?!_)\w", part)]
            if set(parts) - own:
                found.append(f"line {getattr(each, 'lineno', '?')}: {name}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import ray._private.services",
        "from ray import _private",
        "from ray.serve._private import replica",
        "from ray._raylet import GcsClient",
        "import ray; ray._raylet",
        "import ray; ray.init(_temp_dir='x')",
        "import kserve.model_server as m; m.app._state",
        "mock.patch('ray._private.services.start')",
        "logging.getLogger(f'ray._private.{name}')",
    ],
)
def test_a_private_use_is_found(code):
    """In each of its forms."""
    assert private_uses(code)


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n def __init__(self):\n  self._x = 1\n def of(self, other):\n  return other._x",
        "from a import b; b.__name__; b.name._replace(x=1)",
        "import ray.serve; ray.serve.run(app)",
    ],
)
def test_what_is_ones_own_is_not_private(code):
    """Nor what only looks so."""
    assert not private_uses(code)


MODULES = [p for p in sorted((ROOT / "model").rglob("*.py")) if p.name not in WITH_PRIVATE_USES]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_uses_are_in_their_own_files(path: Path):
    """Each has there its reason, and here its test."""
    assert private_uses(path.read_text()) == []
