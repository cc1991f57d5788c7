"""Ring attention: blocks of keys and values travel round the ring, one hop a step (arXiv 2310.01889)."""

from __future__ import annotations

from cphandler.handler.layout_handler import LayoutHandler


class RingHandler(LayoutHandler):
    """Keys travel, queries stay; blocks that nobody downstream sees are neither sent nor computed."""

    comm_type = "ring"
    exchange = "ring"
