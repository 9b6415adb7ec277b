"""The containers of the manifests, run here almost as Kubernetes would, without a cluster.

Bubblewrap shuts the start command in: a network, processes and users of its own, without root,
without privileges, and with nothing to write to but the manifest's volumes.
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

from model.bench import trial
from model.bench.load import REFUSED, Workload
from model.bench.nodes import Network
from tests.conftest import ROOT, needs_network, needs_tool, until
from tests.test_deploy import containers, cores

CODE = "/mnt"  # where the box has the package `model`, and nothing else of the repository
CGROUP = "/sys/fs/cgroup"
BOX = "bwrap --unshare-user --unshare-pid --unshare-ipc --unshare-uts --cap-drop ALL"
BOX = [*BOX.split(), "--new-session", "--die-with-parent", "--ro-bind", "/", "/"]


class Pod:
    """A container of the manifests in a box of its own, and what the kubelet does to it.

    `url`, `name` and `predict` are for its clients, as a ServerProcess has them.
    """

    name = "custom-model"

    def __init__(self, module: str, network: Network, folder: Path) -> None:
        self.container = containers()[module]
        self.spec = self.container["of"]
        address, there = network.add()
        self.url = f"http://{address}:{self.container['ports'][0]['containerPort']}"
        self.predict = f"{self.url}/v1/models/{self.name}:predict"
        self.log = folder / "log"
        whole = sorted(os.sched_getaffinity(0))[: int(cores(self.container))]
        bound = ["taskset", "--cpu-list", ",".join(map(str, whole))]
        with open(self.log, "w") as log:
            self.box = psutil.Popen(
                [*there, *bound, *self._shut_in(folder / "cpu.max"), *self.container["command"]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        found = until(lambda: self.box.poll() is not None or self.processes())
        assert self.box.poll() is None, self.log.read_text()
        self.process = found[0]

    def _shut_in(self, limit: Path) -> list[str]:
        """Bubblewrap's command line; it does what it is told in this order."""
        limit.write_text(f"{round(cores(self.container) * 100_000)} 100000\n")
        user = self.container["securityContext"]["runAsUser"]
        group = self.spec["securityContext"]["runAsGroup"]
        words = [*BOX, "--uid", user, "--gid", group, "--proc", "/proc", "--dev", "/dev"]
        if not self.spec.get("shareProcessNamespace"):
            words += ["--as-pid-1"]  # else that is Bubblewrap, as Kubernetes' pause would be
        sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in self.spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            words += ["--perms", "0777", "--size", in_bytes(sizes[mount["name"]])]
            words += ["--tmpfs", mount["mountPath"]]
        words += ["--tmpfs", CGROUP, "--ro-bind", limit, f"{CGROUP}/cpu.max"]
        words += ["--tmpfs", CODE, "--ro-bind", ROOT / "model", f"{CODE}/model"]
        for folder in {sys.prefix, sys.base_prefix}:  # it may lie where a volume is now
            words += ["--ro-bind", folder, folder]
        for folder in ("/dev", CGROUP, CODE):
            words += ["--remount-ro", folder]
        env = {each["name"]: each["value"] for each in self.container["env"]}
        env |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": CODE}
        words += ["--chdir", "/tmp", "--clearenv"]
        for name, value in env.items():
            words += ["--setenv", name, value]
        return [str(word) for word in words]

    def exec(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command in the box, as preStop is."""
        enter = f"nsenter --target {self.process.pid} --all --preserve-credentials"
        return subprocess.run([*enter.split(), *command], capture_output=True, text=True)

    def processes(self) -> list[psutil.Process]:
        """All that are in the box, but for Bubblewrap itself."""
        return [p for p in self.box.children(recursive=True) if p.name() != "bwrap"]

    def memory(self) -> int:
        """Bytes of all processes, what they share counted once, and of what lies in the volumes."""
        taken = sum(process.memory_full_info().pss for process in self.processes())
        for mount in self.container["volumeMounts"]:
            volume = os.statvfs(f"/proc/{self.process.pid}/root{mount['mountPath']}")
            taken += (volume.f_blocks - volume.f_bfree) * volume.f_frsize
        return taken

    def asked(self, probe: dict) -> bool:
        """Whether a probe succeeds, in its time."""
        try:
            url, timeout = self.url + probe["httpGet"]["path"], probe["timeoutSeconds"]
            return 200 <= requests.get(url, timeout=timeout).status_code < 400
        except requests.RequestException:
            return False

    def starts(self) -> float:
        """Ask as the startup probe says, then for readiness; returns the seconds it took."""
        began, probe = time.monotonic(), self.container["startupProbe"]
        for _ in range(probe["failureThreshold"]):
            if self.asked(probe) or self.box.poll() is not None:
                break
            time.sleep(probe["periodSeconds"])
        ready = self.asked(probe) and until(lambda: self.asked(self.container["readinessProbe"]))
        assert ready, self.log.read_text()
        return time.monotonic() - began

    def pre_stop(self) -> None:
        """What comes before SIGTERM, while the pod is taken out of the Service."""
        hook = self.container["lifecycle"]["preStop"]["exec"]["command"]
        assert self.exec(*hook).returncode == 0

    def terminate(self) -> None:
        """SIGTERM; whoever is there after the grace period has failed."""
        everybody = self.processes()
        self.process.terminate()
        self.box.wait(self.spec["terminationGracePeriodSeconds"])
        assert psutil.wait_procs(everybody, timeout=1)[1] == []

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *_: object) -> None:
        if self.box.poll() is None:
            self.box.kill()  # all in the box die with it
            self.box.wait()


def probes(pod: Pod) -> dict[str, bool]:
    """What those say that go on after the start."""
    names = ("readinessProbe", "livenessProbe")
    return {name: pod.asked(pod.container[name]) for name in names}


def in_bytes(amount: str) -> int:
    """A number of Kubernetes, such as 512Mi."""
    return int(amount[:-2]) * {"Mi": 2**20, "Gi": 2**30}[amount[-2:]]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Where the pods are."""
    needs_network()
    for tool in ("bwrap", "nsenter", "taskset"):
        needs_tool(tool)
    tried = subprocess.run([*BOX, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this test makes user namespaces, which does not work here: {tried.stderr}")
    with Network() as network:
        yield network


@pytest.fixture(params=["model.kserve_server", "model.ray_server"])
def pod(request, network, tmp_path) -> Iterator[Pod]:
    """Either container of an InferenceService, just started."""
    with Pod(request.param, network, tmp_path) as pod:
        yield pod


@pytest.fixture(scope="module")
def work() -> Workload:
    """Pictures to ask about."""
    return Workload.drawn(16)


def assert_confined(pod: Pod) -> None:
    """No root, no privileges, the limit of CPUs, and nothing to write to but the volumes."""
    seen_here = Path(f"/proc/{pod.process.pid}/status").read_text()
    number = re.search(r"^NSpid:.*\t(\d+)$", seen_here, re.M)[1]
    status = pod.exec("cat", f"/proc/{number}/status").stdout
    told = {name: set(value.split()) for name, value in re.findall(r"^(\w+):(.*)", status, re.M)}
    assert told["Uid"] == {str(pod.container["securityContext"]["runAsUser"])}
    assert told["CapEff"] == told["CapBnd"] == {"0" * 16} and told["NoNewPrivs"] == {"1"}
    quota, period = pod.exec("cat", f"{CGROUP}/cpu.max").stdout.split()
    assert int(quota) / int(period) == cores(pod.container)
    places = ["/", "/usr", "/etc", "/dev", "/var/tmp", CODE, f"{CODE}/model", sys.prefix]
    volumes = [mount["mountPath"] for mount in pod.container["volumeMounts"]]
    script = 'for at; do touch "$at/x" && echo "$at" && rm "$at/x"; done'
    tried = pod.exec("sh", "-c", script, "-", *places, *volumes)
    assert tried.stdout.split() == volumes
    assert tried.stderr.count("Read-only file system") == len(places)


def test_it_serves_within_its_limits_and_is_deleted_under_load(pod, work):
    """Its probes are right all the while; clients go while preStop waits, and nobody notices."""
    took = pod.starts()
    assert_confined(pod)
    memory = []

    def look() -> None:
        memory.append(pod.memory())
        assert psutil.STATUS_ZOMBIE not in [process.status() for process in pod.processes()]

    with trial.watched(pod, probes, every=0.5) as told:  # more often than the kubelet
        deeds = [(1.5, "a look", look), (2, "preStop", pod.pre_stop)]
        done = trial.under(pod, "preStop, SIGTERM", work, 4, deeds, ends=True)
    pod.terminate()
    print(f"started in {took:.1f} s, {memory[0] / 2**20:.0f} MiB, {done.row()}")
    assert done.answered == done.run.sent > 0, done.run.errors
    assert len(told) > 4 and all(all(said.values()) for _, said in told), told
    assert memory[0] < in_bytes(pod.container["resources"]["limits"]["memory"])
    assert pod.box.returncode == 0, pod.log.read_text()


@pytest.mark.alone
def test_sigterm_while_clients_keep_sending(pod, work):
    """What is in is answered, and who comes later finds the door closed."""
    pod.starts()
    done = trial.under(pod, "SIGTERM", work, 4, [(2, "SIGTERM", pod.terminate)], ends=True)
    print(f"gone after {done.seconds[0]:.1f} s, {done.row()}")
    assert done.failed == done.run.wrong == 0, done.run.errors
    assert done.answered > 0 < done.refused and done.run.errors.keys() == {REFUSED}


def test_sigterm_at_the_start(pod):
    """It ends a server that does not listen for it yet: process 1 would go on."""
    time.sleep(0.5)
    began = time.monotonic()
    pod.terminate()
    assert time.monotonic() - began < 10
