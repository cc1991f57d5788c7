"""Ulysses: two reshards around attention over whole documents (arXiv 2309.14509)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cphandler.attention.call import AttentionCall
from cphandler.attention.head_parallel import HeadParallel, check_heads
from cphandler.attention.options import OptionalArguments
from cphandler.handler.capabilities import COMMON, Capabilities
from cphandler.handler.layout_handler import LayoutHandler
from cphandler.layouts.layout import LAYOUTS

if TYPE_CHECKING:
    from typing_extensions import Unpack

WAY_OUT = "use cp_size {sizes}, or the ring backend, which takes any number of heads"


class UlyssesHandler(LayoutHandler):
    """Each rank computes some heads over all tokens.

    Serves every number of query heads that the ranks divide, whatever the key heads: each key head that a rank's
    queries use travels to it once. The forward result has the same bits as on one rank. On the replicated layout
    nothing but heads is split: results and gradients are complete on every rank.
    """

    comm_type = "a2a"
    default_layout = "contiguous"
    capabilities = Capabilities(layouts=LAYOUTS, features=COMMON | {"own_attention"})

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`; takes callables."""
        tensors = query, key, value
        call = self.attention_call(attn_mod, tensors, options, exchange="whole", check=self._check_heads)
        if self.cp_size == 1:
            return self.result(call, self.attend_whole(call))
        device = call.q.device
        queries, keys = self.sequence_order(device), self.sequence_order(device, "kv")
        heads = HeadParallel(self._group, queries, keys, self.pad_rows(device), self.layout.replicated)
        return self.result(call, heads.gather(call, self.attend_whole(heads.scatter(call))))

    def _check_heads(self, call: AttentionCall) -> None:
        check_heads(call, self.cp_size, "Ulysses", WAY_OUT)
