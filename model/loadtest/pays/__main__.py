"""When which server pays: `make pays` measures it, prints the table, draws imgs/pays.png."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from model.loadtest import records
from model.loadtest.pays.advice import table_of
from model.loadtest.pays.figure import figure
from model.loadtest.pays.measure import CLIENTS, MODELS, RECORDS, SERVERS, measure
from model.loadtest.summary import interleaved
from model.loadtest.tables import print_row


def main() -> None:
    """Measure all servers in turn, then in the opposite order, and so on."""
    parser = argparse.ArgumentParser(
        prog="python -m model.loadtest.pays", description="Models of different cost on all servers."
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--file", type=Path, default=RECORDS, help="of the records")
    args = parser.parse_args()
    args.file.unlink(missing_ok=True)
    steps = args.rounds * len(SERVERS) * len(MODELS) * len(CLIENTS)
    with tqdm(total=steps, file=sys.stdout, unit="load") as bar:
        for number, name in interleaved(list(SERVERS), args.rounds):
            bar.set_postfix_str(name)
            found = measure(name, progress=bar.update)
            records.append(args.file, ({"round": number} | record for record in found))
    measured = records.read(args.file)
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
