"""Shifting a tensor along the sequence inside each document, across ranks: labels for multi-token prediction."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.comm import collectives
from cphandler.sharding.dispatch import as_movable, filler, restored
from cphandler.sharding.shard import Shard, device_copy
from cphandler.tokens.intervals import Table


class RollRoute(NamedTuple):
    """Which local rows a shift fills, and from where.

    Attributes:
        sources: local rows that go to other ranks, by rank, then by the row they fill.
        kept_sources: local rows that stay.
        kept_targets: the local rows those fill.
        targets: local rows filled by other ranks, in the order the rows arrive.
        send_counts: rows for each rank.
        recv_counts: rows from each rank.
    """

    sources: Tensor
    kept_sources: Tensor
    kept_targets: Tensor
    targets: Tensor
    send_counts: list[int]
    recv_counts: list[int]


def roll_route(shard: Shard, shift: int, device: torch.device) -> RollRoute:
    """The route of ``rolled[t] = x[t - shift]`` inside each document; both ends of a message compute it alone.

    A row moves where both tokens are in one document and, in a packed shard, both are real. Rows of a dense batch with
    padding all move; the caller clears those that are not real.
    """
    held = np.flatnonzero(shard.tokens >= 0)
    to_rank, to_row = _partner(shard, held, shift)
    from_rank, _ = _partner(shard, held, -shift)
    leaves, arrives = to_rank >= 0, from_rank >= 0
    rank, size = shard.rank, shard.layout.cp_size
    stays = leaves & (to_rank == rank)
    goes = np.flatnonzero(leaves & (to_rank != rank))
    goes = goes[np.lexsort((to_row[goes], to_rank[goes]))]
    comes = np.flatnonzero(arrives & (from_rank != rank))
    comes = comes[np.lexsort((held[comes], from_rank[comes]))]

    return RollRoute(
        device_copy(held[goes], device),
        device_copy(held[stays], device),
        device_copy(to_row[stays], device),
        device_copy(held[comes], device),
        np.bincount(to_rank[goes], minlength=size).tolist(),
        np.bincount(from_rank[comes], minlength=size).tolist(),
    )


def _partner(shard: Shard, rows: Table, distance: int) -> tuple[Table, Table]:
    """Rank and local row of the token ``distance`` after that of each local row; -1 where the document has none."""
    documents, tokens = shard.documents, shard.tokens[rows]
    partner = tokens + distance
    document = documents.document_of(tokens)
    inside = (partner >= documents.offsets[document]) & (partner < documents.offsets[document + 1])
    if shard.padded_rows is None:
        inside &= documents.is_valid(tokens) & documents.is_valid(partner)
    places = shard.inverse[np.where(inside, partner, 0)] if shard.layout.num_tokens else partner
    rank, row = np.divmod(places, max(1, shard.num_local_tokens))
    if shard.layout.replicated:
        rank = np.full_like(rank, shard.rank)
    return np.where(inside, rank, -1), np.where(inside, row, -1)


def summed(x: Tensor) -> Tensor:
    """``x.sum()``; of dtypes that torch stores and cannot add, in one that it can."""
    small = x.dtype.itemsize == 1 and x.dtype.is_floating_point
    if small:
        return x.to(torch.float32).sum()
    return (x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x).sum()


def roll(tensor: Tensor, dim: int, route: RollRoute, fill_value: float, group_name: str) -> Tensor:
    """Apply a route along ``dim``; rows nobody fills hold ``fill_value``. Differentiable, one batched exchange."""
    bits = as_movable(tensor)
    rolled = bits.new_full(bits.shape, filler(fill_value, tensor))
    rolled = rolled.index_copy(dim, route.kept_targets, bits.index_select(dim, route.kept_sources))
    if len(route.send_counts) > 1:
        collectives.connect(group_name, tensor.device)
    if any(route.send_counts) or any(route.recv_counts):
        sent = bits.index_select(dim, route.sources).movedim(dim, 0)
        arrived = collectives.exchange_rows(sent, route.send_counts, route.recv_counts, group_name)
        rolled = rolled.index_copy(dim, route.targets, arrived.movedim(0, dim))
    return restored(rolled, tensor.dtype)
