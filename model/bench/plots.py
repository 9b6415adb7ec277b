"""Every figure of the notebooks, in one style: few colours that all eyes can tell apart."""

from io import BytesIO

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from model.bench.trial import Trial

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


def answers(pictures: list[bytes], predictions: list[list[dict]]) -> Figure:
    """Each encoded picture with its five labels and probabilities beside it."""
    with plt.rc_context(STYLE):
        rows = len(pictures)
        figure, axes = plt.subplots(rows, 2, figsize=(7.5, 1.9 * rows), squeeze=False)
        for (left, right), picture, labels in zip(axes, pictures, predictions, strict=True):
            left.imshow(Image.open(BytesIO(picture)))
            left.axis("off")
            names = [item["label"] for item in labels]
            values = [item["probability"] for item in labels]
            right.barh(names, values, color=[BLUE] + [GREY] * (len(names) - 1))
            right.invert_yaxis()
            right.set_xlim(0, 1.12)
            right.spines["bottom"].set_visible(False)
            right.set_xticks([])
            for row, value in enumerate(values):
                right.text(value + 0.015, row, f"{value:.1%}", va="center", fontsize=9)
        figure.tight_layout()
        plt.close(figure)
    return figure


def timeline(lanes: dict[str, list[tuple[float, float, int]]], title: str) -> Figure:
    """Who worked on what, when: for each lane its spans (start, end, number of the request).

    Times are in seconds; the clock starts at the first span. The lanes are drawn from the top.
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
    """One horizontal bar a name, from zero, each with its value."""
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


def processes(groups: dict[str, list[str]], title: str) -> Figure:
    """What runs where: for each place (a node, this notebook) a frame with its processes."""
    columns = 4
    colour = {"replica": BLUE, "HTTP proxy": GREEN, "Serve controller": ORANGE, "KServe": PURPLE}
    heights = {place: -(-len(names) // columns) for place, names in groups.items()}
    total = sum(heights.values()) + 0.75 * len(groups)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.35 + 0.62 * total))
        top = 0.0
        for place, names in groups.items():
            height = heights[place] + 0.55
            axes.add_patch(
                Rectangle((0, -top - height), columns, height, fill=False, ls="--", ec=GREY)
            )
            axes.text(0.05, -top - 0.09, place, va="top", fontsize=10, color="#333333")
            for i, name in enumerate(names):
                x, y = i % columns, -top - 0.45 - i // columns - 0.85
                face = next((c for start, c in colour.items() if name.startswith(start)), GREY)
                box = FancyBboxPatch(
                    (x + 0.1, y + 0.1), 0.8, 0.65, boxstyle="round,pad=0.03", fc=face, ec="none"
                )
                axes.add_patch(box)
                text = name.replace(" of ", "\nof ").replace(" (", "\n(")
                axes.text(x + 0.5, y + 0.43, text, ha="center", va="center", color="white")
            top += height + 0.2
        axes.set_xlim(-0.05, columns + 0.05)
        axes.set_ylim(-top, 0.05)
        axes.axis("off")
        axes.set_title(title)
        figure.tight_layout()
        plt.close(figure)
    return figure


def against_clients(rows: list[dict], limit: float, title: str) -> Figure:
    """Throughput, and latency, of each variant against the number of clients.

    rows: of results.summary, in any order. limit: pictures a second that no server can exceed.
    Bands are 95 % intervals over repeated runs; of the latencies p50 is drawn full, p95 dashed.
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
        left.text(1, limit, "limit", va="bottom", color=GREY, fontsize=9)
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

    rows: of results.summary. From the moment a request was due (full) and, of the same requests,
    from the moment it was sent (dotted): p95, on a scale of tenfold steps.
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


def rungs(rows: list[dict], clients: tuple[int, int], limits: dict[str, float], title: str):
    """The ladder: a bar for each variant from the top, with few and with many clients.

    rows: of results.summary, in the order of the ladder. limits: name -> pictures a second, each a
    line. Whiskers are 95 % intervals over repeated runs.
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


def through(trials: dict[str, Trial], title: str) -> Figure:
    """Every request of each variant's trial: when it was due, how long it took, what it came to.

    Dashed lines say when something was done to the server; what has no name is left out.
    """
    looks = {"answered": (BLUE, "."), "told to come again": (GREY, "|"), "failed": (ORANGE, "x")}
    with plt.rc_context(STYLE):
        size = (8.5, 1.2 + 1.9 * len(trials))
        figure, panels = plt.subplots(
            len(trials), figsize=size, sharex=True, sharey=True, squeeze=False
        )
        for axes, (name, trial) in zip(panels[:, 0], trials.items(), strict=True):
            points = trial.points()
            for fate, (colour, marker) in looks.items():
                x, y = zip(*points[fate], strict=True) if points[fate] else ((), ())
                axes.scatter(x, y, s=28, color=colour, marker=marker, lw=1, label=fate)
            for when, what in (deed for deed in trial.deeds if deed[1]):
                axes.axvline(when - trial.run.began, color=GREY, ls="--", lw=1)
                top = (when - trial.run.began, 1)
                where = ("data", "axes fraction")
                axes.annotate(f" {what}", top, xycoords=where, va="top", color=GREY, fontsize=9)
            axes.set_title(name, fontsize=10)
            axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)  # of all panels, once each has its points: it ends the scaling
        axes.set_xlim(left=0)
        axes.set_xlabel("when the request was due, seconds")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, fates = axes.get_legend_handles_labels()
        seen = [i for i, fate in enumerate(fates) if any(t.points()[fate] for t in trials.values())]
        figure.legend(
            [handles[i] for i in seen],
            [fates[i] for i in seen],
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        plt.close(figure)
    return figure


def on_one_clock(series: dict[str, list[tuple[float, float]]], title: str) -> Figure:
    """Quantities over the same time, a panel each: name -> (seconds, value)."""
    with plt.rc_context(STYLE):
        size = (8.5, 0.8 + 1.4 * len(series))
        figure, panels = plt.subplots(len(series), figsize=size, sharex=True)
        for axes, colour, (name, points) in zip(panels, LANES, series.items(), strict=False):
            x, y = zip(*points, strict=True)
            axes.step(x, y, where="post", color=colour)
            axes.fill_between(x, y, step="post", color=colour, alpha=0.15, lw=0)
            axes.set_ylim(0, 1.15 * max(y))
            axes.set_title(name, fontsize=10)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
        plt.close(figure)
    return figure


def _by_variant(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def _line(axes: Axes, x: list, rows: list[dict], name: str, colour: str, marker: str, style="-"):
    """One quantity of results.summary's rows with its interval as a band."""
    axes.plot(x, [row[name] for row in rows], style, color=colour, marker=marker, ms=5)
    low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
