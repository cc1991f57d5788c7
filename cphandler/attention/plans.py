"""The plans of one exchange over the layouts of queries and keys, one for each mask, made once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cphandler.attention.exchange import get_exchange
from cphandler.layouts.layout import Layout, contiguous
from cphandler.plan.plan import Needs, make_plan
from cphandler.sharding.shard import ShardPair, device_copy
from cphandler.tokens.intervals import Table
from cphandler.tokens.masks import Mask


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
        queries, keys = (layout.stack(pair.queries.copies) for layout in layouts)
        self.exchange = exchange
        self.group_name = group_name
        self._pair, self._rank = pair, rank
        kind = get_exchange(exchange) if exchange else None
        self._needs: Needs = kind.needs if kind else "tasks"
        self._places: Table | None = None
        if kind and kind.gathers and ordered and keys.strides <= {1}:  # others keep the stride that tasks need
            self._places = keys.inverse
            keys = contiguous(np.array([0, keys.num_tokens], dtype=np.int64), 1)
        self._layouts = queries, keys
        self._plans: dict[Mask, Tensor] = {}
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def whole(cls, pair: ShardPair) -> Plans:
        """All tokens of both streams, in global order, on this rank."""
        queries, keys = (contiguous(shard.documents.offsets, 1) for shard in (pair.queries, pair.keys))
        return cls(pair, (queries, keys), 0)

    @property
    def tokens(self) -> tuple[int, int]:
        """Query and key tokens of one row of the batch."""
        return self._pair.queries.documents.num_tokens, self._pair.keys.documents.num_tokens

    def plan(self, mask: Mask) -> Tensor:
        """The packed plan under a mask."""
        if mask not in self._plans:
            made = make_plan(self._pair.visible_bands(mask), *self._layouts, self._rank, needs=self._needs)
            self._plans[mask] = made.to_tensor()
        return self._plans[mask]

    def places(self, device: torch.device) -> Tensor | None:
        """Where each global token lies in the gathered rows; None where they stay as they come."""
        if self._places is None:
            return None
        return self._cached("places", self._places, device)

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global token of each query row ``[L]`` and of each owner's key rows ``[owners, M]``; -1 for a pad row.

        Tokens count through all rows of the batch.
        """
        queries, keys = self._layouts
        everyone = np.stack([keys.positions(rank) for rank in range(keys.cp_size)])
        mine = queries.positions(self._rank)
        return self._cached("queries", mine, device), self._cached("keys", everyone, device)

    def _cached(self, name: str, values: Table, device: torch.device) -> Tensor:
        key = name, device
        if key not in self._tensors:
            self._tensors[key] = device_copy(values, device)
        return self._tensors[key]
