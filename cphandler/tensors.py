"""What a tensor must be before its rows can be told apart and moved, and how tables come to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from cphandler.errors import InvalidTypeError, UnsupportedError


def device_copy(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array as a tensor of its own on a device; to a GPU it goes from pinned memory, so that nothing waits for it.

    An ordinary tensor also under inference mode, since a batch may train later.
    """
    with torch.inference_mode(mode=False):
        made = torch.from_numpy(np.array(array))
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def check_plain(x: Tensor, what: str) -> None:
    """Refuse tensors whose rows are not all here, one after the other.

    Args:
        x: a tensor.
        what: how errors call it.

    Raises:
        InvalidTypeError: a DTensor, a nested tensor or a sparse one.
    """
    if hasattr(x, "to_local") and hasattr(x, "placements"):  # torch's DTensor, which takes long to import
        raise InvalidTypeError(f"{what} must be an ordinary tensor", got="a DTensor", fix="call to_local() first")
    if x.is_nested:
        raise InvalidTypeError(
            f"{what} must be an ordinary tensor",
            got="a nested tensor",
            fix="pass values(), its documents one after the other, to a handler of qkv_format 'thd'",
        )
    if x.layout is not torch.strided:
        raise InvalidTypeError(f"{what} must be a dense tensor", got=x.layout, fix="call to_dense() first")


def check_no_tangent(x: Tensor, what: str) -> None:
    """Refuse what forward-mode differentiation carries along: a collective would lose it without a word.

    Args:
        x: a tensor.
        what: the method that it was given to.

    Raises:
        UnsupportedError: a dual tensor.
    """
    if forward_ad.unpack_dual(x).tangent is not None:
        raise UnsupportedError(
            f"{what} has no forward-mode derivative",
            got="a dual tensor, as torch.func.jvp and jacfwd make them",
            fix="differentiate backward: torch.autograd.grad or backward()",
        )


def where_rows_are(shape: Sequence[int], dim: int, rows: int) -> str:
    """Where a number of rows is found that one dim does not have, in words; empty where it is found nowhere.

    Args:
        shape: a tensor's.
        dim: where the rows were expected.
        rows: how many.
    """
    found = [i for i, size in enumerate(shape) if size == rows and i != dim]
    if found:
        return f"dim {found[0]} has that length"
    if len(shape) > 1 and shape[0] * shape[1] == rows and 1 not in shape[:2]:
        return "dims 0 and 1 have that length together, as rows of a batch that still have to be laid end to end"
    return ""
