"""The manifests of deploy/ as data: their documents, and the pods and containers in them."""

import json
import re
from collections.abc import Iterator
from functools import cache, cached_property

import kubernetes.client
import yaml

from tests.conftest import ROOT

POD_FIELDS = kubernetes.client.V1PodSpec.attribute_map.values()


class Manifests:
    """The YAML files of deploy/. What it returns may be changed: nothing in it is shared."""

    def __init__(self, texts: dict[str, str]) -> None:
        """texts: the content of each file by its name."""
        self.texts = texts
        self.documents = [each for text in texts.values() for each in json.loads(as_json(text))]

    @classmethod
    def read(cls) -> "Manifests":
        """As they are in deploy/."""
        return cls({path.name: path.read_text() for path in (ROOT / "deploy").glob("*.yaml")})

    def edited(self, edits: dict[str, str]) -> "Manifests":
        """As they are after a reader has replaced each regular expression wherever it matches.

        Raises ValueError when one matches nowhere.
        """
        texts = dict(self.texts)
        for pattern, new in edits.items():
            found = {name: re.subn(pattern, new, text) for name, text in texts.items()}
            if not any(count for _, count in found.values()):
                raise ValueError(f"{pattern} matches nowhere")
            texts = {name: text for name, (text, _) in found.items()}
        return Manifests(texts)

    def of_kind(self, *kinds: str) -> list[dict]:
        """The documents of these kinds."""
        return [document for document in self.documents if document["kind"] in kinds]

    @property
    def rayservice(self) -> dict:
        """The one RayService."""
        (document,) = self.of_kind("RayService")
        return document

    @property
    def cluster(self) -> dict:
        """The RayCluster in it."""
        return self.rayservice["spec"]["rayClusterConfig"]

    @property
    def groups(self) -> dict[str, dict]:
        """The groups of its pods by their label `part`: head, worker, frontend."""
        groups = [self.cluster["headGroupSpec"], *self.cluster["workerGroupSpecs"]]
        return {group["template"]["metadata"]["labels"]["part"]: group for group in groups}

    @property
    def serve(self) -> dict:
        """The configuration of Ray Serve in it."""
        return yaml.safe_load(self.rayservice["spec"]["serveConfigV2"])

    @property
    def pods(self) -> Iterator[tuple[dict, dict]]:
        """The labels and the spec of every pod that Kubernetes, KServe or KubeRay makes."""
        for document in self.of_kind("InferenceService"):
            predictor = document["spec"]["predictor"]
            spec = {name: value for name, value in predictor.items() if name in POD_FIELDS}
            yield predictor["labels"], spec
        templates = [group["template"] for group in self.groups.values()]
        templates += [document["spec"]["template"] for document in self.of_kind("Deployment")]
        for template in templates:
            yield template["metadata"]["labels"], template["spec"]

    @cached_property
    def containers(self) -> dict[str, dict]:
        """Every container by PART/NAME, its pod's spec added as `pod`.

        The InferenceServices are `plain` and `ray` here, as both have pods of part `server`.
        """
        found = {}
        for labels, spec in self.pods:
            for container in spec["containers"]:
                part = labels["part"]
                if part == "server":
                    part = "plain" if "--in_process" in container["command"] else "ray"
                found[f"{part}/{container['name']}"] = container | {"pod": spec}
        return found

    @property
    def servers(self) -> dict[str, dict]:
        """The containers with a server of ours, by part: plain, ray, frontend."""
        return {
            name.split("/")[0]: container
            for name, container in self.containers.items()
            if container.get("command", [])[:2] == ["python", "-m"]
        }


@cache
def as_json(text: str) -> str:
    """A file's documents; in JSON, where no two places share what YAML's aliases name."""
    return json.dumps([*yaml.safe_load_all(text)])


def options(container: dict) -> dict[str, str]:
    """The options on a container's command line: name -> value, "" where there is none."""
    words = [word for word in container["command"] if word.startswith("--")]
    return {name.lstrip("-"): value for name, _, value in (word.partition("=") for word in words)}


def env(container: dict) -> dict[str, str | None]:
    """A container's environment variables; None for those that come from a Secret."""
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def cores(container: dict) -> float:
    """The CPU limit."""
    return float(container["resources"]["limits"]["cpu"].removesuffix("m")) / 1000


def in_bytes(amount: str) -> int:
    """A quantity of memory in Kubernetes' notation, such as 512Mi."""
    return int(amount[:-2]) * {"Mi": 2**20, "Gi": 2**30}[amount[-2:]]


def within(value: object, key: str) -> Iterator:
    """Every value that stands under `key`, at any depth."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in parts:
        if name == key:
            yield part
        if isinstance(part, (dict, list)):
            yield from within(part, key)
