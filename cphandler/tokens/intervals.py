"""Integer tables of half-open intervals, and how to join them without a Python loop."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Table: TypeAlias = npt.NDArray[np.int64]
"""Integer columns, one row per item; int64 throughout the library."""

Flags: TypeAlias = npt.NDArray[np.bool_]
"""One truth value per row of a table."""

UNBOUNDED = 1 << 62
"""Sentinel for infinity in band bounds: adding any token index to it cannot overflow int64."""

MOST_TOKENS = 1 << 60
"""More tokens than a batch can have: offsets up to here, and sums of a few of them, stay below :data:`UNBOUNDED`."""


def table(rows: object, columns: int) -> Table:
    """Make an int64 table ``[n, columns]`` from nested sequences or an array; empty input gives ``n = 0``."""
    return np.asarray(rows, dtype=np.int64).reshape(-1, columns)


def frozen(array: Table) -> Table:
    """Make an array read-only in place, so that values that hold it stay immutable; not for an array of a caller's."""
    array = np.ascontiguousarray(array, dtype=np.int64)
    array.setflags(write=False)
    return array


Narrow: TypeAlias = "Table | npt.NDArray[np.int32]"
"""A table as :func:`narrowed` makes it."""

_WIDE = (1 << 31) - 1
"""What stands for :data:`UNBOUNDED` in 32 bits."""


def narrowed(values: Table) -> Narrow:
    """A table in half the bytes, to be sent to another process, where its numbers allow it; undo it by ``widened``."""
    kept = np.where(np.abs(values) == UNBOUNDED, np.sign(values) * _WIDE, values)
    beyond = (np.abs(values) >= _WIDE) & (np.abs(values) != UNBOUNDED)
    return values if beyond.any() else kept.astype(np.int32)


def widened(values: Narrow) -> Table:
    """The table that :func:`narrowed` was given; read-only."""
    wide = values.astype(np.int64)
    if values.dtype == np.int32:
        wide[wide == _WIDE], wide[wide == -_WIDE] = UNBOUNDED, -UNBOUNDED
    return frozen(wide)


def in_order(rows: Table, *columns: Table) -> Table:
    """Rows by several columns of numbers not below 0, the first counts most; ties in any order.

    As :func:`chosen` gives them, or the same table where they are in order.
    """
    bounds = [int(column.max(initial=0)) + 1 for column in columns]
    if math.prod(bounds) > UNBOUNDED:
        return chosen(rows, np.lexsort(columns[::-1]))
    key = columns[0]
    for column, bound in zip(columns[1:], bounds[1:], strict=True):
        key = key * bound + column
    return chosen(rows, np.argsort(key)) if (key[1:] < key[:-1]).any() else rows


def chosen(rows: Table, which: Table) -> Table:
    """Some rows of a table, in that order; column by column in memory, for a table that is worked on by columns."""
    columns = np.empty((rows.shape[1], len(which)), dtype=np.int64)
    for i, column in enumerate(columns):
        rows[:, i].take(which, out=column, mode="clip")
    result: Table = columns.T
    return result


def by_number(numbers: Table) -> Table:
    """The order of rows by a number that each has; those of one number stay in their order."""
    most = int(numbers.max(initial=0))
    few = most < 1 << 16 and numbers.min(initial=0) >= 0
    digits = numbers.astype(np.min_scalar_type(most), copy=False) if few else numbers  # sorted by digits, not compared
    return np.argsort(digits, kind="stable")


def merged(groups: Table, starts: Table, stops: Table) -> tuple[Table, Table, Table, Table]:
    """The unions of the intervals of each group, as few as there can be, ascending; fast where the intervals ascend.

    Args:
        groups: a number for each interval.
        starts: where each begins, 0 or more.
        stops: where each ends, not empty; intervals that touch become one.

    Returns:
        ``(group, start, stop)`` of each union, and which of them each interval is in.
    """
    if not len(starts):
        return groups, starts, stops, groups
    base = groups * (int(stops.max()) + 1)  # groups laid end to end, so that one running maximum serves all
    starts, stops = starts + base, stops + base
    order: Table | slice = np.argsort(starts) if (starts[1:] < starts[:-1]).any() else slice(None)
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    opens = np.append(True, starts[1:] > stops[:-1])
    which = np.empty(len(opens), dtype=np.int64)
    which[order] = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)
    base, last = base[order].take(first), np.append(first[1:], len(opens)) - 1
    return groups[order].take(first), starts.take(first) - base, stops.take(last) - base, which


def offsets_of(lengths: Table) -> Table:
    """Exclusive prefix sums: ``[3, 2, 4]`` gives ``[0, 3, 5, 9]``."""
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def expand(starts: Table, lengths: Table, strides: Table | None = None) -> Table:
    """Concatenate ``starts[i] + strides[i] * arange(lengths[i])`` over all i; None is a stride of 1."""
    before = offsets_of(lengths)
    result = np.arange(before[-1], dtype=np.int64)
    if strides is None:
        result += np.repeat(starts - before[:-1], lengths)
        return result
    result -= np.repeat(before[:-1], lengths)
    result *= np.repeat(strides, lengths)
    result += np.repeat(starts, lengths)
    return result


def overlaps(starts: Table, stops: Table, sorted_starts: Table, sorted_stops: Table) -> tuple[Table, Table]:
    """Pairs ``(i, j)`` whose intervals ``[starts[i], stops[i])`` and ``[sorted_starts[j], sorted_stops[j])`` meet.

    The second family is disjoint, non-empty and ascending, so that each interval of the first meets one run of
    it. Pairs come ordered by ``i``, then ``j``. Empty intervals of the first family meet nothing.
    """
    first = np.searchsorted(sorted_stops, starts, side="right")
    last = np.searchsorted(sorted_starts, stops, side="left")
    counts = np.where(stops > starts, np.maximum(last - first, 0), 0)
    return np.repeat(np.arange(len(starts), dtype=np.int64), counts), expand(first.astype(np.int64), counts)
