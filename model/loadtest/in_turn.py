"""Several servers measured in turn, then in the opposite order, and so on."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from model.loadtest import records
from model.loadtest.summary import interleaved

Measure = Callable[[str, Callable[[], object]], list[dict]]


def measure_in_turn(
    names: Sequence[str], rounds: int, loads: int, measure: Measure, file: Path
) -> list[dict]:
    """Measure each server `rounds` times; every record goes into `file` at once, with its round.

    loads: of a server in a round, for the progress bar. measure: gets a name and what it is to call
    after each load, and returns records. Returns all records.
    """
    file.unlink(missing_ok=True)
    with tqdm(total=rounds * len(names) * loads, file=sys.stdout, unit="load") as bar:
        for number, name in interleaved(names, rounds):
            bar.set_postfix_str(name)
            found = measure(name, bar.update)
            for record in found:
                if record["errors"]:
                    bar.write(f"{name}: {record['errors']} failed: {record['error_kinds']}")
            records.append(file, ({"round": number} | record for record in found))
    return records.read(file)
