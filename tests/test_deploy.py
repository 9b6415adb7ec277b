"""The Kubernetes manifests: up to date, valid field by field, and with numbers that fit.

Nothing here needs a cluster. What only a cluster can say, deploy/README.md lists.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import packages_distributions

import jsonschema
import kserve.models
import kubernetes.client
import kubernetes_validate
import pytest
import yaml
from fastapi import FastAPI
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from packaging.utils import canonicalize_name
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deploy import manifests
from deploy.settings import PRESTOP_S, Settings
from model import options
from tests import kuberay
from tests.conftest import ROOT
from tests.test_project import imports

DEFAULT = Settings()
ON_GPUS = Settings(gpus=1, replicas=4, cpus=0.5, namespace="models", request_timeout=20)
SETTINGS = {"default": DEFAULT, "on GPUs": ON_GPUS, "one of each": Settings(workers=1, fronts=1)}
SETTINGS["cores in parts"] = Settings(replicas=3, cpus=0.7, max_workers=9)
EACH = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
OLDEST, NEWEST = "1.32", kubernetes_validate.latest_version()  # Kubernetes


# --- validators: each returns or raises what is wrong -------------------------------------------


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


# --- what is in the documents --------------------------------------------------------------------


def of_kind(kind: str, settings: Settings = DEFAULT) -> list[dict]:
    """All documents of a kind."""
    files = manifests.documents(settings).values()
    return [document for file in files for document in file if document["kind"] == kind]


def rayservice(settings: Settings = DEFAULT) -> tuple[dict, dict, dict[str, dict]]:
    """The RayService, its cluster, and the groups of its pods by part."""
    (document,) = of_kind("RayService", settings)
    cluster = document["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return document, cluster, {g["template"]["metadata"]["labels"]["part"]: g for g in groups}


def pods(settings: Settings = DEFAULT) -> Iterator[tuple[dict, dict]]:
    """The labels and the spec of every pod that comes of the documents."""
    for document in of_kind("InferenceService", settings):
        predictor = document["spec"]["predictor"]
        fields = kubernetes.client.V1PodSpec.attribute_map.values()
        spec = {name: value for name, value in predictor.items() if name in fields}
        yield predictor["labels"], spec
    templates = [group["template"] for group in rayservice(settings)[2].values()]
    templates += [document["spec"]["template"] for document in of_kind("Deployment", settings)]
    for template in templates:
        yield template["metadata"]["labels"], template["spec"]


def containers(settings: Settings = DEFAULT) -> dict[str, dict]:
    """Every container by what runs in it: a module of ours, or else its name."""
    found = {}
    for _, spec in pods(settings):
        for container in spec["containers"]:
            words = container.get("command") or [None, None, container["name"]]
            found[words[2]] = container | {"of": spec}
    return found


def cores(container: dict) -> float:
    """The CPU limit."""
    return float(container["resources"]["limits"]["cpu"].removesuffix("m")) / 1000


def read(module: str, argv: list[str], limit: float, monkeypatch):
    """The options as the module's parser reads them in a container with this CPU limit."""
    read_by = {
        "model.kserve_server": options.kserve_options,
        "model.ray_server": options.ray_options,
        "model.front_server": partial(options.ray_options, command="front_server"),
    }[module]
    monkeypatch.setattr(options, "cores", lambda: int(limit))
    monkeypatch.delenv("MODEL_WEIGHTS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ports = [f"--http_port={options.free_port()}", f"--grpc_port={options.free_port()}"]
    args = read_by([*argv, *ports])
    for held in args._held:
        held.close()
    return args


# --- files ---------------------------------------------------------------------------------------


def test_the_files_are_up_to_date():
    """As `python -m deploy.manifests` would write them now, and no other."""
    texts = manifests.texts(DEFAULT)
    found = {path.name: path.read_text() for path in manifests.HERE.glob("*.yaml")}
    assert found == texts, "run: python -m deploy.manifests"
    for name, text in texts.items():
        assert text.startswith("# Written by: python -m deploy.manifests\n")
        assert list(yaml.safe_load_all(text)) == manifests.documents(DEFAULT)[name]


def test_the_command_line_sets_every_setting(tmp_path, monkeypatch, capsys):
    """What is given is in the files, and in their first line; what cannot be is refused."""
    argv = f"--image here:2 --gpus 1 --cpus 0.5 --out {tmp_path}".split()
    settings, out = manifests.parsed(argv)
    assert (settings, out) == (replace(DEFAULT, image="here:2", gpus=1, cpus=0.5), tmp_path)
    monkeypatch.setattr("sys.argv", ["manifests", *argv])
    manifests.main()
    text = (tmp_path / "rayservice.yaml").read_text()
    assert text.startswith("# Written by: python -m deploy.manifests --image here:2 --cpus 0.5 --g")
    assert "image: here:2" in text and "nvidia.com/gpu: '1'" in text
    for wrong in ("--replicas 0", "--min_pods 4", "--workers 5", "--memory 0", "--replica 3"):
        with pytest.raises(SystemExit):
            manifests.parsed(wrong.split())


def test_no_secret_is_in_a_file():
    """Tokens and passwords come from a Secret that is made by hand."""
    kinds = {
        document["kind"] for file in manifests.documents(DEFAULT).values() for document in file
    }
    assert "Secret" not in kinds
    for container in containers().values():
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD", variable["name"]):
                assert "value" not in variable and variable["valueFrom"]["secretKeyRef"]


# --- every field exists --------------------------------------------------------------------------


@pytest.mark.parametrize("settings, version", [(DEFAULT, NEWEST), (ON_GPUS, OLDEST)])
def test_kubernetes_knows_every_field(settings, version):
    """Of its own kinds, and of every pod; an unknown field is found."""
    custom = ("InferenceService", "RayService")
    for file in manifests.documents(settings).values():
        for document in file:
            assert document["metadata"]["namespace"] == settings.namespace
            if document["kind"] not in custom:
                check_kubernetes(document, version)
    for labels, spec in pods(settings):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": labels}}
        check_kubernetes(pod | {"spec": spec}, version)
    autoscaler = rayservice(settings)[1]["autoscalerOptions"]
    names = ("env", "resources", "securityContext", "volumeMounts")
    container = {"name": "a"} | {name: autoscaler[name] for name in names if name in autoscaler}
    check_kubernetes(pod | {"spec": {"containers": [container]}}, version)


def test_kubernetes_schemas_refuse_what_they_do_not_know():
    """A misspelt field, deep inside, of a Kubernetes kind."""
    (document,) = of_kind("Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kubernetes(document, NEWEST)


@EACH
def test_kserve_knows_every_field(settings):
    """Of an InferenceService, by the SDK's classes; an unknown field is found."""
    for document in of_kind("InferenceService", settings):
        assert not unknown(document, "V1beta1InferenceService")
        predictor = document["spec"]["predictor"]
        predictor["containers"][0]["livenessProbe"]["httpGet"]["paht"] = "/"
        predictor["minReplica"] = 1
        assert set(unknown(document, "V1beta1InferenceService")) == {
            ".spec.predictor.minReplica",
            ".spec.predictor.containers.livenessProbe.httpGet.paht",
        }


@EACH
def test_kuberay_takes_it(settings):
    """By its CRD and by the rules of its operator; what is misspelt or of another type is found."""
    document, cluster, groups = rayservice(settings)
    check = jsonschema.Draft202012Validator(kuberay.RAYSERVICE)
    assert not [error.message for error in check.iter_errors(document)]
    assert not kuberay.refused(document)
    groups["front"]["minReplica"] = cluster["gcsFaultTolerance"] = cluster["rayVersion"] = 1
    groups["head"]["rayStartParams"]["num-cpus"] = 0
    del groups["worker"]["maxReplicas"]
    assert len([*check.iter_errors(document)]) == 5


def test_kuberay_refuses_what_cannot_run():
    """Two things that its CRD lets through: a port taken twice in a pod, too few of the head's."""
    document, _, groups = rayservice()
    del groups["front"]["rayStartParams"]["metrics-export-port"]
    groups["head"]["template"]["spec"]["containers"][0]["ports"] = [{"name": "dashboard"}]
    ports, twice = kuberay.refused(document)
    assert "8080" in twice and "serve" in ports


@EACH
def test_serve_knows_every_field(settings):
    """Of the RayService's configuration of Serve, which itself would ignore unknown ones."""
    serve = yaml.safe_load(rayservice(settings)[0]["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(serve)
    assert serve.keys() <= ServeDeploySchema.model_fields.keys()
    (application,) = serve["applications"]
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()


# --- the servers can be started so ---------------------------------------------------------------


@EACH
def test_the_servers_take_their_command_lines(settings, monkeypatch):
    """In containers of their size: the replicas' cores are there, and no thread too many."""
    found = {name: part for name, part in containers(settings).items() if name.startswith("model.")}
    assert found.keys() == {"model.kserve_server", "model.ray_server", "model.front_server"}
    for module, container in found.items():
        assert container["command"][:3] == ["python", "-m", module]
        limit = cores(container)
        args = read(module, container["command"][3:], limit, monkeypatch)
        assert (args.host, args.model_name, args.http_port > 0) == ("0.0.0.0", "custom-model", True)
        grace = container["of"]["terminationGracePeriodSeconds"]
        assert grace > settings.request_timeout + PRESTOP_S
        if module != "model.kserve_server":
            assert args.request_timeout_s == settings.request_timeout
        if module == "model.ray_server":
            reserved = args.num_replicas * args.cpus_per_replica
            assert args.num_replicas == settings.replicas
            assert reserved <= int(limit) and reserved + 0.75 <= limit
            assert args.num_replicas * args.threads <= max(int(limit), settings.replicas)
        if module == "model.kserve_server":
            assert args.threads <= limit


@EACH
def test_the_application_takes_its_arguments(settings, monkeypatch):
    """They are options of model.ray_server, but for the one that says how replicas are spread."""
    serve = yaml.safe_load(rayservice(settings)[0]["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == "model.application:application"
    given = application["args"]
    assert given["max_replicas_per_node"] == settings.replicas
    argv = [f"--{name}={value}" for name, value in given.items()]
    args = read("model.ray_server", [*argv, "--address=auto"], 64, monkeypatch)
    assert args.num_replicas == settings.workers * settings.replicas
    assert args.cpus_per_replica == settings.cpus


# --- numbers and paths ---------------------------------------------------------------------------


@EACH
def test_the_replicas_fit_into_the_workers(settings):
    """Ray is told enough CPUs for them, and the container has those and a share for Ray."""
    worker = rayservice(settings)[2]["worker"]
    (container,) = worker["template"]["spec"]["containers"]
    reserved = settings.replicas * settings.cpus
    assert int(worker["rayStartParams"]["num-cpus"]) == math.ceil(reserved)
    assert cores(container) >= reserved + 0.25
    limits = container["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", "0") == str(settings.gpus)
    assert worker["rayStartParams"].get("num-gpus", "0") == str(settings.gpus)


@EACH
def test_nothing_else_gets_replicas(settings):
    """Head and fronts have no CPUs for Ray, so that replicas are on workers only."""
    groups = rayservice(settings)[2]
    for part in ("head", "front"):
        assert groups[part]["rayStartParams"]["num-cpus"] == "0"


@EACH
def test_numbers_of_pods(settings):
    """The least is no more than the most; a disruption leaves all pods of a part but one."""
    for document in of_kind("InferenceService", settings):
        predictor = document["spec"]["predictor"]
        assert 1 <= predictor["minReplicas"] <= predictor["maxReplicas"]
    groups = rayservice(settings)[2]
    for part in ("worker", "front"):
        group = groups[part]
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
    for budget in of_kind("PodDisruptionBudget", settings):
        part = budget["spec"]["selector"]["matchLabels"]["part"]
        assert budget["spec"]["minAvailable"] == groups[part]["replicas"] - 1


@EACH
def test_resources_are_promised_in_full(settings):
    """Requests equal limits, and leave room over what was measured."""
    for container in containers(settings).values():
        wanted = container["resources"]
        assert (
            wanted["requests"] == wanted["limits"] and {"cpu", "memory"} <= wanted["limits"].keys()
        )
    limits = containers(settings)["model.ray_server"]["resources"]["limits"]
    measured = 1 + settings.replicas * settings.memory
    assert int(limits["memory"].removesuffix("Mi")) >= 1.5 * measured * 1024 - 1


def test_pods_may_do_nothing_more_than_serve():
    """No root, no privileges, no token of Kubernetes but the head's, writing only to volumes."""
    for labels, spec in pods():
        assert spec.get("automountServiceAccountToken", True) is (labels["part"] == "head")
        assert spec["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_probes_ask_paths_that_exist():
    """Of KServe's server and of Ray's agent; quickly, and for long enough as they start."""
    app = FastAPI()
    repository = ModelRepository()
    register_v2_endpoints(app, DataPlane(repository), ModelRepositoryExtension(repository))
    paths = [path.replace("{model_name}", "custom-model") for path in app.openapi()["paths"]]
    for name, container in containers().items():
        ours = name.startswith("model.")
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name == "redis":
                continue
            probe = container[kind]
            get = probe["httpGet"]
            assert get["path"] in (paths if ours else PUBLIC_EXACT_PATHS), get
            assert get["port"] == (8080 if ours else 52365)
            assert 1 <= probe["timeoutSeconds"] <= 2
        if name != "redis":
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] >= 120


def test_a_front_outlives_its_requests():
    """It is taken out of the Service before it ends, and its Ray node ends after it."""
    node, front = rayservice()[2]["front"]["template"]["spec"]["containers"]
    assert front["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(PRESTOP_S)]
    *_, script = node["lifecycle"]["preStop"]["exec"]["command"]
    pattern = re.search(r"grep -qs (\S+) ", script)[1]
    assert re.search(pattern, "\0".join(front["command"])) and not re.search(pattern, script)


def test_selectors_find_pods():
    """Services, budgets and policies name labels that pods have."""
    labels = [labels for labels, _ in pods()]
    selectors = [document["spec"]["selector"] for document in of_kind("Service")]
    for budget in of_kind("PodDisruptionBudget"):
        selectors.append(budget["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert any(selector.items() <= found.items() for found in labels), selector
    parts = {found["part"] for found in labels}
    for policy in of_kind("NetworkPolicy"):
        for among in policy["spec"]["podSelector"].get("matchExpressions", []):
            assert set(among["values"]) <= parts


def test_policies_let_in_what_they_should():
    """Requests from the namespace and the gateway; everything else from our own pods only."""
    let_in = {}
    for policy in of_kind("NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            ports = [port["port"] for port in rule.get("ports", [])]
            let_in[policy["metadata"]["name"]] = (ports, [list(peer)[0] for peer in rule["from"]])
    assert let_in == {
        "custom-model-requests": ([8080, 8081], ["podSelector", "namespaceSelector"]),
        "custom-model-ray": ([], ["podSelector"]),
        "custom-model-dashboard": ([8265], ["namespaceSelector"]),
        "custom-model-redis": ([6379], ["podSelector"]),
    }


# --- the image -----------------------------------------------------------------------------------


def test_the_image_has_what_serving_imports():
    """The Dockerfile installs every package that model/ imports, and nothing unpinned."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    words = (
        " ".join(re.findall(r"pip install ([^&\n]*)", text)).replace("requirements.txt", "").split()
    )
    named = {canonicalize_name(re.sub(r"\W*\[.*", "", word.strip('"'))) for word in words}
    named = {name for name in named if name[0].isalpha()}
    assert {"kserve", "ray", "torch"} <= named and not named & {"jupyterlab", "matplotlib"}
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    assert named <= {canonicalize_name(pin) for pin in pins}
    providers = packages_distributions()
    for path in (ROOT / "model").glob("*.py"):
        for name in imports(path) & providers.keys() - {"model"}:
            provided_by = {canonicalize_name(dist) for dist in providers[name]}
            assert provided_by & named, f"{path.name} imports {name}, of {provided_by}"
