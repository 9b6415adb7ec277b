"""Prints what experiments came to, as the tables of docs/reliability.md and docs/scaling.md."""

import argparse
import json
from collections.abc import Iterable, Sequence

from model.faults.experiment import Experiment
from model.loadtest.records import machine
from model.loadtest.tables import print_row


def chosen(module: str, description: str, known: Sequence[str]) -> list[str]:
    """The experiments that the command line names, of those known; all when it names none."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    listed = f"of {', '.join(known)} (default: all)"
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=listed)
    names = parser.parse_args().names
    if unknown := set(names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names or list(known)


def report(experiments: Iterable[Experiment]) -> None:
    """Print what the machine is, a row for each experiment when it is done, then all facts."""
    print(json.dumps(machine()))
    facts = []
    for i, experiment in enumerate(experiments):
        print_row(experiment.row(), header=i == 0)
        facts += [(f"{experiment.name}: {name}", value) for name, value in experiment.facts.items()]
    print_facts(facts)


def print_facts(facts: Iterable[tuple[str, float | str]]) -> None:
    """Print a line for each fact: name and value."""
    for name, value in facts:
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
