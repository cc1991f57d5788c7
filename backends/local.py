"""One rank: attention over whole documents, nothing travels. The oracle of the others."""

from __future__ import annotations

from cphandler.attention.attention import Attention
from cphandler.attention.capabilities import COMMON, Capabilities
from cphandler.errors import InvalidValueError
from cphandler.handler.contract import AskedLayout
from cphandler.handler.layout_handler import LayoutHandler
from cphandler.layouts.layout import LAYOUTS


class WholeAttention(Attention):
    """Every document is here."""

    whole = True


class LocalHandler(LayoutHandler):
    """A group of one rank, or no group at all; takes callables."""

    comm_type = "none"
    default_layout = "contiguous"
    capabilities = Capabilities(layouts=LAYOUTS, features=COMMON | {"own_attention"})
    attention_cls = WholeAttention

    def prepare(self, layout: AskedLayout) -> None:
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
