"""The instruments that layouts are measured with: packs, the least that must travel for them, and the script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.packs import CORPORA, RANKS, bounds, drawn, floor, histogram, mean_floor, packs
from benchmarks.planning import misses, planned, quality, whole

FLOORS = {
    "pile": (0.022, 0.056, 0.052, 0.053, 0.110),
    "prolong64k": (0.005, 0.062, 0.085, 0.094, 0.044),
    "prolong512k": (0.018, 0.063, 0.090, 0.105, 0.155),
}
"""Mean least volume of the packs that are kept, for each number of ranks."""


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_least_that_must_travel_for_the_packs(corpus: str) -> None:
    for ranks, expected in zip(RANKS, FLOORS[corpus], strict=True):
        assert mean_floor(packs(corpus, ranks), ranks).volume == pytest.approx(expected, abs=5e-4)


def test_the_least_of_one_document() -> None:
    """Of two ranks the later one receives the first ``sqrt(1/2)`` of it: as a share of half its tokens, twice that."""
    least = floor([1 << 20], 2)
    assert least.volume == pytest.approx(np.sqrt(0.5), abs=1e-5)
    assert least.worst == pytest.approx(np.sqrt(2), abs=1e-5)
    assert floor([7, 7], 2) == (0, 0)
    assert floor([7, 7], 1) == (0, 0)
    assert floor([], 4) == (0, 0)


@pytest.mark.parametrize("corpus", CORPORA)
def test_packs_that_are_drawn(corpus: str) -> None:
    found = drawn(corpus, 4, 5, seed=3)
    assert found == drawn(corpus, 4, 5, seed=3) != drawn(corpus, 4, 5, seed=4)
    assert all(sum(lengths) == 4 * 8192 for lengths in found)
    assert all(1 <= length <= 8192 for lengths in found for length in lengths)
    buckets, weights = histogram(corpus)
    many = np.array(drawn(corpus, 64, 3, seed=0, tokens=1 << 16)[0][:-1])
    low, high = buckets[10]
    share = ((many >= low) & (many < high)).mean()
    assert share == pytest.approx(weights[10], abs=5 * np.sqrt(weights[10] / len(many)))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_short_documents_stay_whole(ranks: int) -> None:
    for lengths in [*packs("pile", ranks)[:3], [5] * 9, [3 * ranks, 1, 0, 2]]:
        layout = whole(lengths, ranks)
        held = [int(spans[:, 1].sum()) for spans in layout.spans]
        assert max(held) <= -(-sum(lengths) // ranks)
        assert layout.num_local_tokens == -(-sum(lengths) // ranks)
    assert [spans.tolist() for spans in whole([4, 4, 4, 4], 2).spans] == [
        [[0, 4, 1, 0], [8, 4, 1, 4]],
        [[4, 4, 1, 0], [12, 4, 1, 4]],
    ]


def test_numbers_that_miss_what_is_asked() -> None:
    chosen = packs("pile", 8)[:2]
    least = mean_floor(chosen, 8)
    found = quality(chosen, 8, "zigzag")
    assert misses(found, bounds(least, found.volume, 8))[:4] == [True, True, False, False]
    assert misses(found, None) == [False] * 6
    level = quality(chosen, 8, "contiguous")
    assert misses(level, bounds(least, level.volume, 8))[2:4] == [True, True]
    assert planned(chosen[0], 8, "whole")[1].volume < planned(chosen[0], 8, "zigzag")[1].volume


@pytest.mark.slow
def test_the_script() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "benchmarks.planning", "--corpus", "pile", *arguments]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kept = run("--ranks", "4", "--count", "2")
    assert "asked" in kept
    assert "1.000 !" in kept
    assert "3 packs of seed 5" in run("--ranks", "3", "--count", "3", "--seed", "5")
    assert "1048576" in run("--ranks", "8", "--scales", "--layout", "contiguous")
