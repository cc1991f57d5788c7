"""Losses under context parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError


class _ConnectZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor) -> Tensor:
        ctx.shapes = [(x.shape, x.dtype, x.device) for x in tensors]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


def connect_zero_loss(loss: Tensor, *tensors: Tensor) -> Tensor:
    """The same loss, connected to ``tensors`` by gradients of exactly zero.

    Collectives in a backward pass must run on every rank. A rank whose own tokens contribute nothing to the loss still
    has to enter them: ``connect_zero_loss(loss, hidden)`` sends zeros back through ``hidden``. Unlike
    ``loss + 0 * hidden.sum()`` this is exact where ``hidden`` holds inf or NaN.

    Args:
        loss: any floating-point tensor, usually 0-dim.
        tensors: activations to connect to; those that need no gradient are ignored.

    Raises:
        InvalidTypeError: not tensors, or a loss that is not floating point.
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidTypeError(
            "loss must be a floating-point tensor", got=got, fix="call connect_zero_loss(loss, *tensors)"
        )
    for x in tensors:
        if not isinstance(x, Tensor):
            raise InvalidTypeError(
                "connect_zero_loss connects to tensors", got=type(x).__name__, fix="pass them one by one, not in a list"
            )
    wanted = [x for x in tensors if x.requires_grad]
    connected: Tensor = _ConnectZero.apply(loss, *wanted)  # type: ignore[no-untyped-call]
    return connected
