"""What serving costs when the model costs nothing: `make overhead` prints it and draws it."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from model.loadtest import records
from model.loadtest.configurations import PEERS_PYTHON
from model.loadtest.overhead.figure import figure, rows
from model.loadtest.overhead.measure import LOADS, RECORDS, WAYS, measure
from model.loadtest.summary import interleaved
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
    installed = [n for n, way in WAYS.items() if way.python != PEERS_PYTHON or way.python.exists()]
    ways = args.ways or installed
    loads = [load for load in LOADS if load[:2] == (0, 100)] if args.nothing else LOADS
    args.file.unlink(missing_ok=True)
    with tqdm(total=args.rounds * len(ways) * len(loads), file=sys.stdout, unit="load") as bar:
        for number, name in interleaved(ways, args.rounds):
            bar.set_postfix_str(name)
            found = measure(name, loads, args.seconds, bar.update)
            records.append(args.file, ({"round": number} | record for record in found))
    measured = records.read(args.file)
    for i, row in enumerate(rows(measured)):
        print_row(row, header=i == 0)
    machine = f"{measured[0]['cpu']}, {measured[0]['cores']} cores"
    drawn = figure(measured, f"A model that costs nothing, 32 clients, on {machine}")
    drawn.savefig(args.file.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
