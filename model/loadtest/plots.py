"""Figures of load tests, and the style of all figures: few colours that all eyes can tell apart."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays distinct for colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#6B6B6B"
LANES = (BLUE, ORANGE, GREEN, PURPLE)
MARKERS = ("o", "s", "^", "D")
STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}


def against_clients(rows: list[dict], limit: float, title: str) -> Figure:
    """Throughput, and latency, of each variant against the number of clients.

    rows: of `summary`, in any order. limit: images a second that no server can exceed. Bands are
    95 % intervals over repeated runs; of the latencies p50 is drawn solid, p95 dashed.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
        for i, (name, mine) in enumerate(_by_variant(rows).items()):
            mine = sorted(mine, key=lambda row: row["clients"])
            colour, marker, x = LANES[i], MARKERS[i], [row["clients"] for row in mine]
            _line(left, x, mine, "throughput", colour, marker)
            _line(right, x, mine, "p50_ms", colour, marker)
            _line(right, x, mine, "p95_ms", colour, marker, "--")
            left.plot([], [], color=colour, marker=marker, label=name)
        left.axhline(limit, color=GREY, ls=":")
        left.text(1, limit, "upper bound", va="bottom", color=GREY, fontsize=9)
        left.set_title("requests a second")
        right.set_title("milliseconds: p50, and p95 dashed")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, x)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("clients")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(loc="outside lower center", ncols=len(LANES), frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        plt.close(figure)
    return figure


def against_rate(rows: list[dict], title: str) -> Figure:
    """Latency of each variant against the rate of arrivals, timed in the right way and the wrong.

    rows: of `summary`. Drawn is p95, on a logarithmic scale: from the moment a request was due
    (solid) and, of the same requests, from the moment it was sent (dotted).
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.2))
        for i, (name, mine) in enumerate(_by_variant(rows).items()):
            mine = sorted(mine, key=lambda row: row["rate"])
            colour, marker, x = LANES[i], MARKERS[i], [row["rate"] for row in mine]
            _line(axes, x, mine, "p95_ms", colour, marker)
            _line(axes, x, mine, "p95_from_sent_ms", colour, marker, ":")
            last = mine[-1]
            axes.plot([], [], color=colour, marker=marker, label=f"{name}, from when it was due")
            axes.plot([], [], color=colour, ls=":", label=f"{name}, from when it was sent")
            axes.text(x[-1], last["p95_ms"], f"  {name}", va="center", color=colour, fontsize=9)
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("requests a second that arrive")
        axes.set_ylabel("p95, milliseconds")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=9)
        figure.tight_layout()
        plt.close(figure)
    return figure


def configurations(
    rows: list[dict], clients: tuple[int, int], limits: dict[str, float], title: str
) -> Figure:
    """The ladder: two bars for each configuration, with few and with many clients.

    rows: of `summary`, in the order of the ladder, which is drawn from the top. limits: name ->
    images a second, each drawn as a line. Whiskers are 95 % intervals over repeated runs.
    """
    variants = _by_variant(rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 1.3 + 0.5 * len(variants)))
        for place, mine in enumerate(variants.values()):
            for offset, colour, count in zip((-0.2, 0.2), (ORANGE, BLUE), clients, strict=True):
                found = [row for row in mine if row["clients"] == count]
                for row in found:
                    value = row["throughput"]
                    spread = [[value - row["throughput_low"]], [row["throughput_high"] - value]]
                    axes.barh(place + offset, value, 0.38, color=colour, xerr=spread, ecolor=GREY)
                    end = max(value, row["throughput_high"])
                    axes.text(end, place + offset, f" {value:.0f}", va="center", fontsize=8)
        for name, value in limits.items():
            axes.axvline(value, color=GREY, ls=":")
            axes.text(value, -0.75, name, ha="right", va="bottom", color=GREY, fontsize=8)
        for colour, count in zip((ORANGE, BLUE), clients, strict=True):
            axes.barh(0, 0, color=colour, label=f"{count} clients")
        axes.set_yticks(range(len(variants)), list(variants))
        axes.set_ylim(len(variants) - 0.4, -0.8)
        axes.set_xlim(0, 1.08 * max([*limits.values(), *(row["throughput_high"] for row in rows)]))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("requests a second")
        axes.set_title(title, pad=18)
        axes.legend(loc="lower right", framealpha=1, edgecolor="white")
        figure.tight_layout()
        plt.close(figure)
    return figure


def milliseconds(parts: dict[str, dict[str, float]], title: str) -> Figure:
    """Where a request's time goes: for each variant a bar of its parts in milliseconds."""
    shades = (GREY, PURPLE, ORANGE, "#E69F00", BLUE, GREEN)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.6 + 0.6 * len(parts)))
        for row, spans in enumerate(parts.values()):
            start = 0.0
            for (name, width), colour in zip(spans.items(), shades, strict=True):
                label = name if row == 0 else None
                axes.barh(row, width, 0.6, left=start, color=colour, label=label, ec="white")
                start += width
            axes.text(start, row, f" {start:.0f} ms", va="center", fontsize=9)
        axes.set_yticks(range(len(parts)), list(parts))
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.set_xlim(0, 1.12 * max(sum(spans.values()) for spans in parts.values()))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("milliseconds, mean over the requests")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0.16, 1, 1))
        plt.close(figure)
    return figure


def timeline(lanes: dict[str, list[tuple[float, float, int]]], title: str) -> Figure:
    """Who worked on what, when: for each lane its spans (start, end, number of the request).

    Times are in seconds since any moment; the axis starts at the first span. The lanes are drawn
    from the top.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.9 + 0.5 * len(lanes)))
        zero = min(start for spans in lanes.values() for start, _, _ in spans)
        for row, spans in enumerate(lanes.values()):
            colour = LANES[row % len(LANES)]
            for start, end, request in spans:
                axes.barh(
                    row,
                    end - start,
                    left=start - zero,
                    height=0.62,
                    color=colour,
                    edgecolor="white",
                )
                middle = (start + end) / 2 - zero
                axes.text(middle, row, request, ha="center", va="center", color="white")
        axes.set_yticks(range(len(lanes)), list(lanes))
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
        figure.tight_layout()
        plt.close(figure)
    return figure


def bars(values: dict[str, float], title: str, unit: str) -> Figure:
    """A horizontal bar for each name, from zero, with its value beside it."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.8 + 0.36 * len(values)))
        axes.barh(list(values), list(values.values()), color=BLUE, height=0.65)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(values.values()))
        axes.set_title(title)
        axes.set_xlabel(unit)
        for row, value in enumerate(values.values()):
            axes.text(value, row, f" {value:.3g}", va="center", fontsize=9)
        figure.tight_layout()
        plt.close(figure)
    return figure


def _by_variant(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def _line(axes: Axes, x: list, rows: list[dict], name: str, colour: str, marker: str, style="-"):
    """One quantity of the rows of `summary`, with its interval as a band."""
    axes.plot(x, [row[name] for row in rows], style, color=colour, marker=marker, ms=5)
    low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
