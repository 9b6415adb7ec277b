"""Every figure of the notebooks, in one style: few colours that all eyes can tell apart."""

from io import BytesIO

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

# Okabe and Ito's palette, which stays distinct for colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#6B6B6B"
LANES = (BLUE, ORANGE, GREEN, PURPLE)
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
