"""More nodes than one: replicas spread over them, nodes that come, go and are cut off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model.application import application
from model.bench import client, cluster
from model.bench.load import Workload
from model.bench.nodes import Nodes
from model.bench.server import ServerProcess
from model.options import free_port
from tests.conftest import needs_tool
from tests.samples import GOOD
from tests.test_reliability import assert_nothing_lost
from tests.ways import assert_equal

CONFIG = {
    "applications": [
        {
            "name": "custom-model",
            "import_path": "model.application:application",
            "route_prefix": "/custom-model",
            "args": {"num_replicas": 2, "cpus_per_replica": 0.5, "max_replicas_per_node": 1},
        }
    ]
}


@pytest.fixture(scope="module")
def work() -> Workload:
    """Pictures to ask about."""
    return Workload.drawn(16)


def needs_network() -> None:
    """Skip the test where no network of hosts can be made."""
    needs_tool("ip")
    if os.geteuid() != 0:
        pytest.skip("this test makes network namespaces, which takes root")


def test_a_node_is_cut_off(work):
    """No connection closes and no answer comes; what it had goes to another node."""
    needs_network()
    done = cluster.cut(work, seconds=15)
    assert_nothing_lost(done)
    assert done.again > 0
    assert done.facts["nodes with replicas, before"] == 2
    assert done.facts["replicas that live, the one cut off included"] == 3


def test_the_head_is_lost(work):
    """With Redis behind it: replicas and the server go on, and take to the next head."""
    needs_tool("redis-server")
    done = cluster.head(work, seconds=16)
    assert_nothing_lost(done)
    assert done.again > 0
    assert done.facts["probes answered otherwise than 200"] == 0
    assert done.facts["ready, when idle without a head"] == "200"
    assert done.facts["ready, without head and replicas"] == "503"


def test_two_fronts_before_an_application_of_a_config_file(local):
    """What Kubernetes will do: Ray Serve deploys from a file, KServe joins; it may go again."""
    with Nodes(0, 1, 1) as nodes:
        command = [sys.executable, "-m", "model.front_server", "--address", nodes.address]
        ports = [f"--http_port={free_port()}", f"--grpc_port={free_port()}"]
        env = os.environ | nodes.env
        early = subprocess.run([*command, *ports], env=env, capture_output=True, text=True)
        assert early.returncode == 1 and "deploy it first" in early.stderr.splitlines()[-1]
        file = nodes.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(CONFIG))
        serve = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
        serve += ["--address", nodes.address, "--non-blocking"]
        subprocess.run(serve, env=env, check=True, capture_output=True, timeout=60)
        join = ("--address", nodes.address, "--max_replicas", "2")
        with ServerProcess("model.front_server", *join, **nodes.env) as first:
            assert sorted(cluster.on_nodes(first).values()) == [1, 1]
            with ServerProcess("model.front_server", *join, **nodes.env) as second:
                for server in (first, second):
                    assert_equal(client.v1(server, [GOOD]), local.classify([GOOD]))
            assert_equal(client.v1(first, [GOOD]), local.classify([GOOD]))


def test_options_of_a_config_file_are_checked():
    """What is no option, and what does not fit, is told in a sentence."""
    for args, part in (({"replicas": 2}, "replicas"), ({"num_replicas": 0}, "from 1 on")):
        with pytest.raises(ValueError, match=part):
            application(args)
