"""The command lines: defaults, models and their arguments, help, one sentence for what is wrong."""

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.alexnet.model import AlexNetModel
from model.serving import cli
from model.serving.config import CannotStart, ModelConfig, ServerConfig
from model.serving.deployment import application
from model.serving.http_server import uvicorn_config
from model.serving.machine import cores, free_port
from model.serving.model_class import make_model
from model.serving.server import _loop_factory
from tests.conftest import run

CLUSTER = "10.0.0.1:6379"
MODULES: dict[str, Callable[[list[str]], ServerConfig]] = {
    "model.serving": cli.server_config,
    "model.serving.frontend": cli.frontend_config,
    "model.serving.redeploy": lambda argv: cli.redeploy_config(["--address", CLUSTER, *argv])[0],
}
LISTENING = ["model.serving", "model.serving.frontend"]
TINY = "tests.tiny_models:Tiny"
ALL = pytest.mark.parametrize("module", MODULES)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing set that the options read."""
    for name in ("MODEL_WEIGHTS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def config(*argv: str, module: str = "model.serving") -> ServerConfig:
    """What a command makes of its options, on free ports unless argv names others."""
    ports = f"--http_port {free_port()} --grpc_port {free_port()}".split()
    return MODULES[module]([*ports, *argv])


@ALL
def test_defaults(module):
    """The documented name and address; gRPC is on; no line a request; nobody unloads a model."""
    found = config(module=module)
    [model], endpoint, offers = found.models, found.endpoint, found.application
    assert model.name == "custom-model" and model.arguments == ()
    assert model.target == "model.alexnet.model:AlexNetModel"
    assert (endpoint.host, endpoint.workers) == ("127.0.0.1", 1) and endpoint.grpc_port
    assert not (offers.access_log or offers.latency_log or offers.repository_api)
    assert (found.batching.where, found.batching.max_size) == ("frontend", 16)
    assert found.limits.max_queued_requests == 256


@ALL
def test_one_limit_for_both_protocols(module):
    """64 MB unless told otherwise, over gRPC too unless KServe's own option says another."""
    for typed, rest, grpc in (
        ("", 64, 64 * 2**20),
        ("--max_body_mb 0.5", 0.5, 2**19),
        ("--max_body_mb 2 --grpc_max_receive_message_length 7", 2, 7),
    ):
        found = config(*typed.split(), module=module)
        assert (found.limits.max_body_mb, found.endpoint.grpc_max_receive_bytes) == (rest, grpc)


def test_defaults_follow_the_cores(monkeypatch):
    """A replica for every core up to 8, which share the cores; threads follow."""
    for there, replicas, cpus, threads in ((1, 1, 1, 1), (2, 2, 1, 1), (20, 8, 2, 2)):
        monkeypatch.setattr(cli, "cores", lambda there=there: there)
        found = config()
        assert (found.replicas.num_replicas, found.replicas.cpus) == (replicas, cpus)
        assert found.threads == threads and found.cluster.num_cpus == there
        assert config("--in_process").threads == there
        assert config("--in_process", "--workers", "2").threads == max(1, there // 2)
    assert config("--threads", "3").threads == config("--in_process", "--threads", "3").threads == 3


def test_several_models_share_the_cores(monkeypatch):
    """Each gets its part of them, and the whole fits."""
    monkeypatch.setattr(cli, "cores", lambda: 8)
    found = config(f"a={TINY}", "b=model.alexnet.model:AlexNetModel")
    assert (found.replicas.num_replicas, found.replicas.cpus) == (4, 1)
    assert [model.name for model in found.models] == ["a", "b"]
    found = config("--topology", "ingress", f"a={TINY}", "b=model.alexnet.model:AlexNetModel")
    assert (found.replicas.num_replicas, found.replicas.cpus) == (8, 1)  # each has both models


def test_more_replicas_than_cores_share_them():
    """Asked for explicitly, replicas get an equal part of the cores, and fit."""
    found = config("--num_replicas", str(3 * cores()))
    assert found.replicas.cpus == 0.33 and found.threads == 1


def test_autoscaling_is_a_number_that_is_not_given():
    """`auto`: as the load asks for, between two numbers."""
    found = config("--num_replicas", "auto", "--max_replicas", "2", "--cpus_per_replica", "0.5")
    assert found.replicas.num_replicas is None
    assert (found.replicas.min_replicas, found.replicas.max_replicas) == (1, 2)


def test_timeouts_follow_that_of_a_request():
    """An attempt gets a third of it; the watchdog waits for all of it, not for an attempt's part.

    A replica at work on a long step is busy, not stuck.
    """
    for typed, request, attempt, watchdog in (
        ("", 60, 20, 60),
        ("--request_timeout_s 9", 9, 3, 9),
        ("--request_timeout_s 9 --per_attempt_timeout_s 1", 9, 1, 9),
        ("--watchdog_timeout_s 5", 60, 20, 5),
    ):
        limits = config(*typed.split()).limits
        assert limits.request_timeout_s == request
        assert (limits.per_attempt_timeout_s, limits.watchdog_timeout_s) == (attempt, watchdog)


def test_joining_a_cluster_does_not_count_our_cores(monkeypatch):
    """With --address the cluster's own cores count, not this machine's."""
    many = ["--num_replicas", "100", "--cpus_per_replica", "4"]
    assert config("--address", CLUSTER, *many).replicas.num_replicas == 100
    for there in (1, 20):
        monkeypatch.setattr(cli, "cores", lambda there=there: there)
        assert config("--address", CLUSTER, "--num_replicas", "3").replicas.cpus == 1
        assert config("--num_replicas", "3", module="model.serving.redeploy").replicas.cpus == 1


def test_the_environment(monkeypatch):
    """RAY_ADDRESS is as --address."""
    monkeypatch.setenv("RAY_ADDRESS", CLUSTER)
    assert config().cluster.address == CLUSTER
    assert config("--in_process").replicas is None
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert config().cluster.address is None
    assert config(module="model.serving.frontend").cluster.address == "auto"


def test_models_and_their_arguments():
    """NAME=MODULE:CLASS as often as wished; without a name it is --model_name."""
    [model] = config(TINY, "--model_name", "mine", "--set", "folder=/a=b.c").models
    assert model == ModelConfig("mine", TINY, (("folder", "/a=b.c"),), str(Path.cwd()))
    [model] = config(f"own={TINY}", "--set", "own.folder=x", "--set", "folder=y").models
    assert (model.name, model.arguments) == ("own", (("folder", "x"), ("folder", "y")))
    a, b = config(f"a={TINY}", f"b={TINY}", "--set", "b.folder=x").models
    assert (a.arguments, b.arguments) == ((), (("folder", "x"),))


def test_a_redeployment_keeps_the_class_unless_it_is_named():
    """The command line says which models were named, and whether they are to be loaded again."""
    join = ["--address", CLUSTER]
    assert cli.redeploy_config(join)[1:] == (False, False)
    assert cli.redeploy_config([*join, TINY, "--reload"])[1:] == (True, True)


WRONG_FOR_ALL = {  # what is typed: what the sentence must name
    "--http_port abc": "--http_port",
    "--threads 0": "--threads",
    "--threads many": "--threads",
    "--no_such_option 1": "--no_such_option",
    "--thread 2": "--thread",
    "--max_body_mb 0": "--max_body_mb",
    "--max_body_mb nan": "--max_body_mb",
    "--repository_api maybe": "--repository_api",
    "--access_log 1": "--access_log",
    "--batching server": "--batching",
    "--max_batch_size 0": "--max_batch_size",
    "--batch_wait_ms -1": "--batch_wait_ms",
    "--workers 2": "--num_replicas",
    "--workers 0": "--workers",
    "--workers -1": "--workers",
    "--max_threads 4": "--max_threads has no effect",
    "--topology ingress --event-loop uvloop": "--topology",
    "--max_asyncio_workers 2": "--max_asyncio_workers has no effect",
    "--num_replicas 0": "--num_replicas",
    "--num_replicas two": "--num_replicas",
    "--num_replicas auto --min_replicas 3 --max_replicas 2": "--max_replicas",
    "--target_requests 0": "--target_requests",
    "--cpus_per_replica 0": "--cpus_per_replica",
    "--cpus_per_replica nan": "--cpus_per_replica",
    "--gpus_per_replica -1": "--gpus_per_replica",
    "--max_ongoing_requests 0": "--max_ongoing_requests",
    "--max_queued_requests 0": "--max_queued_requests",
    "--request_timeout_s 0": "--request_timeout_s",
    "--request_timeout_s nan": "--request_timeout_s",
    "--request_timeout_s inf": "--request_timeout_s",
    "--per_attempt_timeout_s 0": "--per_attempt_timeout_s",
    "--watchdog_timeout_s 0": "--watchdog_timeout_s",
    f"--dashboard --address {CLUSTER}": "--address",
    f"--proxy 8000 --address {CLUSTER}": "--address",
    "--dashboard 99999": "--dashboard",
}
WRONG_FOR_LISTENERS = {
    "--http_port 99999": "99999",
    "--grpc_port -5": "-5",
    "--host not.a.host.invalid": "not.a.host.invalid",
    "--dispatch_rule greedy": "MODULE:FUNCTION",
    "--dispatch_rule no_such_module:greedy": "no_such_module",
    "--dispatch_rule math:no_such_function": "no_such_function",
}
WRONG_FOR_A_SERVER = {
    "--num_replicas 2 --cpus_per_replica 1000": "--num_replicas",
    "--in_process --num_replicas 2": "--num_replicas",
    "--in_process --workers 0": "--workers",
    "--in_process --workers -1": "--workers",
    "--in_process --watchdog_timeout_s 2": "--watchdog_timeout_s",
    f"--in_process --address {CLUSTER}": "--address",
    "--in_process --batching replica": "--batching",
    "--topology ingress --in_process": "--topology is for replicas",
    f"--topology ingress --address {CLUSTER}": "--topology ingress starts a cluster",
    "--topology ingress --ssl_certfile README.md --ssl_keyfile README.md": "does not speak TLS",
}
WRONG_MODELS = {
    "tiny": "MODULE:CLASS",
    "tests.tiny_models:": "MODULE:CLASS",
    "tests/tiny_models.py:Tiny": "MODULE:CLASS",
    "tests.tiny_models.py:Tiny": "tests.tiny_models:Tiny",
    "no_such_module:Tiny": "no_such_module",
    f"={TINY}": "name",
    f"a/b={TINY}": "a/b",
    f"{TINY} {TINY}": "NAME=",
    f"a={TINY} a=tests.tiny_models:Busy": "same name",
    f"{TINY} --set folder": "KEY=VALUE",
    f"{TINY} --set =x": "KEY=VALUE",
    f"a={TINY} --set b.folder=x": "b",
    f"a={TINY} b={TINY} --set folder=x": "NAME.KEY",
}
WRONG = [(module, typed, names) for module in MODULES for typed, names in WRONG_FOR_ALL.items()]
WRONG += [(m, typed, names) for m in LISTENING for typed, names in WRONG_FOR_LISTENERS.items()]
WRONG += [("model.serving", typed, names) for typed, names in WRONG_FOR_A_SERVER.items()]
WRONG += [("model.serving.frontend", "--topology ingress", "leave it out")]
WRONG += [
    (module, typed, names)
    for module in ("model.serving", "model.serving.redeploy")
    for typed, names in WRONG_MODELS.items()
]


def refusal(module: str, *argv: str) -> str:
    """The one sentence that Python prints to stderr as the command exits with status 1."""
    with pytest.raises(SystemExit) as exit:
        config(*argv, module=module)
    assert isinstance(exit.value.code, str)
    assert re.fullmatch(rf"python -m {module}: [^\n]{{10,250}}", exit.value.code)
    return exit.value.code


@pytest.mark.parametrize(("module", "typed", "names"), WRONG)
def test_a_wrong_option_gets_one_sentence(module, typed, names):
    """It names the option that is wrong, or the one that helps."""
    assert names in refusal(module, *typed.split())


def test_an_access_log_needs_a_package(monkeypatch):
    """The sentence says which, before anything starts; with it, KServe's option counts."""
    typed = ["--access_log_format", "%(message)s"]
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "pip install 'kserve[logging]'" in refusal("model.serving", *typed)
    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    assert config(*typed).application.access_log_format == "%(message)s"


def test_a_redeployment_needs_the_address():
    """The sentence says where to find it."""
    with pytest.raises(SystemExit) as exit:
        cli.redeploy_config([])
    assert "--address" in exit.value.code and "log" in exit.value.code


@pytest.mark.parametrize("module", LISTENING)
def test_one_port_for_both_protocols(module):
    """HTTP and gRPC cannot share a port."""
    port = str(free_port())
    assert "--grpc_port" in refusal(module, "--http_port", port, "--grpc_port", port)


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        yield str(somebody.getsockname()[1])


@pytest.mark.parametrize("option", ["--http_port", "--grpc_port"])
@pytest.mark.parametrize("module", LISTENING)
def test_a_taken_port(module, option, taken):
    """The sentence names the port and the option to choose another with."""
    sentence = refusal(module, option, taken)
    assert taken in sentence and sentence.count(option) == 1


@pytest.mark.parametrize(
    "argv", [["model.serving"], ["model.serving", "--in_process"], ["model.serving.frontend"]]
)
def test_a_refusal_as_a_user_sees_it(argv, taken):
    """Status 1, one line on stderr, nothing on stdout."""
    ended = run(*argv, "--grpc_port", taken)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and taken in ended.stderr


LISTED = {"--http_port", "--grpc_port", "--model_name", "--workers"}
LISTED |= {"--enable_grpc", "--ssl_certfile", "--host", "--set", "--threads", "--batching"}
LISTED |= {"--max_body_mb", "--repository_api", "--access_log", "--max_queued_requests"}
LISTED |= {"--num_replicas", "--cpus_per_replica", "--gpus_per_replica", "--max_ongoing_requests"}
LISTED |= {"--request_timeout_s", "--per_attempt_timeout_s", "--watchdog_timeout_s"}
LISTED |= {"--address", "--dashboard", "--proxy"}
OWN = {"model.serving": {"--in_process"}, "model.serving.redeploy": {"--reload"}}


@ALL
def test_help_lists_the_options(module):
    """KServe's own options and ours, and only those that the command obeys."""
    shown = run(module, "--help").stdout
    listed = {word for word in shown.replace("]", " ").split() if word.startswith("--")}
    assert listed >= LISTED | OWN.get(module, set())
    assert not listed & set().union(*OWN.values()) - OWN.get(module, set())
    assert "--max_asyncio_workers" not in listed
    text = " ".join(shown.split())
    assert "uvloop if available" not in text and "cannot load it again" in text
    assert "(default: None)" not in text
    assert not re.search(r"\(default: [^)]*\) \(default:", text), "a default is told twice"


def test_options_of_a_config_file():
    """Those of Ray Serve's config files are the same, without dashes; what is wrong is told."""
    found = cli.application_config(
        {"model": TINY, "name": "tiny", "set": {"folder": "x", "n": [1, None]}, "num_replicas": 100}
    )
    [model] = found.models
    assert (model.name, model.target) == ("tiny", TINY)
    assert model.arguments == (("folder", "x"), ("n", "[1, null]"))
    assert found.replicas.num_replicas == 100 and found.replicas.cpus == 1
    [model] = cli.application_config({}).models
    assert (model.name, model.target) == ("custom-model", "model.alexnet.model:AlexNetModel")
    for args, part in (
        ({"replicas": 2}, "replicas"),
        ({"num_replicas": 0}, "from 1 on"),
        ({"model": "no_such_module:Tiny"}, "no_such_module"),
        ({"topology": "ingress"}, "leave it out"),
    ):
        with pytest.raises(ValueError, match=part):
            application(args)


def alexnet(**arguments: str) -> ModelConfig:
    """AlexNet, made with what was given as `--set KEY=VALUE`."""
    return ModelConfig("x", arguments=tuple(arguments.items()))


def test_arguments_reach_the_model():
    """Those of AlexNet; without any they are the class's own."""
    assert AlexNetModel("x").max_pixels == 50_000_000
    model = make_model(alexnet(max_pixels="7", precision="bfloat16", device="cpu"))
    assert (model.max_pixels, model.device, str(model.dtype)) == (7, "cpu", "torch.bfloat16")


@pytest.mark.parametrize(
    ("argument", "value", "part"),
    [("device", "tpu", "'auto', 'cpu' or 'cuda'"), ("max_pixels", "1e6", "integer")],
)
def test_a_wrong_argument(argument, value, part):
    """The sentence names it, and what it may be."""
    with pytest.raises(CannotStart, match=f"--set {argument}={value}: .*{part}"):
        make_model(alexnet(**{argument: value}))


def test_unknown_weights(monkeypatch):
    """MODEL_WEIGHTS that are unknown: the sentence names those that are known; empty is as none."""
    monkeypatch.setenv("MODEL_WEIGHTS", "")
    assert AlexNetModel("x").weights == "shapes"
    ended = run("model.serving", "--in_process", MODEL_WEIGHTS="resnet")
    assert ended.returncode == 1
    sentence = ended.stderr.splitlines()[-1]
    assert "resnet" in sentence and "shapes" in sentence and "imagenet" in sentence


def test_a_free_port_stays_free():
    """It is below those that the system gives to connections, and a server can take it at once."""
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")  # only Linux has it
    first = int(file.read_text().split()[0]) if file.exists() else 49152
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and max(ports) < first
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.pop()))


@pytest.mark.parametrize(
    ("typed", "kind"),
    [("", asyncio.SelectorEventLoop), ("asyncio", asyncio.SelectorEventLoop), ("uvloop", None)],
)
def test_the_event_loop_is_the_same_with_workers(typed, kind):
    """Python's own unless uvloop is asked for, in the only process and in each of several."""
    options = ["--event-loop", typed] if typed else []
    endpoint = config("--in_process", "--workers", "2", *options).endpoint
    kind = kind or pytest.importorskip("uvloop").Loop
    workers = uvicorn_config("x:y", endpoint, 1, workers=2).get_loop_factory()
    for make in (workers, _loop_factory(endpoint.event_loop) or asyncio.new_event_loop):
        loop = make()
        loop.close()
        assert isinstance(loop, kind)
