"""Ulysses x ring: heads are split inside a small group, keys travel between groups (USP, arXiv 2405.07719)."""

from __future__ import annotations

import torch

from cphandler.attention.attention import Attention
from cphandler.attention.call import AttentionCall
from cphandler.attention.capabilities import COMMON, Capabilities
from cphandler.attention.head_parallel import HeadParallel, InnerUnions
from cphandler.attention.loop import AttentionResult
from cphandler.attention.plans import Plans
from cphandler.comm.groups import two_levels
from cphandler.handler.layout_handler import LayoutHandler


class USPAttention(Attention):
    """Heads for tokens inside the inner group, around an exchange between the groups."""

    def set_up(self) -> None:
        """Split the group."""
        host, shards = self.host, self.host.shards
        self.capabilities.require_stride_one(self.name, shards.queries.layout, shards.keys.layout)
        self._levels = two_levels(host.ranks, host.config.ulysses_degree)
        self._unions = InnerUnions(shards, self._levels)

    def make_plans(self, ordered: bool) -> Plans:
        """The exchange runs between the unions of inner shards."""
        alone = self._levels.inner.size == 1
        return super().make_plans(ordered) if alone else self._unions.plans(self.exchange)

    def head_parallel(self, device: torch.device) -> HeadParallel:
        """All heads over the inner group."""
        return self._unions.heads(device)

    def compute(self, call: AttentionCall) -> AttentionResult:
        """See :meth:`Attention.compute`."""
        if self._levels.inner.size == 1:
            return self.attend(call)
        heads = call.prepared.heads if call.prepared else self.head_parallel(call.q.device)
        result = heads.gather(call, self.attend(heads.scatter(call), last=False))
        self.host.watched(result.out)
        return result


class USPHandler(LayoutHandler):
    """Rank ``p * A + a`` trades tokens for heads with the A ranks of its ``p``, then keys with the ranks of its ``a``.

    A 2-D (outer, inner) mesh, or a flat group and ``CPConfig.ulysses_degree``, says what A is. Between the groups rows
    are sent straight to the ranks that need them.
    """

    comm_type = "a2a+p2p"
    two_level = True
    exchange = "p2p"
    capabilities = Capabilities(
        layouts=("zigzag", "contiguous", "balanced"), features=COMMON | {"gradient_wire_dtype", "ulysses_degree"}
    )
    attention_cls = USPAttention


class USPRingHandler(USPHandler):
    """Ulysses inside, the ring outside."""

    comm_type = "a2a+ring"
    exchange = "ring"
    capabilities = Capabilities(layouts=("zigzag", "contiguous", "balanced"), features=COMMON | {"ulysses_degree"})
