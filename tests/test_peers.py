"""Servers to compare ours with: those that need no environment of their own, and what all share."""

import shlex
import subprocess
import sys

import pybase64
import pytest
import requests

from model.alexnet import shapes
from model.loadtest import client, ladder
from model.loadtest.bodies import v1_body
from model.loadtest.client import with_reference
from model.loadtest.configurations import CONFIGURATIONS, OURS, PEERS
from model.loadtest.generator import closed_loop
from model.loadtest.peers import command_line, without_kserve
from model.loadtest.workload import Workload
from tests.ways import assert_equal


@pytest.mark.parametrize("name", [n for n, p in PEERS.items() if p.module != OURS])
def test_the_options_of_a_peer_are_accepted(name):
    """And its threads are as many as its environment says."""
    found = command_line.options(name, shlex.split(PEERS[name].options))
    assert (found.model, found.max_batch_size) == ("alexnet", 16) and found.precision in name
    assert found.threads == int(PEERS[name].env["OMP_NUM_THREADS"])


def test_without_kserve_the_network_answers_alike(local):
    """Where KServe cannot be imported: the same five labels and probabilities."""
    images = [shapes.jpeg("red star", 1), shapes.jpeg("blue circle", 2)]
    one = without_kserve.Classifier("float32", 1)
    labels, probabilities = one.predict([pybase64.b64encode(image) for image in images])
    expected = sum(local.classify(images), [])
    assert labels == [entry["label"] for entry in expected]
    assert probabilities == pytest.approx([entry["probability"] for entry in expected], abs=1e-5)


def test_that_it_is_without_kserve():
    """Which cannot be imported beside MLServer, nor in Triton."""
    code = "import sys; from model.loadtest.peers import command_line, program, without_kserve; "
    code += "sys.exit('kserve' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bfloat16_is_measured_where_it_is_fast(monkeypatch):
    """And only peers that are installed."""
    for faster in ("float32", "bfloat16"):
        monkeypatch.setattr(ladder, "limit", lambda p, fast=faster, **_: {16: 1 + (p == fast)})
        names = ladder.beside_peers()
        assert any(name.startswith("FastAPI") for name in names)
        assert any("bfloat16" in name for name in names) == (faster == "bfloat16")


@pytest.mark.long
@pytest.mark.parametrize("server", ["FastAPI", "Ray Serve"])
def test_a_peer_answers_alike(server):
    """In all its workers, and leaves nothing when it is stopped."""
    [peer] = [p for name, p in PEERS.items() if name.startswith(server) and "float32" in name]
    with peer.start() as started:
        work = with_reference(Workload.drawn(8), started)
        run = closed_loop(started.predict, work, 4, 1, warmup_s=0.5)
        there = started.processes()
    assert run.errors == {} and run.distance < 1e-5 and run.requests > 4
    assert not any(process.is_running() for process in there)


@pytest.mark.long
def test_the_stock_server_with_other_values(local, images):
    """Of the ladder, with one replica: exact, and without our headers."""
    with CONFIGURATIONS["1 replica"].start() as server:
        assert_equal(client.v1(server, images[:2]), local.classify(images[:2]))
        headers = requests.post(server.predict, json=v1_body(images[:1]), timeout=60).headers
        lines = [" ".join(process.cmdline()) for process in server.processes()]
    assert sum(line.startswith("ray::ServeReplica") for line in lines) == 1
    assert "x-worker" not in headers
