"""Global rows to local rows and back, with hand-written backward passes."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from cphandler import comm
from cphandler.reshard import SequenceOrder

GradMode: TypeAlias = Literal["replicated", "sum", "scaled"]
"""What the gradient of a combined tensor means; see :func:`combine_rows`."""


def dispatch_rows(
    x: Tensor, dim: int, tokens: Tensor, order: SequenceOrder, pad_value: float, group_name: str
) -> Tensor:
    """This rank's rows of a global tensor.

    Args:
        x: ``[..., S, ...]``, the same on every rank.
        dim: dim of the sequence.
        tokens: ``[L]`` global token of each local row; -1 for a pad row.
        order: the layout's order over all ranks.
        pad_value: what pad rows hold.
        group_name: the group; every rank gets the full gradient in the backward pass.
    """
    result: Tensor = _Dispatch.apply(  # type: ignore[no-untyped-call]
        x, dim, tokens, order, pad_value, group_name
    )
    return result


def combine_rows(x: Tensor, dim: int, tokens: Tensor, order: SequenceOrder, grad: GradMode, group_name: str) -> Tensor:
    """All ranks' rows in global order.

    Args:
        x: ``[..., L, ...]``.
        dim: dim of the sequence.
        tokens: ``[L]`` global token of each local row; -1 for a pad row.
        order: the layout's order over all ranks.
        grad: what the incoming gradient means: ``"replicated"``, every rank computed the same loss, so that the slice
            is right; ``"sum"``, each computed its own part, so that parts are summed over ranks; ``"scaled"``, the
            slice times the number of ranks, for engines that average afterwards.
        group_name: the group.
    """
    result: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        x, dim, tokens, order, grad, group_name
    )
    return result


def _local_rows(x: Tensor, dim: int, tokens: Tensor, pad_value: float) -> Tensor:
    """Rows ``tokens`` of a global tensor along ``dim``, ``pad_value`` where the token is -1."""
    if x.shape[dim] == 0:
        shape = list(x.shape)
        shape[dim] = len(tokens)
        return x.new_full(shape, pad_value)
    rows = x.index_select(dim, tokens.clamp(min=0))
    pads = (tokens < 0).nonzero().flatten()
    return rows.index_fill_(dim, pads, pad_value) if len(pads) else rows


def _global_rows(x: Tensor, dim: int, order: SequenceOrder, group_name: str) -> Tensor:
    """Gather the ranks' rows and put them in global order."""
    gathered = comm.all_gather(x.movedim(dim, 0), group_name)
    ordered: Tensor = gathered if order.identity else gathered.index_select(0, order.places)
    return ordered.movedim(0, dim)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, tokens: Tensor, order: SequenceOrder, pad_value: float, group_name: str
    ) -> Tensor:
        ctx.dim, ctx.order, ctx.group_name = dim, order, group_name
        return _local_rows(x, dim, tokens, pad_value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _global_rows(grad, ctx.dim, ctx.order, ctx.group_name), None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, tokens: Tensor, order: SequenceOrder, grad: GradMode, group_name: str
    ) -> Tensor:
        ctx.dim, ctx.tokens, ctx.order, ctx.grad, ctx.group_name = dim, tokens, order, grad, group_name
        return _global_rows(x, dim, order, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.grad == "sum":
            ranked = _local_rows(grad.movedim(ctx.dim, 0), 0, ctx.order.tokens, 0.0)
            local = comm.reduce_scatter(ranked, ctx.group_name).movedim(0, ctx.dim)
        else:
            local = _local_rows(grad, ctx.dim, ctx.tokens, 0.0)
            if ctx.grad == "scaled":
                local = local * (len(ctx.order.tokens) // max(1, len(ctx.tokens)))
        return local, None, None, None, None, None
