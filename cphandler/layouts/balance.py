"""The balanced layout: as many tokens and as much attention on every rank, and as little as possible that travels.

Ranks are filled one after the other, each with its exact share of tokens and its share of the area that is left, so
that what is left is level by itself. A rank takes whole units while they fit, heaviest first. Where none fits, it ends
with a cut whose place follows from the two shares: the *end* of a long unit (few rows, much area), the lightest whole
units, and rows from the *beginning* of a unit (many rows, little area)::

    a long document          0 ........ w .............. u ...... L
                             | begins   |    left over   |  end   |
    this rank takes [0, w) and [u, L); the rows between are a shorter unit for the ranks to come

For one causal document this is zigzag, row for row. A cut costs the rows that one side sees of the other
(:meth:`cphandler.layouts.workload.Unit.boundary`); of several ways to end, a rank takes the cheapest. The whole is done
a few times with other slacks and orders, and the best result is kept. No communication, no chance, the same on every
rank.

Numbers beside a constant, here and in :mod:`cphandler.layouts.share`, are of the packs that ``benchmarks/planning.py``
keeps, with that constant changed and nothing else: *volume* is what travels as a share of a ring's rows, *area* that of
the busiest rank over the mean. As it is, volumes for 2, 4, 8, 16 and 64 ranks are .0544 .0833 .0940 .1001 .1153 and
areas 1.010 1.006 1.005 1.004 1.005, in the worst pack 1.019 1.018 1.014 1.014 1.039.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from cphandler.layouts.layout import Layout, zigzag
from cphandler.layouts.pool import Piece, Pool
from cphandler.layouts.share import Share
from cphandler.layouts.workload import Workload
from cphandler.tokens.intervals import table


class _Policy(NamedTuple):
    """One way to go about it.

    Attributes:
        by_last_row: whether remainders are ordered by the area of their last row, or by their mean.
        slack: a rank may have so much more than its share of the area, as a part of it.
        overfull: so much more yet, if that keeps the heaviest unit whole.
        price: rows per token of a share that a missed share of the area is worth.
    """

    by_last_row: bool
    slack: float
    overfull: float
    price: float


_POLICIES = [
    _Policy(by_last_row=False, slack=0.0, overfull=0.008, price=12.0),
    _Policy(by_last_row=True, slack=0.012, overfull=0.0, price=2.0),
    _Policy(by_last_row=False, slack=0.006, overfull=0.0, price=2.0),
    _Policy(by_last_row=True, slack=0.006, overfull=0.016, price=12.0),
    _Policy(by_last_row=True, slack=0.0, overfull=0.0, price=5.0),
    _Policy(by_last_row=False, slack=0.018, overfull=0.0, price=2.0),
]
"""Policies tried, the most useful first; found by greedy choice out of a grid, on packs other than the benchmark's.

Without the first a pack on 16 ranks has an area of 1.121; without any other, volumes are at most .0016 higher.
"""

_LEVEL = 0.02
"""A partition is level where no rank has more than this above the mean.

With .01 the volume on 2 ranks is .0580, with .03 it is .0533 and a pack's area 1.029.
"""

_LEVEL_WORTH = 0.2
"""What an area so much above the mean is worth, in shares of a ring's rows.

A trade: with .1 and .5, volume and area are .0541 and 1.012, .0566 and 1.004 on 2 ranks, .0935 and 1.008, .0949 and
1.002 on 8.
"""

_GOOD = 0.003
"""A partition worth no more than this is not tried to better: windows, say, and documents that all fit.

With 0 volumes are the same within .0001; with .01 that on 2 ranks is .0554, in half the time.
"""


Partition: TypeAlias = list[list[Piece]]
"""The pieces of each rank."""


def _partition(workload: Workload, cp_size: int, policy: _Policy, pool: Pool) -> Partition:
    """Fill the ranks by one policy, out of a pool of whole units."""
    total, tokens = workload.area, workload.num_tokens
    left = total
    price = policy.price * (tokens / total if total else 0.0) * workload.weight
    ranks: Partition = []
    for rank in range(cp_size - 1):
        share = tokens // cp_size + (rank < tokens % cp_size)
        goal = left / (cp_size - rank) * (1 + policy.slack)
        pieces = Share(pool, share, goal, price, policy.overfull * total / cp_size).fill()
        left -= sum(workload.units[unit].area(start, stop) for unit, start, stop in pieces)
        ranks.append(pieces)
    ranks.append([(remainder.unit, remainder.start, remainder.stop) for remainder in pool.remainders])
    return ranks


class _Quality(NamedTuple):
    """Area of the fullest rank as a multiple of the mean, and rows that travel as a share of a ring's."""

    level: float
    volume: float


def _quality(workload: Workload, ranks: Partition) -> _Quality:
    units = workload.units
    fullest, received = 0, 0
    for pieces in ranks:
        fullest = max(fullest, sum(units[unit].area(start, stop) for unit, start, stop in pieces))
        cut: dict[int, list[tuple[int, int]]] = {}
        for unit, start, stop in pieces:
            if stop - start < units[unit].length:
                cut.setdefault(unit, []).append((start, stop))
        received += sum(units[unit].received(sorted(runs)) for unit, runs in cut.items())
    ring = workload.num_tokens * max(len(ranks) - 1, 1) * workload.weight
    mean = workload.area / len(ranks)
    return _Quality(fullest / mean if mean else 1.0, received / ring if ring else 0.0)


def _worth(quality: _Quality) -> float:
    """What to make small: what travels, and how far from level it is, above :data:`_LEVEL` more than all else."""
    above = quality.level - 1
    return quality.volume + _LEVEL_WORTH * above + 10 * max(0.0, above - _LEVEL)


def balanced(workload: Workload, cp_size: int) -> Layout:
    """Place tokens so that all ranks have as many and as much area, and little travels.

    Args:
        workload: the area of each row.
        cp_size: ranks P.

    Returns:
        The layout; shares differ by one token at most, spans have stride 1.
    """
    if cp_size == 1 or not workload.num_tokens:
        ranks: Partition = [[(i, 0, unit.length) for i, unit in enumerate(workload.units)]]
        ranks += [[] for _ in range(cp_size - 1)]
    else:
        rated: list[tuple[_Quality, Partition]] = []
        pools: dict[bool, Pool] = {}
        for policy in _POLICIES[: _tries(workload, cp_size)]:
            if policy.by_last_row not in pools:
                pools[policy.by_last_row] = Pool(workload, policy.by_last_row)
            ranks = _partition(workload, cp_size, policy, pools[policy.by_last_row].copy())
            rated.append((_quality(workload, ranks), ranks))
            if _worth(rated[-1][0]) < _GOOD:
                break
        if len(workload.units) == 1:
            rated = _no_worse_than_zigzag(workload, cp_size, rated)
        ranks = min(rated, key=lambda each: _worth(each[0]))[1]
    return _layout(workload, ranks)


def _tries(workload: Workload, cp_size: int) -> int:
    """How many policies to try: as many as help at that size, one for one document, which leaves no choice.

    With one, volumes on 2 to 16 ranks are .0626 .0863 .0957 .1011, in a quarter to a half of the time, and a pack's
    area on 64 is 1.073. With six instead of four, those on 8 and 16 are .0934 and .0996, and areas 1.007 and 1.005.
    Beyond 128 ranks, of which no packs are kept, time decides.
    """
    if len(workload.units) == 1:
        return 1
    return 6 if cp_size <= 4 else 5 if 16 < cp_size <= 128 else 4


def _no_worse_than_zigzag(
    workload: Workload, cp_size: int, rated: Sequence[tuple[_Quality, Partition]]
) -> list[tuple[_Quality, Partition]]:
    """Zigzag, and what is neither less level than it nor moves more: for one document it is hard to beat."""
    spans = zigzag(np.array([0, workload.num_tokens]), cp_size).spans
    ranks: Partition = [[(0, start, start + rows) for start, rows in table[:, :2].tolist()] for table in spans]
    quality = _quality(workload, ranks)
    return [(quality, ranks), *(each for each in rated if all(a <= b for a, b in zip(each[0], quality, strict=True)))]


def _layout(workload: Workload, ranks: Partition) -> Layout:
    """The layout of a partition; pieces that touch become one span."""
    starts = np.array([unit.start for unit in workload.units], dtype=np.int64)
    counts = [len(pieces) for pieces in ranks]
    pieces = table([piece for pieces in ranks for piece in pieces], 3)
    rank = np.repeat(np.arange(len(ranks), dtype=np.int64), counts)
    first = starts[pieces[:, 0]] + pieces[:, 1]
    last = first + pieces[:, 2] - pieces[:, 1]
    order = np.lexsort((first, rank))
    rank, first, last = rank[order], first[order], last[order]
    touches = np.append([False], (rank[1:] == rank[:-1]) & (first[1:] == last[:-1]))[: len(rank)]
    opens = np.flatnonzero(~touches)
    closes = np.append(opens[1:], len(rank))[: len(opens)] - 1
    spans = np.stack([first[opens], last[closes] - first[opens], np.ones_like(opens)], axis=1)
    walls = np.searchsorted(rank[opens], np.arange(1, len(ranks)))
    rows = -(-workload.num_tokens // len(ranks))
    return Layout("balanced", workload.num_tokens, np.split(spans, walls), num_local_tokens=rows)
