"""How local rows of all ranks and global tokens correspond."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.tensors import device_copy
from cphandler.tokens.intervals import Table

FEW_RUNS, LONG_RUN = 4, 512
"""Up to how many runs a rank, and from how many rows on, rows travel run by run, and land where they are read.

A message costs some 60 us on gloo; to put 512 rows of 4 heads of 64 in order afterwards, in float32, about 100, and as
much memory again as the tensor takes."""


class SequenceOrder(NamedTuple):
    """How local rows of all ranks and global tokens correspond, as index tensors on the data's device.

    Attributes:
        places: ``[S]`` place ``rank * L + local`` of each global token.
        tokens: ``[P * L]`` global token of each place; -1 for a pad row.
        runs: ``[n, 3]`` int64 on the host: first place, first token and length of every run of places of one rank whose
            tokens count up, in the order of places; empty where there are pad rows, or many runs or short ones.
        identity: True where places count up from 0 and there are no pad rows, so that no copy is needed.
    """

    places: Tensor
    tokens: Tensor
    runs: Tensor
    identity: bool

    @classmethod
    def over(cls, places: Table, tokens: Table, ranks: int, device: torch.device) -> SequenceOrder:
        """The same from numbers on the host.

        Args:
            places: ``[S]``.
            tokens: ``[P * L]``.
            ranks: P.
            device: where the data is.
        """
        identity = len(places) == len(tokens) and bool((np.diff(places) == 1).all())
        runs = device_copy(_runs(tokens, ranks, identity=identity), torch.device("cpu"))
        return cls(device_copy(places, device), device_copy(tokens, device), runs, identity)


def _runs(tokens: Table, ranks: int, *, identity: bool) -> Table:
    """See :class:`SequenceOrder`."""
    rows = len(tokens) // ranks
    if not rows or (tokens < 0).any():
        return np.empty((0, 3), dtype=np.int64)
    begins = np.arange(len(tokens)) % rows == 0
    begins[1:] |= np.diff(tokens) != 1
    places = np.flatnonzero(begins)
    lengths = np.diff(places, append=len(tokens))
    if not identity and (len(places) > FEW_RUNS * ranks or lengths.min() < LONG_RUN):
        return np.empty((0, 3), dtype=np.int64)
    return np.stack([places, tokens[places], lengths], axis=1)
