"""The Ulysses reshard: trade a split of the sequence for a split of the heads, and back (arXiv 2309.14509).

Two opaque custom ops, each the backward pass of the other. All parts of a call travel at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cphandler.comm import collectives, transfers
from cphandler.comm.membership import members
from cphandler.operators import differentiable, fake, operator
from cphandler.precision import accumulator_dtype
from cphandler.sharding.order import SequenceOrder

Cuts: TypeAlias = "list[tuple[int, int]]"
"""``(first row, rows)`` of each message."""

_Messages: TypeAlias = Sequence[Sequence[Sequence[Tensor]]]
"""Per tensor, per rank, what each message holds."""


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank computes: level shares of the query heads, and every key head that those touch.

    Attributes:
        queries: per rank, the query heads ``[first, stop)``; shares differ by at most one head, and some are empty
            where there are more ranks than heads.
        keys: per rank, the key heads ``[first, stop)``; neighbours share one where a group of query heads is cut.
        group: query heads per key head.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    group: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, cp_size: int) -> HeadSplit:
        """Split heads over ranks; ``num_heads`` divisible by ``num_kv_heads``.

        Bounds are rounded down, so that a share ends with a group of query heads wherever the exact bound does.
        """
        group = num_heads // num_kv_heads
        bounds = [rank * num_heads // cp_size for rank in range(cp_size + 1)]
        queries = tuple(pairwise(bounds))
        keys = tuple((first // group, -(-stop // group) if stop > first else first // group) for first, stop in queries)
        return cls(queries, keys, group)

    def repeats(self, rank: int) -> list[int]:
        """How many of the rank's query heads use each of its key heads."""
        (q_first, q_stop), (k_first, k_stop) = self.queries[rank], self.keys[rank]
        return [
            min(q_stop, (head + 1) * self.group) - max(q_first, head * self.group) for head in range(k_first, k_stop)
        ]


def repeat_heads(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """``[B, S, heads, D]`` with each head repeated as told; itself where every head has the same count.

    Equal counts are what kernels call grouped-query attention. The backward pass sums by plain reductions, in a fixed
    order.
    """
    if len(set(repeats)) <= 1:
        return x
    return torch.cat([x[:, :, i : i + 1].expand(-1, -1, times, -1) for i, times in enumerate(repeats)], dim=2)


def gather_seq_scatter_heads(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[tuple[int, int]]], order: SequenceOrder, group_name: str
) -> list[Tensor]:
    """All tokens of this rank's heads, from this rank's tokens of all heads.

    Args:
        tensors: ``[B, L, N_i, D_i]`` each, one dtype.
        ranges: per tensor, per rank, the heads ``[first, stop)`` that rank wants.
        order: the layout's order.
        group_name: the group to exchange in.

    Returns:
        ``[B, S, n_i, D_i]`` each, tokens in global order. The backward pass sends the gradients back and adds, in rank
        order, those of heads that several ranks wanted.
    """
    result: list[Tensor] = _scattered(list(tensors), _flat(ranges), order.places, order.tokens, order.runs, group_name)
    return result


def gather_heads_scatter_seq(
    tensors: Sequence[Tensor], ranges: Sequence[tuple[int, int]], order: SequenceOrder, group_name: str
) -> list[Tensor]:
    """All heads of this rank's tokens, from all tokens of this rank's heads: ``[B, S, n, D]`` to ``[B, L, N, D]`` each.

    Pad rows come out as zeros. One operator, so that ranks whose losses use different ones of the results still send
    the same messages in their backward passes.
    """
    result: list[Tensor] = _gathered(
        list(tensors), _flat([ranges] * len(tensors)), order.places, order.tokens, order.runs, group_name
    )
    return result


def slice_heads(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[tuple[int, int]]], rank: int, group_name: str
) -> list[Tensor]:
    """This rank's heads of tensors that every rank holds whole, where all ranks go on to one and the same loss.

    Args:
        tensors: ``[B, S, N_i, D_i]`` each, one dtype, the same on every rank.
        ranges: per tensor, per rank, the heads ``[first, stop)``.
        rank: this rank.
        group_name: the group that shares the heads.

    Returns:
        ``[B, S, n_i, D_i]`` each. The backward pass gathers the gradients of all heads on every rank, and adds, in rank
        order, those of heads that several ranks took.
    """
    result: list[Tensor] = _sliced(list(tensors), _flat(ranges), rank, group_name)
    return result


def gather_heads(tensors: Sequence[Tensor], ranges: Sequence[tuple[int, int]], group_name: str) -> list[Tensor]:
    """All heads on every rank, from each rank's own: ``[B, S, n, D]`` to ``[B, S, N, D]`` each.

    The backward pass is this rank's slice: right where every rank computes the same loss.
    """
    result: list[Tensor] = _unsliced(list(tensors), _flat([ranges] * len(tensors)), group_name)
    return result


def _flat(ranges: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    return [bound for per_rank in ranges for pair in per_rank for bound in pair]


def _unflat(ranges: Sequence[int], tensors: int) -> list[list[tuple[int, int]]]:
    """Per tensor, per rank, the heads ``[first, stop)``: what :func:`_flat` packed for an operator's signature."""
    pairs = list(zip(ranges[::2], ranges[1::2], strict=True))
    size = len(pairs) // tensors
    return [pairs[i * size : (i + 1) * size] for i in range(tensors)]


def _one_by_one(tensors: list[Tensor], ranges: Sequence[int]) -> list[tuple[list[Tensor], list[int]]]:
    """Each tensor with its own ranges: one buffer holds one dtype."""
    return [([x], _flat([h])) for x, h in zip(tensors, _unflat(ranges, len(tensors)), strict=True)]


def _shapes(tensors: list[Tensor], heads: list[list[tuple[int, int]]], peer: int, rows: int) -> list[tuple[int, ...]]:
    """Shapes ``(rows, B, heads, D)`` in which the heads of a rank travel, tensor after tensor."""
    return [(rows, x.shape[0], h[peer][1] - h[peer][0], x.shape[-1]) for x, h in zip(tensors, heads, strict=True)]


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Consecutive parts of a flat buffer in the given shapes."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


class _Order(NamedTuple):
    """Where rows leave and arrive, per rank the ``(first row, rows)`` of each message.

    Attributes:
        places: among the rank's own rows.
        tokens: among the rows of all ranks.
        in_place: the latter stand in global order; else in rank order.
        rows: of each rank, where its rows are one message, and follow those of the rank before; else empty.
    """

    places: list[Cuts]
    tokens: list[Cuts]
    in_place: bool
    rows: list[int]

    @classmethod
    def of(cls, runs: Tensor, ranks: int, rows: int) -> _Order:
        """By runs, where a :class:`SequenceOrder` has them; kept for all layers, and not to be written to."""
        return _order_by(tuple(runs.flatten().tolist()), ranks, rows)

    def messages(self, x: Tensor) -> list[Sequence[Tensor]]:
        """Rows of all ranks ``[P * L, ...]`` as each rank's messages have them."""
        if self.rows:
            return [(part,) for part in x.split_with_sizes(self.rows)]
        return [[x.narrow(0, first, rows) for first, rows in cuts] for cuts in self.tokens]


@lru_cache(maxsize=256)
def _order_by(runs: tuple[int, ...], ranks: int, rows: int) -> _Order:
    if not runs:
        in_turn = [[(rank * rows, rows)] for rank in range(ranks)]
        return _Order([[(0, rows)]] * ranks, in_turn, in_place=False, rows=[rows] * ranks)
    places: list[Cuts] = [[] for _ in range(ranks)]
    tokens: list[Cuts] = [[] for _ in range(ranks)]
    for place, token, length in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        rank, local = divmod(place, rows)
        places[rank].append((local, length))
        tokens[rank].append((token, length))
    is_in_turn = all(cuts == [(rank * rows, rows)] for rank, cuts in enumerate(tokens))
    return _Order(places, tokens, in_place=True, rows=[rows] * ranks if is_in_turn else [])


class _Heads(NamedTuple):
    """Which heads of one tensor each rank computes.

    Attributes:
        ranges: ``[first, stop)`` of each rank.
        sizes: how many.
        apart: no two ranks have one in common: each range starts where the one before it stops.
    """

    ranges: list[tuple[int, int]]
    sizes: list[int]
    apart: bool

    def of(self, x: Tensor) -> Sequence[Tensor]:
        """``[rows, B, heads, D]`` of each rank, from all heads."""
        if self.apart:
            parts: Sequence[Tensor] = x.split_with_sizes(self.sizes, 2)
            return parts
        return [x.narrow(2, first, stop - first) for first, stop in self.ranges]


def _heads_of(ranges: list[int], tensors: int) -> tuple[_Heads, ...]:
    """Per tensor, which heads: what :func:`_flat` packed; kept for all layers, and not to be written to."""
    return _heads_by(tuple(ranges), tensors)


@lru_cache(maxsize=256)
def _heads_by(ranges: tuple[int, ...], tensors: int) -> tuple[_Heads, ...]:
    found = []
    for pairs in _unflat(ranges, tensors):
        apart = all(after[0] >= before[1] for before, after in pairwise(pairs))
        found.append(_Heads(pairs, [stop - first for first, stop in pairs], apart))
    return tuple(found)


def _cut(parts: Iterable[Tensor], cuts: Cuts) -> list[Sequence[Tensor]]:
    """``[rows, ...]`` of each cut of a rank's rows, which they cover, out of each tensor."""
    if len(cuts) == 1:
        return [(x,) for x in parts]
    return [[x.narrow(0, first, rows) for first, rows in cuts] for x in parts]


@operator("gather_seq_scatter_heads")
def _to_heads(
    tensors: list[Tensor], ranges: list[int], places: Tensor, tokens: Tensor, runs: Tensor, group_name: str
) -> list[Tensor]:
    heads = _heads_of(ranges, len(tensors))
    size, rank, rows = len(heads[0].sizes), members(group_name).rank, tensors[0].shape[1]
    order = _Order.of(runs, size, rows)
    leaving, arriving, result = [], [], []
    for x, wanted in zip(tensors, heads, strict=True):
        parts = wanted.of(x.transpose(0, 1))
        gathered = x.new_empty((size * rows, *parts[rank].shape[1:]))
        leaving.append(_cut(parts, order.places[rank]))
        arriving.append(order.messages(gathered))
        result.append(gathered)
    _trade(leaving, arriving, rank, group_name)
    for sent, came in zip(leaving, arriving, strict=True):
        for own, place in zip(sent[rank], came[rank], strict=True):
            place.copy_(own)
    return [(x if order.in_place else x.index_select(0, places)).transpose(0, 1) for x in result]


@operator("gather_heads_scatter_seq")
def _to_tokens(
    tensors: list[Tensor], ranges: list[int], places: Tensor, tokens: Tensor, runs: Tensor, group_name: str
) -> list[Tensor]:
    heads = _heads_of(ranges, len(tensors))
    size, rank = len(heads[0].sizes), members(group_name).rank
    rows = len(tokens) // size
    order = _Order.of(runs, size, rows)
    mine = order.places[rank]
    leaving, arriving = [], []
    for x, held in zip(tensors, heads, strict=True):
        ranked = x.transpose(0, 1) if order.in_place else _rank_major(x.transpose(0, 1), places, tokens)
        leaving.append(order.messages(ranked))
        batch, channels = x.shape[0], x.shape[-1]
        others = [number for peer, number in enumerate(held.sizes) if peer != rank]
        arriving.append(_cut([x.new_empty((rows, batch, number, channels)) for number in others], mine))
        arriving[-1].insert(rank, leaving[-1][rank])
    _trade(leaving, arriving, rank, group_name)
    return [_assembled(x, parts, mine, h) for x, parts, h in zip(tensors, arriving, heads, strict=True)]


def _trade(leaving: _Messages, arriving: _Messages, rank: int, group_name: str) -> None:
    """Send each rank its rows of every tensor, and receive where they are read; one's own stay.

    Args:
        leaving: what goes.
        arriving: what comes.
        rank: this rank.
        group_name: the group.
    """
    peers = [peer for peer in range(len(leaving[0])) if peer != rank]
    transfers.connect(group_name, leaving[0][0][0].device)
    sends = [(part, peer) for peer in peers for parts in leaving for part in parts[peer]]
    receives = [(place, peer) for peer in peers for parts in arriving for place in parts[peer]]
    transfers.post(sends, receives, group_name).wait()


def _rank_major(x: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """``[S, ...]`` in global order as ``[P * L, ...]`` in rank order, zeros on pad rows."""
    if places.shape == tokens.shape:  # no pad rows
        return x.index_select(0, tokens)
    if not len(x):
        return x.new_zeros(len(tokens), *x.shape[1:])
    pads = (tokens < 0).view(-1, *[1] * (x.dim() - 1))
    return x.index_select(0, tokens.clamp(min=0)).masked_fill_(pads, 0)


def _assembled(x: Tensor, parts: Sequence[Sequence[Tensor]], cuts: Cuts, heads: _Heads) -> Tensor:
    """Put the heads of each rank side by side, ``[B, L, N, D]``; add, in rank order, what several computed.

    Args:
        x: a tensor of the same batch, channels and dtype.
        parts: per rank, its heads of the rows of each cut, ``[rows, B, n, D]``.
        cuts: ``(first row, rows)`` of each.
        heads: of each rank.
    """
    shape = (x.shape[0], sum(rows for _, rows in cuts), heads.ranges[-1][1], x.shape[-1])
    total = x.new_empty(shape) if heads.apart else x.new_zeros(shape, dtype=accumulator_dtype(x.dtype))
    for pieces, places in zip(parts, _cut(heads.of(total.transpose(0, 1)), cuts), strict=True):
        for place, piece in zip(places, pieces, strict=True):
            (place.copy_ if heads.apart else place.add_)(piece)
    return total.to(x.dtype)


@fake(_to_heads)
def _fake_to_heads(
    tensors: list[Tensor], ranges: list[int], places: Tensor, tokens: Tensor, runs: Tensor, group_name: str
) -> list[Tensor]:
    rank = members(group_name).rank
    shapes = _shapes(tensors, _unflat(ranges, len(tensors)), rank, places.shape[0])
    return [x.new_empty(shape).transpose(0, 1) for x, shape in zip(tensors, shapes, strict=True)]


@fake(_to_tokens)
def _fake_to_tokens(
    tensors: list[Tensor], ranges: list[int], places: Tensor, tokens: Tensor, runs: Tensor, group_name: str
) -> list[Tensor]:
    heads = _unflat(ranges, len(tensors))
    rows = tokens.shape[0] // len(heads[0])
    return [x.new_empty((x.shape[0], rows, h[-1][1], x.shape[-1])) for x, h in zip(tensors, heads, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.ranges, *indices, ctx.group_name = inputs
    ctx.save_for_backward(*indices)


def _to_heads_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return (
        _gathered(list(grads), ctx.ranges, *ctx.saved_tensors, ctx.group_name),
        None,
        None,
        None,
        None,
        None,
    )


def _to_tokens_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return (
        _scattered(list(grads), ctx.ranges, *ctx.saved_tensors, ctx.group_name),
        None,
        None,
        None,
        None,
        None,
    )


_scattered = differentiable(_to_heads, _to_heads_backward, _save, takes_list=True)
_gathered = differentiable(_to_tokens, _to_tokens_backward, _save, takes_list=True)


@operator("slice_heads")
def _slice(tensors: list[Tensor], ranges: list[int], rank: int, group_name: str) -> list[Tensor]:
    heads = _unflat(ranges, len(tensors))
    return [x[:, :, slice(*h[rank])].clone() for x, h in zip(tensors, heads, strict=True)]


@operator("unslice_heads")
def _unslice(tensors: list[Tensor], ranges: list[int], group_name: str) -> list[Tensor]:
    """Every rank's heads side by side; what several hold is added in rank order."""
    if len({x.dtype for x in tensors}) > 1:
        return [part for one in _one_by_one(tensors, ranges) for part in _unslice(*one, group_name)]
    heads = _unflat(ranges, len(tensors))
    size, rank = len(heads[0]), members(group_name).rank
    shapes = [
        [shape for x, h in zip(tensors, heads, strict=True) for shape in _shapes([x], [h], peer, x.shape[1])]
        for peer in range(size)
    ]
    counts = [_elements(shape) for shape in shapes]
    mine = torch.cat([x.transpose(0, 1).reshape(-1) for x in tensors])
    received = collectives.all_to_all(mine.repeat(size), [counts[rank]] * size, counts, group_name).split(counts)
    arrived = [_views(flat, shape) for flat, shape in zip(received, shapes, strict=True)]
    shares = _heads_of(ranges, len(tensors))
    return [
        _assembled(x, [[views[i]] for views in arrived], [(0, x.shape[1])], shares[i]) for i, x in enumerate(tensors)
    ]


@fake(_slice)
def _fake_slice(tensors: list[Tensor], ranges: list[int], rank: int, group_name: str) -> list[Tensor]:
    heads = _unflat(ranges, len(tensors))
    return [
        x.new_empty((*x.shape[:2], h[rank][1] - h[rank][0], x.shape[-1])) for x, h in zip(tensors, heads, strict=True)
    ]


@fake(_unslice)
def _fake_unslice(tensors: list[Tensor], ranges: list[int], group_name: str) -> list[Tensor]:
    heads = _unflat(ranges, len(tensors))
    return [x.new_empty((*x.shape[:2], h[-1][1], x.shape[-1])) for x, h in zip(tensors, heads, strict=True)]


def _save_slice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.ranges, ctx.rank, ctx.group_name = inputs


def _save_unslice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.ranges, ctx.group_name = inputs


def _slice_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return _unsliced(list(grads), ctx.ranges, ctx.group_name), None, None, None


def _unslice_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rank = members(ctx.group_name).rank
    return _sliced(list(grads), ctx.ranges, rank, ctx.group_name), None, None


_sliced = differentiable(_slice, _slice_backward, _save_slice, takes_list=True)
_unsliced = differentiable(_unslice, _unslice_backward, _save_unslice, takes_list=True)
