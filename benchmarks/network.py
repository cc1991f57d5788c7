"""The demo model's step over real links: ranks in network namespaces of one machine, at several rates. Needs root.

Prints, per documents, backend and layout, the payload that a rank sends in a step for context parallelism (mean over
ranks), and for each rate of the links the wall time of a step (slowest rank), the time that a rank stands still in
waits for those transfers (mean over ranks: what overlap does not hide, a rank that is late included), and the time of
the sum of gradients over ranks, which every way of training in parallel has. Medians of steps that take turns.

    sudo .venv/bin/python -m benchmarks.network                     # 2 ranks, every backend and layout
    sudo .venv/bin/python -m benchmarks.network --ranks 4 --run p2p@balanced --run usp@zigzag --rate 1gbit
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import links
from benchmarks.allocator import ALLOCATOR
from benchmarks.batches import KINDS, batches
from benchmarks.links import UNLIMITED, LinkError, Links
from benchmarks.steps import Sample, Trainer, exact, gradient, label, refuse_wrong, run_named, step, trainer
from cphandler import get_cp_handler_cls
from cphandler.demo.model import GPTConfig
from cphandler.demo.training import RunSettings
from cphandler.testing import RankPool

WIDTH = 108
"""Columns of the terminal that a table may take."""

BACKENDS = ("ring", "p2p", "all_gather", "ulysses", "usp")
"""All that connect ranks; the last one needs four."""

PROBE = 1 << 24
"""Bytes that are sent to see what a link carries."""

CANNOT = 2
"""Exit code where this machine or user cannot make links."""


@dataclass(frozen=True)
class Row:
    """A run over links of one rate.

    Attributes:
        documents: of which kind.
        rate: of the links.
        run: backend and layout.
        step_seconds: median wall time of the slowest rank.
        exposed_seconds: median of the mean over ranks of the waits for transfers of context parallelism.
        summing_seconds: the same of the sum of gradients.
        sent_bytes: payload of a rank for context parallelism, mean over ranks and steps.
        wire_bytes: of a rank on its link, the sum of gradients and all headers included.
    """

    documents: str
    rate: str
    run: str
    step_seconds: float
    exposed_seconds: float
    summing_seconds: float
    sent_bytes: float
    wire_bytes: float


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        kinds: of documents.
        rates: of the links.
        base: one rank's run.
        runs: all others, of as many ranks.
        seq_len: tokens of a batch.
        steps: that are counted.
    """

    kinds: Sequence[str]
    rates: Sequence[str]
    base: RunSettings
    runs: Sequence[RunSettings]
    seq_len: int
    steps: int


def linked_gradient(settings: RunSettings, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """A new model's loss and gradient on every rank, over the links."""
    return Trainer(settings, links.group()).gradient(batch)


def linked_step(settings: RunSettings, batch: dict[str, Any]) -> tuple[Sample, int]:
    """A step on every rank, over the links, and the bytes that left this rank's interface.

    Raises:
        RuntimeError: fewer than were sent, so that something else carried them.
    """
    own = trainer(settings, links.group())
    dist.barrier()
    before = links.wire_bytes()
    sample = own.step(batch)
    dist.barrier()  # all has arrived, so all has left
    on_wire = links.wire_bytes() - before
    if on_wire < sample.sent_bytes:
        raise RuntimeError(f"{sample.sent_bytes} bytes were sent, but the link carried {on_wire}")
    return sample, on_wire


def every_run(ranks: int) -> list[str]:
    """Every backend on every layout that gives each rank its share."""
    served: list[tuple[str, tuple[str, ...]]] = [
        (name, get_cp_handler_cls(name).capabilities.layouts)  # type: ignore[attr-defined]
        for name in BACKENDS
        if name != "usp" or ranks > 2
    ]
    return [f"{name}@{layout}" for name, layouts in served for layout in layouts if layout != "replicated"]


class Course:
    """Pools on their links, and what is measured on them.

    Args:
        made: the links, up.
        linked: a rank for each end of them, which have joined.
        alone: one rank.
        base: settings of one rank.
    """

    def __init__(self, made: Links, linked: RankPool, alone: RankPool, base: RunSettings) -> None:
        self._links, self._linked, self._alone, self._base = made, linked, alone, base

    def check(self, runs: Sequence[RunSettings], batch: dict[str, Any]) -> None:
        """Hold every run to one rank in float64."""
        expected = self._alone.run(gradient, exact(self._base), batch)[0]
        for run in runs:
            refuse_wrong(label(run), expected, self._linked.run(linked_gradient, run, batch))

    def probed(self, rate: str) -> float:
        """Bits per second over links of a rate."""
        self._links.limit(rate)
        return float(self._linked.run(links.bits_per_second, PROBE)[0])

    def alone(self, batch: dict[str, Any]) -> float:
        """Seconds of a step of one rank."""
        (sample,) = self._alone.run(step, self._base, batch)
        return float(sample.seconds)

    def steps(self, rate: str, runs: Sequence[RunSettings], batch: dict[str, Any]) -> list[list[tuple[Sample, int]]]:
        """A step of every run over links of a rate: a list of ranks for each."""
        self._links.limit(rate)
        return [self._linked.run(linked_step, run, batch) for run in runs]


def row_of(kind: str, rate: str, run: RunSettings, taken: Sequence[Sequence[tuple[Sample, int]]]) -> Row:
    """What a run's steps came to: a list of ranks for each step."""
    samples = [[sample for sample, _ in ranks] for ranks in taken]
    return Row(
        kind,
        rate,
        label(run),
        statistics.median(max(sample.seconds for sample in ranks) for ranks in samples),
        statistics.median(statistics.fmean(sample.exposed_seconds for sample in ranks) for ranks in samples),
        statistics.median(statistics.fmean(sample.summing_seconds for sample in ranks) for ranks in samples),
        statistics.fmean(sample.sent_bytes for ranks in samples for sample in ranks),
        statistics.fmean(on_wire for ranks in taken for _, on_wire in ranks),
    )


def measured(course: Course, kind: str, task: Task, given: list[dict[str, Any]]) -> tuple[float, list[Row]]:
    """One rank's median seconds, and a row for each rate and run; the first batch warms up and is not counted."""
    course.check(task.runs, given[0])
    alone: list[float] = []
    taken: dict[tuple[str, RunSettings], list[list[tuple[Sample, int]]]] = {}
    for i, batch in enumerate(given):
        first = i % len(task.runs)
        order = (*task.runs[first:], *task.runs[:first])
        alone.append(course.alone(batch))
        for rate in task.rates:
            for run, ranks in zip(order, course.steps(rate, order, batch), strict=True):
                taken.setdefault((rate, run), []).append(ranks)
    rows = [row_of(kind, rate, run, taken[rate, run][1:]) for rate in task.rates for run in task.runs]
    return statistics.median(alone[1:]), rows


def table_of(kind: str, rates: Sequence[str], rows: Sequence[Row], alone: float) -> Table:
    """A row for each run, three columns for each rate."""
    title = f"{KINDS[kind]}; milliseconds; a step of one rank takes {1e3 * alone:,.0f}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("\nrun", no_wrap=True)
    table.add_column("sent\nMiB", justify="right", no_wrap=True)
    for rate in rates:
        for header in (f"{rate}\nstep", "wait not\nhidden", "grad.\nsum"):
            table.add_column(header, justify="right", no_wrap=True)
    for name in dict.fromkeys(row.run for row in rows):
        own = {row.rate: row for row in rows if row.run == name}
        cells = [f"{own[rates[0]].sent_bytes / 2**20:,.2f}"]
        for rate in rates:
            row = own[rate]
            times = (row.step_seconds, row.exposed_seconds, row.summing_seconds)
            cells += [f"{1e3 * seconds:,.0f}" for seconds in times]
        table.add_row(name, *cells)
    return table


def write_json(path: Path, rows: Sequence[Row], alone: dict[str, float], arguments: dict[str, Any]) -> None:
    """Everything that was measured, and where."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    content = {"machine": machine, "arguments": arguments, "one_rank_seconds": alone}
    path.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def race(console: Console, course: Course, task: Task) -> tuple[dict[str, float], list[Row]]:
    """Print what each rate carries and a table for each kind of documents; return one rank's seconds, and rows."""
    for rate in task.rates:
        console.print(f"links {rate}: {course.probed(rate) / 1e9:.2f} Gbit/s carried")
    alone: dict[str, float] = {}
    rows: list[Row] = []
    for kind in task.kinds:
        given = batches(kind, task.seq_len, task.steps + 1, task.base.seed)
        alone[kind], found = measured(course, kind, task, given)
        console.print(table_of(kind, task.rates, found, alone[kind]))
        rows += found
    console.print(
        "sent: by a rank for context parallelism. step: of the slowest rank. wait not hidden: mean over ranks,"
    )
    console.print(
        "for transfers of context parallelism or a rank that is late. grad. sum: the sum of gradients over ranks."
    )
    return alone, rows


def on_links(console: Console, task: Task) -> tuple[dict[str, float], list[Row]]:
    """Make links and ranks, measure, and take them down.

    Raises:
        LinkError: this machine or user cannot make links.
    """
    links.require()
    ranks = task.runs[0].cp_size
    with ExitStack() as stack:
        stack.enter_context(links.ended_in_order())
        made = stack.enter_context(Links(ranks))
        linked, alone = (stack.enter_context(RankPool(size, timeout=300)) for size in (ranks, 1))
        linked.run(links.join, made.namespaces)
        console.print(f"{ranks} ranks, {task.seq_len} tokens, float32, one thread a rank; torch {torch.__version__}")
        return race(console, Course(made, linked, alone, task.base), task)


def main(
    *,
    ranks: Annotated[int, typer.Option(help="Ranks, one link each.", min=2, max=64)] = 2,
    run: Annotated[list[str] | None, typer.Option(help="backend or backend@layout; repeat. Else all.")] = None,
    rate: Annotated[list[str] | None, typer.Option(help="Rate of the links as tc reads it, or unlimited.")] = None,
    documents: Annotated[list[str] | None, typer.Option(help=f"{', '.join(KINDS)}; repeat for several.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a batch.", min=2)] = 4096,
    steps: Annotated[int, typer.Option(help="Steps that are counted.", min=1)] = 3,
    layers: Annotated[int, typer.Option(help="Layers of the model.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of text, packs and weights.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all numbers.")] = None,
) -> None:
    """Time training steps over links of several rates, one thread a rank. Needs root, ip and tc."""
    os.environ.update(ALLOCATOR)
    console, kinds, rates = Console(width=WIDTH), documents or ["pile", "dense"], rate or [UNLIMITED, "10gbit", "1gbit"]
    if set(kinds) - set(KINDS):
        raise typer.BadParameter(f"--documents takes {', '.join(KINDS)}, got {', '.join(kinds)}")
    base = RunSettings(model=GPTConfig(layers=layers), seed=seed)
    runs = [run_named(name, ranks, base) for name in run or every_run(ranks)]
    try:
        alone, rows = on_links(console, Task(kinds, rates, base, runs, seq_len, steps))
    except LinkError as error:
        typer.echo(f"this benchmark needs real links: {error}", err=True)
        raise typer.Exit(CANNOT) from error
    if json_file is not None:
        told = {"ranks": ranks, "seq_len": seq_len, "steps": steps, "layers": layers, "seed": seed}
        write_json(json_file, rows, alone, told)


if __name__ == "__main__":
    typer.run(main)
