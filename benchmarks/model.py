"""The demo model's whole training step under context parallelism beside one rank, on the same batches in one run.

Every step has a new batch. Prints, per documents, tokens and ranks, the global tokens per second, the wall time of a
step (slowest rank) and its speedup over one rank, CPU seconds summed over ranks and as a ratio to one rank's, the same
as if every rank took as long as the slowest, those of what every rank does in full (handler and plan, sum of gradients,
AdamW), the bytes all ranks sent, and the most memory that a step's tensors take on a rank. Medians of interleaved
steps, ratios taken batch by batch; one thread a rank. In a row called apart each rank does all of one rank's work and
sends nothing, and what it takes is divided by the ranks: the most that the cores give.

    python -m benchmarks.model                                  # S grows on 2 ranks, ranks grow at 4096 tokens
    python -m benchmarks.model --documents dense --run ring@zigzag --run ring@balanced --plot model.png
    python -m benchmarks.model --speedup                        # 2 ranks beside one, 8192 tokens, 20 steps
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.allocator import ALLOCATOR
from benchmarks.batches import KINDS, batches
from benchmarks.steps import (
    Apart,
    Sample,
    exact,
    forget,
    gradient,
    in_turns,
    label,
    peak,
    refuse_wrong,
    run_named,
)
from cphandler.demo.model import GPTConfig
from cphandler.demo.training import RunSettings
from cphandler.testing import RankPool

RUNS = ("ring@zigzag", "p2p@zigzag", "p2p@balanced", "ulysses@contiguous")
"""Runs shown where none is named."""

SPEEDUP = {"ring@zigzag": 1.85, "p2p@zigzag": 1.85, "ulysses@contiguous": 1.90, "p2p@balanced": 1.95}
"""Aims for two ranks on two idle cores, times one rank's speed."""

WIDTH = 108
"""Columns of the terminal that a table may take."""

COLUMNS = (
    *("tokens", "docs", "ranks", "run", "tokens\n/ s", "step\nms", "speed\nup"),
    *("CPU\ns", "CPU\nx", "slow\nx", "fixed\nms", "sent\nMiB", "peak\nMiB"),
)
TWOS = ("run, 2 ranks", "step ms", "speedup", "aim", "CPU s", "by CPU,\nslowest rank", "by CPU,\nsum of ranks")


@dataclass(frozen=True)
class Contest:
    """Runs over the same batches, one rank first.

    Attributes:
        kind: of documents.
        seq_len: tokens of a batch.
        runs: the competitors.
    """

    kind: str
    seq_len: int
    runs: tuple[RunSettings, ...]


@dataclass(frozen=True)
class Row:
    """A run of a contest.

    Attributes:
        documents: of which kind.
        tokens: of a batch.
        count: documents of a batch, mean.
        ranks: how many.
        run: backend and layout.
        tokens_per_second: global.
        step_seconds: wall time of the slowest rank; apart, a rank's share of it.
        speedup: one rank's wall time to that.
        cpu_seconds: summed over ranks.
        cpu_ratio: of these to one rank's.
        slowest_ratio: CPU seconds of the slowest rank times the ranks, to one rank's.
        fixed_seconds: CPU seconds, summed over ranks, of what every rank does in full: plan, sum of gradients, AdamW.
        sent_bytes: of all ranks, for context parallelism.
        peak_bytes: most bytes of tensors that a step takes on the largest rank; None where it was not measured.
    """

    documents: str
    tokens: int
    count: float
    ranks: int
    run: str
    tokens_per_second: float
    step_seconds: float
    speedup: float
    cpu_seconds: float
    cpu_ratio: float
    slowest_ratio: float
    fixed_seconds: float
    sent_bytes: float
    peak_bytes: int | None


def contests(
    kinds: Sequence[str], names: Sequence[str], grid: dict[int, list[int]], base: RunSettings
) -> Iterator[Contest]:
    """One for each kind of documents and number of tokens; ``grid`` has the numbers of ranks for each of these."""
    for kind in kinds:
        for seq_len, counts in sorted(grid.items()):
            runs = [run_named(name, count, base) for count in counts for name in names]
            yield Contest(kind, seq_len, (base, *runs))


def sizes(seq_lens: Sequence[int], counts: Sequence[int], at_ranks: int, at_tokens: int) -> dict[int, list[int]]:
    """Numbers of ranks by number of tokens: tokens grow on ``at_ranks``, and ranks at ``at_tokens``."""
    grid = {seq_len: {at_ranks} for seq_len in seq_lens}
    grid.setdefault(at_tokens, set()).update(counts)
    return {seq_len: sorted(chosen) for seq_len, chosen in grid.items() if chosen}


def held(
    contest: Contest, batch: dict[str, Any], pools: dict[int, RankPool], *, memory: bool
) -> dict[RunSettings, int | None]:
    """Check every run against one rank in float64; bytes that a step takes on its largest rank, where asked."""
    expected = pools[1].run(gradient, exact(contest.runs[0]), batch)[0]
    found: dict[RunSettings, int | None] = {}
    for run in contest.runs:
        name = f"{label(run)} on {run.cp_size} ranks, {contest.seq_len} tokens, {contest.kind}"
        refuse_wrong(name, expected, pools[run.cp_size].run(gradient, run, batch))
        found[run] = max(pools[run.cp_size].run(peak, run, batch)) if memory else None
    return found


def rows_of(
    contest: Contest,
    given: Sequence[dict[str, Any]],
    samples: dict[RunSettings | Apart, list[list[Sample]]],
    peaks: dict[RunSettings, int | None],
) -> Iterator[Row]:
    """What each run came to.

    Args:
        contest: the runs.
        given: the batches that were counted.
        samples: of each run, a list of ranks for each batch.
        peaks: bytes of each run.
    """
    alone = samples[contest.runs[0]]
    own_cpu = [sum(sample.cpu_seconds for sample in ranks) for ranks in alone]
    own_wall = [max(sample.seconds for sample in ranks) for ranks in alone]
    tokens = [int(batch["cu_seqlens"][-1]) for batch in given]
    for run, taken in samples.items():
        count, times = len(taken[0]), len(taken[0]) if isinstance(run, Apart) else 1  # apart, each does all
        wall = [max(sample.seconds for sample in ranks) / times for ranks in taken]
        cpu = [sum(sample.cpu_seconds for sample in ranks) / times for ranks in taken]
        slowest = [count * max(sample.cpu_seconds for sample in ranks) / times for ranks in taken]
        yield Row(
            contest.kind,
            contest.seq_len,
            statistics.fmean(len(batch["cu_seqlens"]) - 1 for batch in given),
            count,
            label(run),
            statistics.median(n / seconds for n, seconds in zip(tokens, wall, strict=True)),
            statistics.median(wall),
            ratio(own_wall, wall),
            statistics.median(cpu),
            ratio(cpu, own_cpu),
            ratio(slowest, own_cpu),
            statistics.median(sum(sample.fixed_seconds for sample in ranks) / times for ranks in taken),
            statistics.fmean(sum(sample.sent_bytes for sample in ranks) for ranks in taken),
            None if isinstance(run, Apart) else peaks[run],
        )


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of steps on the same batch."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measured(contest: Contest, pools: dict[int, RankPool], steps: int, seed: int, *, memory: bool) -> list[Row]:
    """A contest's rows, and for each number of ranks one apart."""
    given = batches(contest.kind, contest.seq_len, steps + 1, seed)
    peaks = held(contest, given[0], pools, memory=memory)
    counts = sorted({run.cp_size for run in contest.runs} - {1})
    samples = in_turns(contest.runs, given, pools, apart=counts)
    for pool in pools.values():
        pool.run(forget)
    return sorted(rows_of(contest, given[1:], samples, peaks), key=attrgetter("ranks"))


def empty(title: str, headers: Sequence[str]) -> Table:
    """A table without rows."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header.startswith("run") else "right", no_wrap=True)
    return table


def add_rows(table: Table, rows: Sequence[Row]) -> None:
    """A contest's rows, and a line below."""
    for row in rows:
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        times = f"{row.tokens_per_second:,.0f}", f"{1e3 * row.step_seconds:,.0f}", f"{row.speedup:.2f}"
        cpu = f"{row.cpu_seconds:.2f}", f"{row.cpu_ratio:.2f}", f"{row.slowest_ratio:.2f}"
        fixed = f"{1e3 * row.fixed_seconds:.0f}"
        sent = f"{row.sent_bytes / 2**20:,.1f}" if row.sent_bytes else "-"
        batch = f"{row.tokens:,}", f"{row.count:.0f}"
        table.add_row(*batch, str(row.ranks), row.run, *times, *cpu, fixed, sent, memory)
    table.add_section()


def show_speedup(contest: Contest, pools: dict[int, RankPool], steps: int, seed: int, console: Console) -> list[Row]:
    """Two ranks beside one: the ratio of wall times, and what CPU seconds say it would be on cores of their own.

    In the last row two ranks do one rank's work each, and send nothing: two cores of this machine give no more.
    """
    rows = measured(contest, pools, steps, seed, memory=False)
    table = empty(f"{KINDS[contest.kind]}: {contest.seq_len} tokens, medians of {steps} interleaved steps", TWOS)
    for row in rows:
        aim = SPEEDUP.get(row.run) if row.ranks > 1 else None
        by_slowest, by_sum = row.ranks / row.slowest_ratio, row.ranks / row.cpu_ratio
        cells = [f"{number:.2f}" for number in (row.cpu_seconds, by_slowest, by_sum)]
        wanted = "-" if aim is None else f"{aim:.2f}"
        table.add_row(row.run, f"{1e3 * row.step_seconds:,.0f}", f"{row.speedup:.2f}", wanted, *cells)
    console.print(table)
    return rows


def show(chosen: Sequence[Contest], pools: dict[int, RankPool], steps: int, seed: int, console: Console) -> list[Row]:
    """A table for each kind of documents."""
    found: list[Row] = []
    for kind in dict.fromkeys(contest.kind for contest in chosen):
        table = empty(KINDS[kind], COLUMNS)
        for contest in (contest for contest in chosen if contest.kind == kind):
            with console.status(f"{kind}, {contest.seq_len} tokens"):
                rows = measured(contest, pools, steps, seed, memory=True)
            add_rows(table, rows)
            found += rows
        console.print(table)
    return found


def write_json(path: Path, rows: Sequence[Row], arguments: dict[str, Any]) -> None:
    """Everything that was measured, and where."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    content = {"machine": machine, "arguments": arguments, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def check(kinds: Sequence[str], plot: Path | None) -> None:
    """Refuse before any rank starts what would fail at the end.

    Raises:
        typer.BadParameter: unknown documents, or no package to draw with.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise typer.BadParameter(f"--documents takes {', '.join(KINDS)}, got {', '.join(unknown)}")
    if plot is not None:
        try:
            import matplotlib  # noqa: F401, PLC0415 (only a plot needs it)
        except ImportError as error:
            raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib") from error


def main(
    *,
    documents: Annotated[list[str] | None, typer.Option(help=f"{', '.join(KINDS)}; repeat for several.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="backend or backend@layout; repeat for several.")] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Tokens that grow; repeat.", min=2)] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks that grow; repeat.", min=2)] = None,
    at_ranks: Annotated[int, typer.Option(help="Ranks while tokens grow.", min=2)] = 2,
    at_tokens: Annotated[int, typer.Option(help="Tokens while ranks grow.", min=2)] = 4096,
    steps: Annotated[int | None, typer.Option(help="Steps that are counted; else 5, or 20.", min=1)] = None,
    layers: Annotated[int, typer.Option(help="Layers of the model.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of text, packs and weights.")] = 0,
    speedup: Annotated[bool, typer.Option("--speedup", help="Two ranks beside one, at one length.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw them; needs matplotlib.")] = None,
) -> None:
    """Time whole training steps on several ranks beside one, one thread a rank."""
    os.environ.update(ALLOCATOR)
    kinds = documents or (["sources"] if speedup else ["pile", "dense"])
    check(kinds, plot)
    if speedup and (ranks or plot):
        raise typer.BadParameter("--speedup compares two ranks with one in a table: it takes no --ranks and no --plot")
    base = RunSettings(model=GPTConfig(layers=layers), seed=seed)
    grid = sizes(seq_len or [2048, 4096, 8192], ranks or [2, 4], at_ranks, at_tokens)
    if speedup:
        grid = {length: [2] for length in seq_len or [8192]}
    chosen = list(contests(kinds, run or (list(SPEEDUP) if speedup else list(RUNS)), grid, base))
    console, counted, rows = Console(width=WIDTH), steps or (20 if speedup else 5), []
    console.print(f"the demo's model, {layers} layers, float32, one thread a rank; torch {torch.__version__}")
    with ExitStack() as stack:
        counts = {count for counts in grid.values() for count in counts}
        pools = {count: stack.enter_context(RankPool(count, timeout=600)) for count in sorted({1, *counts})}
        if speedup:
            for contest in chosen:
                rows += show_speedup(contest, pools, counted, seed, console)
        else:
            rows = show(chosen, pools, counted, seed, console)
            console.print(
                "x: to one rank. slow: the slowest rank times the ranks. peak: beside weights, largest rank.\n"
                "fixed: CPU of handler and plan, sum of gradients and AdamW, in full on every rank.\n"
                "apart: each rank does all of one rank's work and sends nothing; a rank's share of what that takes."
            )
    if json_file is not None:
        write_json(json_file, rows, {"steps": counted, "layers": layers, "seed": seed})
    if plot is not None:
        from benchmarks.curves import draw  # noqa: PLC0415 (only a plot needs matplotlib)

        draw(rows, plot, at_ranks, at_tokens)


if __name__ == "__main__":
    typer.run(main)
