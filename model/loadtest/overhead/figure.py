"""The figure and the tables of `make overhead`."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from model.loadtest.overhead.measure import SMALL
from model.loadtest.plots import BLUE, GREEN, GREY, ORANGE, STYLE
from model.loadtest.records import PARTS

NAMES = {"server": "in front (KServe, HAProxy, or all)", "ray": "Ray", "replicas": "replicas"}
COLOURS = dict(zip(PARTS, (BLUE, GREY, GREEN), strict=True))
CLIENTS = 32  # of the figure


def medians(measured: Iterable[dict]) -> dict[tuple, dict[str, float]]:
    """(way, ms, bytes, clients) -> the medians of throughput, p99_ms and the CPU times."""
    groups = defaultdict(list)
    for record in measured:
        key = record["variant"], record["ms"], record["bytes"], record["clients"]
        groups[key].append(record)
    names = ("throughput", "p99_ms", *(f"{part}_cpu_ms" for part in PARTS))
    return {
        key: {name: statistics.median(run[name] for run in runs) for name in names}
        for key, runs in groups.items()
    }


def rows(measured: Iterable[dict]) -> Iterator[dict[str, object]]:
    """Of the table: for each model and size a row for each way."""
    found = medians(measured)
    for ms, size in dict.fromkeys((ms, size) for _, ms, size, _ in found):
        mine = {key: value for key, value in found.items() if key[1:3] == (ms, size)}
        for way in dict.fromkeys(key[0] for key in mine):
            row = {"model, ms": ms, "body, bytes": size, "way": way}
            loads = {key[3]: value for key, value in mine.items() if key[0] == way}
            for clients, values in loads.items():
                row[f"{clients} clients: requests/s"] = f"{values['throughput']:,.0f}"
                row[f"{clients}: p99, ms"] = f"{values['p99_ms']:.3g}"
            of = loads.get(CLIENTS, values)
            row["CPU ms a request: front, Ray, replicas"] = ", ".join(
                f"{of[f'{part}_cpu_ms']:.2g}" for part in PARTS
            )
            yield row


def figure(measured: Iterable[dict], title: str) -> Figure:
    """What the serving layer alone does in a second, and where its CPU time goes."""
    found = medians(measured)
    mine = {key[0]: v for key, v in found.items() if key[1:] == (0, SMALL, CLIENTS)}
    ways = sorted(mine, key=lambda way: mine[way]["throughput"])
    with plt.rc_context(STYLE):
        drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 1.4 + 0.36 * len(ways)), sharey=True)
        for place, way in enumerate(ways):
            rate, start = mine[way]["throughput"], 0.0
            left.barh(place, rate, 0.6, color=ORANGE if "ours" in way else GREY)
            left.text(rate, place, f" {rate:,.0f}", va="center", fontsize=9)
            for part in PARTS:
                ms = mine[way][f"{part}_cpu_ms"]
                right.barh(place, ms, 0.6, left=start, color=COLOURS[part])
                start += ms
            right.text(start, place, f" {start:.2g}", va="center", fontsize=9)
        for part in PARTS:
            right.barh(0, 0, color=COLOURS[part], label=NAMES[part])
        left.set_yticks(range(len(ways)), ways)
        left.set_title("requests a second")
        right.set_title("milliseconds of CPU a request")
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.12)
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        drawn.tight_layout(rect=(0, 0.07, 1, 1))
        plt.close(drawn)
    return drawn
