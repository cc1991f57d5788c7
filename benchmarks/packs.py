"""Packs of documents with honest lengths, the least that has to travel for them, and what is asked of a layout.

Shares are of what a ring moves: each of P ranks receives the ``S * (P - 1) / P`` rows of the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA = Path(__file__).parent / "data"

CORPORA = ("pile", "prolong64k", "prolong512k")
"""Corpora whose lengths are known."""

RANKS = (2, 4, 8, 16, 64)
"""Numbers of ranks for which there are packs."""

TOKENS = 8192
"""Tokens of a pack for each rank."""


class Floor(NamedTuple):
    """The least rows that other ranks receive where every rank has its fair share of attention area.

    Attributes:
        volume: F, the mean over ranks, as a share of what a ring's rank receives.
        worst: W, what the rank with the end of the longest document receives, as the same share.
    """

    volume: float
    worst: float


class Bounds(NamedTuple):
    """What is asked of a layout on a corpus, on average over its packs unless said otherwise.

    Attributes:
        volume: most rows received, mean over ranks, as a share of a ring's.
        worst: most rows that the busiest rank receives, as a share of a ring's.
        area: largest share of attention area over the mean.
        area_of_any: the same, of every pack.
        milliseconds: median time to make the layout.
    """

    volume: float
    worst: float
    area: float
    area_of_any: float
    milliseconds: float


@cache
def _stored(corpus: str) -> dict[str, list[list[int]]]:
    packs: dict[str, list[list[int]]] = json.loads((DATA / "packs" / f"{corpus}.json").read_text())
    return packs


def packs(corpus: str, ranks: int) -> list[list[int]]:
    """Document lengths of the 16 packs kept for a number of ranks.

    Raises:
        KeyError: no packs for so many ranks.
    """
    return _stored(corpus)[str(ranks)]


@cache
def histogram(corpus: str) -> tuple[list[tuple[int, int]], list[float]]:
    """Buckets ``[lo, hi)`` of document lengths and their probabilities."""
    buckets: dict[str, float] = json.loads((DATA / "doc_lengths" / f"{corpus}.json").read_text())
    edges = [tuple(map(int, name.strip("[)").split(","))) for name in buckets]
    total = sum(buckets.values())
    return [(low, high) for low, high in edges], [weight / total for weight in buckets.values()]


def drawn(
    corpus: str, ranks: int, count: int, seed: int, *, tokens: int = TOKENS, longest: int | None = None
) -> list[list[int]]:
    """Other packs of the same kind.

    Lengths are uniform inside a bucket, a document is at most a quarter of its pack, and the last one is trimmed so
    that the pack is exactly full.

    Args:
        corpus: whose lengths.
        ranks: ranks the packs are for.
        count: how many packs.
        seed: what decides them, together with the corpus and the ranks.
        tokens: tokens of a pack for each rank.
        longest: tokens of the longest document; None for a quarter of the pack.
    """
    generator = np.random.default_rng([seed, CORPORA.index(corpus), ranks])
    buckets, weights = histogram(corpus)
    low, high = np.array(buckets).T
    total, result = ranks * tokens, []
    longest = total // 4 if longest is None else longest
    for _ in range(count):
        pack: list[int] = []
        room = total
        while room:
            bucket = generator.choice(len(low), p=weights, size=max(16, ranks))
            for length in np.clip(generator.integers(low[bucket], high[bucket]), 1, longest).tolist():
                pack.append(min(length, room))
                room -= pack[-1]
                if not room:
                    break
        result.append(pack)
    return result


def floor(lengths: Sequence[int], ranks: int) -> Floor:
    """The least that causal attention has to move, and the most that one rank must.

    A document whose area is k > 1 fair shares of a rank has to be cut. The cheapest cut is a chain: an odd piece of
    ``k - floor(k)`` shares first, then whole shares; each later piece receives all rows before it.
    """
    share = sum(length * (length + 1) / 2 for length in lengths) / ranks
    rows = worst = 0.0
    for length in lengths:
        k = length * (length + 1) / 2 / share if share else 0.0
        if k <= 1:
            continue
        whole = math.floor(k)
        rows += sum(length * math.sqrt((k - whole + j) / k) for j in range(whole))
        worst = max(worst, length * math.sqrt(1 - 1 / k))
    tokens = sum(lengths)
    if ranks == 1 or not tokens:
        return Floor(0.0, 0.0)
    return Floor(rows / (tokens * (ranks - 1)), worst / (tokens * (ranks - 1) / ranks))


def mean_floor(chosen: Sequence[Sequence[int]], ranks: int) -> Floor:
    """The mean of several packs' floors."""
    floors = [floor(lengths, ranks) for lengths in chosen]
    return Floor(*(sum(column) / len(floors) for column in zip(*floors, strict=True)))


def bounds(least: Floor, volume: float, ranks: int) -> Bounds | None:
    """What is asked of a layout; None for a number of ranks of which nothing is asked.

    Args:
        least: mean floor of the packs.
        volume: the layout's own mean volume: two ranks are held to each other.
        ranks: how many.
    """
    if ranks == 2:
        return Bounds(least.volume + 0.055, 2 * volume, 1.02, 1.03, 10)
    if ranks == 64:
        return Bounds(1.1 * least.volume + 0.01, least.worst + 0.03, 1.05, 1.06, 100)
    room = {4: 0.030, 8: 0.025, 16: 0.022}.get(ranks)
    if room is None:
        return None
    return Bounds(least.volume + room, least.worst + 0.04, 1.02, 1.03, {4: 10, 8: 10, 16: 30}[ranks])
