"""The launches of a varlen kernel: all tasks of one shape over a block of keys in one call, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.kernels.buffer import Array, on_device
from cphandler.kernels.shapes import HI, LO, NK, NQ, K, Q
from cphandler.tokens.intervals import UNBOUNDED, Table, expand

UNLIMITED = -1
"""A side of a window that hides nothing, as every flash kernel writes it."""


class Window(NamedTuple):
    """What rows of a square see: ``left`` keys before and ``right`` keys after the diagonal, ``UNLIMITED`` for all.

    ``(UNLIMITED, UNLIMITED)`` hides nothing and needs no square; ``(UNLIMITED, 0)`` is causal.
    """

    left: int
    right: int

    @property
    def is_full(self) -> bool:
        """Nothing is hidden."""
        return self == (UNLIMITED, UNLIMITED)

    @property
    def is_causal(self) -> bool:
        """What a causal flag says."""
        return self == (UNLIMITED, 0)


class Gathered(NamedTuple):
    """Rows that one side of a launch reads, and where its results go.

    Attributes:
        number: of rows.
        rows: where they lie side by side, in order; None where they are gathered.
        places: ``[number]`` int64, otherwise.
        turns: what is added to a row more than once comes in turns, each with no row twice: which of the gathered rows
            (None for all), and where they belong.
        pulls: in place of turns, where the tables have room: for every row there is, which of the gathered ones it
            takes, and whether it takes none; ``[L]`` int64 and bool.
    """

    number: int
    rows: slice | None
    places: Tensor | None
    turns: tuple[tuple[Tensor | None, Tensor], ...]
    pulls: tuple[tuple[Tensor, Tensor], ...] = ()

    def of(self, x: Tensor) -> Tensor:
        """The rows ``[B, number, ...]`` of ``[B, L, ...]``; a view where they lie side by side."""
        if self.places is not None:
            return x.index_select(1, self.places)
        return x if self.number == x.shape[1] else x[:, self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        tables = [self.places, *(table for turn in (*self.turns, *self.pulls) for table in turn)]
        return sum(table.nbytes for table in tables if table is not None)


class Offsets(NamedTuple):
    """Where each task's rows start among the gathered ones of all rows of a batch; int32 on the device.

    Attributes:
        queries: ``[n + 1]``.
        keys: ``[n + 1]``.
        longest_query: rows of the longest task.
        longest_key: the same of the keys.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


class Launch(NamedTuple):
    """One call of a kernel.

    Attributes:
        window: what each task's rows see.
        queries: the query rows.
        keys: the key rows.
        offsets: of the tasks; None for a single one, which is a dense batch.
    """

    window: Window
    queries: Gathered
    keys: Gathered
    offsets: Offsets | None


class Launches(list[Launch]):
    """All launches over one block of keys, in the order they run."""

    @property
    def nbytes(self) -> int:
        """Bytes of their tables."""
        sides = sum(side.nbytes for launch in self for side in (launch.queries, launch.keys))
        offsets = (launch.offsets for launch in self)
        return sides + sum(x.queries.nbytes + x.keys.nbytes for x in offsets if x is not None)


def launches(table: Table, batch: int, device: torch.device, most: int) -> Launches:
    """The fewest launches that compute some tasks: one for each distinct window, and for so many tasks.

    Args:
        table: ``[n, 6]``: what :func:`~cphandler.kernels.shapes.cut` gave for tasks over one block of keys.
        batch: rows of the batch, in each of which they are computed.
        device: where tables are needed; one copy brings all of them.
        most: tasks of a launch, those of all rows of the batch; a task is one even so.
    """
    each = max(1, most // batch)
    made = [
        _Host.of(window, part[first : first + each], batch)
        for window, part in grouped(table)
        for first in range(0, len(part), each)
    ]
    tensors = iter(on_device([table for one in made for table in one.tables], device))
    return Launches(one.launch(tensors) for one in made)


def grouped(table: Table) -> Iterator[tuple[Window, Table]]:
    """Tasks that :func:`~cphandler.kernels.shapes.cut` gave by their window, each group in the order of its queries.

    Windows that hide the same of a square are one for it: a document of one token is causal, or full, or in any window,
    as its neighbours are, and what lies between them stays one run of rows.
    """
    bounds = np.stack([-table[:, LO], table[:, HI]], axis=1)  # UNBOUNDED hides nothing
    farthest = np.where(table[:, NQ] == table[:, NK], table[:, NK] - 1, UNBOUNDED)[:, None]
    hides = np.minimum(bounds, farthest)
    windows, which = np.unique(bounds, axis=0, return_inverse=True)
    rows = np.bincount(which.reshape(-1), weights=table[:, NQ], minlength=len(windows))
    left = np.ones(len(table), dtype=bool)
    for window in windows[np.argsort(-rows, kind="stable")]:
        chosen = left & (np.minimum(window, farthest) == hides).all(axis=1)
        if chosen.any():
            left &= ~chosen
            part = table[chosen]
            sides = [UNLIMITED if side == UNBOUNDED else int(side) for side in window]
            yield Window(*sides), part[np.lexsort((part[:, K], part[:, Q]))]


class _HostSide(NamedTuple):
    """A :class:`Gathered` whose tables are on the host."""

    number: int
    rows: slice | None
    places: Table | None
    chosen: tuple[Table, ...]

    @classmethod
    def of(cls, starts: Table, lengths: Table) -> _HostSide:
        """Of runs of rows."""
        ends = starts + lengths
        number = int(lengths.sum())
        if (starts[1:] == ends[:-1]).all():
            return cls(number, slice(int(starts[0]), int(ends[-1])), None, ())
        index = expand(starts, lengths)
        times = earlier(index)
        turns = range(int(times.max()) + 1) if times.any() else ()
        return cls(number, None, index, tuple(np.flatnonzero(times == turn) for turn in turns))

    @property
    def tables(self) -> list[Array]:
        """All of them, in one order."""
        if self.places is None:
            return []
        return [self.places, *(table for some in self.chosen for table in (some, self.places[some]))]

    def gathered(self, tensors: Iterator[Tensor]) -> Gathered:
        """With its tables from the device."""
        if self.places is None:
            return Gathered(self.number, self.rows, None, ())
        places = next(tensors)
        turns = tuple((next(tensors), next(tensors)) for _ in self.chosen)
        return Gathered(self.number, None, places, turns or ((None, places),))


class _Host(NamedTuple):
    """A :class:`Launch` whose tables are on the host."""

    window: Window
    queries: _HostSide
    keys: _HostSide
    offsets: tuple[Array, ...]
    longest: tuple[int, ...]

    @classmethod
    def of(cls, window: Window, table: Table, batch: int) -> _Host:
        """Of tasks of one window."""
        queries, keys = _HostSide.of(table[:, Q], table[:, NQ]), _HostSide.of(table[:, K], table[:, NK])
        if len(table) == 1:
            return cls(window, queries, keys, (), ())
        lengths = np.tile(table[:, [NQ, NK]].T, batch)
        offsets = np.zeros((2, lengths.shape[1] + 1), dtype=np.int32)
        np.cumsum(lengths, axis=1, out=offsets[:, 1:])
        return cls(window, queries, keys, tuple(offsets), tuple(lengths.max(axis=1).tolist()))

    @property
    def tables(self) -> list[Array]:
        """All of them, in one order."""
        return [*self.queries.tables, *self.keys.tables, *self.offsets]

    def launch(self, tensors: Iterator[Tensor]) -> Launch:
        """With its tables from the device."""
        queries, keys = self.queries.gathered(tensors), self.keys.gathered(tensors)
        offsets = Offsets(next(tensors), next(tensors), *self.longest) if self.offsets else None
        return Launch(self.window, queries, keys, offsets)


def earlier(index: Table) -> Table:
    """How many earlier entries are the same as each."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    since = np.arange(len(index)) - np.repeat(starts, np.diff(np.append(starts, len(index))))
    times = np.empty_like(since)
    times[order] = since
    return times
