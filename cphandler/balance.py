"""The balanced layout: as many tokens and as much attention on every rank, and as little as possible that travels.

Ranks are filled one after the other, each with its exact share of tokens and its share of the area that is left, so
that what is left is level by itself. A rank takes whole units while they fit, heaviest first. Where none fits, it ends
with a cut whose place follows from the two shares: the *end* of a long unit (few rows, much area), the lightest whole
units, and rows from the *beginning* of a unit (many rows, little area)::

    a long document          0 ........ w .............. u ...... L
                             | begins   |    left over   |  end   |
    this rank takes [0, w) and [u, L); the rows between are a shorter unit for the ranks to come

For one causal document this is zigzag, row for row. A cut costs the rows that one side sees of the other
(:meth:`cphandler.workload.Unit.boundary`); of several ways to end, a rank takes the cheapest. The whole is done a few
times with other slacks and orders, and the best result is kept. No communication, no chance, the same on every rank.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np

from cphandler.intervals import table
from cphandler.layout import Layout, zigzag
from cphandler.workload import Unit, Workload


class _Remainder(NamedTuple):
    """Rows ``[start, stop)`` of a unit that no rank has yet; sorted by ``heaviness``."""

    heaviness: float
    unit: int
    start: int
    stop: int
    area: int


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
    _Policy(by_last_row=False, slack=0.018, overfull=0.0, price=2.0),
    _Policy(by_last_row=True, slack=0.0, overfull=0.0, price=5.0),
    _Policy(by_last_row=True, slack=0.016, overfull=0.008, price=2.0),
    _Policy(by_last_row=False, slack=0.003, overfull=0.008, price=12.0),
]
"""Policies tried, the most useful first; found by greedy choice out of a grid, on packs other than the benchmark's."""

_LEVEL = 0.02
"""A partition is level where no rank has more than this above the mean."""

_LEVEL_WORTH = 0.2
"""What an area so much above the mean is worth, in shares of a ring's rows."""

_GOOD = 0.003
"""A partition worth no more than this is not tried to better: windows, say, and documents that all fit."""

_LOOKS = frozenset({0, 1, 2, 4, 8, 16, 32})
"""After how many whole units a rank looks for a way to end."""

_CUTS = 3
"""Remainders considered for a cut, each time."""

_CLOSE = 0.001
"""A cut that misses the area by no more than this part of it, or by two rows, needs no rival."""

_AHEAD = 8
"""Remainders considered at either end of the pool."""


class _Finish(NamedTuple):
    """How a rank ends: after ``taken`` whole remainders, the lightest so many, and slices ``(index, start, stop)``.

    Indices count in the pool as it is after those are taken. The smallest is the cheapest; its cost includes the price
    of the area that it is missed by.
    """

    cost: float
    missed: float
    taken: int
    lightest: int
    slices: tuple[tuple[int, int, int], ...]


Piece: TypeAlias = tuple[int, int, int]
"""Rows ``(unit, start, stop)``."""


class _Pool:
    """Remainders, those of light rows first."""

    def __init__(self, units: Sequence[Unit], by_last_row: bool) -> None:
        self.units, self.by_last_row = units, by_last_row
        self.remainders = sorted(self._remainder(i, 0, unit.length) for i, unit in enumerate(units))

    def copy(self) -> _Pool:
        """The same remainders, to be taken anew."""
        twin = copy(self)
        twin.remainders = self.remainders.copy()
        return twin

    def _remainder(self, unit: int, start: int, stop: int) -> _Remainder:
        area = self.units[unit].area(start, stop)
        heaviness = float(self.units[unit].row(stop - 1)) if self.by_last_row else area / (stop - start)
        return _Remainder(heaviness, unit, start, stop, area)

    def put(self, unit: int, start: int, stop: int) -> None:
        """Give rows back, none too."""
        if start < stop:
            insort(self.remainders, self._remainder(unit, start, stop))

    def cut(self, whole: _Remainder, slices: Sequence[tuple[int, int]]) -> None:
        """Put back what slices leave of a remainder."""
        at = whole.start
        for start, stop in sorted(slices):
            self.put(whole.unit, at, start)
            at = stop
        self.put(whole.unit, at, whole.stop)


class _Share:
    """Fills one rank.

    Args:
        pool: what there is; what the rank takes is gone from it afterwards.
        tokens: rows the rank takes.
        area: area it should have.
        price: rows that an area of one too much or too little is worth.
        overfull: area it may have beyond, if that keeps the heaviest remainder whole.
    """

    def __init__(self, pool: _Pool, tokens: int, area: float, price: float, overfull: float) -> None:
        self.pool, self.units, self.remainders = pool, pool.units, pool.remainders
        self.tokens, self.area = tokens, area
        self.price, self.overfull = price, overfull
        self.taken: list[_Remainder] = []

    def fill(self) -> list[Piece]:
        """Choose rows, and take them out of the pool."""
        finishes: list[_Finish] = []
        self._add_up_lightest()
        while self.tokens:
            if len(self.taken) in _LOOKS:
                finishes += self._ends_with_cut()
                if self.taken:
                    finishes += self._ends_with_slice()
            fitting = self._heaviest_fitting()
            if fitting < 0:
                if self.taken or not finishes:
                    finishes += self._trims()
                break
            self._take(fitting)
        else:
            missed = abs(self.area)
            finishes.append(_Finish(self.price * missed, missed, len(self.taken), 0, ()))
        return self._applied(min(finishes)) if finishes else self._lightest_rows()

    def _add_up_lightest(self) -> None:
        """Rows and area of the lightest remainders, up to as many as fill the room."""
        self.rows, self.areas = [0], [0]
        for remainder in self.remainders:
            self.rows.append(self.rows[-1] + remainder.stop - remainder.start)
            self.areas.append(self.areas[-1] + remainder.area)
            if self.rows[-1] >= self.tokens:
                break

    def _take(self, index: int) -> None:
        remainder = self.remainders.pop(index)
        self.taken.append(remainder)
        self.tokens -= remainder.stop - remainder.start
        self.area -= remainder.area
        if index < len(self.rows):
            self._add_up_lightest()

    def _lightest(self, rows: int) -> float:
        """Area of so many rows at the light end of the pool."""
        i = bisect_right(self.rows, rows) - 1
        over = rows - self.rows[i]
        if not over or i >= len(self.remainders):
            return self.areas[i]
        first = self.remainders[i]
        return self.areas[i] + self.units[first.unit].area(first.start, min(first.start + over, first.stop))

    def _heaviest_fitting(self) -> int:
        """The heaviest remainder that leaves room for light rows beside it; -1 where none does."""
        room = self.area
        last = len(self.remainders) - 1
        if not self.taken:
            room += self.overfull
            return last if last >= 0 and self._fits(self.remainders[last], room) else -1
        low, high = 0, last + 1  # heavier remainders tend to be longer and heavier
        while low < high:
            middle = (low + high) >> 1
            if self._fits(self.remainders[middle], room):
                low = middle + 1
            else:
                high = middle
        return low - 1

    def _fits(self, remainder: _Remainder, room: float) -> bool:
        rows = self.tokens - remainder.stop + remainder.start
        return rows >= 0 and remainder.area + self._lightest(rows) <= room

    def _ends_with_cut(self) -> Iterator[_Finish]:
        """Finishes with the end of one remainder, the lightest whole ones, and the beginning of a remainder."""
        others: list[int] | None = None
        for index in self._worth_cutting():
            finish = self._cut_alone(index)
            if finish is None or finish.missed > max(_CLOSE * self.area, 2 * self._last_row(index)):
                others = self._beginnings() if others is None else others
                finish = self._cut_beside(index, others) or (finish if len(self.remainders) == 1 else None)
            if finish is not None:
                yield finish

    def _worth_cutting(self) -> list[int]:
        """The heaviest at first, since no rank can have it whole; later the smallest that hold the area that lacks."""
        if not self.taken:
            return [len(self.remainders) - 1]
        lacking = self.area - self._lightest(self.tokens)
        enough = (i for i, remainder in enumerate(self.remainders) if remainder.area >= lacking)
        return list(islice(enough, _CUTS))

    def _cut_alone(self, index: int) -> _Finish | None:
        """The end and the beginning of one remainder, around as many of the lightest whole ones as there can be."""
        _, which, start, stop, area = self.remainders[index]
        unit = self.units[which]

        def end_is_enough(lightest: int) -> bool:
            """Whether the room beside the lightest, filled from the end, has no less than the area that lacks."""
            rows = self.tokens - self.rows[lightest]
            return rows > stop - start or unit.area(stop - rows, stop) >= self.area - self.areas[lightest]

        lightest = self._last(end_is_enough, min(self._most_lightest(), index))
        between = stop - start - self.tokens + self.rows[lightest]
        if lightest < 0 or between <= 0:
            return None
        target = area - self.area + self.areas[lightest]
        end = _stop_of_run(unit, (start + between, stop), between, target)
        begin = end - between
        missed = abs(unit.area(begin, end) - target)
        cost = self._cost_of_end(unit, start, begin, end, stop) + self.price * missed
        return _Finish(cost, missed, len(self.taken), lightest, ((index, start, begin), (index, end, stop)))

    def _most_lightest(self) -> int:
        return bisect_right(self.rows, self.tokens) - 1

    @staticmethod
    def _last(holds: Callable[[int], bool], most: int) -> int:
        """The largest number up to ``most`` for which a falling condition holds; -1 for none."""
        low, high = -1, most
        while low < high:
            middle = (low + high + 1) >> 1
            if holds(middle):
                low = middle
            else:
                high = middle - 1
        return low

    @staticmethod
    def _cost_of_end(unit: Unit, start: int, begin: int, end: int, stop: int) -> float:
        """What travels for a cut at ``end``, with rows ``[start, begin)`` on the same rank as ``[end, stop)``.

        Where late rows see early ones, those at the beginning cost nothing: what others need of them, their rank saves.
        """
        if end == stop:
            return unit.boundary(begin) if begin > start else 0
        cost = unit.boundary(end)
        return cost if begin == start or unit.sees_far else cost + unit.boundary(begin)

    def _cut_beside(self, index: int, beginnings: list[int]) -> _Finish | None:
        """The end of one remainder, the lightest whole ones, and the beginning of another."""
        for others in (beginnings, [] if self.taken else self._neighbours()):
            cuts = [cut for other in others if other != index and (cut := self._cut_two(index, other)) is not None]
            if cuts:
                return min(cuts)
        return None

    def _beginnings(self) -> list[int]:
        """Remainders whose first rows are light, among the lightest and the heaviest."""
        count = len(self.remainders)
        some = (*range(min(_AHEAD, count)), *range(max(_AHEAD, count - _AHEAD), count))
        return heapq.nsmallest(_CUTS + 1, some, key=lambda i: (self._first_row(i), -i))

    def _neighbours(self) -> list[int]:
        """Remainders just heavier than those that fill the room whole."""
        most = self._most_lightest()
        return list(range(max(0, most - _AHEAD), min(most + 2, len(self.remainders))))

    def _first_row(self, index: int) -> int:
        remainder = self.remainders[index]
        return self.units[remainder.unit].row(remainder.start)

    def _last_row(self, index: int) -> int:
        remainder = self.remainders[index]
        return self.units[remainder.unit].row(remainder.stop - 1)

    def _cut_two(self, index: int, other: int) -> _Finish | None:
        _, which, start, stop, _ = self.remainders[index]
        _, which_other, start_other, stop_other, _ = self.remainders[other]
        unit, unit_other = self.units[which], self.units[which_other]
        most = stop - start

        def area(lightest: int, rows: int) -> int:
            rest = self.tokens - self.rows[lightest] - rows
            return unit.area(stop - rows, stop) + unit_other.area(start_other, start_other + rest)

        def fewest(lightest: int) -> int:
            return max(0, self.tokens - self.rows[lightest] - stop_other + start_other)

        def end_is_enough(lightest: int) -> bool:
            rows = min(self.tokens - self.rows[lightest], most)
            return rows < fewest(lightest) or area(lightest, rows) >= self.area - self.areas[lightest]

        lightest = self._last(end_is_enough, min(self._most_lightest(), index, other))
        if lightest < 0 or fewest(lightest) > most:
            return None
        lacking = self.area - self.areas[lightest]
        low, high = fewest(lightest), min(self.tokens - self.rows[lightest], most)
        if area(lightest, low) > lacking:
            return None
        while low < high:
            middle = (low + high + 1) >> 1
            if area(lightest, middle) <= lacking:
                low = middle
            else:
                high = middle - 1
        rest = start_other + self.tokens - self.rows[lightest] - low
        cost = unit.boundary(stop - low) if low else 0
        cost += unit_other.boundary(rest) if rest > start_other else 0
        slices = (index, stop - low, stop), (other, start_other, rest)
        return _Finish(cost, 0, len(self.taken), lightest, slices)

    def _ends_with_slice(self) -> Iterator[_Finish]:
        """Finishes with the lightest whole remainders and one run of rows out of the heaviest."""
        if not self.remainders:
            return
        index = len(self.remainders) - 1
        _, which, start, stop, _ = self.remainders[index]
        unit = self.units[which]

        def beginning_is_enough(lightest: int) -> bool:
            rows = min(self.tokens - self.rows[lightest], stop - start)
            return unit.area(start, start + rows) >= self.area - self.areas[lightest]

        most = min(self._most_lightest(), index)
        lightest = self._last(beginning_is_enough, most)
        for number in (lightest, lightest + 1):
            if 0 <= number <= most and 0 < self.tokens - self.rows[number] <= stop - start:
                yield self._slice(index, number)

    def _slice(self, index: int, lightest: int) -> _Finish:
        _, which, start, stop, _ = self.remainders[index]
        unit, rows, lacking = self.units[which], self.tokens - self.rows[lightest], self.area - self.areas[lightest]
        last = _stop_of_run(unit, (start + rows, stop), rows, lacking)
        return self._sliced(index, lightest, last - rows, last)

    def _sliced(self, index: int, lightest: int, first: int, last: int) -> _Finish:
        _, which, start, stop, _ = self.remainders[index]
        unit = self.units[which]
        missed = abs(unit.area(first, last) - self.area + self.areas[lightest])
        cost = (unit.boundary(first) if first > start else 0) + (unit.boundary(last) if last < stop else 0)
        return _Finish(cost + self.price * missed, missed, len(self.taken), lightest, ((index, first, last),))

    def _trims(self) -> Iterator[_Finish]:
        """Finishes with one run of rows, where no whole remainder fits any more."""
        long = [i for i, remainder in enumerate(self.remainders) if remainder.stop - remainder.start >= self.tokens]
        for index in long if len(long) <= _AHEAD else [*long[: _AHEAD // 2], *long[-_AHEAD // 2 :]]:
            _, _, start, stop, _ = self.remainders[index]
            yield self._sliced(index, 0, start, start + self.tokens)
            yield self._sliced(index, 0, stop - self.tokens, stop)
            yield self._slice(index, 0)

    def _lightest_rows(self) -> list[Piece]:
        """The lightest beginnings, where nothing else has been found."""
        pieces = []
        while self.tokens:
            remainder = self.remainders.pop(min(range(len(self.remainders)), key=self._first_row))
            last = min(remainder.start + self.tokens, remainder.stop)
            pieces.append((remainder.unit, remainder.start, last))
            self.pool.put(remainder.unit, last, remainder.stop)
            self.tokens -= last - remainder.start
        return [*pieces, *((r.unit, r.start, r.stop) for r in self.taken)]

    def _applied(self, finish: _Finish) -> list[Piece]:
        for remainder in self.taken[finish.taken :]:
            insort(self.remainders, remainder)
        whole = [*self.taken[: finish.taken], *self.remainders[: finish.lightest]]
        pieces = [(remainder.unit, remainder.start, remainder.stop) for remainder in whole]
        cuts: dict[int, list[tuple[int, int]]] = {}
        for index, start, stop in finish.slices:
            if start < stop:
                cuts.setdefault(index, []).append((start, stop))
        cut = [(self.remainders.pop(index), cuts[index]) for index in sorted(cuts, reverse=True)]
        del self.remainders[: finish.lightest]
        for remainder, slices in cut:
            pieces += [(remainder.unit, start, stop) for start, stop in slices]
            self.pool.cut(remainder, slices)
        return pieces


def _stop_of_run(unit: Unit, bounds: tuple[int, int], rows: int, area: float) -> int:
    """Where in ``bounds`` a run of ``rows`` rows must stop to have an area, as near as can be; areas grow along it."""
    low, high = bounds
    if unit.is_linear and unit.slope > 0:
        exact = (area / rows - unit.first) / unit.slope + (rows + 1) / 2
        return min(max(round(exact), low), high)
    while low < high:
        middle = (low + high + 1) >> 1
        if unit.area(middle - rows, middle) <= area:
            low = middle
        else:
            high = middle - 1
    return low


Partition: TypeAlias = list[list[Piece]]
"""The pieces of each rank."""


def _partition(workload: Workload, cp_size: int, policy: _Policy, pool: _Pool) -> Partition:
    """Fill the ranks by one policy, out of a pool of whole units."""
    total, tokens = workload.area, workload.num_tokens
    left = total
    price = policy.price * (tokens / total if total else 0.0) * workload.weight
    ranks: Partition = []
    for rank in range(cp_size - 1):
        share = tokens // cp_size + (rank < tokens % cp_size)
        goal = left / (cp_size - rank) * (1 + policy.slack)
        pieces = _Share(pool, share, goal, price, policy.overfull * total / cp_size).fill()
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
        pools = [_Pool(workload.units, by_last_row) for by_last_row in (False, True)]
        for policy in _POLICIES[: 8 if cp_size <= 4 else 6 if cp_size <= 128 else 4]:
            ranks = _partition(workload, cp_size, policy, pools[policy.by_last_row].copy())
            rated.append((_quality(workload, ranks), ranks))
            if _worth(rated[-1][0]) < _GOOD:
                break
        if len(workload.units) == 1:
            rated = _no_worse_than_zigzag(workload, cp_size, rated)
        ranks = min(rated, key=lambda each: _worth(each[0]))[1]
    return _layout(workload, ranks)


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
