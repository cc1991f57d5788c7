"""Global rows to local rows and back, with hand-written backward passes."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cphandler.comm import collectives
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.sharding.shard import Shard

DispatchGrad: TypeAlias = Literal["full", "partial"]
"""What the gradient of a tensor that was cut will be; see :func:`dispatch_rows`."""

GradMode: TypeAlias = Literal["replicated", "sum", "scaled"]
"""What the gradient of a combined tensor means; see :func:`combine_rows`."""

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_movable(x: Tensor) -> Tensor:
    """``x``, or where torch can store its dtype and hardly anything else (float8, uint16), its bits as integers."""
    return x.contiguous().view(_SAME_WIDTH[x.dtype.itemsize]) if _is_rare(x.dtype) else x


def _is_rare(dtype: torch.dtype) -> bool:
    small = dtype.itemsize == 1 and dtype.is_floating_point
    return small or dtype in (torch.uint16, torch.uint32, torch.uint64)


def restored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`as_movable`."""
    return x if x.dtype == dtype else x.view(dtype)


def filler(value: object, like: Tensor) -> complex:
    """What to fill ``as_movable(like)`` with so that rows hold ``value``: a number, so that nothing goes to a device.

    Args:
        value: a number of Python's or numpy's.
        like: a tensor of the dtype that is to hold it; a bool tensor holds True, False, 1 and 0.

    Raises:
        InvalidTypeError: not a number.
        InvalidValueError: the dtype cannot hold it.
    """
    number = value.item() if isinstance(value, np.generic) else value
    if not isinstance(number, (bool, int, float, complex)):
        raise InvalidTypeError(
            "rows can be filled with a number only",
            got=f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value),
            fix="pass 0 or -100, say; a tensor's item() is a number",
        )
    dtype = like.dtype
    if not _holds(dtype, number):
        raise InvalidValueError(
            f"{value!r} does not fit the tensor's dtype", got=dtype, fix="pass a number that this dtype can hold"
        )
    if dtype == torch.bool:
        return bool(number)
    if not dtype.is_complex:
        number = float(number.real) if dtype.is_floating_point else int(number.real)
    return _rounded(number, dtype).view(_SAME_WIDTH[dtype.itemsize]).item() if _is_rare(dtype) else number


def _holds(dtype: torch.dtype, number: complex) -> bool:
    """Whether a dtype has this number, or one that it may be rounded to."""
    if dtype.is_complex:
        return _holds(dtype.to_real(), number.real) and _holds(dtype.to_real(), number.imag)
    if isinstance(number, complex):
        return False
    finite = isinstance(number, int) or math.isfinite(number)
    if dtype.is_floating_point and not finite:  # most of one byte have no infinity, some no NaN
        return dtype.itemsize > 1 or str(_rounded(number, dtype).item()) == str(float(number))
    if dtype.is_floating_point:
        return abs(number) <= torch.finfo(dtype).max
    if dtype == torch.bool:
        return number in (0, 1)
    return finite and number == int(number) and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


def _rounded(number: complex, dtype: torch.dtype) -> Tensor:
    """A number in a dtype, on the host whatever the default device is."""
    return torch.tensor(number, dtype=dtype, device="cpu")


def dispatch_rows(
    x: Tensor, dim: int, shard: Shard, pad_value: float, group_name: str, grad: DispatchGrad = "full"
) -> Tensor:
    """This rank's rows of a global tensor.

    Args:
        x: ``[..., S, ...]``, the same on every rank.
        dim: dim of the sequence, not negative.
        shard: whose rows.
        pad_value: what pad rows hold.
        group_name: the group.
        grad: what the backward pass gives: ``"full"``, every rank the gradients of all ranks' rows; ``"partial"``, each
            rank those of its own rows and zeros elsewhere, so that the ranks' gradients sum to the whole; nothing is
            sent then.
    """
    fill = filler(pad_value, x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _local_rows(x, dim, shard, fill)
    result: Tensor = _Dispatch.apply(x, dim, shard, fill, grad, group_name)  # type: ignore[no-untyped-call]
    return result


def combine_rows(x: Tensor, dim: int, shard: Shard, grad: GradMode, group_name: str) -> Tensor:
    """All ranks' rows in global order, contiguous.

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


def _local_rows(x: Tensor, dim: int, shard: Shard, fill: complex) -> Tensor:
    """This rank's rows of a global tensor, pad rows filled with what :func:`filler` gave."""
    tokens, bits = shard.tensor("tokens", x.device), as_movable(x)
    if x.shape[dim] == 0:  # no token to select, and all rows are pad rows
        return restored(bits.new_full((*x.shape[:dim], len(tokens), *x.shape[dim + 1 :]), fill), x.dtype)
    rows = bits.index_select(dim, tokens.clamp(min=0))
    for start, count in shard.pad_runs:
        rows.narrow(dim, start, count).fill_(fill)
    return restored(rows, x.dtype)


def _global_rows(x: Tensor, dim: int, shard: Shard, group_name: str) -> Tensor:
    """Gather the ranks' rows and put them in global order."""
    order = shard.order(x.device)
    gathered = collectives.all_gather(as_movable(x).movedim(dim, 0), group_name)
    ordered = gathered if order.identity else gathered.index_select(0, order.places)
    return restored(ordered.movedim(0, dim).contiguous(), x.dtype)


def _placed_rows(x: Tensor, dim: int, shard: Shard) -> Tensor:
    """This rank's rows at their places in a global tensor of zeros."""
    rows, tokens = (shard.tensor(name, x.device) for name in ("held_rows", "held_tokens"))
    zeros = x.new_zeros((*x.shape[:dim], shard.layout.num_tokens, *x.shape[dim + 1 :]))
    return zeros.index_copy(dim, tokens, x.index_select(dim, rows))


class _Dispatch(torch.autograd.Function):
    """A cut, and what undoes it: differentiable in turn, since the two are each other's derivative.

    A global tensor that all ranks share has one gradient on all of them ("full", "replicated"), one that each rank
    uses for its own part of the loss has a part of it on each ("partial", "sum"). Either way it stays what it was when
    a gradient is differentiated again, so that derivatives of any order are those of one rank.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, shard: Shard, fill: complex, grad: DispatchGrad, group_name: str
    ) -> Tensor:
        ctx.dim, ctx.shard, ctx.grad, ctx.group_name = dim, shard, grad, group_name
        return _local_rows(x, dim, shard, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.grad == "partial":
            return _placed_rows(grad, ctx.dim, ctx.shard), None, None, None, None, None
        return combine_rows(grad, ctx.dim, ctx.shard, "replicated", ctx.group_name), None, None, None, None, None


class _Combine(torch.autograd.Function):
    """The ranks' rows put together; see :class:`_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shard: Shard, grad: GradMode, group_name: str) -> Tensor:
        ctx.dim, ctx.shard, ctx.grad, ctx.group_name = dim, shard, grad, group_name
        return _global_rows(x, dim, shard, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dim, shard = ctx.dim, ctx.shard
        if ctx.grad == "sum":
            ranked = _ranked_rows(grad.movedim(dim, 0), shard)
            local = collectives.reduce_scatter(ranked, ctx.group_name).movedim(0, dim)
        elif ctx.grad == "scaled":
            local = _differentiated_once(_local_rows(grad, dim, shard, 0) * shard.layout.cp_size)
        else:
            local = dispatch_rows(grad, dim, shard, 0, ctx.group_name)
        return local, None, None, None, None


def _differentiated_once(x: Tensor) -> Tensor:
    result: Tensor = _Once.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Once(torch.autograd.Function):
    """A gradient that is the ranks' number times too large for now, so that what follows from it is not defined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise UnsupportedError(
            "a gradient of combine(grad='scaled') cannot be differentiated again: it is scaled for a later average",
            fix="use grad='replicated' or grad='sum', whose derivatives of any order are those of one rank",
        )


def _ranked_rows(x: Tensor, shard: Shard) -> Tensor:
    """``[S, ...]`` in global order as ``[P * L, ...]`` in rank order, zeros on pad rows."""
    order = shard.order(x.device)
    if order.identity:
        return x
    if not len(x):
        return x.new_zeros(len(order.tokens), *x.shape[1:])
    pads = (order.tokens < 0).view(-1, *[1] * (x.dim() - 1))
    return x.index_select(0, order.tokens.clamp(min=0)).masked_fill(pads, 0)
