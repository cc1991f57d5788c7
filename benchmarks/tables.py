"""Contests as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from benchmarks.intervals import Interval, median_of, paired_ratio
from benchmarks.runs import Floor, Result, Run
from benchmarks.theory import theoretical_bytes
from benchmarks.works import Work

COLUMNS = (
    "backend",
    "ranks",
    "fwd\ns",
    "both\ns",
    "fwd\nx",
    "both\nx",
    "slow\nx",
    "sent\nMiB",
    "theory\nMiB",
)

CONTEST_COLUMNS = (
    "competitor",
    "error\nof out",
    "error\nof grads",
    "CPU\nx",
    "kernel\nms",
    "rest\nms",
    "gloo\nms",
    "slow\nx",
    "wall\ns",
    "sent\nMiB",
    "peak\nMiB",
)

MIB = 2**20


def least_ratio(times: Sequence[float], plain: Sequence[float]) -> float:
    """The least of one to the least of the other: what each costs when nothing else is in its way."""
    return min(times) / min(plain)


def ratios(times: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Repeat by repeat."""
    return [a / b for a, b in zip(times, plain, strict=True)]


def rows_of(run: Run) -> Iterator[tuple[str, ...]]:
    """Rows of the library's own table: medians of the sums over ranks, ratios repeat by repeat.

    The slowest rank's time counts once for every rank: a layout that is not level makes the others wait.
    """
    for work, result in run.results.items():
        seconds, compared = [], []
        for kind in ("forward", "both"):
            times, own = (
                [sum(getattr(sample, kind) for sample in ranks) for ranks in taken.samples]
                for taken in (result, run.plain)
            )
            seconds.append(statistics.median(times))
            compared.append(statistics.median(ratios(times, own)))
        compared.append(statistics.median(ratios(result.slowest(), run.plain.cpu())))
        sent, theory = result.sent(), theoretical_bytes(work)
        verdict = "-" if work.ranks == 1 else ("equal" if sent == theory else f"{theory[1] / MIB:.2f}")
        numbers = [f"{number:.3f}" for number in (*seconds, *compared)]
        yield work.name, str(work.ranks), *numbers, f"{sent[1] / MIB:.1f}", verdict


def table_of(run: Run) -> Table:
    """The library's backends, and the bytes they sent beside the theory."""
    table = _table(COLUMNS, title=str(run.contest))
    for row in rows_of(run):
        table.add_row(*row)
    return table


def _table(columns: Sequence[str], *, title: str | None = None) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for i, header in enumerate(columns):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    return table


def contest_table(run: Run, ranks: int) -> Table:
    """Everybody on a number of ranks: the library's backends with their floors, then peers, then who is absent."""
    table = _table(CONTEST_COLUMNS)
    for work, result in run.of(ranks).items():
        wrong = result.errors.wrong(work.dtype) if result.errors else []
        style = "red" if wrong else "cyan" if work.is_ours else ""
        table.add_row(*_competitor(run, work, result, wrong), style=style)
        floor = run.floor(work)
        if floor is not None:
            table.add_row(*_floor(run, work, floor), style="dim")
        if result.bare is not None:
            table.add_row("  its bare pass", *_competitor(run, work, result.bare, ())[1:], style="dim")
    for absent in run.absent:
        if absent.ranks == ranks:
            table.add_row(absent.name, "absent", style="dim")
    return table


def _competitor(run: Run, work: Work, result: Result, wrong: Sequence[str]) -> tuple[str, ...]:
    compared, slowest = (ratios(times, run.plain.cpu()) for times in (result.cpu(), result.slowest()))
    wire, errors = result.wire(), result.errors
    marked = [("" if errors is None else f"{error:.0e}") for error in errors or (0.0, 0.0)]
    is_bare = result is not run.results[work]
    name = f"{work.name}, wrong {' and '.join(wrong)}" if wrong else work.name
    return (
        name,
        *marked,
        f"{statistics.median(compared):.3f}",
        *(_milliseconds(seconds) for seconds in (result.kernel(), result.rest(), result.gloo())),
        f"{statistics.median(slowest):.3f}",
        f"{statistics.median(result.wall()):.3f}",
        "-" if wire is None or work.ranks == 1 else f"{wire / MIB:.1f}",
        "" if is_bare else "-" if result.peak is None else f"{result.peak / MIB:.1f}",
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.0f}"


def _floor(run: Run, work: Work, floor: Floor) -> tuple[str, ...]:
    compared, slow = (
        f"{statistics.median(ratios(times, run.plain.cpu())):.3f}" for times in (floor.cpu(), floor.slowest)
    )
    parts = _milliseconds(floor.kernel), "", _milliseconds(floor.gloo)
    return "  its floor", "", "", compared, *parts, slow, "", f"{run.results[work].sent()[1] / MIB:.1f}", ""


def rivals(run: Run, ranks: int) -> tuple[list[Work], list[Work]]:
    """The library's backends and the peers that meet on a number of ranks."""
    works = [work for work in run.results if work.ranks == ranks and ranks > 1]
    return [work for work in works if work.is_ours], [work for work in works if work.peer is not None]


def against(run: Run, work: Work, other: Work) -> Interval:
    """CPU time of one competitor to another's, in the same repeats."""
    return paired_ratio(run.results[work].cpu(), run.results[other].cpu())


def outside_against(run: Run, work: Work, other: Work) -> Interval:
    """The same of what is outside of the kernel's calls."""
    return paired_ratio(run.results[work].outside(), run.results[other].outside())


def interval_table(run: Run, ranks: int) -> Table:
    """The library's backends against each peer, and against their own floors."""
    ours, peers = rivals(run, ranks)
    table = _table(("CPU to that of", *(work.name for work in ours)))
    for peer in peers:
        table.add_row(peer.backend, *(_cell(against(run, work, peer)) for work in ours))
    own = [run.floor(work) for work in ours]
    floors = [
        "-" if floor is None else _cell(paired_ratio(run.results[work].cpu(), floor.cpu()))
        for work, floor in zip(ours, own, strict=True)
    ]
    table.add_row("its own floor", *floors, style="dim")
    bare = [run.results[work].bare for work in ours]
    cells = [
        "-" if result is None else _cell(paired_ratio(run.results[work].cpu(), result.cpu()))
        for work, result in zip(ours, bare, strict=True)
    ]
    table.add_row("its bare pass", *cells, style="dim")
    return table


def outside_table(run: Run, ranks: int) -> Table:
    """The library's backends against each peer, outside of the kernel that all share."""
    ours, peers = rivals(run, ranks)
    table = _table(("outside the kernel", *(work.name for work in ours)))
    for peer in peers:
        table.add_row(peer.backend, *(_cell(outside_against(run, work, peer)) for work in ours))
    return table


ABOVE = ("its bare pass", "its floor", "its bare pass, slow", "its floor, slow")
"""What a backend is above: outside of the kernel, and for the slowest rank times the ranks, the kernel included."""


def above(run: Run, work: Work) -> dict[str, Interval]:
    """What a backend takes above its bare pass and its floor, as a part of what the plain kernel takes.

    Args:
        run: the contest.
        work: the backend.

    Returns:
        By the names in :data:`ABOVE`; empty where there is no floor.
    """
    result, floor = run.results[work], run.floor(work)
    if floor is None or result.bare is None:
        return {}
    pairs = (
        (result.outside(), result.bare.outside()),
        (result.outside(), floor.gloo),
        (result.slowest(), result.bare.slowest()),
        (result.slowest(), floor.slowest),
    )
    plain = run.plain.cpu()
    return {
        name: median_of([(a - b) / c for a, b, c in zip(ours, least, plain, strict=True)])
        for name, (ours, least) in zip(ABOVE, pairs, strict=True)
    }


def above_table(run: Run, ranks: int) -> Table:
    """What the library's backends take above their bare passes and floors."""
    ours, _ = rivals(run, ranks)
    found = [above(run, work) for work in ours]
    table = _table(("above", *(work.name for work in ours)))
    for name in ABOVE:
        cells = [each.get(name) for each in found]
        table.add_row(name, *("-" if c is None else f"{c.median:.3f} {c.low:.3f}-{c.high:.3f}" for c in cells))
    return table


def _cell(interval: Interval) -> str:
    style = "green" if interval.high < 1 else "red" if interval.low > 1 else "default"
    return f"[{style}]{interval.median:.3f} {interval.low:.2f}-{interval.high:.2f}[/]"
