"""The plan: layout x mask -> the tasks of a rank, and what has to travel for them.

Integer tables, the same on every rank, no communication, no tensors on a device. Everything a rank sends follows from
the layouts and the mask, so that both ends of a message compute it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.layouts.layout import Layout
from cphandler.plan.matching import matchings
from cphandler.plan.runs import key_runs, ordered_tasks
from cphandler.plan.tasks import NK, OWNER, K, visibility
from cphandler.tokens.intervals import (
    Flags,
    Narrow,
    Table,
    frozen,
    merged,
    narrowed,
    offsets_of,
    table,
    widened,
)

Needs: TypeAlias = Literal["tasks", "hops", "stages"]
"""What a plan holds beside its tasks: nothing, how far blocks travel round a ring, or who sends which rows when."""

TO, FROM = range(2)
"""Columns of :attr:`Plan.stages`."""

STAGE, START, LENGTH = range(3)
"""Columns of :attr:`Plan.sends` and :attr:`Plan.receives`."""

_COLUMNS = {"tasks": 7, "hops": 2, "stages": 2, "sends": 3, "receives": 3}
"""Tables of a plan and their widths, in the order in which they are packed."""


_HEADER = 2 + len(_COLUMNS)
"""Numbers in front of the packed tables: ranks, this rank, and the rows of each table."""


def _empty(columns: int) -> Table:
    return table([], columns)


class _Groups:
    """The rows of a table by a number that each has; found once, and looked up from then on.

    Args:
        numbers: ``[n]``, those of one group side by side, or in any order.
        rows: ``[n, columns]``.
    """

    def __init__(self, numbers: Table, rows: Table) -> None:
        first = np.flatnonzero(np.diff(numbers, prepend=-1))
        if len(np.unique(numbers[first])) < len(first):
            order = np.argsort(numbers, kind="stable")
            numbers, rows = numbers[order], rows[order]
            first = np.flatnonzero(np.diff(numbers, prepend=-1))
        rows = frozen(rows)
        walls = pairwise([*first.tolist(), len(numbers)])
        self._parts = {number: rows[slice(*wall)] for number, wall in zip(numbers[first].tolist(), walls, strict=True)}
        self._nothing = rows[:0]

    def of(self, number: int) -> Table:
        """The rows of a group, in their order; read-only, the same object each time."""
        return self._parts.get(number, self._nothing)


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank computes, and which blocks travel.

    Attributes:
        cp_size: ranks P.
        rank: the rank that runs the tasks.
        tasks: ``[n, 7]`` in the order they run, own keys first: see :mod:`cphandler.plan.tasks`. Where rows are sent
            directly, the key rows of other owners count in the compact block that arrives.
        hops: ``[P, 2]`` for a ring, per owner the first and the last step at which a rank needs its block; both 0 where
            nobody does. Rank ``owner + s`` holds the block at step s.
        stages: ``[n, 2]`` for direct sends, per stage the rank this one sends to and the one it receives from, -1 for
            none. A stage is a matching: each rank sends at most one message and receives at most one.
        sends: ``[m, 3]`` runs ``(stage, start, length)`` of this rank's rows, in the order they are sent.
        receives: ``[m, 3]`` runs of the sender's rows, in the order they arrive.
    """

    cp_size: int
    rank: int
    tasks: Table
    hops: Table = field(default_factory=partial(_empty, 2))
    stages: Table = field(default_factory=partial(_empty, 2))
    sends: Table = field(default_factory=partial(_empty, 3))
    receives: Table = field(default_factory=partial(_empty, 3))

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            getattr(self, name).setflags(write=False)

    def __reduce__(self) -> tuple[Callable[..., Plan], tuple[object, ...]]:
        return _unpickled, (self.cp_size, self.rank, *(narrowed(getattr(self, name)) for name in _COLUMNS))

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(getattr(self, name).nbytes for name in _COLUMNS)

    def tasks_of(self, owner: int) -> Table:
        """The tasks whose keys live on ``owner``, in the order they run."""
        return self._tasks_by_owner.of(owner)

    def runs(self, stage: int, *, sent: bool) -> Table:
        """``[n, 2]`` runs ``(start, length)`` of rows that this rank sends, or receives, in a stage."""
        return (self._sends_by_stage if sent else self._receives_by_stage).of(stage)

    @cached_property
    def _tasks_by_owner(self) -> _Groups:
        return _Groups(self.tasks[:, OWNER], self.tasks)

    @cached_property
    def _sends_by_stage(self) -> _Groups:
        return _Groups(self.sends[:, STAGE], self.sends[:, [START, LENGTH]])

    @cached_property
    def _receives_by_stage(self) -> _Groups:
        return _Groups(self.receives[:, STAGE], self.receives[:, [START, LENGTH]])

    def to_tensor(self) -> Tensor:
        """One int64 tensor that carries the plan through an operator's signature (and a data loader's queue)."""
        tables = [getattr(self, name) for name in _COLUMNS]
        header = np.array([self.cp_size, self.rank, *map(len, tables)], dtype=np.int64)
        packed, start = np.empty(len(header) + sum(part.size for part in tables), dtype=np.int64), 0
        for part in (header, *tables):
            packed[start : start + part.size].reshape(part.shape)[:] = part
            start += part.size
        with torch.inference_mode(mode=False):  # scored first, the same batch may train later
            return torch.from_numpy(packed)

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Plan:
        """The plan that :meth:`to_tensor` packed, given whole or by :func:`head_of`; its tables share the memory.

        Raises:
            InvalidValueError: a head whose memory does not hold the plan.
        """
        cp_size, rank, *rows = (int(value) for value in packed[:_HEADER].tolist())
        needed = _HEADER + sum(count * columns for count, columns in zip(rows, _COLUMNS.values(), strict=True))
        values = (packed if len(packed) == needed else _behind(packed, needed)).numpy()
        tables, start = [], _HEADER
        for count, columns in zip(rows, _COLUMNS.values(), strict=True):
            tables.append(values[start : start + count * columns].reshape(count, columns))
            start += count * columns
        return cls(cp_size, rank, *tables)


def head_of(packed: Tensor) -> Tensor:
    """The first numbers of a packed plan, over the same memory: one shape for all plans, as compiled graphs want it."""
    with torch.inference_mode(mode=False):
        head = torch.empty(0, dtype=packed.dtype)
        head.set_(packed.untyped_storage(), 0, (_HEADER,), (1,))
        return head


def _behind(head: Tensor, needed: int) -> Tensor:
    """The whole plan that a head is of.

    Raises:
        InvalidValueError: the head was copied, and its memory ends with it.
    """
    if head.untyped_storage().nbytes() < needed * head.itemsize:
        raise InvalidValueError(
            "a compiled block's plan was copied without what belongs to it",
            got=f"{head.untyped_storage().nbytes() // head.itemsize} of {needed} numbers",
            fix="let hooks on saved tensors leave int64 tensors as they are",
        )
    return head.as_strided((needed,), (1,))


def _unpickled(cp_size: int, rank: int, *tables: Narrow) -> Plan:
    return Plan(cp_size, rank, *map(widened, tables))


def make_plan(bands: Table, queries: Layout, keys: Layout, rank: int, *, needs: Needs = "tasks") -> Plan:
    """Cut bands into the tasks of one rank.

    Args:
        bands: ``[n, 6]`` disjoint bands over valid rows, global coordinates.
        queries: layout of the query stream.
        keys: layout of the key stream, over the same ranks or over one.
        rank: the rank whose tasks are wanted.
        needs: ``"hops"``: also how far each block must travel round a ring; ``"stages"``: also which rows each rank
            sends to which, and when.

    Raises:
        UnsupportedError: spans of several strides; on every rank alike, whether its own are among them or not.
    """
    strides = queries.strides | keys.strides
    if len(strides) > 1:
        raise UnsupportedError(
            "attention needs query and key spans of one stride",
            got=f"strides {', '.join(map(str, sorted(strides)))}",
            fix="use one layout for both streams, of stride 1 such as zigzag, or striped",
        )
    if needs == "stages":
        return _direct_plan(bands, queries, keys, rank)
    step = (rank - np.arange(keys.cp_size)) % keys.cp_size
    hops = ring_hops(visibility(bands, queries, keys)) if needs == "hops" else _empty(2)
    return Plan(queries.cp_size, rank, ordered_tasks(bands, queries, keys, rank, step), hops)


def ring_hops(sees: Flags) -> Table:
    """Per owner, the first and last ring step at which a rank needs its block."""
    size = len(sees)
    step = (np.arange(size)[:, None] - np.arange(size)[None]) % size
    needed = sees & (step > 0)
    last = np.where(needed, step, 0).max(axis=0, initial=0)
    first = np.where(needed, step, size).min(axis=0, initial=size)
    return np.stack([np.where(last > 0, first, 0), last], axis=1).astype(np.int64)


def _direct_plan(bands: Table, queries: Layout, keys: Layout, rank: int) -> Plan:
    """The plan in which every needed row goes straight from its owner to the rank that needs it."""
    stage_of = matchings(visibility(bands, queries, keys))
    number = int(stage_of.max(initial=-1)) + 1
    stages = np.full((number, 2), -1, dtype=np.int64)
    for column, row in ((TO, stage_of[:, rank]), (FROM, stage_of[rank])):
        peers = np.flatnonzero(row >= 0)
        stages[row[peers], column] = peers
    sends, _ = _union(*key_runs(bands, queries, keys, rank, stage_of[:, rank]))
    turn = stage_of[rank]  # own keys are at -1, before every stage
    tasks = ordered_tasks(bands, queries, keys, rank, turn)
    stage = turn.take(tasks[:, OWNER])
    receives, run = _union(stage, tasks[:, K], tasks[:, NK])
    tasks[len(tasks) - len(run) :, K] += _places(receives).take(run)
    return Plan(queries.cp_size, rank, tasks, stages=stages, sends=sends, receives=receives)


def _union(stages: Table, starts: Table, lengths: Table) -> tuple[Table, Table]:
    """Disjoint runs ``(stage, start, length)``, stage by stage, of the same rows without those of no stage.

    And which of them each of these rows is in.
    """
    moves = np.flatnonzero(stages >= 0)
    starts, lengths = starts.take(moves), lengths.take(moves)
    stage, starts, stops, which = merged(stages.take(moves), starts, starts + lengths)
    return np.stack([stage, starts, stops - starts], axis=1), which


def _places(receives: Table) -> Table:
    """What to add to a key row of each received run, so that it counts in the block of a stage's runs end to end."""
    before = offsets_of(receives[:, LENGTH])[:-1]
    first = np.flatnonzero(np.diff(receives[:, STAGE], prepend=-1))
    block = np.repeat(before[first], np.diff(first, append=len(before)))  # rows of the stages before
    places: Table = before - block - receives[:, START]
    return places
