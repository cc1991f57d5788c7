"""Global rows to local rows and back, with hand-written backward passes."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from cphandler.comm import collectives
from cphandler.errors import InvalidValueError
from cphandler.sharding.shard import Shard

GradMode: TypeAlias = Literal["replicated", "sum", "scaled"]
"""What the gradient of a combined tensor means; see :func:`combine_rows`."""

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_movable(x: Tensor) -> Tensor:
    """``x``, or where torch can store its dtype and hardly anything else (float8, uint16), its bits as integers."""
    unusual = x.dtype.itemsize == 1 and x.dtype.is_floating_point
    if unusual or x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return x.contiguous().view(_SAME_WIDTH[x.dtype.itemsize])
    return x


def restored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`as_movable`."""
    return x if x.dtype == dtype else x.view(dtype)


def filler(value: float, like: Tensor) -> Tensor:
    """``value`` as a 0-dim tensor of a dtype.

    Raises:
        InvalidValueError: the dtype cannot hold it.
    """
    dtype = like.dtype
    if not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool):
        limits = torch.iinfo(dtype)
        if not (float(value).is_integer() and limits.min <= value <= limits.max):
            raise InvalidValueError(f"{value!r} does not fit the tensor's dtype", got=dtype)
    return torch.tensor(value).to(device=like.device, dtype=dtype)


def dispatch_rows(x: Tensor, dim: int, shard: Shard, pad_value: float, group_name: str) -> Tensor:
    """This rank's rows of a global tensor.

    Args:
        x: ``[..., S, ...]``, the same on every rank.
        dim: dim of the sequence, not negative.
        shard: whose rows.
        pad_value: what pad rows hold.
        group_name: the group; every rank gets the full gradient in the backward pass.
    """
    fill = filler(pad_value, x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _local_rows(x, dim, shard, fill)
    result: Tensor = _Dispatch.apply(x, dim, shard, fill, group_name)  # type: ignore[no-untyped-call]
    return result


def combine_rows(x: Tensor, dim: int, shard: Shard, grad: GradMode, group_name: str) -> Tensor:
    """All ranks' rows in global order.

    Args:
        x: ``[..., L, ...]``.
        dim: dim of the sequence, not negative.
        shard: whose rows.
        grad: what the incoming gradient means: ``"replicated"``, every rank computed the same loss, so that the slice
            is right; ``"sum"``, each computed its own part, so that parts are summed over ranks; ``"scaled"``, the
            slice times the number of ranks, for engines that average afterwards.
        group_name: the group.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _global_rows(x, dim, shard, group_name)
    result: Tensor = _Combine.apply(x, dim, shard, grad, group_name)  # type: ignore[no-untyped-call]
    return result


def _local_rows(x: Tensor, dim: int, shard: Shard, fill: Tensor) -> Tensor:
    """This rank's rows of a global tensor, ``fill`` on pad rows."""
    tokens = shard.tensor("tokens", x.device)
    if x.shape[dim] == 0:
        return x.new_empty([*x.shape[:dim], len(tokens), *x.shape[dim + 1 :]])
    rows = restored(as_movable(x).index_select(dim, tokens.clamp(min=0)), x.dtype)
    for start, count in shard.pad_runs:
        rows.narrow(dim, start, count).copy_(fill)
    return rows


def _global_rows(x: Tensor, dim: int, shard: Shard, group_name: str) -> Tensor:
    """Gather the ranks' rows and put them in global order."""
    order = shard.order(x.device)
    gathered = collectives.all_gather(as_movable(x).movedim(dim, 0), group_name)
    ordered = gathered if order.identity else gathered.index_select(0, order.places)
    return restored(ordered, x.dtype).movedim(0, dim)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shard: Shard, fill: Tensor, group_name: str) -> Tensor:
        ctx.dim, ctx.shard, ctx.group_name = dim, shard, group_name
        return _local_rows(x, dim, shard, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _global_rows(grad, ctx.dim, ctx.shard, ctx.group_name), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shard: Shard, grad: GradMode, group_name: str) -> Tensor:
        ctx.dim, ctx.shard, ctx.grad, ctx.group_name = dim, shard, grad, group_name
        return _global_rows(x, dim, shard, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.grad == "sum":
            ranked = _ranked_rows(grad.movedim(ctx.dim, 0), ctx.shard)
            return collectives.reduce_scatter(ranked, ctx.group_name).movedim(0, ctx.dim), None, None, None, None
        local = _local_rows(grad, ctx.dim, ctx.shard, grad.new_zeros(()))
        return local * ctx.shard.layout.cp_size if ctx.grad == "scaled" else local, None, None, None, None


def _ranked_rows(x: Tensor, shard: Shard) -> Tensor:
    """``[S, ...]`` in global order as ``[P * L, ...]`` in rank order, zeros on pad rows."""
    order = shard.order(x.device)
    if order.identity:
        return x
    if not len(x):
        return x.new_zeros(len(order.tokens), *x.shape[1:])
    pads = (order.tokens < 0).view(-1, *[1] * (x.dim() - 1))
    return x.index_select(0, order.tokens.clamp(min=0)).masked_fill(pads, 0)
