"""Products of parameters, half of which ``make test`` runs, and ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def half(*axes: Iterable[Any]) -> list[Any]:
    """The product of some axes; of two neighbours along any axis one is marked slow, and every value is in both halves.

    Args:
        axes: the values of each parameter.
    """
    listed = [list(axis) for axis in axes]
    made = []
    for places in product(*(range(len(axis)) for axis in listed)):
        values = (axis[i] for axis, i in zip(listed, places, strict=True))
        made.append(pytest.param(*values, marks=[pytest.mark.slow] if sum(places) % 2 else []))
    return made
