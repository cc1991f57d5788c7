"""Tasks cut into the few shapes for which a fused kernel's flags mean the same everywhere.

Every function takes and gives tables ``[n, 6]`` of a :class:`~cphandler.kernels.task.Task`'s fields, and works on all
rows at once: ten thousand documents cost as many Python calls as one.

The shapes are: full rectangles, and squares whose band is causal ``(-inf, 0)``, anti-causal ``(0, inf)``, or a window
``(-left, right)``. In a square the first and the last diagonal coincide, so that it does not matter whether a kernel
aligns its causal flag at the top left or at the bottom right.
"""

from __future__ import annotations

import numpy as np

from cphandler.tokens.intervals import UNBOUNDED, Table

Q, NQ, K, NK, LO, HI = range(6)
"""Columns."""


def _table(*columns: Table | int) -> Table:
    """Columns side by side; a number is the same in all rows."""
    made: Table = np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.int64, copy=False)
    return made


def cut(table: Table) -> Table:
    """Tasks as full rectangles and squares, which cover each pair that sees each other once.

    Args:
        table: tasks of which every row sees a key.
    """
    table = _trimmed(table)
    lower, upper = table[:, LO] != -UNBOUNDED, table[:, HI] != UNBOUNDED
    parts = [table[~lower & ~upper], *_causal(table[~lower & upper]), *_anticausal(table[lower & ~upper])]
    parts += _band(table[lower & upper])
    whole = np.concatenate(parts)
    return whole[(whole[:, NQ] > 0) & (whole[:, NK] > 0)]


def plain(table: Table) -> Table:
    """Of tasks that :func:`cut` gave, which are full or causal: ``[n]`` bool."""
    without: Table = (table[:, LO] == -UNBOUNDED) & ((table[:, HI] == UNBOUNDED) | (table[:, HI] == 0))
    return without


def _trimmed(table: Table) -> Table:
    """The same pairs, in the smallest rectangle of keys, without bounds that hide nothing."""
    q, nq, k, nk, lo, hi = table.T
    ahead = np.maximum(lo, 0)  # keys that no row sees
    behind = np.where(hi == UNBOUNDED, nk, np.minimum(nk, nq + np.minimum(hi, nk)))
    k, nk = k + ahead, np.maximum(0, behind - ahead)
    lo = np.where(lo == -UNBOUNDED, lo, lo - ahead)
    hi = np.where(hi == UNBOUNDED, hi, hi - ahead)
    lo = np.where(lo <= 1 - nq, -UNBOUNDED, lo)  # the last row sees the first key
    hi = np.where(hi >= nk - 1, UNBOUNDED, hi)  # the first row sees the last key
    return _table(q, nq, k, nk, lo, hi)


def _causal(table: Table) -> list[Table]:
    """Tasks bounded above only: the keys all rows see, the square, and the rows that see all keys."""
    q, nq, k, nk, _, hi = table.T
    side = np.minimum(nq, nk - hi)
    return [
        _table(q, nq, k, hi, -UNBOUNDED, UNBOUNDED),
        _table(q, side, k + hi, side, -UNBOUNDED, 0),
        _table(q + side, nq - side, k + hi, nk - hi, -UNBOUNDED, UNBOUNDED),
    ]


def _anticausal(table: Table) -> list[Table]:
    """Tasks bounded below only, whose rows see the last key: the rows that see all, the square, the keys after it."""
    q, nq, k, nk, lo, _ = table.T
    above = np.minimum(nq, -lo)
    side = nq - above
    return [
        _table(q, above, k, nk, -UNBOUNDED, UNBOUNDED),
        _table(q + above, side, k, side, 0, UNBOUNDED),
        _table(q + above, side, k + side, nk - side, -UNBOUNDED, UNBOUNDED),
    ]


def _band(table: Table) -> list[Table]:
    """Tasks bounded on both sides: squares as they are; of others the square whose diagonal is the upper bound.

    So all parts of one window, wherever layouts cut it, have the same bounds and share a launch. Left of that square
    only the lower bound hides keys, and below it too.
    """
    square = (table[:, NQ] == table[:, NK]) & (table[:, LO] <= 0) & (table[:, HI] >= 0)
    q, nq, k, nk, lo, hi = table[~square].T
    side = np.minimum(nq, nk - hi)
    window = _table(q, side, k + hi, side, lo - hi, 0)
    before = _table(q, np.minimum(nq, hi - lo), k, hi, lo, UNBOUNDED)
    after = _table(q + side, np.minimum(nq - side, nk - lo - side), k + hi, nk - hi, lo - hi + side, UNBOUNDED)
    rest = np.concatenate([before, after])
    rest = _trimmed(rest[(rest[:, NQ] > 0) & (rest[:, NK] > 0)])
    full = (rest[:, LO] == -UNBOUNDED) & (rest[:, HI] == UNBOUNDED)
    return [table[square], _trimmed_squares(window), rest[full], *_anticausal(rest[~full])]


def _trimmed_squares(table: Table) -> Table:
    """Squares without a lower bound that hides nothing."""
    table = table[(table[:, NQ] > 0) & (table[:, NK] > 0)].copy()
    table[table[:, LO] <= 1 - table[:, NQ], LO] = -UNBOUNDED
    return table
