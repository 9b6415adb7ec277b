"""What serving costs when the model costs nothing: `make overhead` prints it and draws it."""

import argparse
from pathlib import Path

from model.loadtest.in_turn import measure_in_turn
from model.loadtest.overhead.figure import figure, rows
from model.loadtest.overhead.measure import LOADS, RECORDS, SMALL, WAYS, measure
from model.loadtest.tables import print_row


def main() -> None:
    """Measure all ways in turn, then in the opposite order, and so on."""
    parser = argparse.ArgumentParser(
        prog="python -m model.loadtest.overhead",
        description="A model that costs nothing, and some that cost little, by every way to it.",
    )
    listed = f"of {', '.join(WAYS)} (default: all that are installed)"
    parser.add_argument("ways", nargs="*", metavar="WAY", help=listed)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load")
    parser.add_argument("--nothing", action="store_true", help="only the model that costs nothing")
    parser.add_argument("--file", type=Path, default=RECORDS, help="of the records")
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"there is no {', '.join(unknown)} here; there are {listed}")
    installed = [name for name, way in WAYS.items() if Path(way.python).exists()]
    ways = args.ways or installed
    loads = [load for load in LOADS if load[:2] == (0, SMALL)] if args.nothing else LOADS
    measured = measure_in_turn(
        ways,
        args.rounds,
        len(loads),
        lambda name, progress: measure(name, loads, args.seconds, progress),
        args.file,
    )
    for i, row in enumerate(rows(measured)):
        print_row(row, header=i == 0)
    machine = f"{measured[0]['cpu']}, {measured[0]['cores']} cores"
    drawn = figure(measured, f"A model that costs nothing, 32 clients, on {machine}")
    drawn.savefig(args.file.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
