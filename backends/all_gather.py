"""All-gather attention: every rank gathers all keys and values, and reduce-scatters their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cphandler.attention.options import OptionalArguments
from cphandler.handler.capabilities import COMMON, Capabilities
from cphandler.handler.layout_handler import LayoutHandler

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AllGatherHandler(LayoutHandler):
    """Queries stay; the keys and values of all ranks are held while a layer computes, and not longer."""

    comm_type = "all_gather"
    capabilities = Capabilities(features=COMMON | {"gradient_wire_dtype"})

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`."""
        call = self.attention_call(attn_mod, (query, key, value), options, exchange="all_gather")
        return self.result(call, self.attend(call))
