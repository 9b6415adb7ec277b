"""Packages a model for Kubernetes: `python -m model.course.package tickets:TicketModel …`.

It fills in deploy/inferenceservice-ray.yaml, comments and all, and writes the Dockerfile that puts
the model's files on top of the image of deploy/Dockerfile.
"""

import argparse
import contextlib
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = "parallel-inference:0.1.0"
KSERVE_AND_RAY_CPUS = 0.75  # as the comment in the manifest says


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m model.course.package", description="A Dockerfile and an InferenceService."
    )
    parser.add_argument("model", metavar="MODULE:CLASS")
    parser.add_argument("files", nargs="+", type=Path, help="the module and what it loads")
    parser.add_argument("--image", required=True, help="name:tag, as your registry has it")
    parser.add_argument("--name", default="custom-model-ray", help="of the InferenceService")
    help = "for pip, beside the image's own; one without a version gets the version installed here"
    parser.add_argument("--packages", nargs="*", default=[], help=help)
    parser.add_argument("--num_replicas", type=int, default=2)
    parser.add_argument("--cpus_per_replica", type=float, default=1.0)
    parser.add_argument("--memory_mib", type=int, default=3072, help="of the pod: measure it")
    parser.add_argument("--into", type=Path, default=Path(), help="the folder to write to")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.]+:\w+", args.model):
        parser.error(f"{args.model!r} is not MODULE:CLASS")
    if missing := [str(file) for file in args.files if not file.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    if args.model.partition(".")[0].partition(":")[0] not in {file.stem for file in args.files}:
        parser.error(f"none of the files is the module of {args.model}: name it, and what it loads")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", args.name):
        parser.error(f"--name {args.name}: Kubernetes wants small letters, digits and dashes")
    if args.num_replicas < 1 or args.cpus_per_replica <= 0:
        parser.error("the number of replicas and the CPUs of each are above 0")
    return args


def dockerfile(args: argparse.Namespace) -> str:
    """The image: the model's files on top of the one that serves any model."""
    lines = [f"# docker build -t {args.image} .", f"FROM {BASE}"]
    if args.packages:
        packages = " ".join(f"'{_pinned(package)}'" for package in args.packages)
        install = f"RUN pip install --no-cache-dir {packages}"
        lines += ["USER root", install, "USER 1000"]
    lines.append(f"COPY {' '.join(file.name for file in args.files)} /models/")
    command = ["python", "-m", "model.serving", args.model, "--host=0.0.0.0"]
    lines.append("CMD [" + ", ".join(f'"{word}"' for word in command) + "]")
    return "\n".join(lines) + "\n"


def _pinned(package: str) -> str:
    """With the version that is installed here, unless it names one: what is pickled by one version
    may not be read by another."""
    if not re.fullmatch(r"[\w.-]+", package):
        return package
    with contextlib.suppress(PackageNotFoundError):
        return f"{package}=={version(package)}"
    return package


def inference_service(args: argparse.Namespace) -> str:
    """The manifest, with the image, the model, the replicas and what the pod needs for them."""
    cpus = args.num_replicas * args.cpus_per_replica + KSERVE_AND_RAY_CPUS
    # Replicas can reserve the whole cores of the limit only.
    cpus = max(cpus, math.ceil(args.num_replicas * args.cpus_per_replica))
    resources = f"{{cpu: {1000 * cpus:.0f}m, memory: {args.memory_mib}Mi}}"
    changes = {
        r"  name: custom-model-ray": f"  name: {args.name}",
        r"README.md: what it needs, how to apply it.": (
            "What it needs, how to apply it: deploy/README.md of parallel-inference."
        ),
        rf"image: {BASE}  # built from Dockerfile": f"image: {args.image}",
        r"# - classifier:Classifier  # .*": f"- {args.model}",
        r"--num_replicas=\d+": f"--num_replicas={args.num_replicas}",
        r"--cpus_per_replica=\d+": f"--cpus_per_replica={args.cpus_per_replica:g}",
        r"\n *# 2 replicas × 1 core .*\n.*\n.*\n.*\n": (
            f"\n          # {args.num_replicas} × {args.cpus_per_replica:g} for the replicas, "
            f"{KSERVE_AND_RAY_CPUS} for KServe and Ray. Measure the memory under load.\n"
        ),
        r"requests: \{cpu: .*\}": f"requests: {resources}",
        r"limits: \{cpu: .*\}": f"limits: {resources}",
    }
    text = (DEPLOY / "inferenceservice-ray.yaml").read_text()
    for pattern, new in changes.items():
        text, count = re.subn(pattern, lambda _, new=new: new, text)
        if count != 1:
            raise RuntimeError(f"{pattern!r} is {count} times in the manifest, not once")
    return text


def main(argv: list[str] | None = None) -> None:
    """Write Dockerfile, inferenceservice.yaml and the model's files into one folder."""
    args = options(argv)
    args.into.mkdir(parents=True, exist_ok=True)
    for file in args.files:
        (args.into / file.name).write_bytes(file.read_bytes())
    (args.into / "Dockerfile").write_text(dockerfile(args))
    (args.into / "inferenceservice.yaml").write_text(inference_service(args))
    print(f"{args.into}: Dockerfile, inferenceservice.yaml, and the model's files")


if __name__ == "__main__":
    main()
