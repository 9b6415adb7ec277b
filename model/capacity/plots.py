"""The figure of a validation: errors of predictions, and what more replicas would come to."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.loadtest.plots import BLUE, GREY, LANES, MARKERS, ORANGE, STYLE


def figure(comparison: list[dict], extrapolation: list[dict], title: str = "") -> Figure:
    """How far predictions are off, and from where on the frontends are the limit.

    comparison: rows of validation.compare. extrapolation: rows of extrapolation.extrapolate.
    """
    with plt.rc_context(STYLE):
        size = (11.5, max(4.4, 1.8 + 0.3 * len(comparison)))
        drawn, (left, right) = plt.subplots(1, 2, figsize=size)
        _errors(left, comparison)
        _extrapolation(right, extrapolation)
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        drawn.tight_layout()
        plt.close(drawn)
    return drawn


def _errors(axes: Axes, rows: list[dict]) -> None:
    for percent, alpha in ((20, 0.12), (10, 0.16)):
        axes.axvspan(-percent, percent, color=GREY, alpha=alpha, lw=0)
    looks = {"throughput": (BLUE, "o", -0.13), "p95_ms": (ORANGE, "s", 0.13)}
    for name, (colour, marker, offset) in looks.items():
        errors = [100 * row[f"{name}_error"] for row in rows]
        places = [place + offset for place in range(len(errors))]
        label = name.removesuffix("_ms")
        axes.plot(errors, places, marker, color=colour, ms=5, label=label)
    axes.axvline(0, color=GREY, lw=1)
    widest = max([22.0, *(abs(100 * row[f"{name}_error"]) for row in rows for name in looks)])
    axes.set_xlim(-1.1 * widest, 1.1 * widest)
    axes.set_yticks(range(len(rows)), [row["scenario"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of what was measured; shaded: 10 and 20")
    axes.set_title("predicted less measured")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _extrapolation(axes: Axes, rows: list[dict]) -> None:
    for i, n in enumerate(sorted({row["frontends"] for row in rows})):
        mine = [row for row in rows if row["frontends"] == n]
        x, y = ([row[name] for row in mine] for name in ("replicas", "throughput"))
        axes.plot(x, y, color=LANES[i], marker=MARKERS[i], ms=5)
        limit = mine[0]["frontend_limit"]
        axes.axhline(limit, color=LANES[i], ls=":", lw=1)
        text = f"{n:,} frontend{'s' if n > 1 else ''}: {limit:,.0f}"
        axes.text(1, limit, text, va="bottom", color=LANES[i], fontsize=9)
    rows = sorted(rows, key=lambda row: row["replicas"])
    x, y = ([row[name] for row in rows] for name in ("replicas", "replica_limit"))
    axes.plot(x, y, color=GREY, ls="--", lw=1, zorder=1)
    axes.text(x[-1], y[-1], "replicas alone ", ha="right", va="bottom", color=GREY, fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("replicas; dotted: upper bound of the frontends in full batches")
    axes.set_title("requests a second, simulated")
