"""Exchanges: how rows on the key side reach the queries, and how their gradients go home.

An exchange moves whatever row tensors ``[B, L, ...]`` it is given (keys and values today) and knows nothing of
attention. It is an iterator over blocks: the caller computes with each block while the next one travels. Everything a
rank sends follows from the plan, so that all ranks agree without asking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cphandler import comm
from cphandler.errors import InvalidValueError
from cphandler.intervals import Table
from cphandler.plan import Plan

Rows: TypeAlias = tuple[Tensor, ...]
"""Row tensors ``[B, L, ...]`` of one dtype that travel together."""


class Block(NamedTuple):
    """Rows that have arrived, the tasks over them, and in a backward pass where their gradients are added."""

    tasks: Table
    rows: Rows
    grads: Rows


class Exchange(ABC):
    """Brings every block of rows that this rank's tasks need."""

    @abstractmethod
    def forward(self, plan: Plan, rows: Rows, group_name: str) -> Iterator[Block]:
        """Yield blocks in plan order; ``grads`` is empty."""

    @abstractmethod
    def backward(self, plan: Plan, rows: Rows, home: Rows, group_name: str) -> Iterator[Block]:
        """Yield the same blocks with gradient accumulators, and bring what was added to them home.

        Args:
            plan: the plan of the forward pass.
            rows: this rank's rows.
            home: accumulators for the gradients of ``rows``; complete once the iterator is exhausted.
            group_name: the group to exchange in.
        """


class NoExchange(Exchange):
    """Every task's keys are on this rank."""

    def forward(self, plan: Plan, rows: Rows, group_name: str) -> Iterator[Block]:
        """Yield the rank's own rows."""
        yield Block(plan.tasks, rows, ())

    def backward(self, plan: Plan, rows: Rows, home: Rows, group_name: str) -> Iterator[Block]:
        """Yield the rank's own rows and accumulators."""
        yield Block(plan.tasks, rows, home)


class _Packed:
    """Row tensors in one flat buffer, so that a block is one message."""

    def __init__(self, flat: Tensor, shapes: Sequence[torch.Size]) -> None:
        self.flat, self.shapes = flat, shapes
        parts = flat.split([shape.numel() for shape in shapes])
        self.rows: Rows = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    @classmethod
    def of(cls, rows: Rows) -> _Packed:
        """A packed copy."""
        packed = cls.empty_like(rows)
        for part, row in zip(packed.rows, rows, strict=True):
            part.copy_(row)
        return packed

    @classmethod
    def empty_like(cls, rows: Rows) -> _Packed:
        """Room for the same shapes."""
        return cls(rows[0].new_empty(sum(row.numel() for row in rows)), [row.shape for row in rows])

    @classmethod
    def zeros_like(cls, rows: Rows) -> _Packed:
        """Zeros in the same shapes."""
        return cls(rows[0].new_zeros(sum(row.numel() for row in rows)), [row.shape for row in rows])


class RingExchange(Exchange):
    """Blocks travel round the ring, rank r to r + 1, one hop a step (Ring Attention, arXiv 2310.01889).

    At step s a rank holds the block of rank ``r - s``. A block stops after the last rank that needs it, and ranks that
    need nothing more of it are not sent it. Gradients start at the first rank that needs the block, follow it round
    and go from the last one straight home, so that a rank's own share never travels. Two block buffers and at most
    four of gradients (this rank's share, the sum that arrives, the one that leaves, the own one coming home), whatever
    the number of ranks.
    """

    def forward(self, plan: Plan, rows: Rows, group_name: str) -> Iterator[Block]:
        """Yield the own block, then each block that arrives while the one before it is computed."""
        for step, block in _circulate(plan, rows, group_name):
            tasks = plan.tasks_of((plan.rank - step) % plan.cp_size)
            if len(tasks):
                yield Block(tasks, block, ())

    def backward(self, plan: Plan, rows: Rows, home: Rows, group_name: str) -> Iterator[Block]:
        """Yield the own block with ``home`` itself, then the others with accumulators that travel on."""
        gradients = _TravellingGradients(plan, home, group_name)
        for step, block in _circulate(plan, rows, group_name):
            tasks = plan.tasks_of((plan.rank - step) % plan.cp_size)
            if step == 0:
                yield Block(tasks, block, home)
                continue
            share = None
            if len(tasks):
                share = _Packed.zeros_like(home)
                yield Block(tasks, block, share.rows)
            gradients.pass_on(step, share)
        gradients.settle()


def _circulate(plan: Plan, rows: Rows, group_name: str) -> Iterator[tuple[int, Rows]]:
    """Yield ``(step, block)``; while the caller works on a block, it is sent on and the next one is received.

    Every step is yielded; the rows of a block that this rank is not sent are empty, and so are its tasks.
    """
    size, rank, last = plan.cp_size, plan.rank, plan.hops[:, 1].tolist()
    if not any(last):
        yield 0, rows
        return
    comm.connect(group_name, rows[0].device)
    held, spare = _Packed.of(rows), _Packed.empty_like(rows)
    for step in range(size):
        owner, upcoming = (rank - step) % size, (rank - step - 1) % size
        transfer = comm.post(
            [(held.flat, (rank + 1) % size)] if last[owner] > step else [],
            [(spare.flat, (rank - 1) % size)] if step + 1 < size and last[upcoming] > step else [],
            group_name,
        )
        yield step, rows if step == 0 else held.rows
        transfer.wait()
        held, spare = spare, held


class _TravellingGradients:
    """Gradient accumulators of other ranks' blocks on their way home.

    At step s this rank adds its share for the block of rank ``r - s`` to what rank ``r - 1`` sent, and passes the sum
    to rank ``r + 1``, or home from the last rank that needs the block.
    """

    def __init__(self, plan: Plan, home: Rows, group_name: str) -> None:
        self.plan, self.home, self.group_name = plan, home, group_name
        self.first, self.last = plan.hops[:, 0].tolist(), plan.hops[:, 1].tolist()
        self._transfer: comm.Transfer | None = None
        self._travelling: _Packed | None = None
        self._returning: _Packed | None = None

    def pass_on(self, step: int, share: _Packed | None) -> None:
        """Send the block's sum so far on its way, and start to receive what the next step continues."""
        size, rank = self.plan.cp_size, self.plan.rank
        total = self._with_arrived(share)
        owner, upcoming = (rank - step) % size, (rank - step - 1) % size
        sends, receives = [], []
        if total is not None and step <= self.last[owner]:
            sends.append((total.flat, owner if step == self.last[owner] else (rank + 1) % size))
        if step + 1 < size and self.first[upcoming] <= step < self.last[upcoming]:
            self._travelling = _Packed.empty_like(self.home)
            receives.append((self._travelling.flat, (rank - 1) % size))
        if step == self.last[rank]:
            self._returning = _Packed.empty_like(self.home)
            receives.append((self._returning.flat, (rank + step) % size))
        self._transfer = comm.post(sends, receives, self.group_name)

    def _with_arrived(self, share: _Packed | None) -> _Packed | None:
        """Wait for the transfer of the step before; the travelling sum with this rank's share in it."""
        self.settle()
        total, self._travelling = self._travelling, None
        if total is None or share is None:
            return share if total is None else total
        total.flat += share.flat
        return total

    def settle(self) -> None:
        """Wait for what is under way, and add what has come home."""
        if self._transfer is not None:
            self._transfer.wait()
            self._transfer = None
        if self._returning is not None:
            for total, returned in zip(self.home, self._returning.rows, strict=True):
                total.add_(returned)
            self._returning = None


class GatherExchange(Exchange):
    """Every rank gets every block at once; gradients are summed by one reduce-scatter."""

    def forward(self, plan: Plan, rows: Rows, group_name: str) -> Iterator[Block]:
        """Gather, then yield the blocks in plan order."""
        yield from self._blocks(plan, _gathered(rows, plan.cp_size, group_name), [()] * plan.cp_size)

    def backward(self, plan: Plan, rows: Rows, home: Rows, group_name: str) -> Iterator[Block]:
        """Gather again (a layer keeps only its own rows), yield the blocks, reduce-scatter their gradients."""
        shapes = [row.shape for row in home]
        everyone = home[0].new_zeros(plan.cp_size, sum(row.numel() for row in home))
        grads = [_Packed(flat, shapes).rows for flat in everyone]
        yield from self._blocks(plan, _gathered(rows, plan.cp_size, group_name), grads)
        total = _Packed(comm.reduce_scatter(everyone, group_name).view(-1), shapes)
        for own, summed in zip(home, total.rows, strict=True):
            own.add_(summed)

    @staticmethod
    def _blocks(plan: Plan, gathered: list[Rows], grads: Sequence[Rows]) -> Iterator[Block]:
        for step in range(plan.cp_size):
            owner = (plan.rank - step) % plan.cp_size
            tasks = plan.tasks_of(owner)
            if len(tasks):
                yield Block(tasks, gathered[owner], grads[owner])


def _gathered(rows: Rows, cp_size: int, group_name: str) -> list[Rows]:
    """Every rank's rows, by rank."""
    own = _Packed.of(rows)
    flats = comm.all_gather(own.flat, group_name).view(cp_size, own.flat.numel())
    return [_Packed(flat, own.shapes).rows for flat in flats]


_EXCHANGES: dict[str, type[Exchange]] = {"none": NoExchange, "ring": RingExchange, "all_gather": GatherExchange}


def get_exchange(name: str) -> Exchange:
    """The exchange of this name.

    Raises:
        InvalidValueError: there is none.
    """
    if name not in _EXCHANGES:
        raise InvalidValueError("unknown exchange", got=repr(name), fix=f"choose one of {', '.join(_EXCHANGES)}")
    return _EXCHANGES[name]()


def register_exchange(name: str, exchange: type[Exchange]) -> None:
    """Make an exchange known by name."""
    _EXCHANGES[name] = exchange
