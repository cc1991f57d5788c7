"""Products of parameters, a part of which ``make test`` runs, and ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def one_in(count: int, *axes: Iterable[Any]) -> list[Any]:
    """The product of some axes, of which all are marked slow but one of any ``count`` neighbours along an axis.

    So for an axis of ``count`` values every combination of the others runs with one of them.

    Args:
        count: how many there are to one that is not slow.
        axes: the values of each parameter.
    """
    listed = [list(axis) for axis in axes]
    made = []
    for places in product(*(range(len(axis)) for axis in listed)):
        values = (axis[i] for axis, i in zip(listed, places, strict=True))
        made.append(pytest.param(*values, marks=[pytest.mark.slow] if sum(places) % count else []))
    return made


def half(*axes: Iterable[Any]) -> list[Any]:
    """The product of some axes; of two neighbours along any axis one is marked slow, and every value is in both halves.

    Args:
        axes: the values of each parameter.
    """
    return one_in(2, *axes)
