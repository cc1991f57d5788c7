"""Attention under context parallelism beside one process with torch's own kernel, on the same work in the same run.

Prints, per backend and number of ranks, the CPU seconds of forward and forward+backward summed over ranks, as a ratio
to the plain kernel on one rank (median of interleaved repeats), the same ratio as if every rank took as long as the
slowest, and the bytes all ranks sent beside the theoretical count. ``p2p@balanced`` is a backend on a layout. With
``--floors``, what the kernel's calls and the messages take alone is measured as well, and with ``--peers``, other
projects' attention takes part too (see ``benchmarks/README.md``).

    python -m benchmarks.attention                      # one causal sequence of 4096 tokens
    python -m benchmarks.attention --kv-heads 2 --ranks 2 --ranks 4
    python -m benchmarks.attention --lengths 900,64,243,1500,1389 --layout zigzag
    python -m benchmarks.attention --pack pile:0 --pack prolong64k:3      # honest lengths, 8192 tokens a rank
    python -m benchmarks.attention --pack pile:0 --backend ring --backend p2p --backend p2p@balanced
    python -m benchmarks.attention --pack pile:0 --backend p2p@balanced --floors
    python -m benchmarks.attention --peers --lengths 16384 --repeats 5 --json speed.json --plot speed.png
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import pictures, records
from benchmarks.allocator import ALLOCATOR
from benchmarks.peers import PEERS
from benchmarks.runs import Run, run_contest
from benchmarks.tables import above_table, contest_table, interval_table, outside_table, rivals, table_of
from benchmarks.theory import theoretical_bytes
from benchmarks.works import Absent, Contest, Work, pack_lengths, peers_of, works_of
from cphandler.testing import RankPool

ENVIRONMENT = {
    **ALLOCATOR,
    "OMP_NUM_THREADS": "1",
}
"""Of every rank, which has one thread."""


@dataclass(frozen=True)
class Entry:
    """A contest before it is run: who takes part, and who is known to be absent."""

    contest: Contest
    absent: tuple[Absent, ...] = ()


def entry(name: str, works: Sequence[Work], counts: Sequence[int], peers: Sequence[str]) -> Entry:
    """A contest with the peers that can serve its one document.

    Args:
        name: what the documents are.
        works: plain kernel and backends.
        counts: numbers of ranks.
        peers: import paths.
    """
    if peers and len(works[0].lengths) > 1:
        raise typer.BadParameter(f"peers run one causal sequence, got {len(works[0].lengths)} documents in {name}")
    found = list(peers_of(works[0], counts, peers))
    competing = [work for work in found if isinstance(work, Work)]
    return Entry(Contest(name, (*works, *competing)), tuple(a for a in found if isinstance(a, Absent)))


def summary(run: Run, console: Console, *, thorough: bool) -> None:
    """Print what a contest came to."""
    if not thorough:
        console.print(table_of(run))
        return
    for ranks in sorted({work.ranks for work in run.results} - {1}):
        seconds, price = statistics.median(run.plain.cpu()), 1e9 * statistics.median(run.price(ranks))
        console.print(f"[bold]{run.contest}, {ranks} ranks[/]", highlight=False)
        console.print(
            f"x: to the plain kernel, {seconds:.3f} s; gloo's price: {price:.2f} s a gigabyte", highlight=False
        )
        console.print(contest_table(run, ranks))
        for absent in run.absent:
            if absent.ranks == ranks:
                console.print(f"  {absent.name} is absent: {absent.reason}", style="dim", highlight=False)
        console.print("the library's backends to each of these: median of repeats, 95% interval", highlight=False)
        console.print(interval_table(run, ranks))
        if rivals(run, ranks)[1]:
            console.print(outside_table(run, ranks))
        console.print("above these, in parts of the plain kernel's time", highlight=False)
        console.print(above_table(run, ranks))


def legend(*, thorough: bool) -> Iterator[str]:
    """What the columns are."""
    if not thorough:
        yield "both: forward and backward. slow: both, of the slowest rank times the ranks."
        yield "sent: by all ranks, forward and backward. theory: bytes counted from who sees whom."
        return
    yield "error: relative L2 against a dense float64 reference, the worst gradient. CPU: seconds of forward and"
    yield "backward, summed over ranks; kernel, rest, gloo: of these in the attention kernel's calls, in the rest of"
    yield "the threads that make them, in gloo's threads. slow: of the slowest rank times the ranks. wall: until the"
    yield "last rank is done. sent: bytes that all ranks wrote to their sockets. peak: high-water mark of a rank's"
    yield "memory in a pass, above inputs, outputs and gradients. floor: the same kernel calls alone, and the same"
    yield "bytes at gloo's price. bare pass: the same calls and the same messages in the same order, with nothing"
    yield "around them. above: what a backend takes more than these outside of the kernel; slow, in all."


def main(  # noqa: PLR0913 - an option each
    *,
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks; repeat for several.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, or backend@layout; repeat for several.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Document lengths of the packed causal batch.")] = None,
    pack: Annotated[list[str] | None, typer.Option(help="corpus:index of benchmarks/data/packs; on zigzag.")] = None,
    heads: int = 8,
    kv_heads: Annotated[list[int] | None, typer.Option(help="Key heads, 8 unless told; repeat for several.")] = None,
    head_dim: int = 64,
    dtype: str = "float32",
    layout: Annotated[str | None, typer.Option(help="Layout of backends that name none; else their own.")] = None,
    tile: Annotated[int | None, typer.Option(help="CPConfig.tile, which balanced counts area in.")] = None,
    kernel_cost: Annotated[int, typer.Option(help="CPConfig.kernel_cost, which balanced counts for a task.")] = 0,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.")] = 7,
    floors: Annotated[bool, typer.Option("--floors", help="Floors and bare passes, as with peers.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Other projects' attention takes part.")] = False,
    peer: Annotated[list[str] | None, typer.Option(help="module:class of one, in place of all; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture here.")] = None,
) -> None:
    """Time every backend's attention against torch's own kernel on one rank, one thread a rank."""
    os.environ.update(ENVIRONMENT)
    counts, names = ranks or [2, 4], backend or []
    asked = tuple(peer or (PEERS if peers else ()))
    entries = []
    for key_heads in kv_heads or [8]:
        if heads % key_heads:
            raise typer.BadParameter(f"--heads must be a multiple of --kv-heads, got {heads} and {key_heads}")
        plain = Work("plain", 1, (), heads, key_heads, head_dim, dtype, None, tile, kernel_cost)
        if lengths or not pack:
            given = replace(plain, lengths=tuple(int(part) for part in (lengths or "4096").split(",")))
            entries.append(entry("lengths", tuple(works_of(given, counts, names, layout)), counts, asked))
        for name in pack or []:
            for count in counts:
                given = replace(plain, lengths=pack_lengths(name, count))
                works = tuple(works_of(given, [count], names, layout or "zigzag"))
                entries.append(entry(name, works, [count], asked))
    runs = run_all(entries, repeats, thorough=floors or bool(asked))
    if json is not None:
        records.write(json, runs, asked, {"repeats": repeats, "environment": ENVIRONMENT})
    if plot is not None:
        heading = f"Context parallelism around one attention kernel, forward and backward, {repeats} repeats"
        pictures.draw(plot, runs, f"{heading}, torch {torch.__version__}")
    wrong = [
        work
        for run in runs
        for work, result in run.results.items()
        if work.peer is None and result.sent() != theoretical_bytes(work)
    ]
    if wrong:
        raise typer.Exit(1)


def run_all(entries: Sequence[Entry], repeats: int, *, thorough: bool) -> list[Run]:
    """Run contests one after the other, and print each."""
    console, runs = Console(width=None if sys.stdout.isatty() else 120), []
    console.print(f"CPU seconds summed over ranks, and as a ratio (x) to the plain kernel; torch {torch.__version__}")
    counts = {work.ranks for item in entries for work in item.contest.works}
    with ExitStack() as stack:
        pools = {count: stack.enter_context(RankPool(count, timeout=600)) for count in sorted({1, *counts})}
        for item in entries:
            run = run_contest(item.contest, item.absent, pools, repeats=repeats, thorough=thorough, console=console)
            summary(run, console, thorough=thorough)
            runs.append(run)
    for line in legend(thorough=thorough):
        console.print(line)
    return runs


if __name__ == "__main__":
    typer.run(main)
