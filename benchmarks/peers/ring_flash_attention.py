"""zhuzilin/ring-flash-attention: the zigzag ring.

Its package imports an adapter for transformers that the present transformers no longer fits, so the one file is
imported without the package around it. In float32 its backward pass takes a buffer for a copy (``.to(torch.float32)``
of a float32 buffer is the buffer itself), so that gradients come out wrong; in 16 bits they are right.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import flash_attn_stand_in
from benchmarks.peers.peer import Peer, Shape


class RingFlashAttention(Peer):
    """``zigzag_ring_flash_attn_func``."""

    name = "ring-flash-attn zigzag"
    distribution = "ring-flash-attn"
    _function: Any

    def connect(self, shape: Shape) -> None:
        """Import its zigzag file alone."""
        flash_attn_stand_in.install()
        if "ring_flash_attn" not in sys.modules:
            spec, package = find_spec("ring_flash_attn"), ModuleType("ring_flash_attn")
            assert spec is not None
            package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
            sys.modules["ring_flash_attn"] = package
        self._function = import_module("ring_flash_attn.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """Rank r holds chunks r and 2P-1-r."""
        chunks = torch.arange(shape.tokens).chunk(2 * shape.ranks)
        return torch.cat([chunks[rank], chunks[-1 - rank]])

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One forward pass."""
        out: Tensor = self._function(query, key, value, causal=True, group=dist.group.WORLD)
        return out
