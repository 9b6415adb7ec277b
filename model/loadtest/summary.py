"""Statistics over repeated runs: medians, their intervals, and the order that runs are made in."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def summary(
    records: Iterable[dict], key: Sequence[str] = ("variant", "kind", "clients", "rate")
) -> list[dict]:
    """A row for all records that agree in `key`: medians, each with its `_low` and `_high`."""
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in key)].append(record)
    rows = []
    for values, runs in groups.items():
        row = dict(zip(key, values, strict=True)) | {"runs": len(runs)}
        row |= {name: sum(run[name] for run in runs) for name in ("requests", "errors", "wrong")}
        for name in ("throughput", "p50_ms", "p95_ms", "p99_ms", "p95_from_sent_ms"):
            measured = [run[name] for run in runs]
            row[name] = float(np.median(measured))
            row[f"{name}_low"], row[f"{name}_high"] = interval(measured)
        rows.append(row)
    return rows


def medians(records: Iterable[dict]) -> list[dict]:
    """For each variant the median of every number in its records."""
    groups = defaultdict(list)
    for record in records:
        groups[record["variant"]].append(record)
    return [
        {
            name: statistics.median(run[name] for run in runs)
            if isinstance(value, int | float)
            else value
            for name, value in runs[0].items()
        }
        for runs in groups.values()
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median: where it might be, had we measured again.

    Of less than five values it is the least and the largest, which hold the median less often:
    three times of four with three values, once in two with two.
    """
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def interleaved(variants: Sequence, rounds: int) -> Iterator[tuple[int, object]]:
    """(round, variant) in the order A B C, C B A, ...: the machine's drift affects all alike."""
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            yield number, variant
