"""Attention slices, what MagiAttention takes for a mask, from bands: rectangles whose edges may slide.

A slice ``(q0, q1, k0, k1, kind)`` lets row i of its ``n = q1 - q0`` rows see keys ``[k0 + i, k1 - (n - 1 - i))``: the
left edge slides with the row where kind has the bit 2, else it stays at k0; the right edge slides where it has the bit
1, else it stays at k1 (MagiAttention's AttnSlice). The kinds of a band of width 3 over 6 rows and 6 keys::

    x . . . . .   causal: the right edge slides
    x x . . . .
    x x x . . .   bi_causal: both do
    . x x x . .
    . . x x x .
    . . . x x x
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from cphandler.tokens.bands import HI, K0, K1, LO, Q0, Q1, tightened
from cphandler.tokens.intervals import Flags, Table, expand

KINDS = ("full", "causal", "inv_causal", "bi_causal")
"""Kinds of slices by number, as the engine names them."""

FULL, CAUSAL, INV_CAUSAL, BI_CAUSAL = range(4)
KIND = 4
"""Column of a slice's kind, after the four of its rectangle."""


def slices_of(bands: Table) -> Table:
    """``[n, 5]`` slices that together see what bands see, by query row; no slice is empty, no row of one sees nothing.

    Each band is cut where its left edge begins to slide and where its right edge ceases to. Where the rectangles of two
    slices meet, both are cut to the rows they share; slices side by side become one.

    Args:
        bands: ``[n, 6]`` disjoint bands.
    """
    bands = tightened(bands)
    first, stop = bands[:, Q0], bands[:, Q1]
    slides_left = np.clip(bands[:, K0] - bands[:, LO], first, stop)  # from this row on
    slides_right = np.clip(bands[:, K1] - bands[:, HI], first, stop)  # up to this row
    cuts = [first, np.minimum(slides_left, slides_right), np.maximum(slides_left, slides_right), stop]
    pieces = []
    for begin, end in pairwise(cuts):
        left, right = begin >= slides_left, end <= slides_right
        k0 = np.where(left, begin + bands[:, LO], bands[:, K0])
        k1 = np.where(right, end + bands[:, HI], bands[:, K1])
        kind = INV_CAUSAL * left + CAUSAL * right
        pieces.append(np.stack([begin, end, k0, k1, kind], axis=1)[begin < end])
    return _joined(_aligned(_sorted(np.concatenate(pieces))))


def _sorted(slices: Table) -> Table:
    """By rows, then keys; one row has no edges to slide."""
    slices[slices[:, Q1] - slices[:, Q0] == 1, KIND] = FULL
    return slices[np.lexsort((slices[:, K0], slices[:, Q1], slices[:, Q0]))]


def _aligned(slices: Table) -> Table:
    """Cut slices whose rectangles meet where the other one's rows begin and end."""
    one, other = _meetings(slices)
    of, by = np.concatenate([one, other]), np.concatenate([other, one])
    walls = np.concatenate([slices[by, Q0], slices[by, Q1]])
    of = np.concatenate([of, of])
    inside = (walls > slices[of, Q0]) & (walls < slices[of, Q1])
    every = np.arange(len(slices))
    ends = [(every, slices[:, Q0]), (every, slices[:, Q1]), (of[inside], walls[inside])]
    points = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in ends]), axis=0)
    which, rows = points[:, 0], points[:, 1]
    begins = np.flatnonzero(which[:-1] == which[1:])
    cut = slices[which[begins]]
    begin, end = rows[begins], rows[begins + 1]
    cut[:, K0] += np.where(cut[:, KIND] & INV_CAUSAL, begin - cut[:, Q0], 0)
    cut[:, K1] -= np.where(cut[:, KIND] & CAUSAL, cut[:, Q1] - end, 0)
    cut[:, Q0], cut[:, Q1] = begin, end
    return _sorted(cut)


def _joined(slices: Table) -> Table:
    """Make slices of the same rows one where each row's keys go on in the next slice."""
    rows = slices[:, Q1] - slices[:, Q0] - 1
    right = slices[:, K1] - np.where(slices[:, KIND] & CAUSAL, rows, 0)  # where keys end in the first row
    left = slices[:, K0] + np.where(slices[:, KIND] & INV_CAUSAL, rows, 0)  # where they begin in the last
    goes_on = (slices[:-1, :2] == slices[1:, :2]).all(axis=1)
    goes_on &= (right[:-1] == slices[1:, K0]) & (slices[:-1, K1] == left[1:])
    opens = np.flatnonzero(np.append(True, ~goes_on)[: len(slices)])
    closes = np.append(opens[1:], len(slices)) - 1 if len(slices) else opens
    joined = slices[opens]
    joined[:, K1] = slices[closes, K1]
    joined[:, KIND] = (slices[opens, KIND] & INV_CAUSAL) | (slices[closes, KIND] & CAUSAL)
    return joined


def _meetings(slices: Table) -> tuple[Table, Table]:
    """Pairs of slices, by query row, whose rectangles meet."""
    later = np.arange(1, len(slices) + 1)
    counts = np.maximum(np.searchsorted(slices[:, Q0], slices[:, Q1], side="left") - later, 0)
    one, other = np.repeat(np.arange(len(slices)), counts), expand(later, counts)
    meet = (slices[one, K0] < slices[other, K1]) & (slices[other, K0] < slices[one, K1])
    return one[meet], other[meet]


def overlapping(slices: Table) -> Flags:
    """``[n]``: slices, by query row, whose rectangle meets that of a later one, though no pair is in both.

    Args:
        slices: as :func:`slices_of` gives them.
    """
    found: Flags = np.zeros(len(slices), dtype=bool)
    found[_meetings(slices)[0]] = True
    return found


def thin(slices: Table) -> Flags:
    """``[n]``: slices of several rows that see one key each, along a diagonal."""
    rows, keys = slices[:, Q1] - slices[:, Q0], slices[:, K1] - slices[:, K0]
    along: Flags = (slices[:, KIND] == BI_CAUSAL) & (rows == keys)
    return along
