"""Random choices that follow from a seed and a number alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


class Chance(random.Random):
    """Choices with weights, on any machine the same for the same seed."""

    def happens(self, probability: float) -> bool:
        """True with a probability."""
        return self.random() < probability

    def pick(self, weights: Mapping[T, float]) -> T:
        """One of the keys, as often as its weight says."""
        return self.choices(list(weights), list(weights.values()))[0]

    def cuts(self, total: int, parts: int) -> list[int]:
        """How long each of some parts of a total is; parts may be empty."""
        edges = [0, *sorted(self.randint(0, total) for _ in range(parts - 1)), total]
        return [stop - start for start, stop in pairwise(edges)]
