"""The Kubernetes manifests: valid field by field, and in agreement with each other and the servers.

Nothing here needs a cluster. What only a cluster can say, deploy/README.md lists. Change a number
in a manifest, and these tests tell what else it takes.
"""

import math
import re
from collections.abc import Callable
from importlib.metadata import packages_distributions

import jsonschema
import kserve.models
import kubernetes.client
import kubernetes_validate
import pytest
import ray
from fastapi import FastAPI
from kserve.model_repository import ModelRepository
from kserve.model_server import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from packaging.utils import canonicalize_name
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, DEFAULT_DASHBOARD_PORT
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from model import SHARED_FOLDER
from model.serving import cli, ray_cluster
from model.serving.config import DEFAULT_TARGET
from model.serving.machine import free_port
from tests import kuberay
from tests.conftest import ROOT
from tests.manifests import Manifests, cores, env, in_bytes, options, within
from tests.test_project import PROJECT, imports

MODEL = "custom-model"
OLDEST, NEWEST = "1.32", kubernetes_validate.latest_version()  # Kubernetes
# Measured: cores that KServe's process and Ray's own take; GiB of a replica, and of all the rest;
# memory under overload and after hours, over that at rest.
KSERVE_CPU, RAY_CPU, REPLICA_MEMORY, BASE_MEMORY, HEADROOM = 0.5, 0.25, 0.5, 1.0, 1.5

# What a reader may do to the files, by the comments in them and by README.
EDITS = {
    "as committed": {},
    "on GPUs": {
        r"# - (--gpus_per_replica)": r"- \1",
        r"# (gpus_per_replica: )": r"\1",
        r"# (num-gpus: )": r"\1",
        r"(memory: 3072Mi)}": r'\1, nvidia.com/gpu: "1"}',
    },
    "a model of one's own": {
        r"# - (classifier:Classifier)": r"- \1",
        r"# (model: classifier:Classifier)": r"\1",
        r"# (set: {)": r"\1",
    },
    "for a laptop": {
        r"( replicas| minReplicas|maxReplicas): [23]\b": r"\1: 1",
        r"( num_replicas): 4": r"\1: 2",
        r"(--num_replicas)=6": r"\1=2",
        r"(minAvailable): 1": r"\1: 0",
    },
}
EDITS = {name: {f"(?m){p}": new for p, new in edits.items()} for name, edits in EDITS.items()}


@pytest.fixture(params=EDITS.values(), ids=EDITS)
def manifests(request) -> Manifests:
    """The files as they are, and as a reader may have changed them."""
    return Manifests.read().edited(request.param)


# --- every field exists --------------------------------------------------------------------------


def unknown(value: object, kind: str, at: str = "") -> list[str]:
    """The fields that the SDK's class `kind` does not have, all the way down."""
    if inside := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        return [name for part in value for name in unknown(part, inside[1], at)]
    if inside := re.fullmatch(r"[Dd]ict[(\[]str, (.+)[)\]]", kind):
        return [name for k, part in value.items() for name in unknown(part, inside[1], f"{at}.{k}")]
    sdk = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind, None)
    if sdk is None:
        return [f"{at} is no {kind}"] if isinstance(value, (dict, list)) else []
    fields = {name: sdk.openapi_types[field] for field, name in sdk.attribute_map.items()}
    found = [f"{at}.{name}" for name in value.keys() - fields.keys()]
    for name in value.keys() & fields.keys():
        found += unknown(value[name], fields[name], f"{at}.{name}")
    return found


def check_kubernetes(document: dict, version: str) -> None:
    """Kubernetes' own schemas; a field that they do not have raises."""
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field(manifests, version):
    """Of its own kinds, of every pod, and of the container of KubeRay's autoscaler."""
    for document in manifests.documents:
        if document["kind"] not in ("InferenceService", "RayService"):
            check_kubernetes(document, version)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
    for labels, spec in manifests.pods:
        labelled = {"metadata": {"name": "a", "labels": labels}}
        check_kubernetes(pod | labelled | {"spec": spec}, version)
    autoscaler = manifests.cluster["autoscalerOptions"]
    names = ("env", "resources", "securityContext", "volumeMounts")
    container = {"name": "a"} | {name: autoscaler[name] for name in names if name in autoscaler}
    check_kubernetes(pod | {"spec": {"containers": [container]}}, version)


def test_kubernetes_schemas_reject_what_they_do_not_know():
    """A misspelt field, deep inside, of a Kubernetes kind."""
    (document,) = Manifests.read().of_kind("Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kubernetes(document, NEWEST)


def test_kserve_knows_every_field(manifests):
    """Of an InferenceService, by the SDK's classes; an unknown field is found."""
    for document in manifests.of_kind("InferenceService"):
        assert not unknown(document, "V1beta1InferenceService")
        predictor = document["spec"]["predictor"]
        predictor["containers"][0]["livenessProbe"]["httpGet"]["paht"] = "/"
        predictor["minReplica"] = 1
        assert set(unknown(document, "V1beta1InferenceService")) == {
            ".spec.predictor.minReplica",
            ".spec.predictor.containers.livenessProbe.httpGet.paht",
        }


def test_kuberay_accepts_it(manifests):
    """By its CRD and by the rules of its operator; what is misspelt or of another type is found."""
    check = jsonschema.Draft202012Validator(kuberay.RAYSERVICE)
    assert not [error.message for error in check.iter_errors(manifests.rayservice)]
    assert not kuberay.rejected(manifests.rayservice)
    groups, cluster = manifests.groups, manifests.cluster
    groups["frontend"]["minReplica"] = cluster["gcsFaultTolerance"] = cluster["rayVersion"] = 1
    groups["head"]["rayStartParams"]["num-cpus"] = 0
    del groups["worker"]["maxReplicas"]
    assert len([*check.iter_errors(manifests.rayservice)]) == 5


def test_kuberay_rejects_what_cannot_run():
    """Two things that its CRD lets through: a port taken twice in a pod, too few of the head's."""
    manifests = Manifests.read()
    del manifests.groups["frontend"]["rayStartParams"]["metrics-export-port"]
    head = manifests.groups["head"]["template"]["spec"]["containers"][0]
    head["ports"] = [{"name": "dashboard"}]
    ports, twice = kuberay.rejected(manifests.rayservice)
    assert "8080" in twice and "serve" in ports


def test_serve_knows_every_field(manifests):
    """Of the RayService's configuration of Serve, which itself would ignore unknown ones."""
    ServeDeploySchema.model_validate(manifests.serve)
    assert manifests.serve.keys() <= ServeDeploySchema.model_fields.keys()
    (application,) = manifests.serve["applications"]
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()


# --- names ---------------------------------------------------------------------------------------


def test_names(manifests):
    """Of all objects begin with the model's; no namespace, so that kubectl's option sets it."""
    names = []
    for document in manifests.documents:
        names.append((document["kind"], document["metadata"]["name"]))
        assert document["metadata"]["name"].startswith(MODEL)
        assert "namespace" not in document["metadata"]
    assert len({*names}) == len(names)
    (application,) = manifests.serve["applications"]
    assert (application["name"], application["route_prefix"]) == (MODEL, f"/{MODEL}")
    assert application["import_path"] == "model.serving.deployment:application"
    assert all(labels["model"] == MODEL for labels, _ in manifests.pods)


def test_all_run_one_image(manifests):
    """Ours, of this version, which README and the Dockerfile build; Ray's version is the pinned."""
    ours = {name: c["image"] for name, c in manifests.containers.items() if name != "redis/redis"}
    image = f"{PROJECT['name']}:{PROJECT['version']}"
    assert {*ours.values()} == {image}
    for file in ("README.md", "Dockerfile"):
        text = (ROOT / "deploy" / file).read_text()
        assert {*re.findall(rf"{PROJECT['name']}:[\w.]+", text)} == {image}
        assert f"docker build -f deploy/Dockerfile -t {image} ." in text
    assert manifests.cluster["rayVersion"] == ray.__version__


def test_secrets_come_from_one_secret(manifests):
    """It is in no file; README makes it with the keys that are used."""
    assert not manifests.of_kind("Secret")
    for container in manifests.containers.values():
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD", variable["name"]):
                assert "value" not in variable and variable["valueFrom"]["secretKeyRef"]
    used = [*within(manifests.documents, "secretKeyRef")]
    name = manifests.cluster["authOptions"]["secretName"]
    assert {ref["name"] for ref in used} == {name}
    keys = {ref["key"] for ref in used} | {"auth_token"}  # KubeRay gives the nodes this key
    made = (ROOT / "deploy/README.md").read_text()
    assert f"kubectl create secret generic {name} " in made
    assert {*re.findall(r"--from-literal=(\w+)=", made)} == keys == {"auth_token", "redis_password"}


def test_selectors_find_pods(manifests):
    """Services, budgets, policies and constraints name labels that pods have."""
    pods = [labels for labels, _ in manifests.pods]
    selectors = [document["spec"]["selector"] for document in manifests.of_kind("Service")]
    selectors += [*within(manifests.documents, "matchLabels")]
    for selector in selectors:
        if "kubernetes.io/metadata.name" not in selector:  # a namespace's
            assert any(selector.items() <= labels.items() for labels in pods), selector
    for among in within(manifests.documents, "matchExpressions"):
        for expression in among:
            assert expression["key"] == "part" and expression["operator"] == "In"
            assert {*expression["values"]} <= {labels["part"] for labels in pods}
    for labels, spec in manifests.pods:
        for constraint in spec.get("topologySpreadConstraints", []):
            assert constraint["labelSelector"]["matchLabels"] == labels


# --- ports and paths -----------------------------------------------------------------------------


def ports_of(container: dict) -> set[int]:
    """The ports that a container names."""
    return {port["containerPort"] for port in container.get("ports", [])}


def test_servers_listen_where_the_manifests_say(manifests):
    """On KServe's default ports, beyond loopback; two containers of a pod share no port."""
    for container in manifests.servers.values():
        given = {"http_port": DEFAULT_HTTP_PORT, "grpc_port": DEFAULT_GRPC_PORT}
        given |= options(container)
        assert ports_of(container) == {int(given["http_port"]), int(given["grpc_port"])}
        assert given["host"] == "0.0.0.0"
        for other in container["pod"]["containers"]:
            if other["name"] != container["name"]:
                assert not ports_of(container) & ports_of(other)
    frontend = manifests.groups["frontend"]
    exported = int(frontend["rayStartParams"]["metrics-export-port"])
    assert ports_of(manifests.containers["frontend/ray-worker"]) == {exported}


def test_probes_request_paths_that_exist(manifests):
    """Of KServe's server and of Ray's agent; quickly, and for long enough as they start."""
    app = FastAPI()
    repository = ModelRepository()
    register_v2_endpoints(app, DataPlane(repository), ModelRepositoryExtension(repository))
    paths = [path.replace("{model_name}", MODEL) for path in app.openapi()["paths"]]
    servers = [container["name"] for container in manifests.servers.values()]
    for name, container in manifests.containers.items():
        if name == "redis/redis":
            continue
        ours = container["name"] in servers
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = container[kind]["httpGet"]
            assert get["path"] in (paths if ours else PUBLIC_EXACT_PATHS), get
            agent = DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
            assert get["port"] == (DEFAULT_HTTP_PORT if ours else agent)
            assert 1 <= container[kind]["timeoutSeconds"] <= 2
        assert not ours or MODEL in container["readinessProbe"]["httpGet"]["path"]
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 120


def test_services_lead_to_ports_that_are_open(manifests):
    """Of the pods they select; Ray's head finds Redis by its Service."""
    for service in manifests.of_kind("Service"):
        part = service["spec"]["selector"]["part"]
        of_part = [c for name, c in manifests.containers.items() if name.startswith(f"{part}/")]
        open_there = set().union(*map(ports_of, of_part))
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_there
        if part == "redis":
            (port,) = service["spec"]["ports"]
            address = manifests.cluster["gcsFaultToleranceOptions"]["redisAddress"]
            assert address == f"{service['metadata']['name']}:{port['port']}"


def test_policies_admit_what_they_should(manifests):
    """Requests from the namespace and the gateway; everything else from our own pods only."""
    admitted = {}
    for policy in manifests.of_kind("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"]["ingress"]:
            ports = {port["port"] for port in rule.get("ports", [])}
            admitted[policy["metadata"]["name"]] = (ports, [list(peer)[0] for peer in rule["from"]])
    servers = set().union(*map(ports_of, manifests.servers.values()))
    redis = ports_of(manifests.containers["redis/redis"])
    assert admitted == {
        f"{MODEL}-requests": (servers, ["podSelector", "namespaceSelector"]),
        f"{MODEL}-ray": (set(), ["podSelector"]),
        f"{MODEL}-dashboard": ({DEFAULT_DASHBOARD_PORT}, ["namespaceSelector"]),
        f"{MODEL}-redis": (redis, ["podSelector"]),
    }
    everything = {"matchLabels": {"model": MODEL}}
    (nobody,) = (p["spec"] for p in manifests.of_kind("NetworkPolicy") if not p["spec"]["ingress"])
    assert nobody["podSelector"] == everything
    readme = (ROOT / "deploy/README.md").read_text()
    for namespace in within(manifests.documents, "kubernetes.io/metadata.name"):
        assert f"`{namespace}`" in readme


# --- numbers -------------------------------------------------------------------------------------


def application(manifests: Manifests) -> dict:
    """The arguments of the RayService's application."""
    return manifests.serve["applications"][0]["args"]


def test_the_replicas_of_a_pod_fit_into_it(manifests):
    """Their cores beside KServe and Ray, as whole cores; their memory; their share of the GPU."""
    ray_ = manifests.servers["ray"]
    given = options(ray_)
    assert_fits(ray_, int(given["num_replicas"]), given, KSERVE_CPU + RAY_CPU)
    plain = manifests.servers["plain"]
    threads = int(options(plain)["threads"])
    assert_fits(plain, 1, {"cpus_per_replica": threads}, KSERVE_CPU)
    args, worker = application(manifests), manifests.containers["worker/ray-worker"]
    each = args["max_replicas_per_node"]
    assert_fits(worker, each, args, RAY_CPU)
    params = manifests.groups["worker"]["rayStartParams"]
    assert int(params["num-cpus"]) == math.ceil(each * args["cpus_per_replica"])
    assert params.get("num-gpus", "0") == worker["resources"]["limits"].get("nvidia.com/gpu", "0")


def assert_fits(container: dict, replicas: int, given: dict, others: float) -> None:
    """So many replicas fit into the container, `others` cores being taken by something else."""
    reserved = replicas * float(given["cpus_per_replica"])
    assert cores(container) >= max(reserved + others, math.ceil(reserved))
    limits = container["resources"]["limits"]
    needed = HEADROOM * (replicas * REPLICA_MEMORY + BASE_MEMORY) * 2**30
    assert in_bytes(limits["memory"]) >= needed
    gpus, share = int(limits.get("nvidia.com/gpu", 0)), float(given.get("gpus_per_replica", 0))
    assert replicas * share <= gpus and bool(share) == bool(gpus)


def test_the_application_fills_the_workers(manifests):
    """As many replicas as the workers have room for; frontends know how many there can be."""
    args, workers = application(manifests), manifests.groups["worker"]
    assert args["num_replicas"] == workers["replicas"] * args["max_replicas_per_node"]
    most = workers["maxReplicas"] * args["max_replicas_per_node"]
    assert int(options(manifests.servers["frontend"])["num_replicas"]) == most


def test_nothing_else_gets_replicas(manifests):
    """Head and frontends have no CPUs for Ray, so that replicas are on workers only."""
    for part in ("head", "frontend"):
        assert manifests.groups[part]["rayStartParams"]["num-cpus"] == "0"


def test_numbers_of_pods(manifests):
    """The least is no more than the most; a disruption leaves all pods of a part but one."""
    for document in manifests.of_kind("InferenceService"):
        predictor = document["spec"]["predictor"]
        assert 1 <= predictor["minReplicas"] <= predictor["maxReplicas"]
    budgets = {
        budget["spec"]["selector"]["matchLabels"]["part"]: budget["spec"]["minAvailable"]
        for budget in manifests.of_kind("PodDisruptionBudget")
    }
    for part in ("worker", "frontend"):
        group = manifests.groups[part]
        assert 1 <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        assert budgets.pop(part) == group["replicas"] - 1
    assert not budgets


def test_resources_are_guaranteed(manifests):
    """Requests equal limits; what Ray keeps in /dev/shm has room there."""
    for container in manifests.containers.values():
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
        for volume in container["pod"]["volumes"]:
            if volume["name"] == "shm":
                assert in_bytes(volume["emptyDir"]["sizeLimit"]) > ray_cluster.OBJECT_STORE_BYTES
    for group in manifests.groups.values():
        store = group["rayStartParams"]["object-store-memory"]
        assert int(store) == ray_cluster.OBJECT_STORE_BYTES


def test_requests_end_before_their_pod(manifests):
    """A server answers what it has, for --request_timeout_s, after its Service has let it go."""
    for part, container in manifests.servers.items():
        wait, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        timeout = float(options(container)["request_timeout_s"])
        grace = container["pod"]["terminationGracePeriodSeconds"]
        assert wait == "sleep" and int(seconds) >= 5, part
        assert grace >= int(seconds) + timeout + 15, part
    frontend = options(manifests.servers["frontend"])
    assert float(frontend["request_timeout_s"]) == application(manifests)["request_timeout_s"]
    assert manifests.groups["worker"]["template"]["spec"]["terminationGracePeriodSeconds"] >= grace


def test_a_ray_node_outlives_its_frontend(manifests):
    """It waits for the server beside it, and its own script is not what it waits for."""
    containers = manifests.containers
    node, frontend = containers["frontend/ray-worker"], containers["frontend/kserve-frontend"]
    assert frontend["pod"]["shareProcessNamespace"]
    *_, script = node["lifecycle"]["preStop"]["exec"]["command"]
    pattern = re.search(r"grep -qs (\S+) ", script)[1]
    assert re.search(pattern, "\0".join(frontend["command"])) and not re.search(pattern, script)


# --- the servers accept their command lines -----------------------------------------------------


@pytest.fixture
def classifier(tmp_path, monkeypatch) -> None:
    """A folder to start in, with the class that the manifests take for the reader's own."""
    (tmp_path / "classifier.py").write_text("class Classifier: ...")
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL_WEIGHTS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_the_servers_accept_their_command_lines(manifests, classifier, monkeypatch):
    """In containers of their size: the replicas' cores are there, and no thread too many."""
    for part, container in manifests.servers.items():
        module, *argv = container["command"][2:]
        read = {"model.serving": cli.server_config, "model.serving.frontend": cli.frontend_config}
        whole = int(cores(container))
        monkeypatch.setattr(cli, "cores", lambda whole=whole: whole)
        ports = [f"--http_port={free_port()}", f"--grpc_port={free_port()}"]
        config = read[module]([*argv, *ports])
        assert [model.name for model in config.models] == [MODEL]
        assert (config.endpoint.host, config.cluster.address) == (
            "0.0.0.0",
            "auto" if part == "frontend" else None,
        )
        assert (config.replicas is None) == (part == "plain")
        if part == "plain":
            assert config.threads <= whole
        if part == "ray":
            assert config.replicas.max_replicas * config.threads <= whole


def test_the_application_accepts_its_arguments(manifests, classifier):
    """They are options of model.serving; it serves the model that the frontends ask for."""
    config = cli.application_config(application(manifests))
    assert [model.name for model in config.models] == [MODEL]
    assert config.replicas.max_replicas_per_node == application(manifests)["max_replicas_per_node"]
    served = {model.target for model in config.models}
    for part in ("plain", "ray"):
        own = [word for word in manifests.servers[part]["command"] if ":" in word]
        assert served == set(own or [DEFAULT_TARGET])


# --- environment and security --------------------------------------------------------------------


def test_environment(manifests):
    """A home that can be written to; what a Ray cluster of the server's own gets, in all nodes."""
    ours = ray_cluster.KEEP_MEMORY | ray_cluster.FAST_REACTIONS
    ours |= ray_cluster.GRPC_MESSAGE_BYTES
    for name, container in manifests.containers.items():
        if name == "redis/redis":
            continue
        written = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/dev/shm"} <= written and env(container)["HOME"] == "/tmp"
        if name in ("plain/kserve-container", "ray/kserve-container"):
            continue  # the server sets it itself
        assert ours.items() <= env(container).items()
        if name == "frontend/kserve-frontend":
            assert env(container)["RAY_AUTH_MODE"] == manifests.cluster["authOptions"]["mode"]
            assert float(env(container)["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 600
        else:
            assert env(container)[SHARED_FOLDER] in written


def test_pods_may_do_nothing_more_than_serve(manifests):
    """No root, no privileges, no token of Kubernetes but the head's, writing only to volumes."""
    for labels, spec in manifests.pods:
        assert spec.get("automountServiceAccountToken", True) is (labels["part"] == "head")
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["fsGroup"] == 1000
        volumes = {volume["name"] for volume in spec["volumes"]}
        contexts = [(c["securityContext"], c["volumeMounts"]) for c in spec["containers"]]
        if labels["part"] == "head":
            autoscaler = manifests.cluster["autoscalerOptions"]
            contexts.append((autoscaler["securityContext"], autoscaler["volumeMounts"]))
        for context, mounts in contexts:
            assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"]
            assert context["runAsUser"] == spec["securityContext"]["runAsUser"] > 0
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert {mount["name"] for mount in mounts} <= volumes


# --- the image -----------------------------------------------------------------------------------


def test_the_image_has_what_serving_imports():
    """Every package, pinned; without those of the example, all that a model of one's own needs."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    (example,) = re.findall(r'^ARG PACKAGES="(.*)"$', text, re.M)
    (command,) = re.findall(r"^RUN pip install (.*\$PACKAGES.*)", text, re.M)
    words = [word.strip('"') for word in command.split() if not word.startswith(("-", "$"))]
    general = {re.sub(r"\[.*", "", word) for word in words} - {"requirements.txt"}
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    assert general | {*example.split()} <= {canonicalize_name(pin) for pin in pins}
    assert missing("model/serving", general) == set()
    assert missing("model/alexnet", general | {*example.split()}) == set()
    assert missing("model/alexnet", general) >= {*example.split()} - {"torchvision"}


def missing(folder: str, packages: set[str]) -> set[str]:
    """What the modules of a folder import that none of the packages provides."""
    providers = packages_distributions()
    imported = {name for path in (ROOT / folder).rglob("*.py") for name in imports(path)}
    found = {name: {canonicalize_name(each) for each in providers[name]} for name in imported}
    return {next(iter(by)) for by in found.values() if not by & packages}


# --- these tests find what an edit forgets -------------------------------------------------------


HALF_DONE: list[tuple[Callable, str, str]] = [
    (test_all_run_one_image, r"(kserve-container.*\n +image: )\S+", r"\1other:1"),
    (test_all_run_one_image, "rayVersion: 2", "rayVersion: 1"),
    (test_names, "name: custom-model-plain", "name: mine"),
    (test_names, "(name: custom-model-plain)", r"\1\n  namespace: models"),
    (test_secrets_come_from_one_secret, "secretName: custom-model", "secretName: mine"),
    (test_selectors_find_pods, "selector: (.*), part: redis}", r"selector: \1, part: database}"),
    (test_selectors_find_pods, "matchLabels: (.*), part: worker}", r"matchLabels: \1, part: head}"),
    (test_servers_listen_where_the_manifests_say, "containerPort: 8080", "containerPort: 9000"),
    (test_servers_listen_where_the_manifests_say, "--host=0.0.0.0", "--host=127.0.0.1"),
    (test_servers_listen_where_the_manifests_say, 'port: "8090"', 'port: "8070"'),
    (test_probes_request_paths_that_exist, "models/custom-model/ready", "models/mine/ready"),
    (test_probes_request_paths_that_exist, "failureThreshold: 36", "failureThreshold: 3"),
    (test_services_lead_to_ports_that_are_open, "targetPort: 8080", "targetPort: 80"),
    (test_services_lead_to_ports_that_are_open, "redis:6379", "redis:6380"),
    (test_policies_admit_what_they_should, "{port: 8081, protocol", "{port: 81, protocol"),
    (test_policies_admit_what_they_should, "ray-system", "kuberay"),
    (test_the_replicas_of_a_pod_fit_into_it, "--num_replicas=2", "--num_replicas=3"),
    (test_the_replicas_of_a_pod_fit_into_it, "--cpus_per_replica=1", "--cpus_per_replica=1.5"),
    (test_the_replicas_of_a_pod_fit_into_it, "--threads=2", "--threads=4"),
    (test_the_replicas_of_a_pod_fit_into_it, "cpus_per_replica: 1", "cpus_per_replica: 2"),
    (test_the_replicas_of_a_pod_fit_into_it, "# (gpus_per_replica)", r"\1"),
    (test_the_replicas_of_a_pod_fit_into_it, "# (num-gpus)", r"\1"),
    (test_the_replicas_of_a_pod_fit_into_it, "memory: 3072Mi", "memory: 2Gi"),
    (test_the_application_fills_the_workers, " num_replicas: 4", " num_replicas: 5"),
    (test_the_application_fills_the_workers, "maxReplicas: 3", "maxReplicas: 9"),
    (test_nothing_else_gets_replicas, 'num-cpus: "0"', 'num-cpus: "1"'),
    (test_numbers_of_pods, "minAvailable: 1", "minAvailable: 2"),
    (test_numbers_of_pods, "minReplicas: 2", "minReplicas: 1"),
    (test_resources_are_guaranteed, "requests: {cpu: 1000m", "requests: {cpu: 500m"),
    (test_resources_are_guaranteed, "sizeLimit: 512Mi", "sizeLimit: 128Mi"),
    (test_requests_end_before_their_pod, "request_timeout_s=60", "request_timeout_s=90"),
    (test_requests_end_before_their_pod, "request_timeout_s: 60", "request_timeout_s: 30"),
    (test_requests_end_before_their_pod, r"\[sleep, .5.\]", '[sleep, "60"]'),
    (test_a_ray_node_outlives_its_frontend, "- model.serving.frontend", "- model.frontend"),
    (test_environment, 'MALLOC_ARENA_MAX, value: "1"', 'MALLOC_ARENA_MAX, value: "2"'),
    (test_environment, "MODEL_SHARED_FOLDER, value: /tmp", "MODEL_SHARED_FOLDER, value: /data"),
    (
        test_pods_may_do_nothing_more_than_serve,
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
    ),
    (test_pods_may_do_nothing_more_than_serve, "name: tmp, mountPath", "name: t, mountPath"),
]


@pytest.mark.parametrize("check, old, new", HALF_DONE, ids=[new for *_, new in HALF_DONE])
def test_half_an_edit_is_found(check, old, new):
    """An edit that leaves another place as it was fails the test that it concerns."""
    edited = Manifests.read().edited({old: new})
    with pytest.raises(AssertionError):
        check(edited)
