"""The command lines of both servers: defaults, help, and one sentence for what is wrong."""

import re
import socket
from collections.abc import Iterator

import pytest

from model import options
from model.alexnet import AlexNetModel
from tests.conftest import run

SERVERS = {"model.kserve_server": options.kserve_options, "model.ray_server": options.ray_options}
SHARED = {"--http_port", "--grpc_port", "--model_name", "--workers", "--max_threads"}
SHARED |= {"--enable_grpc", "--ssl_certfile", "--host", "--device", "--threads"}
SHARED |= {"--max_body_mb", "--max_pixels", "--repository_api"}
RAY = {"--num_replicas", "--cpus_per_replica", "--gpus_per_replica", "--max_ongoing_requests"}
RAY |= {"--max_queued_requests", "--request_timeout_s", "--address", "--dashboard", "--proxy"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing set that the options read."""
    for name in ("MODEL_WEIGHTS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def parsed(module: str, *argv: str):
    """The options as a server reads them, on free ports unless argv names others."""
    ports = f"--http_port {options.free_port()} --grpc_port {options.free_port()}".split()
    return SERVERS[module]([*ports, *argv])


@pytest.mark.parametrize("module", SERVERS)
def test_defaults_of_both(module):
    """The documented name, address and device; the demo weights; gRPC is on."""
    args = parsed(module)
    assert (args.model_name, args.host, args.device) == ("custom-model", "127.0.0.1", "auto")
    assert (args.weights, args.enable_grpc, args.workers) == ("shapes", True, 1)


@pytest.mark.parametrize("module", SERVERS)
def test_one_limit_for_both_protocols(module):
    """64 MB unless told otherwise, over gRPC too unless KServe's own option says another."""
    for typed, rest, grpc in (
        ("", 64, 64 * 2**20),
        ("--max_body_mb 0.5", 0.5, 2**19),
        ("--max_body_mb 2 --grpc_max_receive_message_length 7", 2, 7),
    ):
        args = parsed(module, *typed.split())
        assert (args.max_body_mb, args.grpc_max_receive_message_length) == (rest, grpc)


@pytest.mark.parametrize("module", SERVERS)
def test_the_limit_of_pixels_reaches_the_model(module):
    """50 million unless told otherwise, which is the model's own."""
    assert options.of_model(parsed(module))["max_pixels"] == AlexNetModel("x").max_pixels
    assert options.of_model(parsed(module, "--max_pixels", "7"))["max_pixels"] == 7


def test_ray_defaults_follow_the_cores(monkeypatch):
    """A replica for every core up to 8, which share the cores; threads follow."""
    for cores, replicas, cpus, threads in ((1, 1, 1, 1), (2, 2, 1, 1), (20, 8, 2, 2)):
        monkeypatch.setattr(options, "cores", lambda cores=cores: cores)
        args = parsed("model.ray_server")
        assert (args.num_replicas, args.cpus_per_replica, args.threads) == (replicas, cpus, threads)


def test_more_replicas_than_cores_share_them():
    """Asked for explicitly, replicas get an equal part of the cores, and fit."""
    args = parsed("model.ray_server", "--num_replicas", str(3 * options.cores()))
    assert args.cpus_per_replica == 0.33 and args.threads == 1


def test_environment(monkeypatch):
    """MODEL_WEIGHTS and RAY_ADDRESS are read; an empty MODEL_WEIGHTS is as none."""
    monkeypatch.setenv("MODEL_WEIGHTS", "imagenet")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    args = parsed("model.ray_server")
    assert (args.weights, args.address) == ("imagenet", "10.0.0.1:6379")
    monkeypatch.setenv("MODEL_WEIGHTS", "")
    assert parsed("model.kserve_server").weights == "shapes"


def test_joining_a_cluster_does_not_count_our_cores():
    """With --address the cluster's own cores count, not this machine's."""
    many = ["--num_replicas", "100", "--cpus_per_replica", "4"]
    assert parsed("model.ray_server", "--address", "10.0.0.1:6379", *many).num_replicas == 100


WRONG_FOR_BOTH = {  # what is typed: what the sentence must name
    "--http_port abc": "--http_port",
    "--http_port 99999": "99999",
    "--grpc_port -5": "-5",
    "--host not.a.host.invalid": "not.a.host.invalid",
    "--threads 0": "--threads",
    "--threads many": "--threads",
    "--device tpu": "--device",
    "--no_such_option 1": "--no_such_option",
    "--thread 2": "--thread",
    "--max_body_mb 0": "--max_body_mb",
    "--max_body_mb nan": "--max_body_mb",
    "--max_pixels 1e6": "--max_pixels",
    "--repository_api maybe": "--repository_api",
}
WRONG_FOR_RAY = {
    "--workers 2": "--num_replicas",
    "--num_replicas 0": "--num_replicas",
    "--num_replicas two": "--num_replicas",
    "--cpus_per_replica 0": "--cpus_per_replica",
    "--cpus_per_replica nan": "--cpus_per_replica",
    "--num_replicas 2 --cpus_per_replica 1000": "--num_replicas",
    "--gpus_per_replica -1": "--gpus_per_replica",
    "--max_ongoing_requests 0": "--max_ongoing_requests",
    "--max_queued_requests 0": "--max_queued_requests",
    "--request_timeout_s 0": "--request_timeout_s",
    "--request_timeout_s nan": "--request_timeout_s",
    "--request_timeout_s inf": "--request_timeout_s",
    "--dashboard --address 10.0.0.1:6379": "--address",
    "--proxy 8000 --address 10.0.0.1:6379": "--address",
    "--dashboard 99999": "--dashboard",
}
WRONG = [(module, typed, names) for module in SERVERS for typed, names in WRONG_FOR_BOTH.items()]
WRONG += [("model.ray_server", typed, names) for typed, names in WRONG_FOR_RAY.items()]


def refusal(module: str, *argv: str) -> str:
    """The one sentence that Python prints to stderr as the server exits with status 1."""
    with pytest.raises(SystemExit) as exit:
        parsed(module, *argv)
    assert isinstance(exit.value.code, str)
    assert re.fullmatch(rf"python -m {module}: [^\n]{{10,250}}", exit.value.code)
    return exit.value.code


@pytest.mark.parametrize(("module", "typed", "names"), WRONG)
def test_a_wrong_option_gets_one_sentence(module, typed, names):
    """It names the option that is wrong, or the one that helps."""
    assert names in refusal(module, *typed.split())


@pytest.mark.parametrize("module", SERVERS)
def test_one_port_for_both_protocols(module):
    """HTTP and gRPC cannot share a port."""
    port = str(options.free_port())
    assert "--grpc_port" in refusal(module, "--http_port", port, "--grpc_port", port)


@pytest.mark.parametrize("module", SERVERS)
def test_unknown_weights(module, monkeypatch):
    """MODEL_WEIGHTS that are unknown: the sentence names those that are known."""
    monkeypatch.setenv("MODEL_WEIGHTS", "resnet")
    sentence = refusal(module)
    assert "resnet" in sentence and "shapes" in sentence and "imagenet" in sentence


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        yield str(somebody.getsockname()[1])


@pytest.mark.parametrize("option", ["--http_port", "--grpc_port"])
@pytest.mark.parametrize("module", SERVERS)
def test_a_taken_port(module, option, taken):
    """The sentence names the port and the option to choose another with."""
    sentence = refusal(module, option, taken)
    assert taken in sentence and sentence.count(option) == 1


@pytest.mark.parametrize("module", SERVERS)
def test_a_refusal_as_a_user_sees_it(module, taken):
    """Status 1, one line on stderr, nothing on stdout."""
    ended = run(module, "--grpc_port", taken)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and taken in ended.stderr


@pytest.mark.parametrize("module", SERVERS)
def test_help_lists_the_options(module):
    """KServe's own options and ours, and only those that the server obeys."""
    shown = run(module, "--help").stdout
    listed = {word for word in shown.replace("]", " ").split() if word.startswith("--")}
    assert listed >= SHARED
    assert listed & RAY == (RAY if module == "model.ray_server" else set())
