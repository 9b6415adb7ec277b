"""The containers of the manifests, run here almost as Kubernetes would, without a cluster.

Bubblewrap is the sandbox of the start command: it gives it a network, processes and users of its
own, no root, no privileges, and nothing to write to but the manifest's volumes.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from model.faults.experiment import Fault, Observation, run_experiment
from model.faults.network import Network
from model.faults.observe import snapshots
from model.loadtest.run import REFUSED
from model.loadtest.workload import Workload
from tests.conftest import ROOT, needs_network, needs_tool, until
from tests.manifests import Manifests, cores, env, in_bytes
from tests.test_deploy import EDITS

pytestmark = pytest.mark.long

CODE = "/mnt"  # where the sandbox has the package `model`, and nothing else of the repository
MODELS = f"{CODE}/models"  # /models of the image
CGROUP = "/sys/fs/cgroup"
SANDBOX = "bwrap --unshare-user --unshare-pid --unshare-ipc --unshare-uts --cap-drop ALL"
SANDBOX = [*SANDBOX.split(), "--new-session", "--die-with-parent", "--ro-bind", "/", "/"]
CLASSIFIER = """
import kserve

class Classifier(kserve.Model):
    def load(self):
        self.ready = True
        return self.ready

    def predict(self, payload, headers=None):
        return {"predictions": [sum(instance) for instance in payload["instances"]]}
"""


class Pod:
    """A container of an InferenceService in a sandbox, and what the kubelet does to it.

    `url`, `name` and `predict` are for its clients, as a ServerProcess has them.
    """

    name = "custom-model"

    def __init__(
        self, part: str, network: Network, folder: Path, edit: str = "as committed"
    ) -> None:
        """part: plain or ray. folder: for its log; classifier.py in it is in the image.

        edit: of the manifests, by its name in EDITS.
        """
        self.container = Manifests.read().edited(EDITS[edit]).servers[part]
        self.spec = self.container["pod"]
        address, there = network.add()
        self.url = f"http://{address}:{self.container['ports'][0]['containerPort']}"
        self.predict = f"{self.url}/v1/models/{self.name}:predict"
        self.log = folder / "log"
        whole = sorted(os.sched_getaffinity(0))[: int(cores(self.container))]
        bound = ["taskset", "--cpu-list", ",".join(map(str, whole))]
        with open(self.log, "w") as log:
            self.sandbox = psutil.Popen(
                [*there, *bound, *self._sandbox(folder), *self.container["command"]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        found = until(lambda: self.sandbox.poll() is not None or self.processes())
        assert self.sandbox.poll() is None, self.log.read_text()
        self.process = found[0]

    def _sandbox(self, folder: Path) -> list[str]:
        """Bubblewrap's command line; its options take effect in this order."""
        limit = folder / "cpu.max"
        limit.write_text(f"{round(cores(self.container) * 100_000)} 100000\n")
        user = self.container["securityContext"]["runAsUser"]
        group = self.spec["securityContext"]["runAsGroup"]
        words = [*SANDBOX, "--uid", user, "--gid", group, "--proc", "/proc", "--dev", "/dev"]
        if not self.spec.get("shareProcessNamespace"):
            words += ["--as-pid-1"]  # else that is Bubblewrap, as Kubernetes' pause would be
        sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in self.spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            words += ["--perms", "0777", "--size", in_bytes(sizes[mount["name"]])]
            words += ["--tmpfs", mount["mountPath"]]
        words += ["--tmpfs", CGROUP, "--ro-bind", limit, f"{CGROUP}/cpu.max"]
        words += ["--tmpfs", CODE, "--ro-bind", ROOT / "model", f"{CODE}/model", "--dir", MODELS]
        words += ["--ro-bind-try", folder / "classifier.py", f"{MODELS}/classifier.py"]
        for folder in {sys.prefix, sys.base_prefix}:  # it may lie where a volume is now
            words += ["--ro-bind", folder, folder]
        for folder in ("/dev", CGROUP, CODE):
            words += ["--remount-ro", folder]
        variables = env(self.container) | {"PYTHONPATH": f"{CODE}:{MODELS}"}
        variables["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        words += ["--chdir", MODELS, "--clearenv"]
        for name, value in variables.items():
            words += ["--setenv", name, value]
        return [str(word) for word in words]

    def exec(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command in the sandbox, as preStop is."""
        enter = f"nsenter --target {self.process.pid} --all --preserve-credentials"
        return subprocess.run([*enter.split(), *command], capture_output=True, text=True)

    def processes(self) -> list[psutil.Process]:
        """All that are in the sandbox, but for Bubblewrap itself."""
        return [p for p in self.sandbox.children(recursive=True) if p.name() != "bwrap"]

    def memory(self) -> int:
        """Bytes of all processes, what they share counted once, and of what lies in the volumes."""
        taken = sum(process.memory_full_info().pss for process in self.processes())
        for mount in self.container["volumeMounts"]:
            volume = os.statvfs(f"/proc/{self.process.pid}/root{mount['mountPath']}")
            taken += (volume.f_blocks - volume.f_bfree) * volume.f_frsize
        return taken

    def passes(self, probe: dict) -> bool:
        """Whether a probe succeeds within its timeout."""
        try:
            url, timeout = self.url + probe["httpGet"]["path"], probe["timeoutSeconds"]
            return 200 <= requests.get(url, timeout=timeout).status_code < 400
        except requests.RequestException:
            return False

    def start(self) -> float:
        """Probe as the startup probe says, then for readiness; returns the seconds it took."""
        began, probe = time.monotonic(), self.container["startupProbe"]
        for _ in range(probe["failureThreshold"]):
            if self.passes(probe) or self.sandbox.poll() is not None:
                break
            time.sleep(probe["periodSeconds"])
        ready = self.passes(probe) and until(lambda: self.passes(self.container["readinessProbe"]))
        assert ready, self.log.read_text()
        return time.monotonic() - began

    def pre_stop(self) -> str:
        """What comes before SIGTERM, while the pod is taken out of the Service."""
        hook = self.container["lifecycle"]["preStop"]["exec"]["command"]
        assert self.exec(*hook).returncode == 0
        return " ".join(hook)

    def terminate(self) -> str:
        """SIGTERM; a process that is left after the grace period is a failure."""
        processes = self.processes()
        self.process.terminate()
        self.sandbox.wait(self.spec["terminationGracePeriodSeconds"])
        assert psutil.wait_procs(processes, timeout=1)[1] == []
        return f"{len(processes)} processes ended"

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *_: object) -> None:
        if self.sandbox.poll() is None:
            self.sandbox.kill()  # all in the sandbox die with it
            self.sandbox.wait()


def probes(pod: Pod) -> dict[str, bool]:
    """The results of the probes that go on after the start."""
    names = ("readinessProbe", "livenessProbe")
    return {name: pod.passes(pod.container[name]) for name in names}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Where the pods are."""
    needs_network()
    for tool in ("bwrap", "nsenter", "taskset"):
        needs_tool(tool)
    tried = subprocess.run([*SANDBOX, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this test makes user namespaces, which does not work here: {tried.stderr}")
    with Network() as network:
        yield network


@pytest.fixture(params=["plain", "ray"])
def pod(request, network, tmp_path) -> Iterator[Pod]:
    """The container of either InferenceService, just started."""
    with Pod(request.param, network, tmp_path) as pod:
        yield pod


@pytest.fixture(scope="module")
def work() -> Workload:
    """Images to send."""
    return Workload.drawn(16)


def assert_confined(pod: Pod) -> None:
    """No root, no privileges, the limit of CPUs, and nothing to write to but the volumes."""
    seen_here = Path(f"/proc/{pod.process.pid}/status").read_text()
    number = re.search(r"^NSpid:.*\t(\d+)$", seen_here, re.M)[1]
    status = pod.exec("cat", f"/proc/{number}/status").stdout
    has = {name: set(value.split()) for name, value in re.findall(r"^(\w+):(.*)", status, re.M)}
    assert has["Uid"] == {str(pod.container["securityContext"]["runAsUser"])}
    assert has["CapEff"] == has["CapBnd"] == {"0" * 16} and has["NoNewPrivs"] == {"1"}
    quota, period = pod.exec("cat", f"{CGROUP}/cpu.max").stdout.split()
    assert int(quota) / int(period) == cores(pod.container)
    places = ["/", "/usr", "/etc", "/dev", "/var/tmp", CODE, f"{CODE}/model", sys.prefix]
    volumes = [mount["mountPath"] for mount in pod.container["volumeMounts"]]
    script = 'for at; do touch "$at/x" && echo "$at" && rm "$at/x"; done'
    tried = pod.exec("sh", "-c", script, "-", *places, *volumes)
    assert tried.stdout.split() == volumes
    assert tried.stderr.count("Read-only file system") == len(places)


def test_it_serves_within_its_limits_and_is_deleted_under_load(pod, work):
    """Its probes pass all the while; clients leave during preStop, and no request is lost."""
    took = pod.start()
    assert_confined(pod)
    memory = []

    def look() -> None:
        memory.append(pod.memory())
        assert psutil.STATUS_ZOMBIE not in [process.status() for process in pod.processes()]

    steps = [Observation(1.5, look), Fault(2, "preStop", pod.pre_stop)]
    with snapshots(pod, probes, every_s=0.5) as taken:  # more often than the kubelet
        done = run_experiment(pod, "preStop, SIGTERM", work, 4, steps, ends=True)
    pod.terminate()
    print(f"started in {took:.1f} s, {memory[0] / 2**20:.0f} MiB, {done.row()}")
    assert done.answered == done.run.sent > 0, done.run.errors
    assert len(taken) > 4 and all(all(passed.values()) for _, passed in taken), taken
    assert memory[0] < in_bytes(pod.container["resources"]["limits"]["memory"])
    assert pod.sandbox.returncode == 0, pod.log.read_text()


@pytest.mark.alone
def test_sigterm_while_clients_keep_sending(pod, work):
    """Requests in flight are answered; later connections are refused."""
    pod.start()
    steps = [Fault(2, "SIGTERM", pod.terminate)]
    done = run_experiment(pod, "SIGTERM", work, 4, steps, ends=True)
    print(f"gone after {done.faults[0].seconds:.1f} s, {done.row()}")
    assert done.failed == done.run.wrong == 0, done.run.errors
    assert done.answered > 0 < done.rejected and done.run.errors.keys() == {REFUSED}


def test_sigterm_at_the_start(pod):
    """It ends a server that has no handler yet: process 1 would go on."""
    time.sleep(0.5)
    began = time.monotonic()
    pod.terminate()
    assert time.monotonic() - began < 10


def test_a_model_of_ones_own(network, tmp_path):
    """The container with Ray serves a class of the image's folder /models, by one edit."""
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    with Pod("ray", network, tmp_path, "a model of one's own") as pod:
        pod.start()
        body = {"instances": [[1, 2], [3, 4]]}
        response = requests.post(pod.predict, json=body, timeout=30)
        assert response.json() == {"predictions": [3, 7]}
