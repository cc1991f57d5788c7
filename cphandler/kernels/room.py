"""Launches with room: tables of fixed shapes, into which the tasks of any packing of as many tokens are written.

A CUDA graph replays launches with the addresses and sizes that they were recorded with. So nothing here follows from a
packing but what is in the tables: there is one launch for each window a mask has, whatever the documents, sequences
that are not there are empty, and the longest length is a bound. Rows are gathered into room for all of them, and every
row of a result takes its own from what the kernel gave, or holds 0 (and a log-sum-exp of ``-inf``): what the kernel
leaves unwritten is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.kernels.buffer import Array
from cphandler.kernels.launches import UNLIMITED, Gathered, Launch, Launches, Offsets, Window, earlier
from cphandler.kernels.shapes import HI, LO, NK, NQ, K, Q
from cphandler.kernels.task import Task, Tasks
from cphandler.kernels.varlen import VarlenKernel, Work
from cphandler.tokens.intervals import UNBOUNDED, Flags, Table, expand

T = TypeVar("T")


class SideRoom(NamedTuple):
    """Room for one side of a launch.

    Attributes:
        rows: of the tensors that the side reads.
        number: rows that can be gathered.
        turns: how often a row may be among them; 0 where all rows stand as they are, and nothing is gathered.
        longest: rows of the longest sequence that there may be.
    """

    rows: int
    number: int
    turns: int
    longest: int

    def tables(self, starts: Table, lengths: Table) -> list[Array]:
        """Which rows are gathered, and for every row and turn which of those it takes."""
        if not self.turns:
            _check_room("rows", int(lengths.sum()), self.rows, exact=True)
            return []
        index = expand(starts, lengths)
        times = earlier(index) if len(index) else index
        _check_room("gathered rows", len(index), self.number)
        _check_room("turns of one row", int(times.max(initial=-1)) + 1, self.turns)
        places = np.zeros(self.number, dtype=np.int64)
        places[: len(index)] = index
        made: list[Array] = [places]
        for turn in range(self.turns):
            entries = np.flatnonzero(times == turn)
            source, missing = np.zeros(self.rows, dtype=np.int64), np.ones(self.rows, dtype=np.bool_)
            source[index[entries]], missing[index[entries]] = entries, False
            made += [source, missing]
        return made

    def gathered(self, tensors: Iterator[Tensor]) -> Gathered:
        """With its tables from a device."""
        if not self.turns:
            return Gathered(self.rows, slice(0, self.rows), None, ())
        places = next(tensors)
        return Gathered(self.number, None, places, (), tuple((next(tensors), next(tensors)) for _ in range(self.turns)))


class LaunchRoom(NamedTuple):
    """Room for one launch.

    Attributes:
        window: what rows of a square see.
        sequences: how many there may be.
        queries: the query side.
        keys: the key side.
    """

    window: Window
    sequences: int
    queries: SideRoom
    keys: SideRoom

    def tables(self, parts: Table) -> list[Array]:
        """The tables of some tasks of this window, in the order of their queries."""
        made: list[Array] = []
        _check_room("sequences", len(parts), self.sequences)
        for column, side in ((NQ, self.queries), (NK, self.keys)):
            _check_room("rows of a sequence", int(parts[:, column].max(initial=0)), side.longest)
            offsets = np.zeros(self.sequences + 1, dtype=np.int32)
            offsets[1 : len(parts) + 1] = np.cumsum(parts[:, column])
            offsets[len(parts) + 1 :] = offsets[len(parts)]
            made.append(offsets)
        return [
            *made,
            *self.queries.tables(parts[:, Q], parts[:, NQ]),
            *self.keys.tables(parts[:, K], parts[:, NK]),
        ]

    def launch(self, tensors: Iterator[Tensor]) -> Launch:
        """With its tables from a device."""
        # Kernels take a longest length of 1 for decoding, with as many rows as sequences.
        longest = (max(2, side.longest) for side in (self.queries, self.keys))
        offsets = Offsets(next(tensors), next(tensors), *longest)
        return Launch(self.window, self.queries.gathered(tensors), self.keys.gathered(tensors), offsets)


class Room(NamedTuple):
    """Room for all tasks over one block of keys.

    Attributes:
        launches: one for each window; a task goes into the first whose window hides the same of it.
    """

    launches: tuple[LaunchRoom, ...]

    def tables(self, table: Table) -> list[Array]:
        """The tables of tasks, in shapes that are the same for all packings.

        Args:
            table: ``[n, 6]`` squares and full rectangles.

        Raises:
            InvalidValueError: tasks that have no room here.
        """
        left, made = table[np.lexsort((table[:, K], table[:, Q]))], []
        for launch in self.launches:
            fits = _fits(left, launch.window)
            made += launch.tables(left[fits])
            left = left[~fits]
        _check_room("tasks of other windows", len(left), 0)
        return made

    def work(self, tensors: Iterator[Tensor]) -> Work:
        """The launches over these tables on a device."""
        return Work(Launches(launch.launch(tensors) for launch in self.launches), None)


class FixedTasks(Tasks):
    """Tasks that are known by their launches alone, which serve every packing.

    Args:
        work: the launches.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(np.zeros((0, 6), dtype=np.int64))
        self._work = work

    def prepared(self, key: Hashable, make: Callable[[], T]) -> T:
        """The launches, for whichever kernel takes room.

        Raises:
            UnsupportedError: a kernel that wants single tasks.
        """
        kernel = key[0] if isinstance(key, tuple) else None
        if not (isinstance(kernel, type) and issubclass(kernel, VarlenKernel) and kernel.takes_room):
            raise _single_tasks()
        made: Any = self._work
        kept: T = made
        return kept

    def __iter__(self) -> Iterator[Task]:
        """One by one they are another packing's by the time that they are replayed.

        Raises:
            UnsupportedError: always.
        """
        raise _single_tasks()


def _single_tasks() -> UnsupportedError:
    return UnsupportedError(
        "tasks of a captured batch have no places but those in its tables",
        got="a pass over single tasks, as a gradient of the log-sum-exp makes for head dims of values above 253",
        fix="leave this call out of the graph, or return_lse out of this call",
    )


def _fits(table: Table, window: Window) -> Flags:
    """``[n]``: whether a window hides the same of a task as the task's own bounds do."""
    rows, keys = table[:, NQ], table[:, NK]
    lower, upper = table[:, LO] != -UNBOUNDED, table[:, HI] != UNBOUNDED
    square: Flags = rows == keys
    same: Flags = square | (window.is_full & ~lower & ~upper)
    for seen, bound in zip(
        (np.where(lower, -table[:, LO], rows), np.where(upper, table[:, HI], rows)), window, strict=True
    ):
        given = rows if bound == UNLIMITED else np.full_like(rows, bound)
        same &= ~square | (np.minimum(seen, rows - 1) == np.minimum(given, rows - 1))
    return same


def _check_room(what: str, needed: int, room: int, *, exact: bool = False) -> None:
    if needed > room or (exact and needed < room):
        raise InvalidValueError(
            f"a packing does not fit the tables that a graph was captured with, by its {what}",
            got=f"{needed} for room of {room}",
            fix="capture with room for it, or run this batch without the graph",
        )
