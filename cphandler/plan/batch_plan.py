"""A batch planned ahead: its layout, each rank's plan, and what they cost, without a process group or a device.

Made where the batch is packed, in a data-loader process say, it travels to the training process by pickle. Made twice,
it compares two layouts on a caller's own document lengths::

    lengths = [90_000, 4_000, 700, 36_372]
    for layout in ("zigzag", "balanced"):
        print(plan_batch([0, *accumulate(lengths)], 8, layout=layout).stats())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.layouts.layout import Layout
from cphandler.layouts.placement import LayoutSpec, place, stream_bands
from cphandler.plan.cost import RankCost, product, rank_cost
from cphandler.plan.plan import Needs, Plan, make_plan, ring_hops
from cphandler.plan.tasks import task_counts, visibility
from cphandler.tokens.counts import checked_count, checked_flag
from cphandler.tokens.documents import Documents, Offsets
from cphandler.tokens.intervals import Narrow, Table, frozen, narrowed, widened
from cphandler.tokens.masks import Mask, make_mask
from cphandler.tokens.metadata import StreamMetadata

COMM_TYPES: dict[str, Needs] = {"p2p": "stages", "ring": "hops", "all_gather": "tasks"}
"""Ways for keys to reach queries, and what each needs in its plan; trading heads moves no key rows by a plan."""

_COST = "pass the pairs that a launch is worth, a few thousand say, or 0"

_TILE = "pass the rows of the kernel's tile, such as 128, or None to count pairs"


MOST_COST = 1 << 40
"""As :class:`CPConfig` has it."""

MOST_RANKS = 1 << 20
"""More ranks than this are a mistake, and their spans would not fit in memory."""


def plan_batch(
    cu_seqlens: Offsets,
    cp_size: int,
    *,
    layout: LayoutSpec = "zigzag",
    mask: str | Mask = "causal",
    cu_seqlens_padded: Offsets | None = None,
    cp_comm_type: str = "p2p",
    tile: int | None = None,
    kernel_cost: int = 0,
    ranks: Sequence[int] | AbstractSet[int] | Literal["all"] = (),
) -> BatchPlan:
    """Plan a packed batch for a number of ranks, on any process and with no communication.

    A handler takes the result as ``layout=`` and makes nothing of it again: not the layout, nor the bands of its mask,
    nor the plans of ``ranks``, where its class moves keys as ``cp_comm_type`` says. Where it moves them otherwise, or
    has another mask, it takes the layout and plans anew.

    Args:
        cu_seqlens: ``[D + 1]`` global offsets of the documents' valid tokens; ``[0, S]`` for a dense batch.
        cp_size: ranks P that the batch will be spread over.
        layout: a layout's name, a :class:`Balanced` mix of masks, or a Layout.
        mask: ``"causal"``, ``"full"`` or a Mask.
        cu_seqlens_padded: ``[D + 1]`` physical offsets where documents are padded at their ends.
        cp_comm_type: ``"p2p"``, ``"ring"`` or ``"all_gather"``: how keys will reach the queries.
        tile: as in :class:`CPConfig`: rows of the kernel's tile, for the balanced layout.
        kernel_cost: as in :class:`CPConfig`: pairs that a task costs beside its own, for the balanced layout.
        ranks: whose plans to make now, so that they travel with the batch: ``(rank,)`` where each rank loads its own
            batches, ``"all"`` where one sends them to all; those of others are made by :meth:`BatchPlan.plan`.

    Raises:
        InvalidTypeError: arguments of another type.
        InvalidValueError: offsets that are none, an unknown name, a layout of another batch, or a mask that does not
            fit the documents.
    """
    if checked_count("cp_size", cp_size, least=1, fix="pass a number of ranks") > MOST_RANKS:
        raise InvalidValueError("cp_size is more than any group has", got=cp_size, fix="pass a number of ranks")
    comm_type = _checked_comm_type(cp_comm_type)
    if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool)):
        raise InvalidTypeError("tile must be an int or None", got=repr(tile), fix=_TILE)
    if tile is not None and tile < 1:
        raise InvalidValueError("tile must be at least 1", got=tile, fix=_TILE)
    if checked_count("kernel_cost", kernel_cost, least=0, fix=_COST) > MOST_COST:
        raise InvalidValueError("kernel_cost is more than any kernel takes", got=kernel_cost, fix=_COST)
    documents = Documents.from_cu_seqlens(cu_seqlens, cu_seqlens_padded)
    stream = StreamMetadata(documents, None, documents.max_length)
    seen = make_mask(mask)
    started = time.perf_counter()
    known: dict[int, Table] = {}

    def bands_of(mask: Mask) -> Table:
        """Made once, though the layout and the plans ask for them."""
        if id(mask) not in known:
            known[id(mask)] = stream_bands(mask, stream, stream)
        return known[id(mask)]

    made, _ = place((layout, layout), stream, stream, seen, cp_size, tile=tile, kernel_cost=kernel_cost, bands=bands_of)
    seconds = time.perf_counter() - started
    planned = BatchPlan(documents, seen, made, comm_type, bands_of(seen), seconds)
    for rank in _wanted(ranks, cp_size):
        planned.plan(rank)
    return planned


def _checked_comm_type(cp_comm_type: object) -> str:
    if not isinstance(cp_comm_type, str):
        raise InvalidTypeError(
            "cp_comm_type must be a string", got=repr(cp_comm_type), fix=f"choose one of {', '.join(COMM_TYPES)}"
        )
    comm_type = {"allgather": "all_gather"}.get(name := cp_comm_type.strip().lower().replace("-", "_"), name)
    if comm_type not in COMM_TYPES:
        raise InvalidValueError(
            "no plan says what moves under this cp_comm_type",
            got=repr(cp_comm_type),
            fix=f"choose one of {', '.join(COMM_TYPES)}; Ulysses trades heads, whatever the mask",
        )
    return comm_type


def _wanted(ranks: Sequence[int] | AbstractSet[int] | str, cp_size: int) -> Iterable[int]:
    """The ranks whose plans are asked for."""
    if isinstance(ranks, str) and ranks.strip().lower() == "all":
        return range(cp_size)
    if isinstance(ranks, (Sequence, AbstractSet)) and not isinstance(ranks, (str, bytes)):
        return ranks
    raise InvalidTypeError(
        "ranks must be numbers of ranks", got=repr(ranks), fix='pass (rank,) for one, "all" for all of them'
    )


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """A batch, cut: what :func:`plan_batch` makes. It can be pickled, the plans that were made with it.

    Attributes:
        documents: the documents of the batch.
        mask: who sees whom.
        layout: which rank holds which tokens; what a handler takes as ``layout=``.
        cp_comm_type: how keys reach the queries.
        bands: ``[n, 6]`` the mask's bands over valid rows.
        layout_seconds: time it took to make the layout.
    """

    documents: Documents
    mask: Mask
    layout: Layout
    cp_comm_type: str
    bands: Table = field(repr=False)
    layout_seconds: float
    _plans: dict[int, Plan] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", frozen(self.bands))

    def __reduce__(self) -> tuple[Callable[..., BatchPlan], tuple[object, ...]]:
        values = self.documents, self.mask, self.layout, self.cp_comm_type, narrowed(self.bands), self.layout_seconds
        return _unpickled, (*values, dict(self._plans))

    @property
    def cp_size(self) -> int:
        """Ranks P."""
        return self.layout.cp_size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose plans were made, ascending."""
        return tuple(sorted(self._plans))

    def check_fits(self, documents: Documents, cp_size: int) -> None:
        """Refuse another batch than this one, or another number of ranks.

        Raises:
            InvalidValueError: what differs, by name.
        """
        own, differs = self.documents, ""
        if cp_size != self.cp_size:
            differs, got = "number of ranks", f"a plan for {self.cp_size} ranks, and a group of {cp_size}"
        elif own.num_documents != documents.num_documents:
            differs, got = "documents", f"a plan of {own.num_documents} documents, and {documents.num_documents}"
        elif not np.array_equal(own.offsets, documents.offsets):
            i = int(np.flatnonzero(own.offsets != documents.offsets)[0])
            lengths = int(own.lengths[i - 1]), int(documents.lengths[i - 1])
            differs, got = "documents", f"document {i - 1} of {lengths[0]} tokens, and of {lengths[1]}"
        elif not np.array_equal(own.runs, documents.runs):
            numbers = own.num_valid_tokens, documents.num_valid_tokens
            differs, got = "padding", f"a plan of {numbers[0]} real tokens, and {numbers[1]}, or others"
        if differs:
            raise InvalidValueError(
                f"the BatchPlan given as layout= was made for another batch, by its {differs}",
                got=got,
                fix="give plan_batch the offsets, padded ones too, and the number of ranks that the handler gets",
            )

    def plan(self, rank: int) -> Plan:
        """One rank's tasks, and what travels for them; made once.

        Under ``"all_gather"`` keys are counted in their owner's rows.

        Raises:
            InvalidTypeError: a rank that is no int.
            InvalidValueError: a rank that there is not.
            UnsupportedError: a replicated layout, or one whose spans have several strides.
        """
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise InvalidTypeError("rank must be an int", got=repr(rank), fix=f"ranks are 0 to {self.cp_size - 1}")
        if not 0 <= rank < self.cp_size:
            raise InvalidValueError("there is no such rank", got=rank, fix=f"ranks are 0 to {self.cp_size - 1}")
        self._refuse_replicated()
        if rank not in self._plans:
            self._plans.setdefault(rank, self._made(rank))
        return self._plans[rank]

    def _made(self, rank: int) -> Plan:
        return make_plan(self.bands, self.layout, self.layout, rank, needs=COMM_TYPES[self.cp_comm_type])

    @cached_property
    def load(self) -> RankCost:
        """The attention area of each rank, and the key rows of others that its queries see."""
        return rank_cost(self.bands, self.layout, self.layout)

    def stats(
        self,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        itemsize: int = 2,
        gradient_itemsize: int | None = None,
        count_tasks: bool = False,
    ) -> PlanStats:
        """What the layout costs.

        Args:
            kv_heads: key heads, for a count of bytes; None for none.
            head_dim: channels of a key head, needed with ``kv_heads``.
            value_dim: channels of a value head; None for as many.
            itemsize: bytes of a number of keys and values.
            gradient_itemsize: bytes of a number of their gradients on the wire; None for the accumulator's, 4 at least.
            count_tasks: also cut the tasks of every rank, and time the plan of the rank that has most.

        Raises:
            InvalidValueError: one of ``kv_heads`` and ``head_dim`` without the other.
            UnsupportedError: tasks of a layout whose spans have several strides, or a replicated one's.
        """
        named = {
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "gradient_itemsize": gradient_itemsize,
        }
        for name, value in {**named, "itemsize": itemsize}.items():
            if value is not None or name == "itemsize":
                checked_count(name, value, least=1)
        checked_flag("count_tasks", count_tasks)
        if (kv_heads is None) != (head_dim is None):
            raise InvalidValueError(
                "bytes follow from kv_heads and head_dim together", got=f"{kv_heads} and {head_dim}", fix="pass both"
            )
        received, returned = self._moved()
        row = None
        if kv_heads is not None and head_dim is not None:
            numbers = kv_heads * (head_dim + (head_dim if value_dim is None else value_dim))
            row = numbers * itemsize, numbers * (gradient_itemsize or max(4, itemsize))
        tasks, seconds = self._counted() if count_tasks else (None, None)
        return PlanStats(
            layout=self.layout.name,
            cp_comm_type=self.cp_comm_type,
            num_tokens=self.layout.num_tokens,
            num_documents=self.documents.num_documents,
            area=self.load.area,
            needed=self.load.rows,
            received=received,
            layout_seconds=self.layout_seconds,
            forward_bytes=None if row is None else product(received, row[0]),
            both_bytes=None if row is None else product(received, 2 * row[0]) + product(returned, row[1]),
            tasks=tasks,
            plan_seconds=seconds,
        )

    def _moved(self) -> tuple[Table, Table]:
        """``[P]`` key rows that reach each rank in a forward pass, and rows of gradients that it sends in a backward.

        A direct row is one that is needed. Round a ring and in a gather whole blocks move, pad rows with them: a block
        visits every rank as far as the last that needs it, its gradients every rank from the first to the last.
        """
        size, rows = self.cp_size, self.layout.num_local_tokens
        if self.cp_comm_type == "p2p" or self.layout.replicated:
            return self.load.rows, self.load.rows
        if self.cp_comm_type == "all_gather":
            blocks = np.full(size, (size - 1) * rows, dtype=np.int64)
            return blocks, blocks
        first, last = ring_hops(visibility(self.bands, self.layout, self.layout)).T[:, None]
        step = (np.arange(size)[:, None] - np.arange(size)[None]) % size
        visited = (step > 0) & (step <= last)
        return visited.sum(axis=1) * rows, (visited & (step >= first)).sum(axis=1) * rows

    def _counted(self) -> tuple[Table, float]:
        """``[P]`` tasks of each rank, and the seconds that it takes to plan the rank that has most."""
        self._refuse_replicated()
        counts = task_counts(self.bands, self.layout, self.layout)
        started = time.perf_counter()
        self._made(int(counts.argmax()))
        return counts, time.perf_counter() - started

    def _refuse_replicated(self) -> None:
        if self.layout.replicated and self.cp_size > 1:
            raise UnsupportedError(
                "on a replicated layout every rank holds all keys and computes some heads",
                fix="use cp_comm_type='a2a' for it, which needs no plan",
            )


def _unpickled(
    documents: Documents, mask: Mask, layout: Layout, comm_type: str, bands: Narrow, seconds: float, *plans: Any
) -> BatchPlan:
    return BatchPlan(documents, mask, layout, comm_type, widened(bands), seconds, *plans)


@dataclass(frozen=True, eq=False)
class PlanStats:
    """What a layout costs, rank by rank; ``str`` of it is one line to read.

    Attributes:
        layout: the layout's name.
        cp_comm_type: how keys reach the queries.
        num_tokens: global tokens S, padding included.
        num_documents: documents, empty ones included.
        area: ``[P]`` pairs of a query of the rank and a key that it sees. Pairs and bytes are int64, or Python integers
            (dtype object) where all of them together are more than that holds.
        needed: ``[P]`` distinct key rows of other ranks that its queries see: the least that any exchange can bring.
        received: ``[P]`` key rows of other ranks that reach it in a forward pass; under ``"p2p"`` those needed.
        layout_seconds: time it took to make the layout.
        forward_bytes: ``[P]`` bytes received in a forward pass; None where heads were not given.
        both_bytes: ``[P]`` bytes that move for its queries forward and backward: keys and values, received twice, and
            their gradients, which it sends.
        tasks: ``[P]`` tasks of each rank; None where they were not counted.
        plan_seconds: time it took to plan the rank of most tasks; None where tasks were not counted.
    """

    layout: str
    cp_comm_type: str
    num_tokens: int
    num_documents: int
    area: Table
    needed: Table
    received: Table
    layout_seconds: float
    forward_bytes: Table | None = None
    both_bytes: Table | None = None
    tasks: Table | None = None
    plan_seconds: float | None = None

    @property
    def cp_size(self) -> int:
        """Ranks P."""
        return len(self.area)

    @property
    def area_balance(self) -> float:
        """Largest area of a rank over the mean: 1 is level, P is all on one rank."""
        area = self.area.tolist()
        return max(area) * self.cp_size / sum(area) if sum(area) else 1.0

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """``[P]`` rows received, as a share of the ``S * (P - 1) / P`` rows that a full ring brings a rank."""
        return self.received / max(1.0, self.num_tokens * (self.cp_size - 1) / self.cp_size)

    @property
    def volume(self) -> float:
        """Mean of :attr:`shares`."""
        return float(self.shares.mean())

    @property
    def worst(self) -> float:
        """The largest of :attr:`shares`."""
        return float(self.shares.max())

    def __str__(self) -> str:
        parts = [
            f"{self.layout} over {self.cp_size} ranks, {self.num_tokens} tokens in {self.num_documents} documents",
            f"area max/mean {self.area_balance:.3f}",
            f"{self.cp_comm_type} receives {self.volume:.1%} of a ring's rows, {self.worst:.1%} at most",
        ]
        if self.forward_bytes is not None and self.both_bytes is not None:
            forward, both = (float(column.mean()) / 2**20 for column in (self.forward_bytes, self.both_bytes))
            parts.append(f"{forward:.1f} MiB a rank forward, {both:.1f} with backward")
        if self.tasks is not None:
            parts.append(f"{int(self.tasks.sum())} tasks, {int(self.tasks.max())} at most")
        times = f"layout {1e3 * self.layout_seconds:.1f} ms"
        if self.plan_seconds is not None:
            times += f", a rank's plan {1e3 * self.plan_seconds:.1f} ms"
        return "; ".join([*parts, times])
