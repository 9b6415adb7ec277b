"""When which server pays: `make pays` measures it, prints the table, draws imgs/pays.png."""

import argparse
from pathlib import Path

from model.loadtest.in_turn import measure_in_turn
from model.loadtest.pays.advice import table_of
from model.loadtest.pays.figure import figure
from model.loadtest.pays.measure import CLIENTS, MODELS, RECORDS, SERVERS, measure
from model.loadtest.tables import print_row


def main() -> None:
    """Measure all servers in turn, then in the opposite order, and so on."""
    parser = argparse.ArgumentParser(
        prog="python -m model.loadtest.pays", description="Models of different cost on all servers."
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--file", type=Path, default=RECORDS, help="of the records")
    args = parser.parse_args()
    measured = measure_in_turn(
        list(SERVERS),
        args.rounds,
        len(MODELS) * len(CLIENTS),
        lambda name, progress: measure(name, progress=progress),
        args.file,
    )
    for i, row in enumerate(table_of(measured)):
        shown = {
            key: f"{value:.2g}" if isinstance(value, float) else value for key, value in row.items()
        }
        print_row(shown, header=i == 0)
    machine = f"{measured[0]['cpu']}, {measured[0]['cores']} cores"
    drawn = figure(measured, f"Throughput against plain KServe's, on {machine}")
    drawn.savefig(args.file.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
