"""Counts and flags that callers name: how many tokens, and whether or not."""

from __future__ import annotations

import operator
from reprlib import repr as short_repr

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.intervals import MOST_TOKENS


def checked_count(name: str, value: object, *, least: int = 0, fix: str | None = None) -> int:
    """A count as a Python int.

    Args:
        name: how errors call it.
        value: an int, or what numpy and torch have for one: a scalar, a tensor of one integer.
        least: the smallest count that makes sense.
        fix: what to pass instead; None for a number in that range.

    Raises:
        InvalidTypeError: no integer; floats and bools are none, even where they equal one.
        InvalidValueError: below ``least``, or more than any batch has.
    """
    fix = f"pass an int, {least} or more" if fix is None else fix
    truth = isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        count = None if truth else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # the latter from tensors that hold no data
        count = None
    if count is None:
        raise InvalidTypeError(f"{name} must be an int", got=short_repr(value), fix=fix)
    if count < least:
        raise InvalidValueError(f"{name} must be at least {least}", got=count, fix=fix)
    if count > MOST_TOKENS:
        raise InvalidValueError(f"{name} is more than any batch has", got=count, fix=fix)
    return count


def checked_flag(name: str, value: object) -> bool:
    """A flag that is one; ``"no"`` is true to Python.

    Raises:
        InvalidTypeError: neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidTypeError(f"{name} must be True or False", got=short_repr(value), fix="pass a bool")
    return bool(value)
