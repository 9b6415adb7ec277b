"""Figures of experiments: every request, and what the server's metrics said, over the time."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from model.faults.experiment import Experiment
from model.loadtest.plots import BLUE, GREY, LANES, ORANGE, STYLE


def outcomes_over_time(experiments: dict[str, Experiment], title: str) -> Figure:
    """Every request of each experiment: when it was due, how long it took, its outcome.

    experiments: name of its panel -> experiment. Dashed lines say when a fault was injected.
    """
    looks = {"answered": (BLUE, "."), "rejected (503)": (GREY, "|"), "failed": (ORANGE, "x")}
    with plt.rc_context(STYLE):
        size = (8.5, 1.2 + 1.9 * len(experiments))
        figure, panels = plt.subplots(
            len(experiments), figsize=size, sharex=True, sharey=True, squeeze=False
        )
        for axes, (name, experiment) in zip(panels[:, 0], experiments.items(), strict=True):
            points = experiment.points()
            for outcome, (colour, marker) in looks.items():
                x, y = zip(*points[outcome], strict=True) if points[outcome] else ((), ())
                axes.scatter(x, y, s=28, color=colour, marker=marker, lw=1, label=outcome)
            for fault in experiment.faults:
                top = (fault.began - experiment.run.began, 1)
                axes.axvline(top[0], color=GREY, ls="--", lw=1)
                where = ("data", "axes fraction")
                axes.annotate(
                    f" {fault.name}", top, xycoords=where, va="top", color=GREY, fontsize=9
                )
            axes.set_title(name, fontsize=10)
            axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)  # of all panels, once each has its points: it ends the scaling
        axes.set_xlim(left=0)
        axes.set_xlabel("when the request was due, seconds")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, outcomes = axes.get_legend_handles_labels()
        everywhere = [experiment.points() for experiment in experiments.values()]
        seen = [i for i, name in enumerate(outcomes) if any(its[name] for its in everywhere)]
        figure.legend(
            [handles[i] for i in seen],
            [outcomes[i] for i in seen],
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        plt.close(figure)
    return figure


def over_time(series: dict[str, list[tuple[float, float]]], title: str) -> Figure:
    """Quantities over the same time, a panel each. series: name -> [(seconds, value), …]."""
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
