"""More nodes than one: replicas spread over them, nodes that come, go and are cut off."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model.faults import cluster
from model.faults.nodes import Nodes
from model.faults.redis_server import Redis
from model.loadtest import client
from model.loadtest.server_process import ServerProcess
from model.loadtest.workload import Workload
from model.serving.deployment import application
from tests.conftest import needs_network, needs_tool, run
from tests.samples import GOOD
from tests.test_reliability import assert_nothing_lost
from tests.ways import assert_equal

pytestmark = pytest.mark.long

CONFIG = {
    "applications": [
        {
            "name": "custom-model",
            "import_path": "model.serving.deployment:application",
            "route_prefix": "/custom-model",
            "args": {"num_replicas": 2, "cpus_per_replica": 0.5, "max_replicas_per_node": 1},
        }
    ]
}


@pytest.fixture(scope="module")
def work() -> Workload:
    """Images to send."""
    return Workload.drawn(16)


def test_frontends_of_an_application_of_a_config_file(work, local):
    """As on Kubernetes: Ray Serve deploys from a file, KServe joins on each worker node.

    The frontends share the replicas. With Redis behind it Ray's head may be lost: replicas and
    frontends go on, and join the next head.
    """
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(Redis()) if shutil.which("redis-server") else None
        nodes = stack.enter_context(Nodes(0, 1, 1, redis=redis, **cluster.SURVIVE_WITHOUT_HEAD))
        env = nodes.env | cluster.SURVIVE_WITHOUT_HEAD
        deploy(nodes)
        join = ("--address", nodes.address, "--max_replicas", "2")
        first, second = (
            stack.enter_context(
                ServerProcess("model.serving.frontend", *join, "--node_address", host, **env)
            )
            for host in nodes.hosts[1:]
        )
        assert sorted(cluster.replicas_by_node(first).values()) == [1, 1]
        for server in (first, second):
            assert_equal(client.v1(server, [GOOD]), local.classify([GOOD]))
        failed = run("model.serving.frontend", "other", *join, **env)
        assert failed.returncode == 1 and "deploy it first" in failed.stderr.splitlines()[-1]
        second.stop()
        assert_equal(client.v1(first, [GOOD]), local.classify([GOOD]))
        needs_tool("redis-server")
        done = cluster.head(nodes, first, work, seconds=16)
    assert_nothing_lost(done)
    assert done.facts["probes answered otherwise than 200"] == 0
    assert done.facts["ready, when idle without a head"] == "200"
    assert done.facts["ready, without head and replicas"] == "503"


def deploy(nodes: Nodes) -> None:
    """CONFIG, by Ray Serve's command line."""
    file = nodes.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    serve = [Path(sys.executable).with_name("serve"), "run", file, "--address", nodes.address]
    env = os.environ | nodes.env
    subprocess.run([*serve, "--non-blocking"], env=env, check=True, capture_output=True, timeout=60)


def test_a_node_is_added_and_another_cut_off(work):
    """The new one gets its share; then nothing comes from the old one, and nothing is lost."""
    needs_network()
    with cluster.on_a_network() as there:
        done = cluster.added(*there, work, seconds=12)
        assert_nothing_lost(done)
        assert done.facts["replicas on each node"] == "[2, 2]"
        assert 0.3 < done.facts["share of the new node's replicas"] < 0.7
        done = cluster.cut(*there, work, seconds=15)
        assert_nothing_lost(done)
        assert done.retried > 0
        assert done.facts["replicas that live, those cut off included"] == 4


def test_options_of_a_config_file_are_checked():
    """An unknown option, and a value that does not fit, are told in a sentence."""
    for args, part in (({"replicas": 2}, "replicas"), ({"num_replicas": 0}, "from 1 on")):
        with pytest.raises(ValueError, match=part):
            application(args)
