"""Trees of nodes laid end to end, each a run of tokens: who sees whom, and at which position.

A token sees the tokens before it in its node, and all of the nodes on the way to its root. Parents are listed first, so
that whatever a token sees lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np

from cphandler.tokens.intervals import UNBOUNDED, Table, frozen, offsets_of, table

Path: TypeAlias = "tuple[tuple[int, int], ...]"
"""Key intervals ``[start, stop)`` from a root down to a node, ascending, none beginning where another ends."""


def tree_bands(parents: Sequence[int], lengths: Sequence[int]) -> Table:
    """Disjoint bands ``[n, 6]`` of a tree whose first token is token 0.

    A node that follows its parent at once is in the causal band of its parent, and nodes side by side that see the same
    interval before them share a band to it. A chain is one band, a question with n answers 2n at most.

    Args:
        parents: the parent of each node, an earlier one; -1 for a root.
        lengths: tokens of each node.
    """
    rows: list[tuple[int, ...]] = []
    seen_from: dict[tuple[int, int], int] = {}  # earlier intervals that the node at hand sees, and since which query
    first, key, end = 0, 0, 0  # the causal band at hand: queries [first, end) and keys [key, end)
    for path in _paths(parents, lengths):
        *before, (start, stop) = path
        if start != key or end == 0:
            rows.append((first, end, key, end, -UNBOUNDED, 0))
            first, key = end, start
        for interval, since in seen_from.items():
            if interval not in before:
                rows.append((since, end, *interval, -UNBOUNDED, UNBOUNDED))
        seen_from = {interval: seen_from.get(interval, end) for interval in before}
        end = stop
    rows.append((first, end, key, end, -UNBOUNDED, 0))
    rows += [(since, end, *interval, -UNBOUNDED, UNBOUNDED) for interval, since in seen_from.items()]
    return frozen(table([row for row in rows if row[0] < row[1]], 6))


def _paths(parents: Sequence[int], lengths: Sequence[int]) -> list[Path]:
    """The path of each node that has tokens, its own interval last."""
    paths: list[Path] = []
    for parent, (start, stop) in zip(parents, pairwise(accumulate(lengths, initial=0)), strict=True):
        path = paths[parent] if parent >= 0 else ()
        if start < stop and path and path[-1][1] == start:
            path = (*path[:-1], (path[-1][0], stop))
        elif start < stop:
            path = (*path, (start, stop))
        paths.append(path)
    return [path for path, length in zip(paths, lengths, strict=True) if length]


def tree_positions(parents: Sequence[int], lengths: Sequence[int]) -> Table:
    """``[T]`` position of each token: how many it sees before itself."""
    before: list[int] = []
    for parent in parents:
        before.append(before[parent] + lengths[parent] if parent >= 0 else 0)
    sizes = np.array(lengths, dtype=np.int64)
    ahead = np.array(before, dtype=np.int64) - offsets_of(sizes)[:-1]
    return frozen(np.arange(int(sizes.sum()), dtype=np.int64) + np.repeat(ahead, sizes))
