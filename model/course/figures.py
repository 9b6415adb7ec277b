"""Figures that only notebooks show: predictions beside their images, and processes by place."""

from io import BytesIO

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from model.loadtest.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE


def predictions(images: list[bytes], found: list[list[dict]]) -> Figure:
    """Each encoded image with its labels and their probabilities beside it.

    found: V1 predictions, for each image its labels.
    """
    with plt.rc_context(STYLE):
        rows = len(images)
        figure, axes = plt.subplots(rows, 2, figsize=(7.5, 1.9 * rows), squeeze=False)
        for (left, right), image, labels in zip(axes, images, found, strict=True):
            left.imshow(Image.open(BytesIO(image)))
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


def processes(groups: dict[str, list[str]], title: str) -> Figure:
    """What runs where: for each place (a node, say) a frame with the roles of its processes."""
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
