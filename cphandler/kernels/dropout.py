"""Which attention weights are dropped: a hash of where a weight is, so that no cut of the work changes the answer.

A counter-based generator in the manner of Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3* (SC 2011), with
the finalizer of splitmix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014;
constants of Stafford's variant 13). Every weight's 64 bits depend on the seed, the layer, the batch row, the query's
position, the head and the key's position, and on nothing else: neither on ranks, layouts, blocks or devices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
"""Added before mixing, since the finalizer leaves 0 as it is."""

FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Dropout(NamedTuple):
    """Dropout of attention weights, for some query rows and some key rows.

    Attributes:
        p: probability that a weight is dropped, ``0 <= p < 1``; those kept are divided by ``1 - p``.
        states: ``[B, L, N]`` int64 from :func:`query_states`, one per query row and head.
        keys: ``[M]`` int64, the global position of each key row.
    """

    p: float
    states: Tensor
    keys: Tensor

    def of(self, rows: slice, keys: slice) -> Dropout:
        """The same for some of the query rows and key rows."""
        return Dropout(self.p, self.states[:, rows], self.keys[keys])


def query_states(seed: int, layer: int, batch_rows: Tensor, positions: Tensor, heads: Tensor) -> Tensor:
    """Hash what is known of a weight on the query's side.

    Args:
        seed: any integer; its lowest 64 bits count.
        layer: number of the layer, so that layers under one seed drop different weights.
        batch_rows: ``[B, L]`` integers, or ``[L]`` for a batch of one: the row of the global batch.
        positions: ``[L]`` or ``[B, L]`` integers: the query's global position.
        heads: ``[N]`` integers: the head's number in the whole model, not on this rank.

    Returns:
        ``[B, L, N]`` int64 on the device of the positions.
    """
    rows = batch_rows if batch_rows.dim() == 2 else batch_rows.unsqueeze(0)
    state = torch.zeros((), dtype=torch.int64, device=positions.device)
    for value in (seed, layer):
        state = _absorbed(state, torch.full_like(state, _signed(value)))
    for values in (rows.unsqueeze(-1), positions.unsqueeze(-1), heads):
        state = _absorbed(state, values.long())
    return state


def keep_mask(dropout: Dropout) -> Tensor:
    """``[B, N, L, M]``, true where a weight is kept; each weight's answer is its own, whatever is asked along with it.

    A weight's 64 random bits are compared as an integer, so that it is dropped with probability ``p`` to within
    ``2 ** -64`` and nothing is rounded.
    """
    keys = _mixed(dropout.keys + _signed(GAMMA))  # hashed on their own first, or rows would hold shifted runs of others
    bits = _mixed(dropout.states.movedim(2, 1).unsqueeze(-1) ^ keys)
    return bits >= int(dropout.p * 2.0**64) - (1 << 63)


def _absorbed(state: Tensor, values: Tensor) -> Tensor:
    """The state after further values; order counts."""
    return _mixed(state ^ _mixed(values + _signed(GAMMA)))


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of splitmix64: a bijection of 64 bits in which each input bit flips each output bit half the time.

    torch's int64 products wrap around. Its right shift copies the sign, which the mask takes away again.
    """
    for shift, factor in zip((30, 27, 31), (*FACTORS, None), strict=True):
        x = (x >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(x)
        if factor is not None:
            x.mul_(_signed(factor))
    return x


def _signed(value: int) -> int:
    """The lowest 64 bits of an integer, as int64 has them."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
