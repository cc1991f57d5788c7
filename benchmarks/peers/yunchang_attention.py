"""feifeibear/long-context-attention, the package ``yunchang``: its Ulysses, and its Ulysses x ring (USP)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import flash_attn_stand_in
from benchmarks.peers.peer import Peer, Shape, contiguous_tokens, indivisible


class YunchangUlysses(Peer):
    """``UlyssesAttention`` over flash attention."""

    name = "yunchang Ulysses"
    distribution = "yunchang"
    needs = ("einops",)
    _module: Any

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """Each of q, k and v is cut into equal parts by heads."""
        return indivisible("key heads", kv_heads, ranks) or indivisible("heads", heads, ranks)

    def connect(self, shape: Shape) -> None:
        """Over the whole group."""
        flash_attn_stand_in.install()
        kind = import_module("yunchang.kernels").AttnType.FA
        self._module = import_module("yunchang").UlyssesAttention(dist.group.WORLD, attn_type=kind)

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """Contiguous."""
        return contiguous_tokens(shape, rank)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One forward pass."""
        out: Tensor = self._module(query, key, value, causal=True)
        return out


class YunchangUSP(YunchangUlysses):
    """``LongContextAttention``: zigzag ring between pairs of ranks that share the heads.

    Its ring is ring-flash-attention's, with the same mistake in float32.
    """

    name = "yunchang USP"
    degree = 2

    @classmethod
    def refusal(cls, ranks: int, heads: int, kv_heads: int) -> str | None:
        """A ring of one rank fails in its backward pass: it sends to itself."""
        if ranks < 2 * cls.degree or ranks % cls.degree:
            return f"needs at least {2 * cls.degree} ranks: {cls.degree} that share heads, {cls.degree} in the ring"
        return indivisible("key heads", kv_heads, cls.degree) or indivisible("heads", heads, cls.degree)

    def connect(self, shape: Shape) -> None:
        """Make its two groups; they are the process's own, and each sequence makes them anew."""
        flash_attn_stand_in.install()
        yunchang, kind = import_module("yunchang"), import_module("yunchang.kernels").AttnType.FA
        yunchang.set_seq_parallel_pg(self.degree, shape.ranks // self.degree, dist.get_rank(), shape.ranks)
        self._module = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=kind)

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """As its own ``zigzag`` cuts a sequence."""
        cut = import_module("yunchang").EXTRACT_FUNC_DICT["zigzag"]
        everything = torch.arange(shape.tokens).view(1, -1, 1)
        held: Tensor = cut(everything, rank, shape.ranks, rd=shape.ranks // self.degree, ud=self.degree)
        return held.flatten()
