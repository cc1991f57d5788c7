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
from cphandler.tokens.intervals import UNBOUNDED, Flags, Table, expand, table

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
    parts = [(table([], 7), table([], 1).reshape(-1))]
    parts += [_local_tasks(pieces, key_spans) for key_spans in keys.tables(key_ranks)]
    tasks, ranks = zip(*parts, strict=True)
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
    start, stride = queries[span, START], queries[span, STRIDE]
    pieces = bands[band]
    pieces[:, Q0] = start + first * stride
    pieces[:, Q1] = start + (stop - 1) * stride + 1
    pieces[:, K0] = np.maximum(pieces[:, K0], pieces[:, Q0] + pieces[:, LO])
    pieces[:, K1] = np.minimum(pieces[:, K1], pieces[:, Q1] + pieces[:, HI])
    return Pieces(pieces, queries[span], first, stop)


def _all_pieces(bands: Table, tables: Sequence[Table]) -> Pieces:
    """Bands cut by several tables, each of which does not interleave in itself."""
    if len(tables) == 1:
        return query_pieces(bands, tables[0])
    parts = [query_pieces(bands, spans) for spans in [table([], 5), *tables]]
    return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _local_tasks(pieces: Pieces, key_spans: Table) -> tuple[Table, Table]:
    """Pieces cut by key spans, in local rows, and the rank that runs each.

    The bounds are converted by stride and offset here, once; then rows that see nothing are trimmed.
    """
    piece, span, k_first, k_stop = cut_by_spans(pieces.bands[:, K0], pieces.bands[:, K1], key_spans)
    bands, q_spans, k_spans = pieces.bands[piece], pieces.spans[piece], key_spans[span]
    q_first, nq, nk = pieces.first[piece], (pieces.stop - pieces.first)[piece], k_stop - k_first
    stride = np.maximum(q_spans[:, STRIDE], k_spans[:, STRIDE])  # a span of one row says 1, and has any
    offset = (k_spans[:, START] + k_first * k_spans[:, STRIDE]) - (q_spans[:, START] + q_first * q_spans[:, STRIDE])
    local = np.stack([np.zeros_like(nq), nq, np.zeros_like(nk), nk, bands[:, LO], bands[:, HI]], axis=1)
    bounded = bands[:, LO] > -UNBOUNDED
    local[bounded, LO] = -(-(bands[bounded, LO] - offset[bounded]) // stride[bounded])
    bounded = bands[:, HI] < UNBOUNDED
    local[bounded, HI] = (bands[bounded, HI] - offset[bounded]) // stride[bounded]
    trimmed, kept = _trimmed(local)
    shift = trimmed[:, K0] - trimmed[:, Q0]
    nq, nk = trimmed[:, Q1] - trimmed[:, Q0], trimmed[:, K1] - trimmed[:, K0]
    lo, hi = trimmed[:, LO] - shift, trimmed[:, HI] - shift
    columns = [
        k_spans[kept, RANK],
        (q_spans[:, LOCAL] + q_first)[kept] + trimmed[:, Q0],
        nq,
        (k_spans[:, LOCAL] + k_first)[kept] + trimmed[:, K0],
        nk,
        np.where(lo <= 1 - nq, -UNBOUNDED, lo),
        np.where(hi >= nk - 1, UNBOUNDED, hi),
    ]
    return np.stack(columns, axis=1), q_spans[kept, RANK]


def _trimmed(local: Table) -> tuple[Table, Flags]:
    """:func:`cphandler.tokens.masks.tightened`, and which rows it kept."""
    numbered = tightened(np.concatenate([local, np.arange(len(local), dtype=np.int64)[:, None]], axis=1))
    kept = np.zeros(len(local), dtype=bool)
    kept[numbered[:, -1]] = True
    return numbered[:, :-1], kept


def _is_full(tasks: Table) -> Flags:
    full: Flags = (tasks[:, TASK_LO] == -UNBOUNDED) & (tasks[:, TASK_HI] == UNBOUNDED)
    return full


def coalesced(tasks: Table) -> Table:
    """Fewer, larger tasks over the same pairs: neighbours that one band describes become one task."""
    tasks = _joined_rows(tasks, Q, NQ, K, NK)
    tasks = _joined_rows(tasks, K, NK, Q, NQ)
    tasks = _joined_prefix(tasks)
    return _joined_diagonal(tasks)


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
    """Join full tasks that touch along one side and have the same rows on the other."""
    full = _is_full(tasks)
    rest, tasks = tasks[~full], tasks[full]
    tasks = tasks[np.lexsort((tasks[:, start], tasks[:, other_length], tasks[:, other], tasks[:, OWNER]))]
    same = (tasks[1:, [OWNER, other, other_length]] == tasks[:-1, [OWNER, other, other_length]]).all(axis=1)
    touches = tasks[1:, start] == tasks[:-1, start] + tasks[:-1, length]
    first = np.flatnonzero(np.append(True, ~(same & touches))[: len(tasks)])
    joined = tasks[first].copy()
    if len(first):
        joined[:, length] = np.add.reduceat(tasks[:, length], first)
    return np.concatenate([rest, joined])


def _joined_prefix(tasks: Table) -> Table:
    """A full block of keys and, for the same query rows, a causal task over the keys after it are one causal task."""
    tasks = tasks[np.lexsort((tasks[:, K], tasks[:, NQ], tasks[:, Q], tasks[:, OWNER]))]
    before, after = tasks[:-1], tasks[1:]
    joins = (
        (before[:, [OWNER, Q, NQ]] == after[:, [OWNER, Q, NQ]]).all(axis=1)
        & (before[:, K] + before[:, NK] == after[:, K])
        & _is_full(before)
        & (after[:, TASK_LO] == -UNBOUNDED)
        & (after[:, TASK_HI] < UNBOUNDED)
    )
    right = np.flatnonzero(joins) + 1
    joined = tasks[right].copy()
    joined[:, K] = tasks[right - 1, K]
    joined[:, NK] += tasks[right - 1, NK]
    joined[:, TASK_HI] += tasks[right - 1, NK]
    return np.concatenate([np.delete(tasks, np.concatenate([right, right - 1]), axis=0), joined])


def _joined_diagonal(tasks: Table) -> Table:
    """Causal tasks that continue one diagonal over neighbouring query rows are one causal task.

    This is what a rank's own chunks of a document are: local order keeps global order, so the block on the diagonal is
    plainly causal in local rows.
    """
    tasks = tasks[np.lexsort((tasks[:, Q], tasks[:, K], tasks[:, OWNER]))]
    before, after = tasks[:-1], tasks[1:]
    joins = (
        (before[:, [OWNER, K]] == after[:, [OWNER, K]]).all(axis=1)
        & (before[:, Q] + before[:, NQ] == after[:, Q])
        & (before[:, TASK_LO] == -UNBOUNDED)
        & (after[:, TASK_LO] == -UNBOUNDED)
        & (before[:, TASK_HI] < UNBOUNDED)
        & (after[:, TASK_HI] == before[:, TASK_HI] + before[:, NQ])
        & (before[:, NK] == np.minimum(after[:, NK], before[:, NQ] + before[:, TASK_HI]))
    )
    first = np.flatnonzero(~np.append(False, joins)[: len(tasks)])
    joined: Table = tasks[first].copy()
    if len(first):
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
    first, count = 0, 4
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
