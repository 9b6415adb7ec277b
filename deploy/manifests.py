"""Writes the Kubernetes manifests of this folder: `python -m deploy.manifests --help`"""

import argparse
from dataclasses import fields
from pathlib import Path

import yaml

from deploy import inferenceservice, networkpolicies, rayservice
from deploy.settings import Settings

HERE = Path(__file__).parent


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such, and everything anew instead of by reference."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def documents(settings: Settings) -> dict[str, list[dict]]:
    """Every file's name and the documents in it."""
    return {
        "inferenceservice-plain.yaml": [inferenceservice.without_ray(settings)],
        "inferenceservice-ray.yaml": [inferenceservice.with_ray(settings)],
        "rayservice.yaml": rayservice.documents(settings),
        "networkpolicies.yaml": networkpolicies.documents(settings),
    }


def texts(settings: Settings) -> dict[str, str]:
    """Every file's name and what is in it, with the command that wrote it in the first line."""
    changed = [
        f" --{field.name} {getattr(settings, field.name)}"
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    header = f"# Written by: python -m deploy.manifests{''.join(changed)}\n"
    return {
        name: header + yaml.dump_all(parts, Dumper=_Dumper, sort_keys=False, width=100)
        for name, parts in documents(settings).items()
    }


def parsed(argv: list[str] | None = None) -> tuple[Settings, Path]:
    """The settings of a command line, and the folder that the files go to."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.manifests",
        description="Writes the Kubernetes manifests.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for field in fields(Settings):
        help = field.metadata["help"]
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=help)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to")
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    settings = Settings(**given)
    low = [name for name in ("replicas", "min_pods", "workers", "fronts") if given[name] < 1]
    if low or settings.cpus <= 0 or settings.memory <= 0 or settings.gpus < 0:
        parser.error("there must be at least one of each, and something for each of them")
    if settings.max_pods < settings.min_pods or settings.max_workers < settings.workers:
        parser.error("--max_pods and --max_workers must not be less than --min_pods and --workers")
    return settings, out


def main() -> None:
    """Write the files and say which."""
    settings, out = parsed()
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts(settings).items():
        (out / name).write_text(text)
        print(out / name)


if __name__ == "__main__":
    main()
