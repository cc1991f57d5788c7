"""The demo's table, picture and JSON file."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from cphandler.demo.training import RunResult, RunSettings
from cphandler.testing import relative_error

LIMITS = {"float32": (1e-4, 1e-6), "float64": (1e-9, 1e-12)}
"""Largest loss difference over a run and largest relative gradient difference of the first step, by dtype."""


@dataclass(frozen=True)
class Comparison:
    """One run beside the one-rank run of the same dtype.

    Attributes:
        name: of the run.
        ranks: how many.
        dtype: of weights and activations.
        losses: per step.
        loss_difference: largest over the steps; None for the one-rank run itself.
        gradient_difference: relative L2 of the first step's gradient over all parameters.
        parameter_difference: largest over all parameters after the last step.
        tokens_per_second: global.
        peak_memory: bytes of the largest rank.
    """

    name: str
    ranks: int
    dtype: str
    losses: list[float]
    loss_difference: float | None
    gradient_difference: float | None
    parameter_difference: float | None
    tokens_per_second: float
    peak_memory: int

    @property
    def agrees(self) -> bool:
        """Within the limits of the dtype; true for a dtype without limits and for the one-rank run."""
        if self.loss_difference is None or self.gradient_difference is None or self.dtype not in LIMITS:
            return True
        loss_limit, gradient_limit = LIMITS[self.dtype]
        return self.loss_difference <= loss_limit and self.gradient_difference <= gradient_limit


def compare(settings: RunSettings, results: list[RunResult], reference: RunResult | None) -> Comparison:
    """Put a run's ranks together and beside the one-rank run."""
    first = results[0]
    loss = gradient = parameter = None
    if reference is not None:
        loss = max(abs(a - b) for a, b in zip(first.losses, reference.losses, strict=True))
        gradient = max(relative_error(result.first_gradient, reference.first_gradient) for result in results)
        parameter = max(float((result.parameters - reference.parameters).abs().max()) for result in results)
    return Comparison(
        settings.name,
        settings.cp_size,
        settings.dtype,
        first.losses,
        loss_difference=loss,
        gradient_difference=gradient,
        parameter_difference=parameter,
        tokens_per_second=min(result.tokens_per_second for result in results),
        peak_memory=max(result.peak_memory for result in results),
    )


def print_table(console: Console, comparisons: list[Comparison]) -> None:
    """One row a run."""
    table = Table(title="Every run beside one rank", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    headers = (
        "run",
        "dtype",
        "last\nloss",
        "loss\ndiff",
        "grad\ndiff",
        "param\ndiff",
        "tokens\n/s",
        "MiB\n/rank",
        "equal",
    )
    for header in headers:
        table.add_column(header, justify="left" if header in ("run", "dtype") else "right", no_wrap=True)
    for row in comparisons:
        differences = (row.loss_difference, row.gradient_difference, row.parameter_difference)
        table.add_row(
            row.name,
            row.dtype,
            f"{row.losses[-1]:.4f}",
            *("-" if value is None else f"{value:.0e}" for value in differences),
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_memory / 2**20:,.0f}",
            "-" if row.loss_difference is None else ("yes" if row.agrees else "NO"),
        )
    console.print(table)
    console.print("loss diff: the largest over the steps. grad diff: relative L2 of the first step's gradient.")
    console.print("param diff: the largest after the last step. MiB/rank: peak of the largest rank.")


def write_json(path: Path, comparisons: list[Comparison], arguments: dict[str, Any]) -> None:
    """Everything that was measured, and where."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    runs = [{**asdict(row), "equal": row.agrees} for row in comparisons]
    path.write_text(json.dumps({"machine": machine, "arguments": arguments, "runs": runs}, indent=2) + "\n")


def write_plot(path: Path, comparisons: list[Comparison]) -> None:
    """Loss curves of the longest runs, and how far each is from one rank."""
    rows = [row for row in comparisons if row.dtype == comparisons[0].dtype]
    reference, others = rows[0], rows[1:]
    limit = LIMITS.get(reference.dtype, (1.0, 1.0))[0]
    floor = limit * 1e-6
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(reference.losses) + 1)
    top.plot(steps, reference.losses, color="black", linewidth=6, alpha=0.2, label=reference.name)
    for i, row in enumerate(others):
        top.plot(steps, row.losses, linewidth=1 + 3 * (len(others) - i) / len(others), label=row.name)
        gaps = [abs(a - b) for a, b in zip(row.losses, reference.losses, strict=True)]
        bottom.semilogy(steps, [max(gap, floor) for gap in gaps], ".", markersize=9 - 6 * i / len(others))
    if reference.dtype in LIMITS:
        bottom.axhline(limit, color="grey", linestyle="--", linewidth=1)
        bottom.annotate("limit", (1, limit), textcoords="offset points", xytext=(0, 4), color="grey")
    bottom.set_ylim(floor / 2, limit * 10)
    top.set_ylabel("loss, nats per byte")
    top.set_title(f"Packed real documents, {reference.dtype}: context-parallel runs beside one rank")
    top.legend()
    bottom.set_ylabel("|loss - one rank|\n(0 is at the bottom)")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)
