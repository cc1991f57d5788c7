"""All-gather attention: every rank gathers all keys and values, and reduce-scatters their gradients."""

from __future__ import annotations

from cphandler.attention.capabilities import COMMON, Capabilities
from cphandler.handler.layout_handler import LayoutHandler


class AllGatherHandler(LayoutHandler):
    """Queries stay; the keys and values of all ranks are held while a layer computes, and not longer."""

    comm_type = "all_gather"
    exchange = "all_gather"
    capabilities = Capabilities(features=COMMON | {"gradient_wire_dtype"})
