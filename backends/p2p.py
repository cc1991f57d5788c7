"""Point-to-point attention: each key row goes straight to exactly the ranks whose queries see it."""

from __future__ import annotations

from cphandler.attention.capabilities import COMMON, Capabilities
from cphandler.handler.layout_handler import LayoutHandler


class P2PHandler(LayoutHandler):
    """Keys travel, queries stay; what nobody sees is not sent, and gradients come back from where rows went."""

    comm_type = "p2p"
    exchange = "p2p"
    capabilities = Capabilities(features=COMMON | {"gradient_wire_dtype"})
