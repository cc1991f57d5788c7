"""Bands: tables of ``(q0, q1, k0, k1, lo, hi)``, and how they are cut; see :mod:`cphandler.tokens.masks`."""

from __future__ import annotations

import numpy as np

from cphandler.tokens.intervals import UNBOUNDED, Flags, Table, overlaps

Q0, Q1, K0, K1, LO, HI = range(6)
"""Columns of a band table."""


def tightened(bands: Table) -> Table:
    """Drop what no pair satisfies: rows that see nothing at either end of a band, then empty bands."""
    bands = bands.copy()
    for _ in range(2):
        bands[:, Q0] = np.maximum(bands[:, Q0], bands[:, K0] - bands[:, HI])
        bands[:, Q1] = np.minimum(bands[:, Q1], bands[:, K1] - bands[:, LO])
        bands[:, K0] = np.maximum(bands[:, K0], bands[:, Q0] + bands[:, LO])
        bands[:, K1] = np.minimum(bands[:, K1], bands[:, Q1] + bands[:, HI])
    some: Flags = (bands[:, Q0] < bands[:, Q1]) & (bands[:, K0] < bands[:, K1]) & (bands[:, LO] <= bands[:, HI])
    return bands[some]


def shifted(bands: Table, queries: Table, keys: Table) -> Table:
    """Each band moved by so many queries and so many keys."""
    moved: Table = bands.copy()
    moved[:, [Q0, Q1]] += queries[:, None]
    moved[:, [K0, K1]] += keys[:, None]
    for bound, limit in ((LO, -UNBOUNDED), (HI, UNBOUNDED)):
        bounded = moved[:, bound] != limit
        moved[bounded, bound] += (keys - queries)[bounded]
    return moved


def restrict(bands: Table, query_runs: Table, key_runs: Table) -> Table:
    """Cut bands to the valid ``[R, 2]`` runs of both streams."""
    bands = tightened(bands)
    which, run = overlaps(bands[:, Q0], bands[:, Q1], query_runs[:, 0], query_runs[:, 1])
    bands = bands[which]
    bands[:, Q0] = np.maximum(bands[:, Q0], query_runs[run, 0])
    bands[:, Q1] = np.minimum(bands[:, Q1], query_runs[run, 1])
    bands = tightened(bands)
    which, run = overlaps(bands[:, K0], bands[:, K1], key_runs[:, 0], key_runs[:, 1])
    bands = bands[which]
    bands[:, K0] = np.maximum(bands[:, K0], key_runs[run, 0])
    bands[:, K1] = np.minimum(bands[:, K1], key_runs[run, 1])
    return tightened(bands)
