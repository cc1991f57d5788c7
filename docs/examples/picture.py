"""Draws what a handler does to a batch: who holds which tokens, in which order.

Everything drawn is asked of the library: the layouts of ``plan_batch``, and each rank's positions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cphandler import plan_batch

LENGTHS = [5, 14, 3, 10]
RANKS = 4
TINTS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def draw_row(axes: Axes, y: float, tokens: np.ndarray, offsets: np.ndarray, start: float = 0.0) -> None:
    """Tokens side by side, coloured by document, each with its position."""
    for i, token in enumerate(tokens):
        if token < 0:
            continue
        document = int(np.searchsorted(offsets, token, side="right")) - 1
        axes.add_patch(Rectangle((start + i + 0.04, y), 0.92, 0.8, color=TINTS[document]))
        label = str(token - offsets[document])
        axes.text(start + i + 0.5, y + 0.4, label, ha="center", va="center", fontsize=7, color="white")


def main(path: Path) -> None:
    """Write the picture."""
    offsets = np.cumsum([0, *LENGTHS])
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw_row(axes, 0, np.arange(offsets[-1]), offsets)
    axes.text(-0.5, 0.4, "the batch", ha="right", va="center")
    y = -1.7
    for name in ("contiguous", "zigzag", "balanced"):
        plan = plan_batch(offsets, cp_size=RANKS, layout=name)
        axes.text(-0.5, y - 0.1, name, ha="right", va="center", weight="bold")
        for rank in range(RANKS):
            tokens = plan.layout.positions(rank)
            place = rank * (len(tokens) + 1.3)
            draw_row(axes, y - 0.5, tokens, offsets, start=place)
            axes.text(place + len(tokens) / 2, y + 0.55, f"rank {rank}", ha="center", va="center", fontsize=7)
        y -= 1.9
    axes.set_xlim(-5, offsets[-1] + 5)
    axes.set_ylim(y + 1.0, 1.1)
    axes.axis("off")
    axes.set_title("dispatch: four packed documents on four ranks; numbers are positions in a document", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "batch.png"))
