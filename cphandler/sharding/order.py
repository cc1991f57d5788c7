"""How local rows of all ranks and global tokens correspond."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SequenceOrder(NamedTuple):
    """How local rows of all ranks and global tokens correspond, as index tensors on the data's device.

    Attributes:
        places: ``[S]`` place ``rank * L + local`` of each global token.
        tokens: ``[P * L]`` global token of each place; -1 for a pad row.
        identity: True where places count up from 0 and there are no pad rows, so that no copy is needed.
    """

    places: Tensor
    tokens: Tensor
    identity: bool
