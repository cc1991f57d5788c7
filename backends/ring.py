"""Ring attention: blocks of keys and values travel round the ring, one hop a step (arXiv 2310.01889)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cphandler.attention.options import OptionalArguments
from cphandler.handler.capabilities import Capabilities
from cphandler.handler.layout_handler import LayoutHandler

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RingHandler(LayoutHandler):
    """Keys travel, queries stay; blocks that nobody downstream sees are neither sent nor computed."""

    comm_type = "ring"
    capabilities = Capabilities()

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`."""
        call = self.attention_call(attn_mod, (query, key, value), options, exchange="ring")
        return self.result(call, self.attend(call))
