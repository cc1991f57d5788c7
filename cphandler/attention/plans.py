"""The plans of one exchange over the layouts of queries and keys, one for each mask, made once for a batch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.attention.exchange import get_exchange
from cphandler.attention.loop import bytes_kept_with
from cphandler.layouts.layout import Layout, contiguous
from cphandler.plan.batch_plan import COMM_TYPES, BatchPlan
from cphandler.plan.plan import Needs, Plan, make_plan
from cphandler.sharding.shard import ShardPair
from cphandler.tensors import device_copy
from cphandler.tokens.intervals import Table
from cphandler.tokens.masks import Mask, is_value


class Plans:
    """A rank's plans over two layouts and one exchange, by mask, and the index tensors that go with them.

    Args:
        pair: the two shards, with the documents and the masks' bands.
        layouts: of one row of the batch: queries and keys, over the same ranks, or keys over one that has all.
        rank: this rank's place in the queries' layout.
        exchange: name of the exchange; empty where all keys are here.
        group_name: the group to exchange in.
        ordered: put gathered keys in global order, so that what a row sees lies together: worth a copy to kernels that
            take a whole prefix in one call.
    """

    def __init__(
        self,
        pair: ShardPair,
        layouts: tuple[Layout, Layout],
        rank: int,
        exchange: str = "",
        group_name: str = "",
        *,
        ordered: bool = False,
    ) -> None:
        self.exchange = exchange
        self.group_name = group_name
        self._pair, self._rank = pair, rank
        kind = get_exchange(exchange) if exchange else None
        self._needs: Needs = kind.needs if kind else "tasks"
        ordered = bool(ordered and kind and kind.gathers)
        own = layouts[0] is pair.queries.layout and layouts[1] is pair.keys.layout
        over = OWN if own else tuple(layout.fingerprint for layout in layouts)
        self._key: Hashable = (over, rank, self._needs, ordered)
        self._cut = pair.memo.get(("cut", self._key), lambda: _cut(layouts, pair.queries.copies, ordered=ordered))

    def __deepcopy__(self, memo: dict[int, Any]) -> Plans:
        """Itself: it never changes."""
        return self

    @classmethod
    def whole(cls, pair: ShardPair) -> Plans:
        """All tokens of both streams, in global order, on this rank."""
        shards = pair.queries, pair.keys
        layouts = pair.memo.get("whole", lambda: tuple(contiguous(shard.documents.offsets, 1) for shard in shards))
        return cls(pair, (layouts[0], layouts[1]), 0)

    @property
    def tokens(self) -> tuple[int, int]:
        """Query and key tokens of one row of the batch."""
        return self._pair.queries.documents.num_tokens, self._pair.keys.documents.num_tokens

    def plan(self, mask: Mask) -> Tensor:
        """The packed plan under a mask."""
        memo = self._pair.memo_of(mask)

        def packed() -> Tensor:
            ahead: Plan | None = memo.find(("ahead", self._key, mask))
            queries, keys, _ = self._cut
            bands = self._pair.visible_bands(mask)
            made = make_plan(bands, queries, keys, self._rank, needs=self._needs) if ahead is None else ahead
            return made.to_tensor()

        return memo.get(("plan", self._key, mask), packed, size=bytes_kept_with)

    def places(self, device: torch.device) -> Tensor | None:
        """Where each global token lies in the gathered rows; None where they stay as they come."""
        places = self._cut.places
        if places is None:
            return None
        return self._pair.memo.on(("places", self._key), device, lambda: device_copy(places, device))

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global token of each query row ``[L]`` and of each owner's key rows ``[owners, M]``; -1 for a pad row.

        Tokens count through all rows of the batch.
        """

        def copies() -> tuple[Tensor, Tensor]:
            queries, keys, _ = self._cut
            everyone = np.stack([keys.positions(rank) for rank in range(keys.cp_size)])
            return device_copy(queries.positions(self._rank), device), device_copy(everyone, device)

        return self._pair.memo.on(("positions", self._key), device, copies)


class _Cut(NamedTuple):
    """What a plan is made over: layouts of all rows of the batch, and the order that gathered keys are put in."""

    queries: Layout
    keys: Layout
    places: Table | None


def _cut(layouts: tuple[Layout, Layout], copies: int, *, ordered: bool) -> _Cut:
    queries, keys = (layout.stack(copies) for layout in layouts)
    if not ordered or not keys.strides <= {1}:  # others keep the stride that tasks need
        return _Cut(queries, keys, None)
    return _Cut(queries, contiguous(np.array([0, keys.num_tokens], dtype=np.int64), 1), keys.inverse)


OWN = "own"
"""In the name of a plan: over the shards' layouts as they are."""


def take_ahead(pair: ShardPair, planned: BatchPlan, rank: int) -> None:
    """Let a pair have the bands of a batch that was planned ahead, and the plan of a rank where that was made.

    Args:
        pair: cut by the batch's layout.
        planned: a plan of the same documents.
        rank: this rank.
    """
    mask = planned.mask
    if not is_value(mask):
        return
    pair.memo.get(("bands", mask), lambda: planned.bands)
    if rank in planned.ranks:
        key: Hashable = (OWN, rank, COMM_TYPES[planned.cp_comm_type], False)
        pair.memo.get(("ahead", key, mask), lambda: planned.plan(rank))
