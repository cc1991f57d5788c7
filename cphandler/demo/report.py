"""The demo's table, picture and JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cphandler.demo.training import RunResult, RunSettings
from cphandler.testing import relative_error

LIMITS = {"float32": (1e-4, 1e-6), "float64": (1e-9, 1e-12)}
"""Largest loss difference over a run and largest relative gradient difference of the first step, by dtype."""


@dataclass(frozen=True)
class Comparison:
    """One run beside the one-rank run of the same dtype.

    Attributes:
        name: of the run.
        layout: name of its layout; None for one rank.
        ranks: how many.
        dtype: of weights and activations.
        losses: per step.
        loss_difference: largest over the steps; None for the one-rank run itself.
        gradient_difference: relative L2 of the first step's gradient over all parameters.
        parameter_difference: largest over all parameters after the last step.
        tokens_per_second: global.
        seconds_per_step: of the slowest rank: the median over its steps.
        sent_bytes_per_step: of each rank: what it sent for context parallelism, mean over the steps.
        peak_memory: bytes of the largest rank.
        score_difference: largest over the first batch's log-probabilities; None where they were not asked for.
        equal_scores: how many of them have one rank's bits, as a part of all.
        same_bits_due: whether all of them must have: every rank holds all rows, or whole heads and rows that are alone.
    """

    name: str
    layout: str | None
    ranks: int
    dtype: str
    losses: list[float]
    loss_difference: float | None
    gradient_difference: float | None
    parameter_difference: float | None
    tokens_per_second: float
    seconds_per_step: float
    sent_bytes_per_step: list[float]
    peak_memory: int
    score_difference: float | None = None
    equal_scores: float | None = None
    same_bits_due: bool = False

    @property
    def agrees(self) -> bool:
        """Within the limits of the dtype; true for a dtype without limits and for the one-rank run."""
        if self.same_bits_due and self.equal_scores != 1:
            return False
        if self.loss_difference is None or self.gradient_difference is None or self.dtype not in LIMITS:
            return True
        loss_limit, gradient_limit = LIMITS[self.dtype]
        return self.loss_difference <= loss_limit and self.gradient_difference <= gradient_limit

    @property
    def label(self) -> str:
        """The run and its layout."""
        return f"{self.name} {self.layout}" if self.layout else self.name

    @property
    def mean_sent_bytes(self) -> float:
        """What a rank sent in a step, mean over the ranks."""
        return sum(self.sent_bytes_per_step) / len(self.sent_bytes_per_step)


def compare(settings: RunSettings, results: list[RunResult], reference: RunResult | None) -> Comparison:
    """Put a run's ranks together and beside the one-rank run."""
    first = results[0]
    loss = gradient = parameter = score = equal = None
    due = first.layout == "replicated" or (settings.backend == "ulysses" and all(x.rows_alone for x in results))
    if reference is not None:
        loss = max(abs(a - b) for a, b in zip(first.losses, reference.losses, strict=True))
        gradient = max(relative_error(result.first_gradient, reference.first_gradient) for result in results)
        parameter = max(float((result.parameters - reference.parameters).abs().max()) for result in results)
        if reference.scores is not None:
            score, equal = scores_beside(results, reference.scores)
    return Comparison(
        settings.name,
        first.layout if settings.cp_size > 1 else None,
        settings.cp_size,
        settings.dtype,
        first.losses,
        loss_difference=loss,
        gradient_difference=gradient,
        parameter_difference=parameter,
        tokens_per_second=min(result.tokens_per_second for result in results),
        seconds_per_step=max(result.seconds_per_step for result in results),
        sent_bytes_per_step=[result.sent_bytes_per_step for result in results],
        peak_memory=max(result.peak_memory for result in results),
        score_difference=score,
        equal_scores=equal,
        same_bits_due=score is not None and due,
    )


def scores_beside(results: list[RunResult], reference: Tensor) -> tuple[float, float]:
    """The largest difference of any rank's log-probabilities, and the least part that has the same bits."""
    scores = [result.scores for result in results if result.scores is not None]
    difference = max(float((x - reference).abs().max()) for x in scores)
    return difference, min(float((x == reference).double().mean()) for x in scores)


COLUMNS = (
    "run",
    "layout",
    "last\nloss",
    "loss\ndiff",
    "grad\ndiff",
    "param\ndiff",
    "ms\n/step",
    "sent\nMiB",
    "MiB\n/rank",
    "equal",
)


SCORE_COLUMNS = ("score\ndiff", "equal\nbits")
"""With ``--rl``."""


def print_table(console: Console, comparisons: list[Comparison]) -> None:
    """A table for each dtype, one row a run."""
    scored = any(row.score_difference is not None for row in comparisons)
    for dtype in dict.fromkeys(row.dtype for row in comparisons):
        title = f"{dtype}: every run beside one rank"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
        for header in (*COLUMNS[:-1], *(SCORE_COLUMNS if scored else ()), COLUMNS[-1]):
            table.add_column(header, justify="left" if header in ("run", "layout") else "right", no_wrap=True)
        for row in comparisons:
            if row.dtype == dtype:
                table.add_row(*cells_of(row, scored=scored))
        console.print(table)
    console.print("loss diff: the largest over the steps. grad diff: relative L2 of the first step's gradient.")
    console.print("param diff: the largest after the last step. ms/step: the median of the slowest rank.")
    console.print("sent: by a rank in a step for context parallelism, the mean. MiB/rank: peak of the largest rank.")
    if scored:
        console.print(
            "score diff: the largest over the first batch's log-probabilities before training. equal bits: how"
        )
        console.print("many of them are one rank's to the bit; with ulysses and replicated they all are, where a probe")
        console.print("shows that a row of a linear layer does not depend on how many rows there are.")
    slower = remark_on_time(comparisons)
    if slower:
        console.print(slower)


def remark_on_time(comparisons: list[Comparison]) -> str:
    """Why a step of several ranks takes longer than one rank's, where it does; empty where none does."""
    alone = comparisons[0]
    slow = [row for row in comparisons if row.dtype == alone.dtype and row.seconds_per_step > alone.seconds_per_step]
    if not slow:
        return ""
    cores, most = os.cpu_count() or 1, max(row.ranks for row in slow)
    shared = f" {most} ranks share the {cores} cores of this machine." if most > cores else ""
    others = sum(row.dtype == alone.dtype for row in comparisons) - 1
    return (
        f"{len(slow)} of {others} runs are slower than one rank, whose step takes {alone.seconds_per_step * 1000:,.0f} "
        "ms: at this size a rank saves less than messages, a plan for each new batch and the sum of gradients cost."
        f"{shared} Try --seq-len 8192."
    )


def cells_of(row: Comparison, *, scored: bool) -> tuple[str, ...]:
    """A row of the table."""
    differences = (row.loss_difference, row.gradient_difference, row.parameter_difference)
    return (
        row.name,
        row.layout or "-",
        f"{row.losses[-1]:.4f}",
        *("-" if value is None else f"{value:.0e}" for value in differences),
        f"{row.seconds_per_step * 1000:,.0f}",
        "-" if row.layout is None else f"{row.mean_sent_bytes / 2**20:.2f}",
        f"{row.peak_memory / 2**20:,.0f}",
        *(score_cells(row) if scored else ()),
        "-" if row.loss_difference is None else ("yes" if row.agrees else "NO"),
    )


def score_cells(row: Comparison) -> tuple[str, str]:
    """Of log-probabilities."""
    if row.score_difference is None or row.equal_scores is None:
        return "-", "-"
    return f"{row.score_difference:.0e}", "all" if row.equal_scores == 1 else f"{row.equal_scores:.0%}"


def write_json(path: Path, comparisons: list[Comparison], arguments: dict[str, Any]) -> None:
    """Everything that was measured, and where."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    runs = [{**asdict(row), "equal": row.agrees} for row in comparisons]
    path.write_text(json.dumps({"machine": machine, "arguments": arguments, "runs": runs}, indent=2) + "\n")


def write_plot(path: Path, comparisons: list[Comparison]) -> None:
    """Loss curves of the longest runs, how far each is from one rank, and what a step of each costs."""
    rows = [row for row in comparisons if row.dtype == comparisons[0].dtype]
    figure = Figure(figsize=(8, 8 + 0.25 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 2, 0.6 + 0.2 * len(rows)))
    losses = figure.add_subplot(grid[0, :])
    gaps = figure.add_subplot(grid[1, :], sharex=losses)
    times, bytes_sent = (figure.add_subplot(grid[2, i]) for i in range(2))
    colors = ["black", *(f"C{i}" for i in range(len(rows) - 1))]
    draw_losses(losses, gaps, rows, colors)
    draw_bars(times, "ms per step", [row.seconds_per_step * 1000 for row in rows], colors, number="{:,.0f}")
    sent = [row.mean_sent_bytes / 2**20 for row in rows]
    draw_bars(bytes_sent, "MiB a rank sends per step", sent, colors, number="{:,.2f}")
    times.set_yticks(range(len(rows)), [row.label for row in rows])
    bytes_sent.set_yticks([])
    figure.savefig(path, dpi=120)


def draw_losses(top: Axes, bottom: Axes, rows: list[Comparison], colors: list[str]) -> None:
    """Loss curves above, which lie on each other, with markers in turns; below distances from the first row's."""
    reference, others = rows[0], rows[1:]
    limit = LIMITS.get(reference.dtype, (1.0, 1.0))[0]
    floor = limit * 1e-6
    count, turns = len(reference.losses), max(1, len(others))
    steps = range(1, count + 1)
    top.plot(steps, reference.losses, color=colors[0], linewidth=6, alpha=0.2, label=reference.name)
    for i, (row, color) in enumerate(zip(others, colors[1:], strict=True)):
        turn = (i % count, turns)
        top.plot(steps, row.losses, color=color, linewidth=1, marker="o", markersize=5, markevery=turn, label=row.label)
        gaps = [abs(a - b) for a, b in zip(row.losses, reference.losses, strict=True)]
        aside = [step + 0.6 * (i - (turns - 1) / 2) / turns for step in steps]
        bottom.semilogy(aside, [max(gap, floor) for gap in gaps], "o", color=color, markersize=3)
    bottom.axhspan(floor / 3, floor * 3, color="grey", alpha=0.15)
    bottom.annotate(
        "equal to the bit", (1, floor), textcoords="offset points", xytext=(0, 7), color="grey", fontsize="small"
    )
    if reference.dtype in LIMITS:
        bottom.axhline(limit, color="grey", linestyle="--", linewidth=1)
        bottom.annotate("limit", (1, limit), textcoords="offset points", xytext=(0, 4), color="grey")
    bottom.set_ylim(floor / 3, limit * 10)
    top.set_ylabel("loss, nats per byte")
    top.set_title(f"Packed real documents, {reference.dtype}: context-parallel runs beside one rank")
    top.legend(title=f"each marks one step in {turns}" if turns > 1 else None)
    bottom.set_ylabel("|loss - one rank|")
    bottom.set_xlabel("step")


def draw_bars(axes: Axes, title: str, values: list[float], colors: list[str], *, number: str) -> None:
    """A bar for each run, the first on top, with its value in the format ``number``."""
    bars = axes.barh(range(len(values)), values, color=colors, alpha=0.6)
    axes.bar_label(bars, fmt=number, padding=3, fontsize="small")
    axes.set_title(title, fontsize="medium")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
