"""How good layouts are on honest document lengths, what is asked of them, and how long planning takes.

Prints, per corpus and number of ranks, the mean over packs of the key rows that ranks receive (of all, and of the
busiest), as a share of what a ring's rank receives, the attention area of the busiest rank over the mean, and the CPU
time to plan. The least that must travel stands beside it; a number that misses what is asked is marked with !.

    python -m benchmarks.planning                                   # the packs that are kept
    python -m benchmarks.planning --seed 1 --corpus pile --ranks 8  # others, drawn the same way
    python -m benchmarks.planning --times                           # CPU time of handlers and their plans
    python -m benchmarks.planning --layout zigzag --scales          # planning time, up to eight million tokens
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.packs import CORPORA, RANKS, TOKENS, Bounds, Floor, bounds, drawn, mean_floor, packs
from cphandler import BatchPlan, Layout, PlanStats, clear_plan_cache, get_cp_handler_cls, plan_batch
from cphandler.comm.groups import Place
from cphandler.layouts.layout import make_layout
from cphandler.plan.plan import Plan

BASELINES = ("zigzag", "contiguous", "whole")
"""Layouts that others are measured against; ``whole`` is zigzag with short documents whole."""

LAYOUTS = ("balanced", *BASELINES)
"""Layouts shown where none is named."""

COLUMNS = ("ranks", "layout", "volume", "worst\nrank", "area\nmean", "area\nany", "ms\nmedian", "ms\nmax")

HANDLERS = ("what", "asked", "median", "least")

TIMED = ("tokens", "documents", "ranks", "layout", "batch\nms", "rank\nms", "tasks", "area", "volume")

SCALES = ((8, TOKENS), (8, 1 << 17), (64, TOKENS), (64, 1 << 17), (256, TOKENS), (1024, TOKENS))
"""Numbers of ranks and tokens a rank at which planning is timed."""

REPEATS = 3
"""Each pack is planned so often, and the best time counts: other work on the machine makes the others longer."""

SHORTEST_LONG = 1 << 16
"""Where planning is timed, no document is longer than this, or a quarter of the pack: so there are many."""


MEAN, SIGMA, SEED = 750, 1.0, 0
"""Lengths whose handlers are timed: lognormal with this mean, deviation of the logarithm, and seed of the generator."""

TRIES = 15
"""How often each of these times is taken; the median and the least of them are shown."""


class Quality(NamedTuple):
    """A layout on several packs.

    Attributes:
        volume: mean of the packs' mean share of a ring's rows.
        worst: mean of the packs' busiest ranks' shares.
        area: mean of the packs' largest area over the mean.
        area_of_any: the largest of these.
        milliseconds: median over packs of the CPU time to plan: bands and layout, the best of :data:`REPEATS`.
        slowest: the longest of these times.
    """

    volume: float
    worst: float
    area: float
    area_of_any: float
    milliseconds: float
    slowest: float


def whole(lengths: Sequence[int], ranks: int) -> Layout:
    """Zigzag over all ranks for documents of more than a rank's share of tokens or area, the others left whole.

    These are dealt the longest first, each to the rank of least area that has room for it; where none has, it is cut
    over those with most room, so that tokens are level.
    """
    offsets, total = [0, *accumulate(lengths)], sum(lengths)
    room = [-(-total // ranks)] * ranks
    area = [0] * ranks
    fair = sum(n * (n + 1) // 2 for n in lengths) / ranks
    spans: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]

    def give(rank: int, document: int, first: int, length: int) -> None:
        spans[rank].append((offsets[document] + first, length, 1))
        room[rank] -= length
        area[rank] += length * (2 * first + length + 1) // 2

    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        if length > total / ranks or length * (length + 1) / 2 > fair:
            for rank, held in enumerate(make_layout("zigzag", np.array([0, length]), ranks).spans):
                for first, count in held[:, :2].tolist():
                    give(rank, document, first, count)
            continue
        first = 0
        while first < length:
            fitting = [rank for rank in range(ranks) if room[rank] >= length - first]
            rank = min(fitting, key=area.__getitem__) if fitting else max(range(ranks), key=room.__getitem__)
            count = min(length - first, room[rank])
            give(rank, document, first, count)
            first += count
    return Layout("whole", total, [sorted(held) for held in spans], num_local_tokens=-(-total // ranks))


def planned(lengths: Sequence[int], ranks: int, name: str) -> tuple[BatchPlan, PlanStats, float]:
    """A pack's plan, what its layout costs, and the CPU seconds that it took to make.

    Raises:
        RuntimeError: areas that do not add up to the documents', or ranks of unequal numbers of tokens.
    """
    offsets = [0, *accumulate(lengths)]
    started = time.process_time()
    made = plan_batch(offsets, ranks, layout=whole(lengths, ranks) if name == "whole" else name)
    seconds = time.process_time() - started
    stats = made.stats()
    held = [int(spans[:, 1].sum()) for spans in made.layout.spans]
    if int(stats.area.sum()) != sum(n * (n + 1) // 2 for n in lengths) or max(held) - min(held) > 1:
        raise RuntimeError(f"{name} over {ranks} ranks loses pairs, or its shares of tokens are not level: {held}")
    return made, stats, seconds


def quality(chosen: Sequence[Sequence[int]], ranks: int, name: str) -> Quality:
    """A layout's numbers on some packs."""
    found, milliseconds = [], []
    for lengths in chosen:
        made = [planned(lengths, ranks, name) for _ in range(REPEATS)]
        found.append(made[0][1])
        milliseconds.append(1e3 * min(seconds for _, _, seconds in made))
    balance = [stats.area_balance for stats in found]
    return Quality(
        statistics.fmean(stats.volume for stats in found),
        statistics.fmean(stats.worst for stats in found),
        statistics.fmean(balance),
        max(balance),
        statistics.median(milliseconds),
        max(milliseconds),
    )


def misses(found: Quality, asked: Bounds | None) -> list[bool]:
    """Which of a layout's numbers are above what is asked."""
    if asked is None:
        return [False] * len(found)
    return [*(number > most + 1e-9 for number, most in zip(found[:5], asked, strict=True)), False]


def cells(found: Quality, missed: Sequence[bool]) -> Iterator[str]:
    """Numbers as the table shows them."""
    formats = (".3f", ".3f", ".3f", ".3f", ".1f", ".1f")
    for number, style, wrong in zip(found, formats, missed, strict=True):
        yield f"[bold red]{number:{style}} ![/]" if wrong else f"{number:{style}}  "


def asked_cells(least: Floor, asked: Bounds | None, ranks: int) -> Iterator[str]:
    """What is asked, as the table shows it: the worst of two ranks is held to each layout's own mean."""
    if asked is None:
        yield from [""] * 6
        return
    worst = "2 x vol  " if ranks == 2 else f"{asked.worst:.3f}  "
    yield from (f"{asked.volume:.3f}  ", worst, f"{asked.area:.3f}  ", f"{asked.area_of_any:.3f}  ")
    yield from (f"{asked.milliseconds:.1f}  ", "")


def empty(title: str, headers: Sequence[str]) -> Table:
    """A table without rows."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header in ("layout", "what") else "right", no_wrap=True)
    return table


def compared(
    corpus: str, counts: Sequence[int], names: Sequence[str], seed: int | None, count: int
) -> tuple[Table, int]:
    """The table of a corpus, and how many numbers of layouts that are no baselines miss what is asked."""
    source = "the packs that are kept" if seed is None else f"{count} packs of seed {seed}"
    table, wrong = empty(f"{corpus}: {source}, {TOKENS} tokens a rank, causal", COLUMNS), 0
    for ranks in counts:
        chosen = packs(corpus, ranks)[:count] if seed is None else drawn(corpus, ranks, count, seed)
        least = mean_floor(chosen, ranks)
        table.add_row(str(ranks), "least", f"{least.volume:.3f}  ", f"{least.worst:.3f}  ")
        table.add_row("", "asked", *asked_cells(least, bounds(least, 0.0, ranks), ranks))
        for name in names:
            found = quality(chosen, ranks, name)
            missed = misses(found, bounds(least, found.volume, ranks))
            table.add_row("", name, *cells(found, missed))
            wrong += sum(missed) if name not in BASELINES else 0
        table.add_section()
    return table, wrong


def timed(corpus: str, scales: Sequence[tuple[int, int]], names: Sequence[str], seed: int) -> Table:
    """Planning time against tokens, documents and ranks."""
    table = empty(f"{corpus}: time to plan for one rank, p2p", TIMED)
    for ranks, tokens in scales:
        longest = min(SHORTEST_LONG, ranks * tokens // 4)
        (lengths,) = drawn(corpus, ranks, 1, seed, tokens=tokens, longest=longest)
        for name in names:
            made, stats, seconds = planned(lengths, ranks, name)
            started = time.process_time()
            tasks = len(made.plan(ranks // 2).tasks)
            spent = time.process_time() - started
            times = f"{1e3 * seconds:.1f}", f"{1e3 * spent:.1f}"
            shape = str(ranks * tokens), str(len(lengths)), str(ranks)
            table.add_row(*shape, name, *times, str(tasks), f"{stats.area_balance:.3f}", f"{stats.volume:.3f}")
        table.add_section()
    return table


def lognormal(count: int) -> list[int]:
    """Lengths of documents whose handlers are timed."""
    lengths = np.random.default_rng(SEED).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return [max(1, round(length)) for length in lengths.tolist()]


def milliseconds(work: Callable[[], object], *, before: Callable[[], None] | None = None) -> tuple[float, float]:
    """Median and least CPU time of some work."""
    spent = []
    for _ in range(TRIES):
        if before is not None:
            before()
        started = time.process_time()
        work()
        spent.append(1e3 * (time.process_time() - started))
    return statistics.median(spent), min(spent)


def handlers() -> Iterator[tuple[str, float | None, tuple[float, float]]]:
    """What is timed of handlers and plans, the milliseconds asked of it, and those that it takes."""
    many, fewer = ([0, *accumulate(lognormal(count))] for count in (1000, 600))
    make: Any = get_cp_handler_cls("p2p")

    def packed(offsets: list[int], ranks: int, layout: object) -> Callable[[], object]:
        array = np.array(offsets)
        return lambda: make(
            cp_group=Place(ranks, ranks // 2), qkv_format="thd", cu_seqlens_q=array, layout=layout
        ).plan()

    for layout, first in (("zigzag", 8.0), ("balanced", 20.0)):
        work = packed(many, 8, layout)
        yield f"1000 documents, 8 ranks, {layout}, first", first, milliseconds(work, before=clear_plan_cache)
        yield f"1000 documents, 8 ranks, {layout}, again", 1.0, milliseconds(work)
    sent = pickle.dumps(plan_batch(many, 8, layout="balanced", ranks=(4,)))
    work = packed(many, 8, pickle.loads(sent))
    yield "1000 documents, 8 ranks, from a BatchPlan", None, milliseconds(work, before=clear_plan_cache)
    yield f"its pickle of {len(sent) / 2**20:.2f} MiB, read", None, milliseconds(lambda: pickle.loads(sent))
    every = plan_batch(many, 8, layout="balanced", ranks="all")
    written = milliseconds(lambda: pickle.dumps(every))
    yield f"one with all ranks' plans, {len(pickle.dumps(every)) / 2**20:.2f} MiB, written", None, written
    dense = lambda: make(cp_group=Place(8, 4), max_seqlen_q=1 << 16).plan()  # noqa: E731
    yield "a dense batch, 8 ranks, again", 0.2, milliseconds(dense)
    yield (
        "600 documents, 64 ranks, zigzag, first",
        20.0,
        milliseconds(packed(fewer, 64, "zigzag"), before=clear_plan_cache),
    )
    plan = plan_batch(fewer, 64).plan(32)
    packed_plan = plan.to_tensor()
    yield "its tasks and runs in a pass", 5.0, milliseconds(lambda: listed(Plan.from_tensor(packed_plan)))


def listed(plan: Plan) -> int:
    """The rows of a plan's tasks and runs, looked up as a pass does."""
    count = sum(len(plan.tasks_of(owner)) for owner in range(plan.cp_size))
    return count + sum(len(plan.runs(stage, sent=sent)) for stage in range(len(plan.stages)) for sent in (True, False))


def timed_handlers() -> tuple[Table, int]:
    """The table of :func:`handlers`, and how many medians are above what is asked."""
    table, wrong = empty(f"CPU ms, lognormal lengths of mean {MEAN}, sigma {SIGMA:g}, seed {SEED}", HANDLERS), 0
    for what, asked, (median, least) in handlers():
        missed = asked is not None and median > asked
        wrong += missed
        shown = f"[bold red]{median:.2f} ![/]" if missed else f"{median:.2f}  "
        table.add_row(what, "" if asked is None else f"{asked:g}", shown, f"{least:.2f}")
    return table, wrong


def main(
    *,
    corpus: Annotated[list[str] | None, typer.Option(help="Corpora; repeat for several.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks; repeat for several.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Layouts; repeat for several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw other packs instead of those that are kept.")] = None,
    count: Annotated[int, typer.Option(help="Packs of each corpus and number of ranks.", min=1)] = 16,
    scales: Annotated[bool, typer.Option("--scales", help="Time planning up to eight million tokens instead.")] = False,
    times: Annotated[bool, typer.Option("--times", help="Time making handlers and their plans instead.")] = False,
) -> None:
    """Compare layouts; fail where one that is no baseline misses what is asked of it."""
    chosen, names = corpus or list(CORPORA), layout or list(LAYOUTS)
    unknown = [name for name in chosen if name not in CORPORA]
    if unknown:
        raise typer.BadParameter(f"--corpus takes {', '.join(CORPORA)}, got {', '.join(unknown)}")
    console, wrong = Console(), 0
    if times:
        table, wrong = timed_handlers()
        console.print(table)
        chosen = []
    elif seed is None and not scales and set(ranks or []) - set(RANKS):
        raise typer.BadParameter(f"packs are kept for {', '.join(map(str, RANKS))} ranks; --seed draws for any number")
    for name in chosen:
        if scales:
            console.print(timed(name, [scale for scale in SCALES if not ranks or scale[0] in ranks], names, seed or 0))
            continue
        table, missed = compared(name, ranks or list(RANKS), names, seed, count)
        console.print(table)
        wrong += missed
    if chosen and not scales:
        console.print("volume, worst rank: rows received as a share of a ring's. area: most of a rank over the mean.")
    if wrong:
        console.print(f"{wrong} numbers miss what is asked")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
