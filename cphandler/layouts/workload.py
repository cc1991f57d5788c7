"""How much work each token's row of attention is, and what a cut costs: bands, seen by whoever places tokens.

Rows fall into units: runs of tokens between which nothing is seen, such as documents, or the chunks of
:class:`cphandler.Chunked`. Inside a unit the area of a row (how many keys it sees, over all masks) is piecewise linear,
so that the area of any run of rows is two look-ups, whatever its length::

    Causal()            SlidingWindow(2)       Full()
    area of row q       area of row q          area of row q
    1 2 3 4 5 6 ...     1 2 3 3 3 3 ...        6 6 6 6 6 6
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cphandler.errors import InvalidValueError
from cphandler.tokens.bands import HI, K0, K1, LO, Q0, Q1, tightened
from cphandler.tokens.intervals import UNBOUNDED, Table, table

MOST_TILES = 1 << 24
"""Work in tiles is said tile by tile; so many of them take a gigabyte."""


class Reach(NamedTuple):
    """What the rows of a unit see of it under one mask.

    Attributes:
        weight: how many layers have this mask.
        before: a row sees so many rows before itself, at most.
        after: a row sees so many rows after itself, at most.
        elsewhere: keys of another stream that every row may see.
    """

    weight: int
    before: int
    after: int
    elsewhere: int


class Reaches(NamedTuple):
    """The :class:`Reach` of every unit under one mask, as columns."""

    weight: int
    before: list[int]
    after: list[int]
    elsewhere: list[int]

    def of(self, unit: int) -> Reach:
        """That of one unit."""
        return Reach(self.weight, self.before[unit], self.after[unit], self.elsewhere[unit])


class Unit:
    """A run of tokens that sees no other one.

    A batch may have a hundred thousand of them: those of one segment hold no list, and how far all reach is said in
    columns, so that the garbage collector has little to look at.

    Args:
        number: which of the units it is.
        start: its first token.
        length: its tokens.
        segments: ``[n, 3]`` rows ``(first row, area, slope)``, ascending: row ``first + j`` of the unit has area
            ``area + slope * j``.
        masks: how far the units reach, mask by mask.

    Attributes:
        is_linear: whether one segment describes all rows.
        first: area of the first row.
        slope: growth of the area from row to row in the first segment.
    """

    __slots__ = (
        "_area",
        "_at",
        "_before",
        "_masks",
        "_slope",
        "first",
        "is_linear",
        "length",
        "number",
        "slope",
        "start",
    )

    def __init__(
        self, number: int, start: int, length: int, segments: Sequence[Sequence[int]], masks: Sequence[Reaches]
    ) -> None:
        self.number, self.start, self.length, self._masks = number, start, length, masks
        _, self.first, self.slope = segments[0]
        self.is_linear = len(segments) == 1
        if self.is_linear:
            return
        self._at, self._area, self._slope = zip(*segments, strict=True)
        self._before = [0]
        for i in range(1, len(segments)):
            rows = self._at[i] - self._at[i - 1]
            self._before.append(self._before[-1] + _sum(self._area[i - 1], self._slope[i - 1], rows))

    @property
    def reaches(self) -> list[Reach]:
        """How far its rows see, under each mask."""
        return [mask.of(self.number) for mask in self._masks]

    @property
    def sees_far(self) -> bool:
        """Whether late rows see the early ones, under every mask."""
        return all(before[self.number] >= self.length - 1 for _, before, _, _ in self._masks)

    def upto(self, row: int) -> int:
        """Area of the rows before ``row``."""
        if self.is_linear:
            return _sum(self.first, self.slope, row)
        i = bisect_right(self._at, row) - 1
        return self._before[i] + _sum(self._area[i], self._slope[i], row - self._at[i])

    def area(self, start: int, stop: int) -> int:
        """Area of rows ``[start, stop)``."""
        if self.is_linear:
            rows = stop - start
            return rows * (self.first + self.slope * start) + self.slope * (rows * (rows - 1) >> 1)
        return self.upto(stop) - self.upto(start)

    def row(self, row: int) -> int:
        """Area of one row."""
        return self.area(row, row + 1)

    def boundary(self, row: int) -> int:
        """Rows that must travel, over all layers, where rows before ``row`` and from it on lie on different ranks."""
        if not 0 < row < self.length:
            return 0
        number, left, total = self.number, self.length - row, 0
        for weight, before, after, elsewhere in self._masks:
            total += weight * (min(row, before[number]) + min(left, after[number]) + elsewhere[number])
        return total

    def received(self, pieces: Sequence[tuple[int, int]]) -> int:
        """Rows, over all layers, that a rank with these ascending pieces ``(start, stop)`` needs of other ranks."""
        total = 0
        own = sum(stop - start for start, stop in pieces)
        for reach in self.reaches:
            seen, at = 0, 0
            for start, stop in pieces:
                first, last = max(start - reach.before, at, 0), min(stop + reach.after, self.length)
                seen += max(last - first, 0)
                at = max(at, last)
            total += reach.weight * (seen - own + (reach.elsewhere if own < self.length else 0))
        return total


def _sum(area: int, slope: int, rows: int) -> int:
    return rows * area + slope * (rows * (rows - 1) // 2)


@dataclass(frozen=True)
class Workload:
    """The work of a batch, unit by unit.

    Attributes:
        num_tokens: tokens of the stream.
        units: in ascending order; they cover every token.
        weight: layers that the area is summed over.
    """

    num_tokens: int
    units: tuple[Unit, ...]
    weight: int = 1

    @cached_property
    def areas(self) -> list[int]:
        """Area of each unit."""
        return [unit.area(0, unit.length) for unit in self.units]

    @cached_property
    def area(self) -> int:
        """Area of all rows."""
        return sum(self.areas)

    @classmethod
    def of(
        cls,
        num_tokens: int,
        bands: Sequence[tuple[Table, int]],
        *,
        tile: int | None = None,
        kernel_cost: int = 0,
        crossing: bool = False,
    ) -> Workload:
        """The work of some masks.

        Args:
            num_tokens: tokens of the query stream.
            bands: for each mask its ``[n, 6]`` bands over the stream, and how many layers have it.
            tile: rows of the kernel's tile: a run of rows costs whole tiles. None counts pairs.
            kernel_cost: pairs that each band costs beside its own; its rows share them.
            crossing: keys are another stream.

        Raises:
            InvalidValueError: layers or tiles so large that the work of one row is past int64, or too many tiles.
        """
        masks = [(tightened(table), weight) for table, weight in bands]
        _check_countable(masks, tile, kernel_cost)
        edges = _units(num_tokens, [table for table, _ in masks], crossing)
        pieces = [_segments(table, weight) if tile is None else _tiled(table, weight, tile) for table, weight in masks]
        pieces += [_launches(table, weight, kernel_cost) for table, weight in masks if kernel_cost]
        segments = _summed(np.concatenate([*pieces, table([], 4)]), edges)
        reaches = [_reaches(table, weight, edges, crossing) for table, weight in masks]
        first = np.searchsorted(segments[:, 0], edges)
        relative = segments - np.repeat(edges[:-1], np.diff(first))[:, None] * np.array([1, 0, 0])
        (at, area, slope), cuts, starts = relative.T.tolist(), first.tolist(), edges.tolist()
        units = []
        for i, (low, high) in enumerate(pairwise(cuts)):
            rows = list(zip(at[low:high], area[low:high], slope[low:high], strict=True))
            units.append(Unit(i, starts[i], starts[i + 1] - starts[i], rows, reaches))
        return cls(num_tokens, tuple(units), sum(weight for _, weight in bands))


def _check_countable(masks: Sequence[tuple[Table, int]], tile: int | None, kernel_cost: int) -> None:
    """Refuse what the integer columns cannot hold; sums over rows are Python's integers, and have no limit."""
    most, tiles, size = 0, 0, tile or 1
    for bands, weight in masks:
        keys = int((bands[:, K1] - bands[:, K0]).astype(float).sum())
        most += weight * ((keys + len(bands) * size) * (1 if tile is None else size) + len(bands) * kernel_cost)
        tiles += 0 if tile is None else int((-(-(bands[:, Q1] - bands[:, Q0]) // min(tile, UNBOUNDED))).sum())
    if most >= UNBOUNDED:
        raise InvalidValueError(
            "the work of a row is past what 64 bits can count",
            got=f"{sum(weight for _, weight in masks)} layers" + ("" if tile is None else f", tiles of {tile} rows"),
            fix="weigh masks by their numbers of layers, and pass the rows of the kernel's tile, such as 128",
        )
    if tiles > MOST_TILES:
        raise InvalidValueError(
            "a batch has too many tiles to weigh one by one",
            got=f"{tiles} of {tile} rows",
            fix="pass tile=None, which counts pairs: in documents that long they are level in tiles as well",
        )


def _units(num_tokens: int, tables: Sequence[Table], crossing: bool) -> Table:
    """``[n + 1]`` edges of the units: where nothing is seen across, or where rows that see nothing begin or end."""
    spans = []
    for bands in tables:
        first, last = bands[:, Q0], bands[:, Q1]
        if not crossing:
            first, last = np.minimum(first, bands[:, K0]), np.maximum(last, bands[:, K1])
        spans.append(np.stack([first, last], axis=1))
    every = np.concatenate([*spans, table([], 2)])
    every = every[np.argsort(every[:, 0], kind="stable")]
    reached = np.maximum.accumulate(every[:, 1])
    opens = np.append(True, every[1:, 0] >= reached[:-1])[: len(every)]
    closes = reached[np.append(opens[1:], True)[: len(every)]]
    return np.unique(np.concatenate([every[opens, 0], closes, [0, num_tokens]])).astype(np.int64)


def _segments(bands: Table, weight: int) -> Table:
    """``[n, 4]`` rows ``(first, last, area, slope)``: the keys each row of a band sees, in up to three linear parts."""
    q0, q1 = bands[:, Q0], bands[:, Q1]
    enters = np.clip(bands[:, K0] - bands[:, LO], q0, q1)  # from here on the lower bound follows the row
    leaves = np.clip(bands[:, K1] - bands[:, HI], q0, q1)  # from here on the upper bound stays
    cuts = np.sort(np.stack([q0, enters, leaves, q1], axis=1), axis=1)
    parts = []
    for i in range(3):
        first, last = cuts[:, i], cuts[:, i + 1]
        some = first < last
        rows, first, last = bands[some], first[some], last[some]
        area = _visible(rows, first)
        slope = (first < leaves[some]).astype(np.int64) - (first >= enters[some])
        parts.append(np.stack([first, last, weight * area, weight * slope], axis=1))
    return np.concatenate(parts)


def _visible(bands: Table, rows: Table) -> Table:
    """Keys that one row of each band sees."""
    seen: Table = np.minimum(bands[:, K1], rows + bands[:, HI] + 1) - np.maximum(bands[:, K0], rows + bands[:, LO])
    return seen


def _tiled(bands: Table, weight: int, tile: int) -> Table:
    """Segments as :func:`_segments` makes them, of a kernel that computes whole tiles from each band's first row."""
    counts = -(-(bands[:, Q1] - bands[:, Q0]) // tile)
    which = np.repeat(np.arange(len(bands)), counts)
    within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = bands[which]
    first = rows[:, Q0] + within * tile
    last = np.minimum(first + tile, rows[:, Q1])
    keys = np.minimum(rows[:, K1], last + rows[:, HI]) - np.maximum(rows[:, K0], first + rows[:, LO])
    area = tile * tile * -(-keys // tile)
    return np.stack([first, last, weight * -(-area // (last - first)), np.zeros_like(first)], axis=1)


def _launches(bands: Table, weight: int, kernel_cost: int) -> Table:
    """Segments of what each band costs once, in equal parts on its rows."""
    first, last = bands[:, Q0], bands[:, Q1]
    share = -(-kernel_cost // np.maximum(last - first, 1))
    return np.stack([first, last, weight * share, np.zeros_like(first)], axis=1)


def _summed(parts: Table, edges: Table) -> Table:
    """``[n, 3]`` rows ``(first, area, slope)`` of the sum of linear parts, one at every edge and wherever it bends."""
    first, last, area, slope = parts.T
    constant = area - slope * first  # area of row q is constant + slope * q
    at = np.concatenate([edges[:-1], first, last])
    zeros = np.zeros(len(edges) - 1, dtype=np.int64)
    change = np.stack([np.concatenate([zeros, c, -c]) for c in (constant, slope)], axis=1)
    order = np.argsort(at, kind="stable")
    at, total = at[order], np.cumsum(change[order], axis=0)
    final = np.append(at[1:] != at[:-1], True)[: len(at)]
    at, total = at[final], total[final]
    bends = np.append(True, (total[1:] != total[:-1]).any(axis=1))[: len(at)] | np.isin(at, edges[:-1])
    at, total = at[bends & (at < edges[-1])], total[bends & (at < edges[-1])]
    return np.stack([at, total[:, 0] + total[:, 1] * at, total[:, 1]], axis=1)


def _reaches(bands: Table, weight: int, edges: Table, crossing: bool) -> Reaches:
    """Of each unit, how far its rows see under one mask."""
    unit = np.searchsorted(edges, bands[:, Q0], side="right") - 1
    columns = np.zeros((3, len(edges) - 1), dtype=np.int64)
    if crossing:
        np.maximum.at(columns[2], unit, bands[:, K1] - bands[:, K0])
    else:
        before = np.minimum(np.minimum(-bands[:, LO], UNBOUNDED), bands[:, Q1] - 1 - bands[:, K0])
        after = np.minimum(bands[:, HI], bands[:, K1] - 1 - bands[:, Q0])
        np.maximum.at(columns[0], unit, before)
        np.maximum.at(columns[1], unit, after)
    return Reaches(weight, *columns.tolist())
