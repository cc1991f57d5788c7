"""The picture of ``benchmarks/model.py``: what a step costs as tokens grow, and as ranks grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.model import Row

APART = "apart"
"""The run of ranks that do all of one rank's work each: a limit, not a competitor."""

MEASURES: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("tokens per second", lambda row: row.tokens_per_second),
    ("CPU seconds, to one rank", lambda row: row.cpu_ratio),
    ("peak MiB of a rank", lambda row: math.nan if row.peak_bytes is None else row.peak_bytes / 2**20),
)
"""What is drawn, one line of axes for each."""


def draw(rows: Sequence[Row], path: Path, at_ranks: int, at_tokens: int) -> None:
    """For each kind of documents, a column over tokens and a column over ranks.

    Args:
        rows: what was measured.
        path: of the picture.
        at_ranks: ranks while tokens grow.
        at_tokens: tokens while ranks grow.
    """
    kinds = list(dict.fromkeys(row.documents for row in rows))
    named = dict.fromkeys(row.run for row in rows if row.ranks > 1 and row.run != APART)
    colors = {APART: "gray"} | {name: f"C{i}" for i, name in enumerate(named)}
    figure = Figure(figsize=(3.4 * 2 * len(kinds), 8.5), layout="constrained")
    grid = figure.subplots(len(MEASURES), 2 * len(kinds), squeeze=False, sharey="row")
    for i, kind in enumerate(kinds):
        own = [row for row in rows if row.documents == kind]
        growing = [row for row in own if row.ranks in (1, at_ranks)]
        wider = [row for row in own if row.tokens == at_tokens]
        for line, (title, value) in enumerate(MEASURES):
            left, right = grid[line, 2 * i], grid[line, 2 * i + 1]
            draw_lines(left, growing, lambda row: row.tokens, value, colors)
            draw_lines(right, wider, lambda row: row.ranks, value, colors)
            if i == 0:
                left.set_ylabel(title)
        grid[0, 2 * i].set_title(f"{kind}, {at_ranks} ranks", fontsize="medium")
        grid[0, 2 * i + 1].set_title(f"{kind}, {at_tokens:,} tokens", fontsize="medium")
        grid[-1, 2 * i].set_xlabel("tokens of a batch")
        grid[-1, 2 * i + 1].set_xlabel("ranks")
    for axes in grid[:, 0]:
        axes.set_ylim(bottom=0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def draw_lines(
    axes: Axes,
    rows: Sequence[Row],
    place: Callable[[Row], float],
    value: Callable[[Row], float],
    colors: dict[str, str],
) -> None:
    """A line for each run, one rank in black; where ranks grow, that is a level line."""
    places = sorted({place(row) for row in rows})
    alone = [row for row in rows if row.ranks == 1]
    level = len({row.tokens for row in alone}) == 1 and len(places) > 1
    xs = places if level else [place(row) for row in alone]
    ys = [value(alone[0])] * len(places) if level else [value(row) for row in alone]
    axes.plot(xs, ys, ":" if level else ".:", color="black", label="one rank")
    for name, color in colors.items():
        own = sorted((row for row in rows if row.run == name), key=place)
        style = ".:" if name == APART else ".-"
        axes.plot([place(row) for row in own], [value(row) for row in own], style, color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{number:,.0f}" for number in places], fontsize="small")
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
