"""Shifting a tensor along the sequence inside each document, across ranks: labels for multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.comm import collectives, transfers
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.sharding.dispatch import as_movable, filler, restored
from cphandler.sharding.shard import Shard
from cphandler.tensors import device_copy
from cphandler.tokens.intervals import Table


class RollRoute(NamedTuple):
    """Which rows some shifts fill, and from where.

    The rows that shift i fills are numbered from ``i * L``.

    Attributes:
        shifts: how many shifts.
        sources: local rows that go to other ranks, by rank, then by the row they fill.
        kept_sources: local rows that stay.
        kept_targets: the rows those fill.
        targets: rows filled by other ranks, in the order the rows arrive.
        send_counts: rows for each rank.
        recv_counts: rows from each rank.
    """

    shifts: int
    sources: Tensor
    kept_sources: Tensor
    kept_targets: Tensor
    targets: Tensor
    send_counts: list[int]
    recv_counts: list[int]


def roll_route(shard: Shard, shifts: tuple[int, ...], device: torch.device) -> RollRoute:
    """The route of ``rolled[i, t] = x[t - shifts[i]]`` inside each document; both ends of a message compute it alone.

    A row moves where both tokens are in one document and, in a packed shard, both are real. Rows of a dense batch with
    padding all move; the caller clears those that are not real.
    """
    held, rows = np.flatnonzero(shard.tokens >= 0), shard.num_local_tokens
    first = np.repeat(np.arange(len(shifts), dtype=np.int64) * rows, len(held))
    to_rank, to_row = _partners(shard, held, shifts)
    from_rank, _ = _partners(shard, held, tuple(-shift for shift in shifts))
    held = np.tile(held, len(shifts))
    filled, target = first + held, first + to_row
    rank, size = shard.rank, shard.layout.cp_size
    stays = to_rank == rank
    goes = np.flatnonzero((to_rank >= 0) & ~stays)
    goes = goes[np.lexsort((target[goes], to_rank[goes]))]
    comes = np.flatnonzero((from_rank >= 0) & (from_rank != rank))
    comes = comes[np.lexsort((filled[comes], from_rank[comes]))]

    return RollRoute(
        len(shifts),
        device_copy(held[goes], device),
        device_copy(held[stays], device),
        device_copy(target[stays], device),
        device_copy(filled[comes], device),
        np.bincount(to_rank[goes], minlength=size).tolist(),
        np.bincount(from_rank[comes], minlength=size).tolist(),
    )


def _partners(shard: Shard, rows: Table, distances: tuple[int, ...]) -> tuple[Table, Table]:
    """:func:`_partner` for each distance, one after another."""
    ranks, places = zip(*(_partner(shard, rows, distance) for distance in distances), strict=True)
    return np.concatenate(ranks), np.concatenate(places)


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
    """Apply a route along ``dim``; rows nobody fills hold ``fill_value``. Differentiable, one batched exchange.

    Returns:
        ``[shifts, ..., L, ...]``, a view where there is one shift or the sequence comes first.
    """
    bits = as_movable(tensor)
    rows = bits.shape[dim]
    shape = *bits.shape[:dim], route.shifts * rows, *bits.shape[dim + 1 :]
    rolled = bits.new_full(shape, filler(fill_value, tensor))
    rolled = rolled.index_copy(dim, route.kept_targets, bits.index_select(dim, route.kept_sources))
    if len(route.send_counts) > 1:
        transfers.connect(group_name, tensor.device)
    if any(route.send_counts) or any(route.recv_counts):
        sent = bits.index_select(dim, route.sources).movedim(dim, 0)
        arrived = collectives.exchange_rows(sent, route.send_counts, route.recv_counts, group_name)
        rolled = rolled.index_copy(dim, route.targets, arrived.movedim(0, dim))
    stacked: Tensor = restored(rolled, tensor.dtype).unflatten(dim, (route.shifts, rows))
    return stacked.movedim(dim, 0)


def cleared(rolled: Tensor, dim: int, valid: Tensor, fill_value: float) -> Tensor:
    """Fill where the row, or the row it came from, is padding in that row of the batch.

    Args:
        rolled: ``[shifts, B, L, ...]``, or ``[shifts, L, B, ...]``.
        dim: of the sequence, 1 or 2.
        valid: ``[shifts, B, L]``.
        fill_value: what goes there.
    """
    keep = valid if dim == 2 else valid.transpose(1, 2)
    keep = keep.reshape(*keep.shape, *[1] * (rolled.dim() - 3))
    return restored(as_movable(rolled).masked_fill(~keep, filler(fill_value, rolled)), rolled.dtype)


def checked_shifts(shifts: int | Sequence[int]) -> tuple[int, ...]:
    """Shifts by ints, one or several.

    Raises:
        InvalidTypeError: neither an int nor a list or tuple of them.
        InvalidValueError: none at all.
    """
    several = tuple(shifts) if isinstance(shifts, (list, tuple)) else (shifts,)
    if any(isinstance(shift, bool) or not isinstance(shift, int) for shift in several):
        raise InvalidTypeError(
            "shifts must be an int, or a list or tuple of them", got=repr(shifts), fix="pass -1 for the next token"
        )
    if not several:
        raise InvalidValueError("shifts name no shift", got=repr(shifts), fix="pass -1 for the next token")
    return several
