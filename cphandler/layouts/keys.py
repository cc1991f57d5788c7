"""Where the keys of cross attention go: level in tokens, and on the ranks whose queries see them."""

from __future__ import annotations

import numpy as np

from cphandler.layouts.layout import MOST_ROWS, RANK, Layout, cut_by_spans, joined
from cphandler.tokens.bands import K0, K1, Q0, Q1, tightened
from cphandler.tokens.intervals import Table, offsets_of, overlaps, table


def place_keys(queries: Layout, bands: Table, num_keys: int) -> Layout:
    """Place key rows beside the queries that see them.

    The keys of a band are dealt to the ranks in proportion to the rows they hold of its queries. What is more than a
    rank's share of the tokens goes, with what nobody sees, where there is room.

    Args:
        queries: layout of the query stream.
        bands: ``[n, 6]`` who sees whom.
        num_keys: tokens of the key stream.
    """
    runs = _uncovered(_wanted(queries, tightened(bands)), num_keys)
    size = queries.cp_size
    room = num_keys // size + (np.arange(size) < num_keys % size)
    kept, rest = _within(runs[runs[:, 2] >= 0], room)
    rest = np.concatenate([rest, runs[runs[:, 2] < 0]])
    placed = np.concatenate([kept, _filled(rest, room - _rows_of(kept, size))])
    placed = placed[np.argsort(placed[:, 0], kind="stable")]
    spans = []
    for rank in range(size):
        own = placed[placed[:, 2] == rank]
        spans.append(joined(own[:, 0], own[:, 1] - own[:, 0]))
    return Layout("balanced", num_keys, spans, num_local_tokens=-(-num_keys // size))


def _wanted(queries: Layout, bands: Table) -> Table:
    """``[m, 3]`` runs ``(start, stop, rank)`` of keys and who would have them; those of several bands may overlap."""
    size = queries.cp_size
    counts = np.zeros((len(bands), size), dtype=np.int64)
    for spans in queries.tables():
        band, span, start, stop = cut_by_spans(bands[:, Q0], bands[:, Q1], spans)
        np.add.at(counts, (band, spans[span, RANK]), stop - start)
    held = np.cumsum(counts, axis=1)
    first, keys = bands[:, K0, None], (bands[:, K1] - bands[:, K0])[:, None]
    stops = first + _parts(keys, held)
    starts = np.concatenate([first, stops[:, :-1]], axis=1)
    ranks = np.broadcast_to(np.arange(size, dtype=np.int64), stops.shape)
    runs = np.stack([starts, stops, ranks], axis=2).reshape(-1, 3)
    return runs[runs[:, 0] < runs[:, 1]]


def _parts(keys: Table, held: Table) -> Table:
    """``[n, P]`` of each band's keys, how many belong to the first so many of the rows held, rounded down."""
    total = np.maximum(held[:, -1:], 1)
    if int(keys.max(initial=0)) * int(held.max(initial=0)) < MOST_ROWS:
        return keys * held // total
    return (keys.astype(object) * held // total).astype(np.int64)  # a product of two lengths may be past int64


def _uncovered(runs: Table, num_keys: int) -> Table:
    """The same made disjoint, the first come first, and with rank -1 the keys that nobody wants."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reached = np.maximum.accumulate(np.append(0, runs[:, 1]))
    starts = np.maximum(runs[:, 0], reached[:-1])
    wanted = np.stack([starts, runs[:, 1], runs[:, 2]], axis=1)[starts < runs[:, 1]]
    gaps = np.stack([reached, np.append(runs[:, 0], num_keys)], axis=1)
    gaps = gaps[gaps[:, 0] < gaps[:, 1]]
    nobody = np.full((len(gaps), 1), -1, dtype=np.int64)
    return np.concatenate([wanted, np.concatenate([gaps, nobody], axis=1)])


def _rows_of(runs: Table, size: int) -> Table:
    """``[P]`` rows of each rank."""
    total = np.zeros(size, dtype=np.int64)
    np.add.at(total, runs[:, 2], runs[:, 1] - runs[:, 0])
    return total


def _within(runs: Table, room: Table) -> tuple[Table, Table]:
    """What of each rank's runs it has room for, and what is too much."""
    runs = runs[np.lexsort((runs[:, 0], runs[:, 2]))]
    rows = runs[:, 1] - runs[:, 0]
    before = offsets_of(rows)[:-1]
    first = np.searchsorted(runs[:, 2], runs[:, 2], side="left")
    left = room[runs[:, 2]] - (before - before[first])
    middle = runs[:, 0] + np.clip(left, 0, rows)
    kept = np.stack([runs[:, 0], middle, runs[:, 2]], axis=1)
    rest = np.stack([middle, runs[:, 1], runs[:, 2]], axis=1)
    return kept[kept[:, 0] < kept[:, 1]], rest[rest[:, 0] < rest[:, 1]]


def _filled(runs: Table, room: Table) -> Table:
    """Runs laid end to end into the room of all ranks, in order."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    at, walls = offsets_of(runs[:, 1] - runs[:, 0]), offsets_of(room)
    some = np.flatnonzero(room > 0)
    run, wall = overlaps(at[:-1], at[1:], walls[some], walls[some + 1])
    rank = some[wall]
    first, last = np.maximum(at[run], walls[rank]), np.minimum(at[run + 1], walls[rank + 1])
    shift = runs[run, 0] - at[run]
    return table(np.stack([first + shift, last + shift, rank], axis=1), 3)
