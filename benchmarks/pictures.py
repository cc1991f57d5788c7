"""Contests as a picture: a panel for each, and in it what each competitor adds to the kernel, with its interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import paired_ratio
from benchmarks.runs import Run
from benchmarks.works import Work

OURS, THEIRS, WRONG, FLOOR, BARE = "#0b6e99", "#b8591b", "#b8591b", "#a8a8a8", "#303030"


def draw(path: Path, runs: Sequence[Run], heading: str) -> None:
    """Write a picture of some contests; the file's ending says which kind.

    Args:
        path: where to.
        runs: the contests, a row of panels each.
        heading: the title.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415 (an extra)

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    counts = sorted({work.ranks for run in runs for work in run.results} - {1})
    most = max(len(_entries(run, n)) for run in runs for n in counts)
    figure, axes = plt.subplots(
        len(runs), len(counts), figsize=(5.6 * len(counts), (0.27 * most + 1.2) * len(runs) + 0.6), squeeze=False
    )
    for run, row in zip(runs, axes, strict=True):
        for count, axis in zip(counts, row, strict=True):
            _panel(axis, run, count)
    for row in axes:
        limits = [axis.get_xlim() for axis in row]
        for axis in row:
            axis.set_xlim(0, max(high for _, high in limits))
    for axis in axes[-1]:
        axis.set_xlabel("CPU ms of all ranks outside of the kernel's calls")
    inch = 1 / figure.get_figheight()
    figure.suptitle(heading, x=0.01, y=1 - 0.1 * inch, ha="left", va="top", fontsize=12, fontweight="bold")
    corner = (0.005, 1 - 0.32 * inch)
    figure.legend(handles=_legend(), loc="upper left", bbox_to_anchor=corner, ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 * inch), h_pad=2.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _entries(run: Run, ranks: int) -> list[Work]:
    """Competitors on a number of ranks, who adds least to the kernel first."""
    works = [work for work in run.results if work.ranks == ranks]
    return sorted(works, key=lambda work: statistics.median(run.results[work].outside()))


def _panel(axis: Any, run: Run, ranks: int) -> None:
    works, labels = _entries(run, ranks), []
    for place, work in enumerate(works):
        result = run.results[work]
        outside = [1e3 * seconds for seconds in result.outside()]
        middle, low, high = paired_ratio(outside, [1.0] * len(outside))
        wrong = result.errors is not None and bool(result.errors.wrong(work.dtype))
        colour = OURS if work.is_ours else THEIRS
        axis.plot([low, high], [place, place], color=colour, linewidth=2.4, alpha=0.45, solid_capstyle="round")
        axis.plot(middle, place, "o", color=colour, markersize=6.5, markerfacecolor="white" if wrong else colour)
        floor = run.floor(work)
        if floor is not None:
            axis.plot(1e3 * statistics.median(floor.gloo), place, "|", color=FLOOR, markersize=12, markeredgewidth=2)
        if result.bare is not None:
            bare = 1e3 * statistics.median(result.bare.outside())
            axis.plot(bare, place, "|", color=BARE, markersize=12, markeredgewidth=2)
        labels.append(f"{work.name} (wrong)" if wrong else work.name)
    axis.set_yticks(range(len(works)), labels, fontsize=9)
    for label, work in zip(axis.get_yticklabels(), works, strict=True):
        label.set_color(OURS if work.is_ours else THEIRS)
    axis.set_ylim(len(works) - 0.4, -0.6)
    axis.grid(axis="x", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    shape = run.contest.works[0]
    heads = f"{shape.heads} query, {shape.kv_heads} key heads"
    axis.set_title(f"{ranks} ranks, {shape.tokens} tokens, {heads}", loc="left", fontsize=10)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    dot: dict[str, Any] = {"marker": "o", "linestyle": "-", "linewidth": 2.4, "markersize": 6.5}
    tick: dict[str, Any] = {"marker": "|", "linestyle": "", "markersize": 12, "markeredgewidth": 2}
    return [
        Line2D([], [], color=OURS, label="cphandler", **dot),
        Line2D([], [], color=THEIRS, label="peer", **dot),
        Line2D([], [], color=WRONG, markerfacecolor="white", label="peer with wrong gradients", **dot),
        Line2D([], [], color=FLOOR, label="its bytes alone", **tick),
        Line2D([], [], color=BARE, label="its messages alone, in place", **tick),
    ]
