"""All experiments with one server, under load: `python -m model.faults.experiments [NAME …]`.

`make reliability` prints the tables of docs/reliability.md with it.
"""

from collections.abc import Callable, Iterator, Sequence

from model.faults.changes import changes, scaled
from model.faults.crashes import all_killed, controller, ended, killed, node, slow, stuck
from model.faults.experiment import Experiment
from model.faults.overload import overload
from model.faults.probes import probes
from model.faults.report import chosen, report
from model.faults.servers import HALVES, ours
from model.loadtest.tables import print_row
from model.loadtest.workload import Workload

# Those that can share one server, in the order in which they are done to it.
SHARED: dict[str, Callable[..., Experiment | Iterator[Experiment]]] = {
    "killed": killed,
    "all_killed": all_killed,
    "stuck": stuck,
    "slow": slow,
    "controller": controller,
    "overload": overload,
    "changes": changes,
    "scaled": scaled,
    "ended": ended,
}


def run(names: Sequence[str], work: Workload) -> Iterator[Experiment]:
    """Run the experiments named, one after the other. names: of SHARED, and `node`."""
    if shared := [name for name in SHARED if name in names]:
        with ours(*HALVES, "--max_queued_requests", "16") as server:
            for name in shared:
                found = SHARED[name](server, work)
                yield from [found] if isinstance(found, Experiment) else found
    if "node" in names:
        yield node(work)


def main() -> None:
    """Run what the command line names; print a table of it, and the table of health probes."""
    known = [*SHARED, "node", "probes"]
    names = chosen("model.faults.experiments", "Injects faults into a server.", known)
    work = Workload.drawn()
    report(run(names, work))
    if "probes" in names:
        for i, row in enumerate(probes(work)):
            print_row(row, header=i == 0)


if __name__ == "__main__":
    main()
