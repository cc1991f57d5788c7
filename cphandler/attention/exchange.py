"""Exchanges: how rows on the key side reach the queries, and how their gradients go home.

An exchange moves whatever row tensors ``[B, L, ...]`` it is given (keys and values today) and knows nothing of
attention. It is an iterator over blocks: the caller computes with each block while the next one travels. Everything a
rank sends follows from the plan, so that all ranks agree without asking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from cphandler.comm import collectives, transfers
from cphandler.comm.endings import ended_on_error
from cphandler.errors import InvalidValueError
from cphandler.kernels.sums import ALL, FEW_RUNS, RowSum
from cphandler.kernels.tables import DeviceTables
from cphandler.plan.plan import FROM, Needs, Plan
from cphandler.registry import Registry, normal
from cphandler.tensors import device_copy
from cphandler.tokens.intervals import Table, expand

Rows: TypeAlias = tuple[Tensor, ...]
"""Row tensors ``[B, L, ...]`` of one dtype that travel together, a message each."""

Sums: TypeAlias = tuple[RowSum, ...]
"""Their gradients, as they are summed."""


class Route(NamedTuple):
    """What an exchange knows beside the rows.

    Attributes:
        plan: this rank's plan.
        group_name: the group to exchange in.
        tables: row numbers on devices, kept with the plan; see :func:`rows_of`.
        places: for one gather, ``[S]`` place ``rank * L + row`` of each global token, on the rows' device; None leaves
            the gathered rows in rank order.
        wire: dtype in which gradients travel; None is the accumulator's.
    """

    plan: Plan
    group_name: str
    tables: DeviceTables
    places: Tensor | None = None
    wire: torch.dtype | None = None


class Block(NamedTuple):
    """Rows that have arrived, the tasks over them, and in a backward pass where their gradients are added.

    Attributes:
        tasks: tasks over the rows.
        rows: the rows.
        grads: sums that take the rows' gradients; empty in a forward pass.
        owner: the rank whose rows they are; 0 where they are everybody's.
        runs: ``[n, 2]`` runs ``(start, length)`` of the owner's rows that the block holds; None for all of them.
    """

    tasks: Table
    rows: Rows
    grads: Sums
    owner: int
    runs: Table | None = None


class Exchange(ABC):
    """Brings every block of rows that this rank's tasks need."""

    needs: ClassVar[Needs] = "tasks"
    """What must be in its plan: ``"tasks"`` alone, ``"hops"`` round a ring, or the ``"stages"`` of direct sends."""

    gathers: ClassVar[bool] = False
    """Whether every rank gets every row, so that they can be put in global order (see :class:`Route`)."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if cls.needs not in get_args(Needs):
            raise InvalidValueError(
                f"{cls.__name__}.needs is nothing that a plan can hold",
                got=repr(cls.needs),
                fix=f"choose one of {', '.join(get_args(Needs))}",
            )

    @abstractmethod
    def forward(self, route: Route, rows: Rows) -> Iterator[Block]:
        """Yield blocks in plan order; ``grads`` is empty."""

    @abstractmethod
    def backward(self, route: Route, rows: Rows, home: Sums) -> Iterator[Block]:
        """Yield the same blocks with sums for their gradients, and bring what was added to them home.

        Args:
            route: the route of the forward pass.
            rows: this rank's rows.
            home: sums for the gradients of ``rows``; complete once the iterator is exhausted.
        """


def _room(rows: Sequence[Tensor | RowSum], length: int | None = None, dtype: torch.dtype | None = None) -> Rows:
    """Unwritten tensors in the same shapes, or in shapes with so many rows."""
    shapes = [row.shape if length is None else (row.shape[0], length, *row.shape[2:]) for row in rows]
    return tuple(
        torch.empty(shape, dtype=dtype or row.dtype, device=row.device) for shape, row in zip(shapes, rows, strict=True)
    )


def _blank(home: Sums, length: int | None = None) -> Sums:
    """Sums in the same shapes, or in shapes with so many rows."""
    return tuple(
        RowSum((x.shape[0], x.shape[1] if length is None else length, *x.shape[2:]), x.dtype, x.device) for x in home
    )


def _totals(sums: Sums) -> Rows:
    return tuple(x.total() for x in sums)


def _with_rank(rows: Rows, rank: int) -> list[tuple[Tensor, int]]:
    """Each tensor beside the rank that it goes to, or comes from."""
    return [(row, rank) for row in rows]


class RingExchange(Exchange):
    """Blocks travel round the ring, rank r to r + 1, one hop a step (Ring Attention, arXiv 2310.01889).

    At step s a rank holds the block of rank ``r - s``. A block stops after the last rank that needs it, and ranks that
    need nothing more of it are not sent it. Gradients start at the first rank that needs the block, follow it round
    and go from the last one straight home, so that a rank's own share never travels. Two block buffers and at most
    four of gradients (this rank's share, the sum that arrives, the one that leaves, the own one coming home), whatever
    the number of ranks. The own rows leave from where they are.
    """

    needs = "hops"

    def forward(self, route: Route, rows: Rows) -> Iterator[Block]:
        """Yield the own block, then each block that arrives while the one before it is computed."""
        plan = route.plan
        for step, block in _circulate(plan, rows, route.group_name):
            owner = (plan.rank - step) % plan.cp_size
            tasks = plan.tasks_of(owner)
            if len(tasks):
                yield Block(tasks, block, (), owner)

    def backward(self, route: Route, rows: Rows, home: Sums) -> Iterator[Block]:
        """Yield the own block with ``home`` itself, then the others with sums that travel on."""
        plan = route.plan
        gradients = _TravellingGradients(plan, home, route.group_name)
        for step, block in _circulate(plan, rows, route.group_name):
            owner = (plan.rank - step) % plan.cp_size
            tasks = plan.tasks_of(owner)
            if step == 0:
                yield Block(tasks, block, home, owner)
                continue
            share = None
            if len(tasks):
                share = _blank(home)
                yield Block(tasks, block, share, owner)
            gradients.pass_on(step, share)
            del share
        gradients.settle()


def _circulate(plan: Plan, rows: Rows, group_name: str) -> Iterator[tuple[int, Rows]]:
    """Yield ``(step, block)``; while the caller works on a block, it is sent on and the next one is received.

    Every step is yielded; the rows of a block that this rank is not sent are empty, and so are its tasks.
    """
    size, rank, last = plan.cp_size, plan.rank, plan.hops[:, 1].tolist()
    if not any(last):
        yield 0, rows
        return
    transfers.connect(group_name, rows[0].device)
    held, spare = rows, None
    with ended_on_error(group_name):  # a caller that raises over a block never asks for the next one
        for step in range(size):
            owner, upcoming = (rank - step) % size, (rank - step - 1) % size
            arriving: Rows = ()
            if step + 1 < size and last[upcoming] > step:
                arriving = _room(rows) if spare is None else spare
                spare = None
            transfer = transfers.post(
                _with_rank(held, (rank + 1) % size) if last[owner] > step else [],
                _with_rank(arriving, (rank - 1) % size),
                group_name,
            )
            yield step, held
            transfer.wait()
            if step and held:
                spare = held
            held = arriving


class _TravellingGradients:
    """Sums of the gradients of other ranks' blocks on their way home.

    At step s this rank adds its share for the block of rank ``r - s`` to what rank ``r - 1`` sent, and passes the sum
    to rank ``r + 1``, or home from the last rank that needs the block.
    """

    def __init__(self, plan: Plan, home: Sums, group_name: str) -> None:
        self.plan, self.home, self.group_name = plan, home, group_name
        self.first, self.last = plan.hops[:, 0].tolist(), plan.hops[:, 1].tolist()
        self._transfer: transfers.Transfer | None = None
        self._travelling: Rows | None = None
        self._returning: Rows | None = None

    def pass_on(self, step: int, share: Sums | None) -> None:
        """Send the block's sum so far on its way, and start to receive what the next step continues."""
        size, rank = self.plan.cp_size, self.plan.rank
        total = self._with_arrived(share)
        owner, upcoming = (rank - step) % size, (rank - step - 1) % size
        sends, receives = [], []
        if total is not None and step <= self.last[owner]:
            sends = _with_rank(total, owner if step == self.last[owner] else (rank + 1) % size)
        if step + 1 < size and self.first[upcoming] <= step < self.last[upcoming]:
            self._travelling = _room(self.home)
            receives += _with_rank(self._travelling, (rank - 1) % size)
        if step == self.last[rank]:
            self._returning = _room(self.home)
            receives += _with_rank(self._returning, (rank + step) % size)
        self._transfer = transfers.post(sends, receives, self.group_name)

    def _with_arrived(self, share: Sums | None) -> Rows | None:
        """Wait for the transfer of the step before; the travelling sum with this rank's share in it."""
        self.settle()
        total, self._travelling = self._travelling, None
        if share is None:
            return total
        if total is None:
            return _totals(share)
        for summed, part in zip(total, share, strict=True):
            part.add_to(summed)
        return total

    def settle(self) -> None:
        """Wait for what is under way, and add what has come home."""
        if self._transfer is not None:
            self._transfer.wait()
            self._transfer = None
        if self._returning is not None:
            for total, returned in zip(self.home, self._returning, strict=True):
                total.add(ALL, returned)
            self._returning = None


class DirectExchange(Exchange):
    """Each row goes straight to exactly the ranks whose queries see it, and only those gradients come back.

    Messages are arranged in stages, each a matching of senders and receivers (:mod:`cphandler.plan.matching`). While
    the tasks of one stage run, the rows of the next one arrive: two blocks of at most L rows, whatever the number of
    ranks, and a packed copy of the rows that this rank is sending. A gradient travels once, from the rank that computed
    it to the rank that owns the row.
    """

    needs = "stages"

    def forward(self, route: Route, rows: Rows) -> Iterator[Block]:
        """Yield the own block, then each block that has arrived while the one before it was computed."""
        own = route.plan.tasks_of(route.plan.rank)
        for stage, block in _staged(route, rows):
            if stage < 0:
                yield Block(own, rows, (), route.plan.rank)
            elif block is not None:
                yield _block_of(route.plan, stage, block, ())
            del block  # its memory is for the rows after the next

    def backward(self, route: Route, rows: Rows, home: Sums) -> Iterator[Block]:
        """Yield the same blocks; each one's gradients start home while the next one is computed."""
        own, returns = route.plan.tasks_of(route.plan.rank), _Returns(route, home)
        for stage, block in _staged(route, rows):
            if stage < 0:
                yield Block(own, rows, home, route.plan.rank)
                continue
            grads = None
            if block is not None:
                sums = _blank(home, block[0].shape[1])
                yield _block_of(route.plan, stage, block, sums)
                grads = _totals(sums)
                del sums
            del block  # its memory is for the rows after the next
            returns.send(stage, grads)
            del grads
        returns.settle()


def _block_of(plan: Plan, stage: int, rows: Rows, grads: Sums) -> Block:
    owner = int(plan.stages[stage, FROM])
    return Block(plan.tasks_of(owner), rows, grads, owner, plan.runs(stage, sent=False))


def _staged(route: Route, rows: Rows) -> Iterator[tuple[int, Rows | None]]:
    """Yield ``(stage, rows received)``, stage -1 for what is here; None where this rank receives nothing in a stage."""
    plan = route.plan
    if not len(plan.stages):
        yield -1, rows
        return
    transfers.connect(route.group_name, rows[0].device)
    with ended_on_error(route.group_name):  # a caller that raises over a block never asks for the next one
        upcoming = _posted(route, 0, rows)
        yield -1, rows
        for stage in range(len(plan.stages)):
            transfer, received = upcoming
            transfer.wait()
            upcoming = _posted(route, stage + 1, rows)
            yield stage, received


def _posted(route: Route, stage: int, rows: Rows) -> tuple[transfers.Transfer, Rows | None]:
    """Start a stage: what is under way, and where what arrives will be; nothing after the last stage."""
    plan = route.plan
    if stage >= len(plan.stages):
        return transfers.Transfer([], []), None
    to, source = plan.stages[stage].tolist()
    received = None
    if source >= 0:
        received = _room(rows, int(plan.runs(stage, sent=False)[:, 1].sum()))
    sends = _with_rank(_packed_runs(route, rows, plan.runs(stage, sent=True)), to) if to >= 0 else []
    receives = [] if received is None else _with_rank(received, source)
    return transfers.post(sends, receives, route.group_name), received


class _Returns:
    """Gradients on their way home, stage by stage, against the direction in which the rows came."""

    def __init__(self, route: Route, home: Sums) -> None:
        self.route, self.home = route, home
        self._transfer = transfers.Transfer([], [])
        self._arriving: tuple[Table, Rows] | None = None

    def send(self, stage: int, grads: Rows | None) -> None:
        """Add what came home in the stage before, then start this one."""
        self.settle()
        plan = self.route.plan
        to, source = plan.stages[stage].tolist()
        wire = self.route.wire or self.home[0].dtype
        sends = [] if grads is None else _with_rank(tuple(grad.to(wire) for grad in grads), source)
        receives = []
        if to >= 0:
            runs = plan.runs(stage, sent=True)
            arriving = _room(self.home, int(runs[:, 1].sum()), wire)
            self._arriving = runs, arriving
            receives = _with_rank(arriving, to)
        self._transfer = transfers.post(sends, receives, self.route.group_name)

    def settle(self) -> None:
        """Wait for what is under way, and add what has come home."""
        self._transfer.wait()
        if self._arriving is not None:
            runs, arrived = self._arriving
            for total, part in zip(self.home, arrived, strict=True):
                _add_runs(self.route, total, part, runs)
            self._arriving = None


_FEW_RUNS = FEW_RUNS
"""Under a name of its own, which ``benchmarks/blocks.py`` changes."""


def _packed_runs(route: Route, rows: Rows, runs: Table) -> Rows:
    """The rows of runs ``(start, length)``, end to end; a single run is sent from where it is."""
    if not 1 <= len(runs) <= _FEW_RUNS:
        index = rows_of(runs, rows[0].device, route.tables)
        return tuple(row.index_select(1, index) for row in rows)
    pieces = [slice(start, start + length) for start, length in runs.tolist()]
    if len(pieces) == 1:
        return tuple(row[:, pieces[0]] for row in rows)
    return tuple(torch.cat([row[:, piece] for piece in pieces], dim=1) for row in rows)


def _add_runs(route: Route, total: RowSum, part: Tensor, runs: Table) -> None:
    """Add rows that lie end to end to the runs they came from."""
    if len(runs) > _FEW_RUNS:
        total.add_at(rows_of(runs, part.device, route.tables), part)
        return
    first = 0
    for start, length in runs.tolist():
        total.add(slice(start, start + length), part[:, first : first + length])
        first += length


def rows_of(runs: Table, device: torch.device, tables: DeviceTables) -> Tensor:
    """The row numbers in runs ``(start, length)``, end to end, on a device; not to be written to.

    Every layer of a batch asks for the same ones.
    """
    return tables.get(runs.tobytes(), device, lambda: device_copy(expand(*runs.T), device))


class GatherExchange(Exchange):
    """Every rank gets every row at once; gradients go straight home, and are summed there in rank order.

    Rows stay in rank order, a block per owner. Where the route says so they are put in global order instead, one block
    of all: a copy that pays for kernels that take everything a row sees in one call, and then have nothing to merge.
    """

    gathers = True

    def forward(self, route: Route, rows: Rows) -> Iterator[Block]:
        """Gather, then yield the blocks in plan order."""
        yield from _gathered_blocks(route, rows, [])

    def backward(self, route: Route, rows: Rows, home: Sums) -> Iterator[Block]:
        """Gather again (a layer keeps only its own rows), yield the blocks, send their gradients home."""
        everyone = [_blank(home) for _ in range(route.plan.cp_size)]
        with ended_on_error(route.group_name):
            yield from _gathered_blocks(route, rows, everyone)
        for i, own in enumerate(home):
            own.add(ALL, _summed(route, [sums[i].total() for sums in everyone]))


def _ordered(everyone: Sequence[Rows], places: Tensor) -> Rows:
    """A copy of everybody's rows in global order."""
    return tuple(torch.cat(parts, dim=1).index_select(1, places) for parts in zip(*everyone, strict=True))


def _add_ordered(everyone: Sequence[Sums], grads: Sums, places: Tensor) -> None:
    """Add the gradients of rows in global order to where they belong."""
    for sums, grad in zip(zip(*everyone, strict=True), grads, strict=True):
        rows, part = sums[0].shape[1], grad.total()
        ranked = part.new_zeros(part.shape[0], len(sums) * rows, *part.shape[2:]).index_copy_(1, places, part)
        for rank, total in enumerate(sums):
            total.add(ALL, ranked[:, rank * rows : (rank + 1) * rows])


def _gathered_blocks(route: Route, rows: Rows, grads: Sequence[Sums]) -> Iterator[Block]:
    """The blocks in plan order, with sums out of ``grads``, one tuple for each rank's rows, where there are any."""
    plan, gathered = route.plan, collectives.gather_parts(rows, route.group_name)
    if route.places is not None:
        everything = _ordered(gathered, route.places)
        sums = _blank(grads[0], everything[0].shape[1]) if grads else ()
        yield Block(plan.tasks, everything, sums, 0)
        if grads:
            _add_ordered(grads, sums, route.places)
        return
    for step in range(plan.cp_size):
        owner = (plan.rank - step) % plan.cp_size
        tasks = plan.tasks_of(owner)
        if len(tasks):
            yield Block(tasks, gathered[owner], grads[owner] if grads else (), owner)


def _summed(route: Route, parts: Sequence[Tensor]) -> Tensor:
    """The sum over ranks of this rank's part, in rank order; the own share never leaves the accumulator's dtype."""
    rank, wire = route.plan.rank, route.wire or parts[0].dtype
    everyone = [part if source == rank else torch.empty_like(part, dtype=wire) for source, part in enumerate(parts)]
    transfers.connect(route.group_name, parts[0].device)
    transfers.post(
        [(part.to(wire), peer) for peer, part in enumerate(parts) if peer != rank],
        [(part, peer) for peer, part in enumerate(everyone) if peer != rank],
        route.group_name,
    ).wait()
    total = everyone[0].to(parts[0].dtype)
    for part in everyone[1:]:
        total.add_(part)
    return total


_EXCHANGES: Registry[str, Exchange] = Registry(
    "exchange",
    lambda: Exchange,
    {
        "ring": f"{__name__}:RingExchange",
        "p2p": f"{__name__}:DirectExchange",
        "all_gather": f"{__name__}:GatherExchange",
    },
    made_without=True,
)


def get_exchange(name: str) -> type[Exchange]:
    """The exchange of this name.

    Raises:
        InvalidValueError: there is none.
    """
    name = normal(name)
    if name not in _EXCHANGES:
        raise InvalidValueError(
            "unknown exchange", got=repr(name), fix=f"choose one of {', '.join(_EXCHANGES)}, or register_exchange it"
        )
    return _EXCHANGES.get(name, repr(name))


def register_exchange(name: str, target: str | type[Exchange]) -> None:
    """Make an exchange known by name, for :attr:`LayoutHandler.exchange` and :attr:`Attention.exchange`.

    Args:
        name: its name; case and the choice of ``-`` or ``_`` do not matter.
        target: an :class:`Exchange` subclass that takes no arguments, or ``"module:Class"``, imported when first used.

    Raises:
        InvalidTypeError: a target that is neither.
        InvalidValueError: a name that is no text, or taken by another target.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidValueError("an exchange's name must be a non-empty string", got=repr(name), fix='"mine", say')
    _EXCHANGES.register(normal(name), target, repr(normal(name)))
