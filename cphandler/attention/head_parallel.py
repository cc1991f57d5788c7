"""A split of the heads around attention: all of Ulysses, and the inside of Ulysses x ring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cphandler.attention.call import AttentionCall
from cphandler.attention.loop import AttentionResult
from cphandler.attention.plans import Plans
from cphandler.comm.groups import CPGroup, TwoLevels
from cphandler.sharding.heads import (
    HeadSplit,
    gather_heads,
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    repeat_heads,
    slice_heads,
)
from cphandler.sharding.order import SequenceOrder
from cphandler.sharding.shard import Shard, ShardPair
from cphandler.tokens.intervals import Table
from cphandler.tracing import untraced


@dataclass(frozen=True)
class HeadParallel:
    """Trades this rank's tokens of all heads for more tokens of its heads, and back.

    With more ranks than heads some ranks have none: they take part in every exchange and compute nothing.

    Attributes:
        group: the ranks that share the heads.
        queries: order of the query rows of all these ranks.
        keys: order of the key rows; the same object as ``queries`` where both are one stream.
        pads: ``[L]`` bool, local query rows that hold no token.
        replicated: every rank holds all tokens already; heads are sliced and gathered.
    """

    group: CPGroup
    queries: SequenceOrder
    keys: SequenceOrder
    pads: Tensor
    replicated: bool = False

    @classmethod
    @untraced
    def over(cls, group: CPGroup, shards: ShardPair, device: torch.device) -> HeadParallel:
        """The split of all heads over all ranks of a group.

        Args:
            group: the ranks.
            shards: this rank's shards.
            device: where the tensors are.
        """
        queries, keys = shards.queries.order(device), shards.keys.order(device)
        return cls(group, queries, keys, shards.queries.pads(device), shards.queries.layout.replicated)

    def split(self, call: AttentionCall) -> HeadSplit:
        """Which heads each rank computes."""
        return HeadSplit.of(call.q.shape[2], call.k.shape[2], self.group.size)

    def scatter(self, call: AttentionCall) -> AttentionCall:
        """The call over this rank's heads of all the ranks' tokens."""
        split, rank, name = self.split(call), self.group.rank, self.group.name
        tensors, ranges = [call.q, call.k, call.v], [split.queries, split.keys, split.keys]
        sinks = call.sinks
        if self.replicated:
            if sinks is not None:
                sinks = slice_heads([sinks.view(1, 1, -1, 1)], [split.queries], rank, name)[0].reshape(-1)
            q, k, v = slice_heads(tensors, ranges, rank, name)
        else:
            sinks = None if sinks is None else sinks[slice(*split.queries[rank])]
            if self.queries is self.keys:
                q, k, v = gather_seq_scatter_heads(tensors, ranges, self.queries, name)
            else:
                (q,) = gather_seq_scatter_heads(tensors[:1], ranges[:1], self.queries, name)
                k, v = gather_seq_scatter_heads(tensors[1:], ranges[1:], self.keys, name)
        first, repeats = call.first_head + split.queries[rank][0], tuple(split.repeats(rank))
        if call.module is not None:  # knows even groups only
            q, k, v = (_with_a_head(x) for x in (q, repeat_heads(k, repeats), repeat_heads(v, repeats)))
            repeats = ()
        return call.replaced(q, k, v, sinks=sinks, first_head=first, repeats=repeats)

    def gather(self, call: AttentionCall, result: AttentionResult) -> AttentionResult:
        """All heads of this rank's tokens, from a result over its heads of all the ranks' tokens."""
        split = self.split(call)
        first, stop = split.queries[self.group.rank]
        whole = [result.out if result.out.shape[2] == stop - first else result.out[:, :, : stop - first]]
        if call.return_lse and result.lse is not None:
            whole.append(result.lse.unsqueeze(-1))
        out, *rest = self._home(whole, split)
        lse = rest[0].squeeze(-1).masked_fill(self.pads.view(1, -1, 1), float("-inf")) if rest else None
        largest = None
        if result.max_logit is not None:
            largest = result.max_logit.new_full((call.q.shape[2],), float("-inf"))
            largest[first:stop] = result.max_logit
        return AttentionResult(out, lse, largest)

    def _home(self, tensors: list[Tensor], split: HeadSplit) -> list[Tensor]:
        if self.replicated:
            return gather_heads(tensors, split.queries, self.group.name)
        return gather_heads_scatter_seq(tensors, split.queries, self.queries, self.group.name)


def _with_a_head(x: Tensor) -> Tensor:
    """A head of ones where this rank has none, for a caller's own attention, which is called on every rank alike.

    It may communicate, and its parameters must get a gradient, here of zeros. Ones, since they can be normalised.
    """
    if x.shape[2]:
        return x
    return torch.cat([x, x.new_ones((*x.shape[:2], 1, x.shape[-1]))], dim=2)


class InnerUnions:
    """The rows that the A ranks of an inner group hold together, for an exchange between inner groups.

    Args:
        pair: the two shards; their layouts have stride 1.
        levels: inner and outer groups.
    """

    def __init__(self, pair: ShardPair, levels: TwoLevels) -> None:
        self._pair, self._levels = pair, levels

    def plans(self, exchange: str) -> Plans:
        """Attention between the unions, over the outer group."""
        outer, size = self._levels.outer, self._levels.inner.size
        queries, keys = (
            shard.memo.get(("merged", size), partial(shard.layout.merged, size))
            for shard in (self._pair.queries, self._pair.keys)
        )
        return Plans(self._pair, (queries, keys), outer.rank, exchange if outer.size > 1 else "", outer.name)

    @untraced
    def heads(self, device: torch.device) -> HeadParallel:
        """The split of the heads inside; the same orders as those of the plans' layouts.

        Args:
            device: where the tensors are.
        """
        queries, keys = (self._order(shard, device) for shard in (self._pair.queries, self._pair.keys))
        return HeadParallel(self._levels.inner, queries, keys, self._pair.queries.pads(device))

    def _order(self, shard: Shard, device: torch.device) -> SequenceOrder:
        size = self._levels.inner.size
        first = self._levels.outer.rank * size

        def order() -> SequenceOrder:
            held = np.concatenate([shard.layout.positions(rank) for rank in range(first, first + size)])
            return _ascending(held, size, device)

        return shard.memo.on(("union", first, size), device, order)


def _ascending(tokens: Table, ranks: int, device: torch.device) -> SequenceOrder:
    """Rows of several ranks in ascending order of tokens, pad rows last and kept, so that all unions are level."""
    places = np.argsort(np.where(tokens < 0, np.iinfo(np.int64).max, tokens), kind="stable")
    inverse = np.empty_like(places)
    inverse[places] = np.arange(len(places))
    return SequenceOrder.over(places, inverse, ranks, device)
