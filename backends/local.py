"""One rank: attention over whole documents, nothing travels. The oracle of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cphandler.attention.options import OptionalArguments
from cphandler.errors import InvalidValueError
from cphandler.handler.capabilities import COMMON, Capabilities
from cphandler.handler.contract import LayoutSource
from cphandler.handler.layout_handler import LayoutHandler
from cphandler.layouts.layout import LAYOUTS

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LocalHandler(LayoutHandler):
    """A group of one rank, or no group at all."""

    comm_type = "none"
    default_layout = "contiguous"
    capabilities = Capabilities(layouts=LAYOUTS, features=COMMON | {"own_attention"})

    def prepare(self, layout: LayoutSource) -> None:
        """Refuse more than one rank.

        Raises:
            InvalidValueError: a group of several ranks.
        """
        if self.cp_size > 1:
            raise InvalidValueError(
                "the local backend without a comm type serves one rank",
                got=f"a group of {self.cp_size}",
                fix='choose how ranks communicate: get_cp_handler_cls("local", "a2a"), "ring" or "all_gather"',
            )
        super().prepare(layout)

    def core_attn(
        self, attn_mod: Any, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[OptionalArguments]
    ) -> Any:
        """See :meth:`ContextParallelHandler.core_attn`; takes callables."""
        call = self.attention_call(attn_mod, (query, key, value), options, exchange="whole")
        return self.result(call, self.attend_whole(call))
