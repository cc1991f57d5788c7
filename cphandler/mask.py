"""Masks: who may see whom, as bands in global coordinates. No layout, no padding, no ranks.

A band ``(q0, q1, k0, k1, lo, hi)`` lets query rows ``[q0, q1)`` see key rows ``[k0, k1)`` where
``lo <= k - q <= hi``. A mask is a set of disjoint bands. Padding is not the mask's business: bands speak of physical
rows, and :func:`restrict` cuts them to the valid ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.intervals import UNBOUNDED, Table, overlaps, table

Q0, Q1, K0, K1, LO, HI = range(6)
"""Columns of a band table."""


class Mask(ABC):
    """A value that says which keys a query may see; hashable, the same on every rank."""

    @abstractmethod
    def bands(self, offsets: Table) -> Table:
        """``[n, 6]`` disjoint bands over documents with these physical ``[D + 1]`` offsets."""

    @property
    def is_causal(self) -> bool:
        """True where no query sees a later key."""
        return False


def _document_bands(offsets: Table, lo: int, hi: int) -> Table:
    starts, stops = offsets[:-1], offsets[1:]
    keep = stops > starts
    starts, stops = starts[keep], stops[keep]
    bounds = np.broadcast_to(np.array([lo, hi], dtype=np.int64), (len(starts), 2))
    return np.concatenate([np.stack([starts, stops, starts, stops], axis=1), bounds], axis=1)


@dataclass(frozen=True)
class Causal(Mask):
    """Each token sees itself and the tokens before it in its document."""

    def bands(self, offsets: Table) -> Table:
        """One band per document, ``hi = 0``."""
        return _document_bands(offsets, -UNBOUNDED, 0)

    @property
    def is_causal(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class Full(Mask):
    """Each token sees its whole document."""

    def bands(self, offsets: Table) -> Table:
        """One unbounded band per document."""
        return _document_bands(offsets, -UNBOUNDED, UNBOUNDED)


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Each token sees ``left`` tokens before and ``right`` tokens after itself, inside its document.

    Both bounds are inclusive and count physical positions, itself not counted: ``SlidingWindow(1)`` sees itself and
    the token before.

    Raises:
        InvalidTypeError: a bound that is not an int.
        InvalidValueError: a negative bound.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidTypeError(f"SlidingWindow {name} must be an int", got=repr(value))
            if value < 0:
                raise InvalidValueError(
                    f"SlidingWindow {name} must not be negative",
                    got=value,
                    fix="it counts tokens; use Causal() or Full() for no bound",
                )

    def bands(self, offsets: Table) -> Table:
        """One band per document, ``-left <= k - q <= right``."""
        return _document_bands(offsets, -self.left, self.right)

    @property
    def is_causal(self) -> bool:
        """True where ``right`` is 0."""
        return self.right == 0


@dataclass(frozen=True, init=False)
class Bands(Mask):
    """A mask given as its bands ``(q0, q1, k0, k1, lo, hi)`` in packed coordinates.

    It may cross documents. ``lo`` may be ``-math.inf`` and ``hi`` ``math.inf``. The same bands serve every row of a
    dense batch.

    Raises:
        InvalidValueError: rows that are not six numbers, intervals that run backwards or below 0, ``lo > hi``, or
            bands that overlap.
    """

    rows: tuple[tuple[int, int, int, int, int, int], ...]

    def __init__(self, rows: Iterable[Sequence[float]]) -> None:
        checked = []
        for i, row in enumerate(rows):
            if len(row) != 6:
                raise InvalidValueError(f"band {i} must be (q0, q1, k0, k1, lo, hi)", got=f"{len(row)} numbers")
            if any(math.isnan(value) or (not math.isinf(value) and int(value) != value) for value in row) or any(
                math.isinf(value) for value in row[:4]
            ):
                raise InvalidValueError(f"band {i} must hold integers", got=tuple(row))
            q0, q1, k0, k1 = (int(value) for value in row[:4])
            lo, hi = (int(min(max(value, -UNBOUNDED), UNBOUNDED)) for value in row[4:])
            if not (0 <= q0 <= q1 and 0 <= k0 <= k1 and lo <= hi):
                raise InvalidValueError(
                    f"band {i} is empty or runs backwards", got=tuple(row), fix="0 <= q0 <= q1, 0 <= k0 <= k1, lo <= hi"
                )
            checked.append((q0, q1, k0, k1, lo, hi))
        object.__setattr__(self, "rows", tuple(checked))
        self._refuse_overlap()

    def _refuse_overlap(self) -> None:
        """A pair of cells seen twice would count twice in the softmax."""
        bands = tightened(table(self.rows, 6))
        order = np.argsort(bands[:, Q0], kind="stable")
        bands = bands[order]
        for i in range(len(bands)):
            a = bands[i]
            rest = bands[i + 1 :]
            rest = rest[: np.searchsorted(rest[:, Q0], a[Q1], side="left")]
            both = np.stack(
                [
                    np.maximum(a[Q0], rest[:, Q0]),
                    np.minimum(a[Q1], rest[:, Q1]),
                    np.maximum(a[K0], rest[:, K0]),
                    np.minimum(a[K1], rest[:, K1]),
                    np.maximum(a[LO], rest[:, LO]),
                    np.minimum(a[HI], rest[:, HI]),
                ],
                axis=1,
            )
            if len(tightened(both)):
                raise InvalidValueError(
                    "bands must be disjoint",
                    got=f"band {tuple(int(x) for x in a)} overlaps another",
                    fix="cut one of the two so that no (query, key) pair is in both",
                )

    def bands(self, offsets: Table) -> Table:
        """The bands as given.

        Raises:
            InvalidValueError: a band that reaches past the last token.
        """
        bands = table(self.rows, 6)
        reach = int(bands[:, [Q1, K1]].max(initial=0))
        if reach > int(offsets[-1]):
            raise InvalidValueError(
                "a band reaches past the end of the sequence",
                got=f"token {reach} of {int(offsets[-1])}",
                fix="bands are in packed coordinates of the global sequence",
            )
        return bands

    @property
    def is_causal(self) -> bool:
        """True where no band reaches a later key."""
        bands = table(self.rows, 6)
        return bool((np.minimum(bands[:, HI], bands[:, K1] - 1 - bands[:, Q0]) <= 0).all())


def tightened(bands: Table) -> Table:
    """Drop what no pair satisfies: rows that see nothing at either end of a band, then empty bands."""
    bands = bands.copy()
    for _ in range(2):
        bands[:, Q0] = np.maximum(bands[:, Q0], bands[:, K0] - bands[:, HI])
        bands[:, Q1] = np.minimum(bands[:, Q1], bands[:, K1] - bands[:, LO])
        bands[:, K0] = np.maximum(bands[:, K0], bands[:, Q0] + bands[:, LO])
        bands[:, K1] = np.minimum(bands[:, K1], bands[:, Q1] + bands[:, HI])
    return bands[(bands[:, Q0] < bands[:, Q1]) & (bands[:, K0] < bands[:, K1]) & (bands[:, LO] <= bands[:, HI])]


def stack(bands: Table, copies: int, num_tokens: int) -> Table:
    """The same bands for ``copies`` streams of ``num_tokens`` tokens laid end to end."""
    if copies == 1:
        return bands
    repeated = np.concatenate([bands] * copies)
    repeated[:, [Q0, Q1, K0, K1]] += np.repeat(np.arange(copies, dtype=np.int64) * num_tokens, len(bands))[:, None]
    return repeated


def restrict(bands: Table, runs: Table) -> Table:
    """Cut bands to the valid ``[R, 2]`` runs, on the query and on the key side."""
    bands = tightened(bands)
    which, run = overlaps(bands[:, Q0], bands[:, Q1], runs[:, 0], runs[:, 1])
    bands = bands[which]
    bands[:, Q0] = np.maximum(bands[:, Q0], runs[run, 0])
    bands[:, Q1] = np.minimum(bands[:, Q1], runs[run, 1])
    bands = tightened(bands)
    which, run = overlaps(bands[:, K0], bands[:, K1], runs[:, 0], runs[:, 1])
    bands = bands[which]
    bands[:, K0] = np.maximum(bands[:, K0], runs[run, 0])
    bands[:, K1] = np.minimum(bands[:, K1], runs[run, 1])
    return tightened(bands)


def make_mask(mask: str | Mask) -> Mask:
    """A mask by name (``"causal"``, ``"full"``), or the one given.

    Raises:
        InvalidTypeError: neither a name nor a Mask.
        InvalidValueError: an unknown name.
    """
    if isinstance(mask, Mask):
        return mask
    if not isinstance(mask, str):
        raise InvalidTypeError(
            "mask must be a name or a Mask", got=type(mask).__name__, fix='pass "causal", "full" or a cphandler mask'
        )
    named: dict[str, Mask] = {"causal": Causal(), "full": Full()}
    if mask.lower() not in named:
        raise InvalidValueError(
            "unknown mask",
            got=repr(mask),
            fix=f"choose one of {', '.join(named)}, or pass a Mask such as SlidingWindow(128)",
        )
    return named[mask.lower()]
