"""Point-to-point attention: each key row goes straight to exactly the ranks whose queries see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cphandler.attention.options import OptionalArguments
from cphandler.handler.capabilities import COMMON, Capabilities
from cphandler.handler.layout_handler import LayoutHandler

if TYPE_CHECKING:
    from typing_extensions import Unpack


class P2PHandler(LayoutHandler):
    """Keys travel, queries stay; what nobody sees is not sent, and gradients come back from where rows went."""

    comm_type = "p2p"
    capabilities = Capabilities(features=COMMON | {"gradient_wire_dtype"})

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`."""
        call = self.attention_call(attn_mod, (query, key, value), options, exchange="p2p")
        return self.result(call, self.attend(call))
