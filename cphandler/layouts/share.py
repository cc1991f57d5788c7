"""One rank of the balanced layout, filled out of what is left: whole units while they fit, then one cut.

See :mod:`cphandler.layouts.balance` for the idea. Here are the ways in which a rank can end, each with its cost: the
rows that travel for it, and the price of the area that it misses its share by.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from cphandler.layouts.pool import AREA, ROWS, Piece, Pool, Remainder
from cphandler.layouts.workload import Unit

_LOOKS = (0, 1, 2, 4, 8, 16, 32)
"""After how many whole units a rank looks for a way to end.

Where it looks at the start alone, a pack's area is up to 1.253; up to 4 or to 128, or at every number up to 32, changes
no volume by more than .0001. How numbers are measured: :mod:`cphandler.layouts.balance`.
"""

_CUTS = 3
"""Remainders considered for a cut, each time. 1, 2 and 5 change no volume by more than .0004; with 1 and with 5 a pack
on 64 ranks has an area of 1.063."""

_CLOSE = 0.001
"""A cut that misses the area by no more than this part of it, or by two rows, needs no rival. With 0 all is the same;
with .01 a pack on 64 ranks has an area of 1.066."""

_AHEAD = 8
"""Remainders considered at either end of the pool. With 2 the volume on 64 ranks is .1159; with 32 it is the same, and
a pack's area 1.018."""


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


class Share:
    """Fills one rank.

    Args:
        pool: what there is; what the rank takes is gone from it afterwards.
        tokens: rows the rank takes.
        area: area it should have.
        price: rows that an area of one too much or too little is worth.
        overfull: area it may have beyond, if that keeps the heaviest remainder whole.
    """

    def __init__(self, pool: Pool, tokens: int, area: float, price: float, overfull: float) -> None:
        self.pool, self.units, self.remainders = pool, pool.units, pool.remainders
        self.tokens, self.area = tokens, area
        self.price, self.overfull = price, overfull
        self.taken: list[Remainder] = []

    def fill(self) -> list[Piece]:
        """Choose rows, and take them out of the pool."""
        finishes: list[_Finish] = []
        self.rows, self.areas = [0], [0]
        self._add_up_lightest(0)
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
            self._take_down_from(fitting)
        else:
            missed = abs(self.area)
            finishes.append(_Finish(self.price * missed, missed, len(self.taken), 0, ()))
        return self._applied(min(finishes)) if finishes else self._lightest_rows()

    def _add_up_lightest(self, known: int) -> None:
        """Rows and area of the lightest remainders, up to as many as fill the room; so many are as they were."""
        del self.rows[known + 1 :], self.areas[known + 1 :]
        rows, area = self.rows[-1], self.areas[-1]
        for index in range(len(self.rows) - 1, len(self.remainders)):
            if rows >= self.tokens:
                break
            remainder = self.remainders[index]
            rows, area = rows + remainder.rows, area + remainder.area
            self.rows.append(rows)
            self.areas.append(area)

    def _take_down_from(self, index: int) -> None:
        """Take a remainder, and the lighter ones beside it while they fit, up to the next look.

        What is taken stays in the pool until the run ends, so that the lightest are added up once for all of it.
        """
        most = next((count - len(self.taken) for count in _LOOKS if count > len(self.taken)), index + 1)
        first, gone_rows, gone_area = index + 1, 0, 0
        while first > 0 and index + 1 - first < most:
            remainder = self.remainders[first - 1]
            if gone_rows and not self._fits_beside(remainder, first, gone_rows, gone_area):
                break
            first -= 1
            gone_rows, gone_area = gone_rows + remainder.rows, gone_area + remainder.area
            self.tokens -= remainder.rows
            self.area -= remainder.area
        self.taken += reversed(self.remainders[first : index + 1])
        del self.remainders[first : index + 1]
        if first < len(self.rows):
            self._add_up_lightest(first)

    def _fits_beside(self, remainder: Remainder, first: int, gone_rows: int, gone_area: int) -> bool:
        """:meth:`_fits` for the next of a run, where the remainders from ``first`` on are taken and still there."""
        rows = self.tokens - remainder.rows
        if rows < 0:
            return False
        if first < len(self.rows) and rows > self.rows[first]:
            lightest = self._lightest(rows + gone_rows) - gone_area
        else:
            lightest = self._lightest(rows)
        return remainder.area + lightest <= self.area

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

    def _fits(self, remainder: Remainder, room: float) -> bool:
        rows = self.tokens - remainder.rows
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
        return list(islice(self.pool.search(AREA, lacking), _CUTS))

    def _cut_alone(self, index: int) -> _Finish | None:
        """The end and the beginning of one remainder, around as many of the lightest whole ones as there can be."""
        _, which, start, stop, area, _ = self.remainders[index]
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
        """The end of one remainder and the beginning of another, around as many of the lightest as there can be."""
        _, which, start, stop, _, _ = self.remainders[index]
        _, which_other, start_other, stop_other, _, _ = self.remainders[other]
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
        _, which, start, stop, _, _ = self.remainders[index]
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
        """The run of a remainder that has the area that lacks, or comes nearest to it."""
        _, which, start, stop, _, _ = self.remainders[index]
        unit, rows, lacking = self.units[which], self.tokens - self.rows[lightest], self.area - self.areas[lightest]
        last = _stop_of_run(unit, (start + rows, stop), rows, lacking)
        return self._sliced(index, lightest, last - rows, last)

    def _sliced(self, index: int, lightest: int, first: int, last: int) -> _Finish:
        """A given run of a remainder."""
        _, which, start, stop, _, _ = self.remainders[index]
        unit = self.units[which]
        missed = abs(unit.area(first, last) - self.area + self.areas[lightest])
        cost = (unit.boundary(first) if first > start else 0) + (unit.boundary(last) if last < stop else 0)
        return _Finish(cost + self.price * missed, missed, len(self.taken), lightest, ((index, first, last),))

    def _trims(self) -> Iterator[_Finish]:
        """Finishes with one run of rows, where no whole remainder fits any more."""
        long = list(islice(self.pool.search(ROWS, self.tokens), _AHEAD + 1))
        if len(long) > _AHEAD:
            last = list(islice(self.pool.search(ROWS, self.tokens, backwards=True), _AHEAD // 2))
            long = [*long[: _AHEAD // 2], *reversed(last)]
        for index in long:
            _, _, start, stop, _, _ = self.remainders[index]
            yield self._sliced(index, 0, start, start + self.tokens)
            yield self._sliced(index, 0, stop - self.tokens, stop)
            yield self._slice(index, 0)

    def _lightest_rows(self) -> list[Piece]:
        """The lightest beginnings, where nothing else has been found."""
        pieces = []
        order = sorted(range(len(self.remainders)), key=self._first_row)
        chosen: list[int] = []
        cut = (0, 0, 0)
        for index in order:
            if not self.tokens:
                break
            remainder = self.remainders[index]
            last = min(remainder.start + self.tokens, remainder.stop)
            pieces.append((remainder.unit, remainder.start, last))
            chosen.append(index)
            cut = remainder.unit, last, remainder.stop
            self.tokens -= last - remainder.start
        gone = set(chosen)
        self.remainders[:] = [each for i, each in enumerate(self.remainders) if i not in gone]
        self.pool.put(*cut)
        return [*pieces, *((r.unit, r.start, r.stop) for r in self.taken)]

    def _applied(self, finish: _Finish) -> list[Piece]:
        """Give back what was taken too much, and take what the finish says."""
        self.pool.put_back(self.taken[finish.taken :])
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
