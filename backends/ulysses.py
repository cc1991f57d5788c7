"""Ulysses: two reshards around attention over whole documents (arXiv 2309.14509)."""

from __future__ import annotations

import torch

from cphandler.attention.attention import Attention
from cphandler.attention.call import AttentionCall
from cphandler.attention.capabilities import COMMON, Capabilities
from cphandler.attention.head_parallel import HeadParallel
from cphandler.attention.loop import AttentionResult
from cphandler.handler.layout_handler import LayoutHandler
from cphandler.layouts.layout import LAYOUTS


class UlyssesAttention(Attention):
    """Heads for tokens, attention over whole documents, and tokens for heads."""

    whole = True
    serves_packings = True

    def head_parallel(self, device: torch.device) -> HeadParallel:
        """All heads over all ranks."""
        return HeadParallel.over(self.host.ranks, self.host.shards, device)

    def compute(self, call: AttentionCall) -> AttentionResult:
        """See :meth:`Attention.compute`."""
        if self.host.ranks.size == 1:
            return self.attend_whole(call)
        heads = call.prepared.heads if call.prepared else self.head_parallel(call.q.device)
        result = heads.gather(call, self.attend_whole(heads.scatter(call), last=False))
        self.host.watched(result.out)
        return result


class UlyssesHandler(LayoutHandler):
    """Each rank computes some heads over all tokens; takes callables.

    Serves any number of query heads, whatever the key heads: shares differ by at most one head, and each key head that
    a rank's queries use travels to it once. The forward result has the same bits as on one rank. On the replicated
    layout nothing but heads is split: results and gradients are complete on every rank.
    """

    comm_type = "a2a"
    default_layout = "contiguous"
    capabilities = Capabilities(layouts=LAYOUTS, features=COMMON | {"own_attention"})
    attention_cls = UlyssesAttention
