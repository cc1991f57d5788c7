"""What no rank of the balanced layout has yet: runs of units, those of light rows first."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from copy import copy
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import numpy as np

from cphandler.layouts.workload import Workload

AREA, ROWS = 4, 5
"""Fields of a :class:`Remainder` that can be searched for."""

_FEW = 32
"""So many are put back one by one, each at the price of moving the list's end; more of them are sorted in at once."""

Piece: TypeAlias = tuple[int, int, int]
"""Rows ``(unit, start, stop)``."""


class Remainder(NamedTuple):
    """Rows ``[start, stop)`` of a unit that no rank has yet; sorted by ``heaviness``."""

    heaviness: float
    unit: int
    start: int
    stop: int
    area: int
    rows: int


class Pool:
    """Remainders, those of light rows first.

    Args:
        workload: whose units are in the pool at first, all of them whole.
        by_last_row: whether remainders are ordered by the area of their last row, or by their mean.

    Attributes:
        units: the units.
        remainders: ascending. They may be removed from the list; what is added goes through the pool.
    """

    def __init__(self, workload: Workload, by_last_row: bool) -> None:
        self.units, self.by_last_row = workload.units, by_last_row
        lengths, areas = [unit.length for unit in self.units], workload.areas
        if by_last_row:
            heaviness = [float(unit.row(unit.length - 1)) for unit in self.units]
        else:
            heaviness = [area / rows for area, rows in zip(areas, lengths, strict=True)]
        order = np.argsort(np.array(heaviness), kind="stable").tolist()
        self.remainders = [Remainder(heaviness[i], i, 0, lengths[i], areas[i], lengths[i]) for i in order]
        self._most = {field: max(map(itemgetter(field), self.remainders), default=0) for field in (AREA, ROWS)}

    def copy(self) -> Pool:
        """The same remainders, to be taken anew."""
        twin = copy(self)
        twin.remainders = self.remainders.copy()
        twin._most = self._most.copy()
        return twin

    def put(self, unit: int, start: int, stop: int) -> None:
        """Give rows back, none too."""
        if start < stop:
            area, rows = self.units[unit].area(start, stop), stop - start
            heaviness = float(self.units[unit].row(stop - 1)) if self.by_last_row else area / rows
            self.put_back([Remainder(heaviness, unit, start, stop, area, rows)])

    def put_back(self, remainders: Sequence[Remainder]) -> None:
        """Add remainders."""
        if len(remainders) > _FEW:
            self.remainders += remainders
            self.remainders.sort()
        else:
            for remainder in remainders:
                insort(self.remainders, remainder)
        for field, most in self._most.items():
            self._most[field] = max([most, *map(itemgetter(field), remainders)])

    def cut(self, whole: Remainder, slices: Sequence[tuple[int, int]]) -> None:
        """Put back what slices leave of a remainder."""
        at = whole.start
        for start, stop in sorted(slices):
            self.put(whole.unit, at, start)
            at = stop
        self.put(whole.unit, at, whole.stop)

    def search(self, field: int, least: float, *, backwards: bool = False) -> Iterator[int]:
        """Indices of remainders that have so much of a field, ascending or descending.

        Most searches find nothing, and need not look: no remainder has more than the last vain search has seen.
        """
        if self._most[field] < least:
            return
        found = False
        for index in range(len(self.remainders))[:: -1 if backwards else 1]:
            if self.remainders[index][field] >= least:
                found = True
                yield index
        if not found:
            self._most[field] = max(map(itemgetter(field), self.remainders), default=0)
