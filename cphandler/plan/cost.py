"""What falls to each rank: the attention it computes, and the key rows that it needs from others.

Counted from bands and spans without listing a task, so that layouts can be compared at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np

from cphandler.layouts.layout import LENGTH, RANK, START, STRIDE, Layout
from cphandler.plan.tasks import Pieces, query_pieces
from cphandler.tokens.bands import HI, K0, K1, LO, Q0, Q1, tightened
from cphandler.tokens.intervals import Table, expand, offsets_of

MOST_PAIRS = 1 << 62
"""Pairs and bytes are counted in int64 where all of them together are fewer, and in Python's integers otherwise."""


class RankCost(NamedTuple):
    """What falls to each rank; both columns are ``[P]``.

    Attributes:
        area: pairs of a query of the rank and a key that it sees, on any rank. Four thousand million causal tokens have
            more of them than int64 holds; the column is one of Python integers (dtype object) then.
        rows: distinct key rows of other ranks that the rank's queries see: what direct sends bring it, to the row.
    """

    area: Table
    rows: Table


class _Runs(NamedTuple):
    """Runs ``[start, stop)`` of global keys, and the rank whose queries see them."""

    ranks: Table
    starts: Table
    stops: Table


def rank_cost(bands: Table, queries: Layout, keys: Layout) -> RankCost:
    """Count what falls to each rank.

    Args:
        bands: ``[n, 6]`` disjoint bands over valid rows, global coordinates.
        queries: layout of the query stream.
        keys: layout of the key stream, over the same ranks.
    """
    bands = tightened(bands)
    area, rows = np.zeros((2, queries.cp_size), dtype=np.int64)
    wide = _may_overflow(bands)
    if wide:
        area = _unlimited(area)
    plain = queries.strides | keys.strides <= {1} and not (queries.replicated or keys.replicated)
    for ranks in [range(queries.cp_size)] if plain else [[rank] for rank in range(queries.cp_size)]:
        seen = []
        for spans in queries.tables(ranks):
            pieces = query_pieces(bands, spans)
            np.add.at(area, pieces.spans[:, RANK], _area(pieces, _unlimited if wide else np.asarray))
            seen.append(_seen(pieces))
        if not seen:
            continue
        runs = _union(_Runs(*(np.concatenate(column) for column in zip(*seen, strict=True))), keys.num_tokens)
        np.add.at(rows, runs.ranks, runs.stops - runs.starts)
        for spans in keys.tables(ranks):
            np.subtract.at(rows, runs.ranks, _held(runs, spans, keys.num_tokens))
    area = _unlimited(area) if sum(area.tolist()) >= MOST_PAIRS else area.astype(np.int64)
    for column in (area, rows):
        column.setflags(write=False)  # kept with the plan, and handed out
    return RankCost(area, rows)


def product(column: Table, factor: int) -> Table:
    """A column times a number: int64 where all of it together fits twice, Python's integers otherwise."""
    fits = 2 * sum(column.tolist()) * int(factor) < MOST_PAIRS
    return column * factor if fits else _unlimited(column) * int(factor)


def _unlimited(column: Table) -> Table:
    """The same numbers as Python's, which know no limit."""
    return cast(Table, column.astype(object))


def _may_overflow(bands: Table) -> bool:
    """Whether sums over the pairs of some bands, with all that adds up to them, may be past int64."""
    rows, keys = (bands[:, Q1] - bands[:, Q0]).astype(float), (bands[:, K1] - bands[:, K0]).astype(float)
    return float(rows @ (rows + keys)) > MOST_PAIRS / 8


def _bounds(pieces: Pieces) -> tuple[Table, Table]:
    """Bounds on ``k - q`` without the sentinels, which sums would overflow."""
    bands = pieces.bands
    lo = np.maximum(bands[:, LO], bands[:, K0] - bands[:, Q1] + 1)
    hi = np.minimum(bands[:, HI], bands[:, K1] - bands[:, Q0] - 1)
    return lo, hi


def _area(pieces: Pieces, numbers: Callable[[Table], Table]) -> Table:
    """Pairs in each piece: the row that is i-th sees keys from ``max(K0, q + lo)`` to ``min(K1 - 1, q + hi)``."""
    bands = pieces.bands
    rows, stride = numbers(pieces.stop - pieces.first), numbers(pieces.spans[:, STRIDE])
    lo, hi = map(numbers, _bounds(pieces))
    keys, first = numbers(bands[:, K1] - bands[:, K0]), numbers(bands[:, Q0] - bands[:, K0])
    late = np.clip(-(-(keys - 1 - first - hi) // stride), 0, rows)  # rows before this one end with a key q + hi
    ends = late * (first + hi) + stride * (late * (late - 1) // 2) + (rows - late) * (keys - 1)
    early = np.clip(-(-(-first - lo) // stride), 0, rows)  # rows before this one begin with the first key
    begins = (rows - early) * (first + lo) + stride * ((rows * (rows - 1) - early * (early - 1)) // 2)
    pairs: Table = ends - begins + rows
    return pairs


def _seen(pieces: Pieces) -> _Runs:
    """The keys of each piece: all that it spans, but where its rows lie further apart than they see."""
    bands, ranks, (lo, hi) = pieces.bands, pieces.spans[:, RANK], _bounds(pieces)
    rows, stride = pieces.stop - pieces.first, pieces.spans[:, STRIDE]
    apart = np.flatnonzero((hi - lo + 1 < stride) & (rows > 1))
    if not len(apart):
        return _Runs(ranks, bands[:, K0], bands[:, K1])
    each = np.repeat(apart, rows[apart])
    query = expand(bands[apart, Q0], rows[apart], stride[apart])
    starts = np.maximum(bands[each, K0], query + lo[each])
    stops = np.minimum(bands[each, K1], query + hi[each] + 1)
    whole = np.delete(np.arange(len(bands)), apart)
    return _Runs(
        np.concatenate([ranks[whole], ranks[each]]),
        np.concatenate([bands[whole, K0], starts]),
        np.concatenate([bands[whole, K1], stops]),
    )


def _union(runs: _Runs, num_tokens: int) -> _Runs:
    """Disjoint runs of the same keys, rank by rank, ascending."""
    room = num_tokens + 1  # ranks laid end to end, so that one sort and one running maximum serve all
    starts = runs.ranks * room + runs.starts
    order = np.argsort(starts)
    starts = starts[order]
    stops = np.maximum.accumulate((runs.ranks * room + runs.stops)[order])
    opens = np.ones(len(starts), dtype=bool)
    opens[1:] = starts[1:] > stops[:-1]
    first = np.flatnonzero(opens)
    starts, stops = starts[first], stops[np.append(first[1:], len(stops))[: len(first)] - 1]
    ranks = starts // room
    return _Runs(ranks, starts - ranks * room, stops - ranks * room)


def _held(runs: _Runs, spans: Table, num_tokens: int) -> Table:
    """How many keys of each run its own rank holds in spans that do not interleave."""
    if not len(spans):
        return np.zeros_like(runs.ranks)
    room = num_tokens + 1
    spans = spans[np.argsort(spans[:, RANK] * room + spans[:, START])]
    starts, before = spans[:, RANK] * room + spans[:, START], offsets_of(spans[:, LENGTH])

    def until(tokens: Table) -> Table:
        """Tokens in spans before a token of a rank, all ranks laid end to end."""
        at = runs.ranks * room + tokens
        span = np.searchsorted(starts, at, side="left") - 1
        reached = np.minimum(-(-(at - starts[span]) // spans[span, STRIDE]), spans[span, LENGTH])
        counted: Table = np.where(span >= 0, before[span] + reached, 0)
        return counted

    return until(runs.stops) - until(runs.starts)
