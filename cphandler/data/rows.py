"""Which tokens a rank's shard of a sample has: the one formula of whoever writes it and whoever reads it."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from cphandler.layouts.layout import Layout
from cphandler.sharding.shard import Shard
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Flags, Table, frozen


class SampleRows:
    """The rows of one rank's shard: its local ones, pad rows included, then its halo.

    The halo is the next real tokens of each local one, of the same document, as far as the rank does not hold them
    anyway; each is there once, ascending. A rank that holds several pieces has a halo after each.

    Args:
        documents: the documents of the sample.
        layout: which rank holds which tokens.
        rank: whose rows.
        halo: how many tokens ahead can be asked for.
    """

    def __init__(self, documents: Documents, layout: Layout, rank: int, halo: int) -> None:
        self.shard = Shard(documents, layout, rank)
        self.halo = halo

    @property
    def num_local_tokens(self) -> int:
        """Local rows L."""
        return self.shard.num_local_tokens

    @cached_property
    def tokens(self) -> Table:
        """``[L + H]`` global token of each row; -1 for a pad row."""
        ahead = [self._next(distance) for distance in range(1, self.halo + 1)]
        wanted = np.unique(np.concatenate([self.shard.tokens[:0], *(tokens[tokens >= 0] for tokens in ahead)]))
        return frozen(np.concatenate([self.shard.tokens, np.setdiff1d(wanted, self.shard.tokens)]))

    def ahead(self, distance: int) -> Table:
        """``[L]`` row that holds the token ``distance`` after each local one; -1 where the document has none."""
        order = np.argsort(self.tokens, kind="stable")
        wanted = self._next(distance)
        row = order[np.searchsorted(self.tokens[order], np.maximum(wanted, 0)).clip(max=max(len(order) - 1, 0))]
        return np.where(wanted >= 0, row, -1)

    def marked(self, runs: Table, distance: int = 0) -> Flags:
        """``[L]``: whether the token ``distance`` after each local one exists and lies in one of some runs.

        Args:
            runs: ``[R, 2]`` ascending, disjoint ``[start, stop)``.
            distance: how far ahead.
        """
        tokens = self._next(distance)
        run = np.searchsorted(runs[:, 0], tokens, side="right") - 1
        inside = (run >= 0) & (tokens >= 0)
        if len(runs):
            inside &= tokens < runs[np.maximum(run, 0), 1]
        return inside

    def _next(self, distance: int) -> Table:
        """``[L]`` token ``distance`` after each local one where both are real and of one document, else -1."""
        documents, tokens = self.shard.documents, self.shard.tokens
        ahead = tokens + distance
        held = (tokens >= 0) & (ahead < documents.num_tokens)
        both = np.where(held, tokens, 0), np.where(held, ahead, 0)
        if not documents.num_tokens:
            return np.full_like(tokens, -1)
        document = documents.document_of(both[0])
        held &= document == documents.document_of(both[1])
        held &= documents.is_valid(both[0]) & documents.is_valid(both[1])
        return np.where(held, ahead, -1)
