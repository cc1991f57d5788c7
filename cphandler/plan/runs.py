"""What a rank computes, and what others see of its keys, with a row to begin with for each run of an owner's rows.

Where ranks hold their tokens in order, what one of them has of any interval of tokens is one run of its rows. A
document of n chunks, cut chunk by chunk, gives a rank n rows or more, most of which are then joined.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cphandler.layouts.layout import LENGTH, LOCAL, RANK, START, Layout, cut_by_spans
from cphandler.plan.tasks import (
    NK,
    NQ,
    OWNER,
    TASK_HI,
    TASK_LO,
    K,
    Pieces,
    Q,
    coalesced,
    cut,
    in_local_rows,
    query_pieces,
)
from cphandler.tokens.bands import HI, K0, K1, LO, Q0, Q1, tightened
from cphandler.tokens.intervals import UNBOUNDED, Flags, Table, by_number, expand, in_order, offsets_of


def ordered_tasks(bands: Table, queries: Layout, keys: Layout, rank: int, turn: Table) -> Table:
    """``[n, 7]`` tasks of a rank, neighbours joined, by the turn of their owner, then by query and key rows.

    Args:
        bands: ``[n, 6]`` disjoint bands over valid rows, global coordinates.
        queries: layout of the query stream.
        keys: layout of the key stream.
        rank: the rank that computes.
        turn: ``[P]`` when each owner's keys are there, those of two owners never at once.
    """
    tight = tightened(bands)
    apart: Flags = (tight[:-1, Q1] <= tight[1:, Q0]) & (tight[:-1, K1] <= tight[1:, K0])
    if queries.is_dense and keys.is_dense and apart.all() and (tight[:, LO] == -UNBOUNDED).all():
        ((own,), (spans,)) = queries.tables([rank]), keys.tables()
        tasks = _of_runs(query_pieces(tight, own), spans, turn)
    else:
        tasks = coalesced(cut(bands, queries, keys, [rank])[0])
    return in_order(tasks, turn.take(tasks[:, OWNER]) - turn.min(initial=0), tasks[:, Q], tasks[:, K])


def _of_runs(pieces: Pieces, spans: Table, turn: Table) -> Table:
    """Joined tasks of pieces whose bands lie apart and have no lower bound.

    The pieces of a band lie side by side in local rows, and each sees all keys that those before it see. So spans that
    all rows of a piece see, and the pieces before it do not, are seen by all rows from its first to the band's last.
    What a piece sees a part of is cut by spans, and joined with what its owner has beside it.
    """
    k0, k1 = pieces.bands[:, K0], pieces.bands[:, K1]
    opens = np.append(True, k0[1:] != k0[:-1])[: len(k0)]
    last = np.append(np.flatnonzero(opens)[1:] - 1, len(k0) - 1)[np.cumsum(opens) - 1]
    whole = np.minimum(k1, pieces.bands[:, Q0] + pieces.bands[:, HI] + 1)  # keys before this one are seen by all rows
    starts, ends = spans[:, START], spans[:, START] + spans[:, LENGTH]
    stop = np.searchsorted(starts, k1)
    first = np.where(opens, np.searchsorted(ends, k0, "right"), np.append(0, stop)[:-1])
    split = np.maximum(first, np.where(whole < k1[last], np.searchsorted(ends, whole, "right"), stop))
    parts = _parts(pieces, last, spans, split, stop)
    runs = _held(first, split, spans, turn - turn.min(initial=0))
    is_cut = np.zeros(len(turn), dtype=bool)
    is_cut[parts[:, OWNER]] = True
    beside = is_cut.take(spans[:, RANK].take(runs.first))
    joined = coalesced(np.concatenate([_full(pieces, last, spans, runs.chosen(beside)), parts]))
    rest = _full(pieces, last, spans, runs.chosen(~beside), room=len(joined))
    rest[: len(joined)] = joined
    return rest


def _parts(pieces: Pieces, last: Table, spans: Table, first: Table, stop: Table) -> Table:
    """Tasks of spans ``[first, stop)`` and the rows from each piece to the last of its band, piece by piece."""
    span, piece = expand(first, stop - first), np.repeat(np.arange(len(first)), stop - first)
    count = last[piece] - piece + 1
    span, piece = np.repeat(span, count), expand(piece, count)
    k_first = np.maximum(pieces.bands[piece, K0] - spans[span, START], 0)
    k_stop = np.minimum(pieces.bands[piece, K1] - spans[span, START], spans[span, LENGTH])
    return in_local_rows(pieces, spans, piece, span, k_first, k_stop)[0]


def _full(pieces: Pieces, last: Table, spans: Table, runs: _Runs, room: int = 0) -> Table:
    """A task without bounds for each run and the rows from its piece to the band's last, behind some empty rows."""
    q = pieces.spans[:, LOCAL] + pieces.first
    nq = (q + pieces.stop - pieces.first)[last] - q
    starts, local = spans[:, START], spans[:, LOCAL]
    before = np.maximum(pieces.bands[:, K0].take(runs.item) - starts.take(runs.first), 0)
    held = np.minimum(pieces.bands[:, K1].take(runs.item) - starts.take(runs.last), spans[:, LENGTH].take(runs.last))
    columns = np.empty((7, room + len(before)), dtype=np.int64)  # column by column, as all that follows reads it
    result: Table = columns.T
    tasks = result[room:]
    tasks[:, OWNER] = spans[:, RANK].take(runs.first)
    tasks[:, Q], tasks[:, NQ] = q.take(runs.item), nq.take(runs.item)
    tasks[:, K] = local.take(runs.first) + before
    tasks[:, NK] = local.take(runs.last) + held - tasks[:, K]
    tasks[:, TASK_LO], tasks[:, TASK_HI] = -UNBOUNDED, UNBOUNDED
    return result


class _Runs(NamedTuple):
    """What ranks hold of items, each of which is a run of spans: the item, and a rank's first and last span of it."""

    item: Table
    first: Table
    last: Table

    def chosen(self, some: Flags) -> _Runs:
        """Some of them."""
        which = np.flatnonzero(some)
        return _Runs(*(column.take(which) for column in self))


def _held(first: Table, stop: Table, spans: Table, number: Table) -> _Runs:
    """What each rank holds of spans ``[first, stop)``, by the ranks' numbers, then in their order."""
    span, item = expand(first, stop - first), np.repeat(np.arange(len(first)), stop - first)
    numbers = number.astype(np.min_scalar_type(number.max(initial=0))).take(spans[:, RANK].take(span))
    order = by_number(numbers)
    numbers, item = numbers.take(order), item.take(order)
    edges = np.flatnonzero((numbers[1:] != numbers[:-1]) | (item[1:] != item[:-1]))
    opens, closes = (np.append(*ends)[: len(order)] for ends in ((0, edges + 1), (edges, len(order) - 1)))
    return _Runs(item.take(opens), span.take(order.take(opens)), span.take(order.take(closes)))


def key_runs(bands: Table, queries: Layout, keys: Layout, owner: int, turn: Table) -> tuple[Table, Table, Table]:
    """Runs of an owner's key rows that some rank's queries see: the rank's turn, the first row, and how many rows.

    They may touch and overlap.

    Args:
        bands: ``[n, 6]`` disjoint bands over valid rows, global coordinates.
        queries: layout of the query stream.
        keys: layout of the key stream.
        owner: whose keys.
        turn: ``[P]`` when each rank gets them, no two at once; -1 for one that does not.
    """
    if not queries.strides | keys.strides <= {1} or queries.replicated or keys.replicated:
        tasks, ranks = cut(bands, queries, keys, key_ranks=[owner])
        return turn.take(ranks), tasks[:, K], tasks[:, NK]
    ((spans,), (own,)) = queries.tables(), keys.tables([owner])
    bands = tightened(bands)
    begins = _rows_before(own, bands[:, K0])
    held = begins < _rows_before(own, bands[:, K1])
    bands, begins = bands[held], begins[held]
    ends = spans[:, START] + spans[:, LENGTH]
    first, stop = np.searchsorted(ends, bands[:, Q0], "right"), np.searchsorted(spans[:, START], bands[:, Q1])
    bounded = bool((bands[:, LO] != -UNBOUNDED).any())
    if bounded:  # otherwise the last row of a rank in a band sees all that its others do
        bands, first = bands.repeat(stop - first, axis=0), expand(first, stop - first)
        stop = first + 1
    item, begin, end = _held(first, stop, spans, turn + 1)
    q1 = np.minimum(bands[:, Q1].take(item), ends.take(end))
    stops = _rows_before(own, np.minimum(bands[:, K1].take(item), q1 + bands[:, HI].take(item)))
    if bounded:
        q0 = np.maximum(bands[:, Q0], spans[:, START].take(first))
        begins = _rows_before(own, np.maximum(bands[:, K0], q0 + bands[:, LO]))
    starts = begins.take(item)
    some = np.flatnonzero(starts < stops)
    when, starts, stops = turn.take(spans[:, RANK].take(begin.take(some))), starts.take(some), stops.take(some)
    if keys.is_dense:
        return when, starts, stops - starts
    local, own[:, START] = own[:, LOCAL].copy(), offsets_of(own[:, LENGTH])[:-1]
    run, span, first, stop = cut_by_spans(starts, stops, own)
    return when.take(run), local.take(span) + first, stop - first


def _rows_before(spans: Table, tokens: Table) -> Table:
    """How many rows of ascending spans of stride 1 are before each token."""
    if not len(spans):
        return np.zeros_like(tokens)
    span = np.maximum(np.searchsorted(spans[:, START], tokens, side="right") - 1, 0)
    within = np.minimum(tokens - spans[:, START].take(span), spans[:, LENGTH].take(span))
    rows: Table = offsets_of(spans[:, LENGTH]).take(span) + np.maximum(within, 0)
    return rows
