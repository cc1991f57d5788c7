"""Which rank holds which tokens of both streams, from what a caller asked for: a name, a Layout, or a weighted mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.layouts.balance import balanced
from cphandler.layouts.keys import beside
from cphandler.layouts.layout import Layout, make_layout
from cphandler.layouts.workload import Workload
from cphandler.tokens.bands import Q0, shifted
from cphandler.tokens.intervals import Table
from cphandler.tokens.masks import Mask, visible_bands
from cphandler.tokens.metadata import StreamMetadata


@dataclass(frozen=True, init=False)
class Balanced:
    """The balanced layout, level over a mix of masks: for a model whose layers do not all have the handler's mask.

    ``Balanced({Causal(): 1, SlidingWindow(1024): 3})`` is for one full layer to three windowed ones. ``"balanced"`` is
    short for ``Balanced()``: the handler's own mask, in every layer.

    Attributes:
        masks: masks and how many layers have each, or how often; empty for the handler's own.

    Raises:
        InvalidTypeError: not a mapping of masks to ints.
        InvalidValueError: a number of layers below 1.
    """

    masks: tuple[tuple[Mask, int], ...]

    def __init__(self, masks: Mapping[Mask, int] | None = None) -> None:
        given = {} if masks is None else masks
        if not isinstance(given, Mapping):
            raise InvalidTypeError(
                "Balanced takes a mapping", got=type(masks).__name__, fix="pass {Causal(): 1, SlidingWindow(1024): 3}"
            )
        for mask, weight in given.items():
            if not isinstance(mask, Mask):
                raise InvalidTypeError(
                    "Balanced levels masks", got=repr(mask), fix="pass Causal() rather than its name"
                )
            if not isinstance(weight, int) or isinstance(weight, bool):
                raise InvalidTypeError("a number of layers must be an int", got=repr(weight))
            if weight < 1:
                raise InvalidValueError("a mask must have a layer at least", got=f"{weight} of {mask!r}")
        object.__setattr__(self, "masks", tuple(given.items()))


Placing: TypeAlias = "str | Layout | Balanced"
"""How tokens are to be placed."""


class Batch(NamedTuple):
    """What placing tokens depends on.

    Attributes:
        queries: the query stream.
        keys: the key stream; the same object for self attention.
        mask: who sees whom.
        cp_size: ranks P.
        tile: rows of the kernel's tile, that work is rounded up to; None counts pairs.
    """

    queries: StreamMetadata
    keys: StreamMetadata
    mask: Mask
    cp_size: int
    tile: int | None = None

    def bands(self, mask: Mask) -> Table:
        """A mask's bands over one row of the batch; those of all its rows, one on the other, where they are padded."""
        documents, padded = (self.queries.documents, self.keys.documents), self.queries.padded_rows
        if padded is None or self.keys.padded_rows is None:
            return visible_bands(mask, documents, None)
        bands = visible_bands(mask, documents, (padded, self.keys.padded_rows))
        queries, keys = (stream.num_tokens for stream in documents)
        row = bands[:, Q0] // max(queries, 1)
        return shifted(bands, -row * queries, -row * keys)

    @property
    def is_crossing(self) -> bool:
        """Whether keys are a stream of their own."""
        return self.keys is not self.queries


def place(placings: tuple[Placing, Placing], batch: Batch) -> tuple[Layout, Layout]:
    """The layouts of the query and the key stream; the same object twice for self attention.

    Raises:
        InvalidTypeError: neither a name, a Layout nor a mix.
        InvalidValueError: an unknown name, a Layout of another batch, or a mask that does not fit the documents.
        UnsupportedError: a mask that has no meaning across two streams.
    """
    mixes = [_mix(placing, batch) for placing in placings]
    queries, keys = batch.queries.documents, batch.keys.documents
    if mixes[0] is None:
        own = make_layout(_known(placings[0]), queries.offsets, batch.cp_size)
    else:
        work = Workload.of(queries.num_tokens, mixes[0], tile=batch.tile, crossing=batch.is_crossing)
        own = balanced(work, batch.cp_size)
    if not batch.is_crossing:
        return own, own
    if mixes[1] is None:
        return own, make_layout(_known(placings[1]), keys.offsets, batch.cp_size)
    return own, beside(own, np.concatenate([bands for bands, _ in mixes[1]]), keys.num_tokens)


def _mix(placing: Placing, batch: Batch) -> list[tuple[Table, int]] | None:
    """The bands to be level over, and their weights; None where another layout is asked for."""
    if isinstance(placing, str) and placing.lower().replace("-", "_") == "balanced":
        placing = Balanced()
    if not isinstance(placing, Balanced):
        return None
    return [(batch.bands(mask), weight) for mask, weight in placing.masks or ((batch.mask, 1),)]


def _known(placing: Placing) -> str | Layout:
    """A name or a Layout, for those who know no masks."""
    assert not isinstance(placing, Balanced)
    return placing
