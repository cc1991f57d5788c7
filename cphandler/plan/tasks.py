"""Tasks: bands cut by the spans of queries and keys. Integer tables, the same on every rank, no communication.

Cutting a band by the spans of a query rank and a key rank gives tasks, each a band in local rows: query row ``i`` and
key row ``j`` of a task see each other where ``lo <= j - i <= hi``. This is the same for every layout, so that one
attention loop and one kernel interface serve all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cphandler.layouts.layout import LENGTH, LOCAL, RANK, START, STRIDE, Layout, cut_by_spans
from cphandler.tokens.bands import HI, K0, K1, LO, Q0, Q1, tightened
from cphandler.tokens.intervals import UNBOUNDED, Flags, Table, chosen, expand, in_order, table

OWNER, Q, NQ, K, NK, TASK_LO, TASK_HI = range(7)
"""Columns of a task table: the rank that owns the keys, query rows ``[q, q + nq)`` of the rank that computes, key rows
``[k, k + nk)`` of the owner, and the bounds on ``j - i``, counted from the first row of each."""


def cut(
    bands: Table,
    queries: Layout,
    keys: Layout,
    query_ranks: Sequence[int] | None = None,
    key_ranks: Sequence[int] | None = None,
) -> tuple[Table, Table]:
    """Bands cut to the spans of some ranks, in no particular order.

    Args:
        bands: ``[n, 6]`` disjoint bands over valid rows, global coordinates.
        queries: layout of the query stream.
        keys: layout of the key stream.
        query_ranks: whose queries; None for everybody's.
        key_ranks: whose keys.

    Returns:
        ``[m, 7]`` tasks, every row and key of which sees or is seen, and ``[m]`` the rank of each one's queries.
    """
    pieces = _all_pieces(tightened(bands), list(queries.tables(query_ranks)))
    parts = [_local_tasks(pieces, key_spans) for key_spans in keys.tables(key_ranks)]
    if len(parts) == 1:
        return parts[0]
    tasks, ranks = zip((table([], 7), table([], 1).reshape(-1)), *parts, strict=True)
    return np.concatenate(tasks), np.concatenate(ranks)


class Pieces(NamedTuple):
    """Bands cut by query spans: each band tightened to its rows, and the rows ``[first, stop)`` of their span."""

    bands: Table
    spans: Table
    first: Table
    stop: Table


def query_pieces(bands: Table, queries: Table) -> Pieces:
    """Bands cut by spans that do not interleave; every row of a piece sees a key, and at stride 1 every key is seen."""
    band, span, first, stop = cut_by_spans(bands[:, Q0], bands[:, Q1], queries)
    spans, pieces = np.empty((len(span), 5), dtype=np.int64), bands.take(band, axis=0)
    for column in range(5):
        spans[:, column] = queries[:, column].take(span)
    start, stride = spans[:, START], spans[:, STRIDE]
    starts, stops = start + first * stride, start + (stop - 1) * stride + 1
    pieces[:, Q0], pieces[:, Q1] = starts, stops
    pieces[:, K0] = np.maximum(pieces[:, K0], starts + pieces[:, LO])
    pieces[:, K1] = np.minimum(pieces[:, K1], stops + pieces[:, HI])
    return Pieces(pieces, spans, first, stop)


def _all_pieces(bands: Table, tables: Sequence[Table]) -> Pieces:
    """Bands cut by several tables, each of which does not interleave in itself."""
    if len(tables) == 1:
        return query_pieces(bands, tables[0])
    parts = [query_pieces(bands, spans) for spans in [table([], 5), *tables]]
    return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _local_tasks(pieces: Pieces, key_spans: Table) -> tuple[Table, Table]:
    """Pieces cut by key spans, in local rows, and the rank that runs each."""
    return in_local_rows(pieces, key_spans, *cut_by_spans(pieces.bands[:, K0], pieces.bands[:, K1], key_spans))


def in_local_rows(
    pieces: Pieces, key_spans: Table, piece: Table, span: Table, k_first: Table, k_stop: Table
) -> tuple[Table, Table]:
    """Tasks of pieces and rows ``[k_first, k_stop)`` of key spans, and the rank that runs each.

    The bounds are converted by stride and offset here, once; then rows that see nothing are trimmed.
    """
    bands, spans, first = pieces.bands, pieces.spans, pieces.first
    tasks = np.empty((7, len(piece)), dtype=np.int64).T  # column by column in memory, as all that follows reads it
    tasks[:, OWNER] = key_spans[:, RANK].take(span)
    tasks[:, Q] = (spans[:, LOCAL] + first).take(piece)
    tasks[:, NQ] = nq = (pieces.stop - first).take(piece)
    tasks[:, K] = key_spans[:, LOCAL].take(span) + k_first
    tasks[:, NK] = nk = k_stop - k_first
    offset = key_spans[:, START].take(span) + k_first * key_spans[:, STRIDE].take(span) - bands[:, Q0].take(piece)
    lo, hi = bands[:, LO].take(piece) - offset, bands[:, HI].take(piece) - offset
    stride = np.maximum(spans[:, STRIDE].take(piece), key_spans[:, STRIDE].take(span))
    if (stride != 1).any():  # a span of one row says 1, and has any
        lo, hi = -(-lo // stride), hi // stride
    tasks[:, TASK_LO], tasks[:, TASK_HI] = -UNBOUNDED, UNBOUNDED
    cut_off = np.flatnonzero((lo > 1 - nq) | (hi < nk - 1))
    ranks = spans[:, RANK].take(piece)
    if not len(cut_off):
        return tasks, ranks
    tasks[cut_off] = _trimmed(chosen(tasks, cut_off), lo.take(cut_off), hi.take(cut_off))
    some = (tasks[:, NQ] > 0) & (tasks[:, NK] > 0)
    return (tasks, ranks) if some.all() else (chosen(tasks, np.flatnonzero(some)), ranks[some])


def _trimmed(tasks: Table, lo: Table, hi: Table) -> Table:
    """Tasks without the rows that see nothing at their ends, as :func:`cphandler.tokens.bands.tightened` does it.

    Args:
        tasks: without bounds; those of which nothing is left get 0 rows, or fewer.
        lo: least ``j - i``.
        hi: largest ``j - i``.
    """
    q0, q1, k0, k1 = _seen(tasks[:, NQ], tasks[:, NK], lo, hi)
    nq, nk, shift = q1 - q0, k1 - k0, k0 - q0
    lo, hi = lo - shift, hi - shift
    nq = np.where(lo <= hi, nq, 0)
    lo, hi = np.where(lo <= 1 - nq, -UNBOUNDED, lo), np.where(hi >= nk - 1, UNBOUNDED, hi)
    return np.stack([tasks[:, OWNER], tasks[:, Q] + q0, nq, tasks[:, K] + k0, nk, lo, hi], axis=1)


def _seen(nq: Table, nk: Table, lo: Table, hi: Table) -> tuple[Table, Table, Table, Table]:
    """Rows ``[q0, q1)`` of ``nq`` and keys ``[k0, k1)`` of ``nk`` that see or are seen."""
    q0 = np.maximum(0, -hi)
    q1 = np.minimum(nq, nk - lo)
    k0 = np.maximum(0, q0 + lo)
    k1 = np.minimum(nk, q1 + hi)
    q0 = np.maximum(q0, k0 - hi)
    q1 = np.minimum(q1, k1 - lo)
    return q0, q1, np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)


def _is_full(tasks: Table) -> Flags:
    full: Flags = (tasks[:, TASK_LO] == -UNBOUNDED) & (tasks[:, TASK_HI] == UNBOUNDED)
    return full


def coalesced(tasks: Table) -> Table:
    """Fewer, larger tasks over the same pairs: neighbours that one band describes become one task.

    The first row of a task sees its first key, and no pair is in two tasks: so no task begins inside a full one, and
    what joins another is next to it once they are sorted by where they begin.
    """
    tasks = _joined_rows(_sorted(tasks, K, Q), Q, NQ, K, NK)
    tasks = _joined_rows(_sorted(tasks, Q, K), K, NK, Q, NQ)
    return _joined_diagonal(_sorted(_joined_prefix(tasks), K, Q))


def _sorted(tasks: Table, first: int, second: int) -> Table:
    return in_order(tasks, tasks[:, OWNER], tasks[:, first], tasks[:, second])


def _same(tasks: Table, *columns: int) -> Flags:
    """Which tasks have the values of the one before in some columns; the first has none before it."""
    result = np.zeros(len(tasks), dtype=bool)
    result[1:] = True
    for column in columns:
        result[1:] &= tasks[1:, column] == tasks[:-1, column]
    return result


def task_counts(bands: Table, queries: Layout, keys: Layout, room: int = 1 << 12) -> Table:
    """``[P]`` tasks of each rank, neighbours joined.

    Args:
        bands: ``[n, 6]`` disjoint bands over valid rows, global coordinates.
        queries: layout of the query stream.
        keys: layout of the key stream.
        room: query spans that are cut at a time: of several ranks where they have few, of one rank at least.
    """
    result = np.zeros(queries.cp_size, dtype=np.int64)
    chunk = np.cumsum([len(spans) for spans in queries.spans]) // room
    for ranks in np.split(np.arange(queries.cp_size), np.flatnonzero(np.diff(chunk)) + 1):
        tasks, runs_on = cut(bands, queries, keys, ranks.tolist())
        tasks[:, OWNER] += runs_on * keys.cp_size  # a pair of ranks stands for the owner, so that nothing joins across
        result += np.bincount(coalesced(tasks)[:, OWNER] // keys.cp_size, minlength=len(result))
    return result


def _joined_rows(tasks: Table, start: int, length: int, other: int, other_length: int) -> Table:
    """Join full tasks, sorted by owner, ``other`` and ``start``, that touch and are alike on the other side."""
    full, joins = _is_full(tasks), _same(tasks, OWNER, other, other_length)
    joins[1:] &= full[1:] & full[:-1] & (tasks[1:, start] == tasks[:-1, start] + tasks[:-1, length])
    if not joins.any():
        return tasks
    first = np.flatnonzero(~joins)
    joined = chosen(tasks, first)
    joined[:, length] = np.add.reduceat(tasks[:, length], first)
    return joined


def _joined_prefix(tasks: Table) -> Table:
    """A full block of keys and, for the same query rows, a causal task over the keys after it are one causal task.

    Args:
        tasks: sorted by owner, query and key rows.
    """
    joins = _same(tasks, OWNER, Q, NQ)
    joins[1:] &= (tasks[:-1, K] + tasks[:-1, NK] == tasks[1:, K]) & _is_full(tasks[:-1])
    joins &= (tasks[:, TASK_LO] == -UNBOUNDED) & (tasks[:, TASK_HI] < UNBOUNDED)
    right = np.flatnonzero(joins)
    if not len(right):
        return tasks
    before = tasks[right - 1, NK]
    tasks[right, K] -= before
    tasks[right, NK] += before
    tasks[right, TASK_HI] += before
    kept = np.ones(len(tasks), dtype=bool)
    kept[right - 1] = False
    return chosen(tasks, np.flatnonzero(kept))


def _joined_diagonal(tasks: Table) -> Table:
    """Causal tasks that continue one diagonal over neighbouring query rows are one causal task.

    This is what a rank's own chunks of a document are: local order keeps global order, so the block on the diagonal is
    plainly causal in local rows.

    Args:
        tasks: sorted by owner, key and query rows.
    """
    before, after, joins = tasks[:-1], tasks[1:], _same(tasks, OWNER, K)
    joins[1:] &= (
        (before[:, Q] + before[:, NQ] == after[:, Q])
        & (before[:, TASK_LO] == -UNBOUNDED)
        & (after[:, TASK_LO] == -UNBOUNDED)
        & (before[:, TASK_HI] < UNBOUNDED)
        & (after[:, TASK_HI] == before[:, TASK_HI] + before[:, NQ])
        & (before[:, NK] == np.minimum(after[:, NK], before[:, NQ] + before[:, TASK_HI]))
    )
    if not joins.any():
        return tasks
    first = np.flatnonzero(~joins)
    joined = chosen(tasks, first)
    joined[:, NQ] = np.add.reduceat(tasks[:, NQ], first)
    joined[:, NK] = np.maximum.reduceat(tasks[:, NK], first)
    return joined


def visibility(bands: Table, queries: Layout, keys: Layout) -> Flags:
    """``[P_q, P_k]``: whether rank r's queries see any key of owner o.

    Looks at the longest bands first, at more and more of them, and stops when everybody sees everybody, as soon happens
    where long documents are cut over all ranks.
    """
    bands = tightened(bands)
    bands = bands[np.argsort(bands[:, K0] - bands[:, K1], kind="stable")]
    result = np.zeros((queries.cp_size, keys.cp_size), dtype=bool)
    query_tables = list(queries.tables())
    key_tables = query_tables if keys is queries else list(keys.tables())
    strided = any((spans[:, STRIDE] != 1).any() for spans in [*query_tables, *key_tables])
    first, count = 0, 1
    while first < len(bands) and not result.all():
        pieces = _all_pieces(bands[first : first + count], query_tables)
        for key_spans in key_tables:
            if strided:
                tasks, ranks = _local_tasks(pieces, key_spans)
                result[ranks, tasks[:, OWNER]] = True
            else:
                _mark_owners(result, pieces, key_spans)
        first, count = first + count, 4 * count
    return result


def _mark_owners(result: Flags, pieces: Pieces, key_spans: Table, room: int = 1 << 20) -> None:
    """Mark the owners of the spans that each piece's key interval meets.

    At stride 1 every key of a piece is seen, so a piece meets one run of the ascending spans. Runs are listed the
    longest first, about ``room`` spans at a time; those of ranks that see everybody by then are left out.
    """
    opens = np.searchsorted(key_spans[:, START] + key_spans[:, LENGTH], pieces.bands[:, K0], side="right")
    closes = np.searchsorted(key_spans[:, START], pieces.bands[:, K1], side="left")
    order = np.argsort(opens - closes, kind="stable")
    opens, counts, ranks = opens[order], (closes - opens)[order], pieces.spans[order, RANK]
    while len(ranks):
        some = max(1, int(np.searchsorted(np.cumsum(counts), room)))
        seen = key_spans[expand(opens[:some], counts[:some]), RANK]
        result[np.repeat(ranks[:some], counts[:some]), seen] = True
        done: Flags = np.logical_and.reduce(result, axis=1)
        left = some + np.flatnonzero(~done[ranks[some:]])
        opens, counts, ranks = opens[left], counts[left], ranks[left]
