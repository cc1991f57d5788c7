"""How close is close enough where a tolerance relative to the result says too little: cancellation, and 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cphandler.testing.tolerance import assert_close, relative_error

BESIDE_ONE_RANK = 1.5
"""How much larger the error of several ranks may be than one rank's with the same kernel, in 16-bit dtypes."""


def assert_near(
    actual: Tensor,
    wanted: Tensor,
    dtype: torch.dtype,
    what: str,
    *,
    magnitude: Callable[[], Tensor],
    alone: Callable[[], Tensor],
) -> None:
    """:func:`assert_close`, but that two things excuse an error.

    Terms that cancel may be off by one rounding of what they are the difference of; and in 16-bit dtypes, where a few
    numbers may all be rounded the wrong way, an error may be as large as on one rank.

    Args:
        actual: what was computed.
        wanted: what is right.
        dtype: dtype the computation ran in.
        what: name in the error message.
        magnitude: the sums over absolute values; asked where the tolerance does not hold.
        alone: what one rank computes with the same kernel; asked where nothing else excuses an error of 16 bits.

    Raises:
        AssertionError: neither close nor excused.
    """
    try:
        assert_close(actual, wanted, dtype=dtype, what=what)
    except AssertionError:
        finite = torch.isfinite(wanted)
        if actual.shape != wanted.shape or not torch.equal(torch.isfinite(actual), finite):
            raise
        if not torch.equal(actual[~finite].double(), wanted[~finite].double()):
            raise
        off = (actual.detach().double() - wanted)[finite].norm()
        if float(off) <= torch.finfo(dtype).eps * float(magnitude().double()[finite].norm()):
            return
        if torch.finfo(dtype).bits > 16 or not torch.equal(torch.isfinite(beside := alone()), finite):
            raise
        error = relative_error(actual[finite], wanted[finite])
        if error > BESIDE_ONE_RANK * relative_error(beside[finite], wanted[finite]):
            raise
