"""How sure a ratio is: a bootstrap over the repeats of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 4000
"""Draws of a bootstrap."""


class Interval(NamedTuple):
    """A median, and the interval that holds 95% of the medians of resampled repeats."""

    median: float
    low: float
    high: float


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Interval:
    """The ratio of two competitors, repeat by repeat, so that what slows a whole repeat falls out.

    Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        ours: a measure in each repeat.
        theirs: the same of another competitor, in the same repeats.
        seed: of the draws.

    Raises:
        ValueError: no repeats, or not the same number.
    """
    if not len(ours) or len(ours) != len(theirs):
        raise ValueError(f"one measure for each repeat of both competitors, got {len(ours)} and {len(theirs)}")
    return median_of(np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float), seed=seed)


def median_of(measures: ArrayLike, *, seed: int = 0) -> Interval:
    """The median of a measure over the repeats; see :func:`paired_ratio`.

    Args:
        measures: one in each repeat.
        seed: of the draws.
    """
    values = np.asarray(measures, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return Interval(float(np.median(values)), float(low), float(high))
