"""Positions of tokens that a caller names, in place of those that follow from documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
from torch import Tensor

from cphandler.errors import InvalidValueError
from cphandler.tokens.documents import host_integers
from cphandler.tokens.intervals import MOST_TOKENS, Table, frozen

PositionIds: TypeAlias = "Tensor | npt.NDArray[Any] | Sequence[Any]"
"""What a caller may give as ``position_ids``: integers, global, none below 0; see :func:`checked_positions`."""

_FORMS = {True: "[T], [1, T], or [A, T] for A rotary axes", False: "[S], [B, S], or [A, B, S] for A rotary axes"}
"""Shapes by whether the batch is packed."""


def checked_positions(
    position_ids: PositionIds, num_tokens: int, *, packed: bool, rows: int | None = None, name: str = "position_ids"
) -> Table:
    """A caller's positions as a host table of its own, the sequence in the last dim.

    Args:
        position_ids: for a packed batch ``[T]`` or ``[1, T]``; ``[A, T]`` or ``[A, 1, T]`` for A rotary axes. For a
            dense one ``[S]``, ``[B, S]``, or ``[A, B, S]`` for A axes; ``[1, S]`` and ``[A, 1, S]`` are for all rows.
        num_tokens: global tokens, T or S, padding included.
        packed: whether the batch is packed.
        rows: rows B of a dense batch where they are known.
        name: how errors call the first argument.

    Returns:
        ``[T]`` or ``[A, T]``; ``[S]``, ``[B, S]`` or ``[A, B, S]``.

    Raises:
        InvalidTypeError: not integers.
        InvalidValueError: another shape, or positions below 0 or past any batch.
    """
    forms = _FORMS[packed]
    array = host_integers(position_ids, name, f"pass {forms}")
    batch = array.shape[-2] if array.ndim == 3 or (array.ndim == 2 and not packed) else 1
    fits = array.ndim in (1, 2, 3) and array.shape[-1] == num_tokens and (batch == 1 or not packed)
    if not fits or 0 in array.shape[: -1 if packed else -2]:
        raise InvalidValueError(
            f"{name} must be {forms}, of {num_tokens} tokens",
            got=f"shape {list(array.shape)}",
            fix=_way_out(array.shape, num_tokens, packed=packed),
        )
    if rows is not None and batch not in (1, rows):
        raise InvalidValueError(
            f"{name} must be for the batch's {rows} rows, or one for all of them",
            got=f"{batch} rows in shape {list(array.shape)}",
            fix=f"pass {forms}",
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < MOST_TOKENS:
        raise InvalidValueError(
            f"{name} must count from 0",
            got=f"{int(array.min())} to {int(array.max())}",
            fix="pass 0, say, where there is no token",
        )
    if packed and array.ndim == 3:
        array = array[:, 0]
    elif packed and array.ndim == 2 and len(array) == 1:
        array = array[0]
    return frozen(array.copy())


def _way_out(shape: tuple[int, ...], num_tokens: int, *, packed: bool) -> str:
    if packed and len(shape) > 1 and shape[-1] * shape[-2] == num_tokens:
        return "lay the rows of the batch end to end, as its tokens are: flatten(-2)"
    return "pass global positions, one for each token, as they were before the split over ranks"
