"""What the functions around attention take, checked alike."""

from __future__ import annotations

import math
from reprlib import repr as short_repr

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.precision import ATTENTION_DTYPES
from cphandler.tensors import check_plain

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of token numbers."""

MASKS = (torch.bool, *ATTENTION_DTYPES, *INTEGERS)
"""Dtypes of what says which tokens count."""


def checked_handler(handler: object) -> ContextParallelHandler:
    """A handler that is one.

    Raises:
        InvalidTypeError: anything else.
    """
    if not isinstance(handler, ContextParallelHandler):
        raise InvalidTypeError(
            "handler must be the batch's context-parallel handler",
            got=type(handler).__name__,
            fix="pass what get_cp_handler_cls(...)(...) made for this batch",
        )
    return handler


def check_rows(name: str, x: object, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    """Refuse what holds no rows to compute with.

    Args:
        name: how errors call it.
        x: a tensor.
        dtypes: that are served.
        kind: what they are, in a word.

    Raises:
        InvalidTypeError: no tensor, or one that is sparse, nested or distributed, without data, or of another dtype.
    """
    if not isinstance(x, Tensor):
        raise InvalidTypeError(f"{name} must be a tensor", got=type(x).__name__, fix="torch.as_tensor makes one")
    check_plain(x, name)
    if x.dtype not in dtypes:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidTypeError(f"{name} must be {kind}", got=x.dtype, fix=f"cast to one of {served}")
    if x.device.type == "meta":
        raise InvalidTypeError(f"{name} must hold numbers", got="a tensor on meta", fix="move it to a device")


def check_mask(mask: object, values: Tensor) -> None:
    """Refuse what does not say of each of some values whether it counts.

    Args:
        mask: bool, or weights.
        values: one number for each token.

    Raises:
        InvalidTypeError: no tensor of bool or numbers.
        InvalidValueError: another shape.
    """
    check_rows("mask", mask, MASKS, "bool or numbers")
    assert isinstance(mask, Tensor)
    if mask.shape != values.shape:
        raise InvalidValueError(
            "mask must have the shape of the values",
            got=f"{list(mask.shape)} beside {list(values.shape)}",
            fix="dispatch both, with pad_value=0 for the mask",
        )


def check_floats(name: str, x: object) -> None:
    """Rows in a dtype that losses compute in.

    Args:
        name: how errors call it.
        x: a tensor.
    """
    check_rows(name, x, ATTENTION_DTYPES, "floating point")


def check_integers(name: str, x: object) -> None:
    """Token numbers.

    Args:
        name: how errors call them.
        x: a tensor.
    """
    check_rows(name, x, INTEGERS, "integers")


def checked_label(value: object) -> int:
    """An ``ignore_index``.

    Raises:
        InvalidTypeError: no int.
        InvalidValueError: 0 and above, which are tokens, or more than int64 holds.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError("ignore_index must be an int", got=short_repr(value), fix="-100 is usual")
    if not -(1 << 63) <= value < 0:
        raise InvalidValueError("ignore_index must be below 0", got=short_repr(value), fix="-100 is usual")
    return value


def checked_divisor(name: str, value: object) -> float | Tensor:
    """A finite number above 0, or a tensor with one, which is not looked into.

    Args:
        name: how errors call it.
        value: what is divided by.

    Raises:
        InvalidTypeError: no number, nor a tensor of one.
        InvalidValueError: a number that is not above 0 or not finite.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.layout is not torch.strided:
            got = f"{value.dtype} of shape {list(value.shape)}"
            raise InvalidTypeError(f"{name} must be one number", got=got, fix="pass a number, or a tensor of one")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise InvalidTypeError(f"{name} must be a number", got=short_repr(value), fix="pass a number above 0")
    if not (0 < value < 1 << 63 and math.isfinite(value)):
        raise InvalidValueError(f"{name} must be above 0 and finite", got=short_repr(value), fix="count tokens or rows")
    return float(value)
