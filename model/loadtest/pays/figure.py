"""The figure of `make pays`: throughput against the plain server's, for each model."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from model.loadtest.pays.advice import advice
from model.loadtest.plots import BLUE, GREEN, GREY, MARKERS, ORANGE, PURPLE, STYLE

COLOURS = (GREY, GREEN, PURPLE, ORANGE, BLUE, "black")


def figure(measured: Iterable[dict], title: str) -> Figure:
    """A panel for each model: how many times the plain server's throughput, by clients."""
    cases = advice(measured)
    costs = sorted({case["ms"] for case in cases})
    parts = sorted({case["shared"] for case in cases})
    names = list(cases[0]["ratios"])
    with plt.rc_context(STYLE):
        size = (2.6 * len(costs) + 0.6, 2.5 * len(parts) + 1.1)
        drawn, panels = plt.subplots(
            len(parts), len(costs), figsize=size, squeeze=False, sharex=True, sharey=True
        )
        for axes_row, shared in zip(panels, parts, strict=True):
            for axes, ms in zip(axes_row, costs, strict=True):
                mine = [c for c in cases if (c["ms"], c["shared"]) == (ms, shared)]
                x = [case["clients"] for case in mine]
                for i, name in enumerate(names):
                    y = [case["ratios"][name] for case in mine]
                    marker = (*MARKERS, "v", "P")[i]
                    axes.plot(x, y, color=COLOURS[i], marker=marker, ms=5, label=name)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(x, x)
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                gain = f"a batch saves {shared:.0%}" if shared else "a batch saves nothing"
                axes.set_title(f"{ms:g} ms, {gain}", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("clients")
        for axes in panels[:, 0]:
            axes.set_ylabel("times plain KServe")
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        lines, labels = panels[0, 0].get_legend_handles_labels()
        drawn.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        drawn.tight_layout(rect=(0, 0.6 / size[1], 1, 1))
        plt.close(drawn)
    return drawn
