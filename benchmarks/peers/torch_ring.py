"""torch's own ring attention, which its context parallelism runs on CUDA, with the CPU kernel given to it.

``torch.distributed.tensor.experimental.context_parallel`` refuses the CPU kernel, so the two private functions under it
are called: keys rotate by all-to-all or are gathered at once, rows lie head and tail, gradients always rotate.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.peer import Peer, Shape, heads_first, rows_first

PRIVATE = "torch.distributed.tensor.experimental._context_parallel"


def _forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, **options: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, **options)


def _backward(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    grad_out: Tensor,
    **options: Any,
) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal, **options
    )


def _set_up(rotation: str) -> Any:
    """The module with its process-wide options set: another peer, or another rotation, may have run in between."""
    module = import_module(f"{PRIVATE}._attention")
    module._cp_options.enable_load_balance = True
    module.set_rotate_method(rotation)
    return module


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rotation: str) -> Tensor:
        ring = _set_up(rotation)._templated_ring_attention
        out, lse = ring(dist.group.WORLD, 2, _forward, query, key, value, is_causal=True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rotation = rotation
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ring = _set_up(ctx.rotation)._templated_ring_attention_backward
        return (*ring(dist.group.WORLD, 2, _backward, grad_out, "grad_out", *ctx.saved_tensors, True)[:3], None)


class TorchRing(Peer):
    """Head-tail balanced, keys rotated by all-to-all."""

    name = "torch ring, all-to-all"
    distribution = "torch"
    rotation: ClassVar[str] = "alltoall"

    def connect(self, shape: Shape) -> None:
        """Nothing is kept: see the options above."""
        _set_up(self.rotation)

    def tokens(self, shape: Shape, rank: int) -> Tensor:
        """Rank r holds chunks r and 2P-1-r, as torch's own balancer says."""
        balancer = import_module(f"{PRIVATE}._load_balancer")._HeadTailLoadBalancer
        order: Tensor = balancer(shape.tokens, shape.ranks, torch.device("cpu"))._generate_indices(restore=False)
        return order.flatten().chunk(shape.ranks)[rank]

    def arranged(self, rows: Tensor) -> Tensor:
        """``[1, N, L, D]``, contiguous: it would copy keys and values otherwise."""
        return heads_first(rows).contiguous()

    def rows(self, arranged: Tensor) -> Tensor:
        """The inverse."""
        return rows_first(arranged)

    def arranged_output(self, rows: Tensor) -> Tensor:
        """As the inputs."""
        return self.arranged(rows)

    def output_rows(self, out: Tensor) -> Tensor:
        """The inverse."""
        return rows_first(out)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One forward pass."""
        out: Tensor = _Ring.apply(query, key, value, self.rotation)  # type: ignore[no-untyped-call]
        return out


class TorchGather(TorchRing):
    """The same with keys gathered at once, which is torch's default."""

    name = "torch ring, all-gather"
    rotation = "allgather"
