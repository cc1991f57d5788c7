"""Attention over tables that stay where they are: what one CUDA graph needs to serve every packing of as many tokens.

Messages of one rank, of Ulysses and of one gather have the shape of the batch, whatever its documents. What else
follows from the packing is integers in tables of fixed shapes (:mod:`cphandler.kernels.room`), where rows of all ranks
stand in global order, and which rows are padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.attention.attention import Attention, Prepared
from cphandler.attention.call import AttentionCall
from cphandler.attention.head_parallel import HeadParallel
from cphandler.attention.loop import Indices, fixed_plan
from cphandler.attention.plans import Plans
from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.kernels import get_kernel
from cphandler.kernels.buffer import Array
from cphandler.kernels.launches import UNLIMITED, Window
from cphandler.kernels.room import FixedTasks, LaunchRoom, Room, SideRoom
from cphandler.kernels.shapes import cut
from cphandler.plan.plan import Plan
from cphandler.sharding.order import SequenceOrder
from cphandler.tensors import device_copy
from cphandler.tokens.intervals import Table
from cphandler.tokens.masks import Causal, Full, Mask, SlidingWindow

MASKS = Causal, Full, SlidingWindow
"""What has the same windows in every packing."""

CAUSAL, FULL = Window(UNLIMITED, 0), Window(UNLIMITED, UNLIMITED)

HOST = torch.device("cpu")


class Limits(NamedTuple):
    """What a packing may have at most.

    Attributes:
        documents: that hold tokens.
        longest: rows of a document, padding included.
        padded: whether some rows may hold no token.
    """

    documents: int
    longest: int
    padded: bool


class FixedAttention:
    """One algorithm's tables, as host arrays of one packing, and once they are on a device as what calls are given.

    Args:
        attention: over the first packing.
        masks: that calls may name.
        limits: what packings may have.

    Raises:
        UnsupportedError: messages that follow from the packing, a mask, or a layout without such tables.
    """

    def __init__(self, attention: Attention, masks: Sequence[Mask], limits: Limits) -> None:
        if not attention.serves_packings:
            moved = f"the messages of {attention.exchange!r}" if attention.exchange else "its messages, or its engine's"
            raise UnsupportedError(
                f"{attention.name}: no CUDA graph of it serves another packing",
                got=f"{moved}, which follow from the documents",
                fix="use the ulysses or all_gather backend, or local on one rank; or leave attention out of the graph",
            )
        self._rooms = {mask: _room(attention, mask, limits) for mask in masks}
        self._plans = attention.make_plans(ordered=True)
        self._ranks = attention.host.ranks
        self._heads: HeadParallel | None = attention.head_parallel(HOST)
        contiguous = attention.host.shards.queries.layout.name == "contiguous"
        self._in_place = contiguous and self._heads is not None and self._heads.queries.identity
        self._device, self._prepared = HOST, dict[Mask, Prepared]()

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedAttention:
        """Itself: the tables are the graph's, whoever holds them."""
        return self

    @property
    def masks(self) -> tuple[Mask, ...]:
        """What calls may name."""
        return tuple(self._rooms)

    def tables(self, attention: Attention) -> list[Array]:
        """The tables of a packing, in the shapes of all packings.

        Args:
            attention: the same algorithm over that packing.

        Raises:
            InvalidValueError: a packing that does not fit.
        """
        made: list[Array] = []
        plans = attention.make_plans(ordered=True)
        if self._gathers:
            made.append(_places(plans))
        if self._heads is not None:
            heads: HeadParallel = attention.head_parallel(HOST)
            if self._in_place and not heads.queries.identity:
                raise InvalidValueError(
                    "the graph was captured for rows that stand in global order on all ranks",
                    got=f"layout {attention.host.shards.queries.layout.name!r} with others",
                    fix="make both handlers with the same layout=",
                )
            made += [heads.queries.places.numpy(), heads.queries.tokens.numpy(), heads.pads.numpy()]
        for mask, room in self._rooms.items():
            tasks = Plan.from_tensor(plans.plan(mask)).tasks[:, 1:]
            made += room.tables(tasks if not self._gathers else cut(tasks))
        return made

    @property
    def _gathers(self) -> bool:
        return bool(self._plans.exchange)

    def take(self, tensors: Iterator[Tensor], device: torch.device) -> None:
        """Use these tables from now on.

        Args:
            tensors: what :meth:`tables` gave, on a device.
            device: which.
        """
        self._device = device
        places = next(tensors) if self._gathers else None
        heads = self._heads
        if heads is not None:
            runs = heads.queries.runs if self._in_place else device_copy(np.empty((0, 3), np.int64), HOST)
            order = SequenceOrder(next(tensors), next(tensors), runs, self._in_place)
            heads = replace(heads, queries=order, keys=order, pads=next(tensors))
        size, rank = (self._ranks.size, self._ranks.rank) if self._gathers else (1, 0)
        for mask, room in self._rooms.items():
            plan = fixed_plan(size, rank, FixedTasks(room.work(tensors)))
            self._prepared[mask] = Prepared(plan, self._plans, Indices(places), heads, device)

    def served(self, name: str, call: AttentionCall) -> AttentionCall:
        """A call over the tables.

        Args:
            name: the handler's class.
            call: the call, checked.

        Raises:
            InvalidValueError: tensors on another device.
            UnsupportedError: what no graph can replay for another packing.
        """
        if call.q.device != self._device:
            raise InvalidValueError(
                f"{name}: the captured batch has its tables on another device than the tensors",
                got=f"{self._device} and {call.q.device}",
                fix="make CapturedBatch with device= where the model is",
            )
        prepared = self._prepared.get(call.mask) if type(call.mask) in MASKS else None
        asked = {
            "a callable attn_mod, which is told of one packing's documents": call.module is not None,
            "dropout, whose weights follow from the seed and one packing's tokens": bool(call.options.dropout_p),
            "the largest score, which is found task by task": call.wants_max_logit,
            f"the mask {call.mask!r}, which has no tables here": prepared is None,
        }
        refused = [what for what, given in asked.items() if given]
        if refused:
            raise UnsupportedError(
                f"{name}: a captured batch does not serve this call",
                got="; ".join(refused),
                fix="name masks of single calls in CapturedBatch(masks=...); make other calls outside of the graph",
            )
        if not get_kernel(call.kernel, call.q.device.type).serves_packings(call.q.dtype):
            raise UnsupportedError(
                f"{name}: kernel {call.kernel!r} has no launches that serve other packings, in {call.q.dtype}",
                got=f"tensors on {call.q.device}",
                fix="use float16 or bfloat16 on CUDA, and torch's flash kernel or flash-attn's (CPConfig.kernel)",
            )
        return call._replace(prepared=prepared)


def _places(plans: Plans) -> Table:
    places = plans.places(HOST)
    if places is None:
        raise UnsupportedError(
            "gathered rows of this layout have no global order",
            got="spans with strides",
            fix="use zigzag or contiguous",
        )
    table: Table = places.numpy()
    return table


def _window(name: str, mask: Mask, tokens: int) -> Window:
    """What every row sees of a document of its own length."""
    if type(mask) is Causal:
        return CAUSAL
    if type(mask) is Full:
        return FULL
    if type(mask) is SlidingWindow:
        return Window(min(mask.left, tokens), min(mask.right, tokens))
    raise UnsupportedError(
        f"{name}: launches under this mask follow from the documents",
        got=repr(mask),
        fix="capture Causal, Full or SlidingWindow, or leave attention out of the graph",
    )


def _room(attention: Attention, mask: Mask, limits: Limits) -> Room:
    """Room for the tasks of every packing: of whole documents, or of a rank's rows over the keys of all ranks."""
    shard, size = attention.host.shards.queries, attention.host.ranks.size
    tokens, rows, layout = shard.documents.num_tokens, shard.num_local_tokens, shard.layout
    window = _window(attention.name, mask, tokens)
    if attention.whole or size == 1:
        side = SideRoom(tokens, tokens, int(limits.padded), limits.longest)
        return Room((LaunchRoom(window, limits.documents, side, side),))
    cuts = {"zigzag": 2, "contiguous": 1}.get(layout.name)
    if cuts is None or type(mask) is SlidingWindow:
        raise UnsupportedError(
            f"{attention.name}: {'windows' if cuts else 'documents'} are cut into tasks that follow from the packing",
            got=f"{mask!r} on layout {layout.name!r}",
            fix="use the ulysses backend, or Causal and Full on layout zigzag or contiguous",
        )
    longest, pieces = min(rows, limits.longest), cuts * limits.documents
    queries = SideRoom(rows, rows, 1, longest)
    if type(mask) is Full:
        return Room((LaunchRoom(FULL, pieces, queries, SideRoom(tokens, tokens, 1, limits.longest)),))
    # A chunk sees the keys before it. Of zigzag's two in a document these are as many as its tokens, and a row more for
    # each rank before this one where lengths do not divide; of contiguous rows only the first document begins earlier.
    before = min(2 * tokens, tokens + (size - 1) * limits.documents) if cuts == 2 else min(tokens, limits.longest)
    return Room(
        (
            LaunchRoom(CAUSAL, pieces, queries, SideRoom(tokens, rows, 1, longest)),
            LaunchRoom(FULL, pieces, queries, SideRoom(tokens, before, cuts, limits.longest)),
        )
    )
