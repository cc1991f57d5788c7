"""Which rank holds which tokens of both streams, from what a caller asked for: a name, a Layout, or a weighted mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.layouts.balance import balanced
from cphandler.layouts.keys import place_keys
from cphandler.layouts.layout import BALANCED, Layout, check_rows, layout_name, make_layout
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
                raise InvalidTypeError(
                    "a number of layers must be an int", got=repr(weight), fix="count the layers that have the mask"
                )
            if weight < 1:
                raise InvalidValueError(
                    "a mask must have a layer at least", got=f"{weight} of {mask!r}", fix="leave out masks of no layer"
                )
        object.__setattr__(self, "masks", tuple(given.items()))


LayoutSpec: TypeAlias = "str | Layout | Balanced"
"""How one stream's tokens are to be placed: a name out of :data:`cphandler.layouts.layout.LAYOUTS`, or a value."""

BandsOf: TypeAlias = Callable[[Mask], Table]
"""A mask's bands over a batch."""


def place(
    specs: tuple[LayoutSpec, LayoutSpec],
    queries: StreamMetadata,
    keys: StreamMetadata,
    mask: Mask,
    cp_size: int,
    *,
    tile: int | None = None,
    kernel_cost: int = 0,
    bands: BandsOf | None = None,
) -> tuple[Layout, Layout]:
    """The layouts of the query and the key stream; the same object twice for self attention.

    Args:
        specs: what was asked for the query and the key stream; for self attention the first counts.
        queries: the query stream.
        keys: the key stream; the same object for self attention.
        mask: who sees whom.
        cp_size: ranks P.
        tile: rows of the kernel's tile, that work is rounded up to; None counts pairs.
        kernel_cost: pairs that a task costs beside its own.
        bands: :func:`stream_bands` of the two streams, for a caller who keeps them; None makes them here.

    Raises:
        InvalidTypeError: neither a name, a Layout nor a mix.
        InvalidValueError: an unknown name, a Layout of another batch, or a mask that does not fit the documents.
        UnsupportedError: a mask that has no meaning across two streams.
    """
    crossing = keys is not queries
    bands_of = partial(_row_bands, bands or partial(stream_bands, queries=queries, keys=keys), queries, keys)
    own = _level_bands(specs[0], mask, bands_of)
    if own is None:
        layout = make_layout(_known(specs[0]), queries.documents.offsets, cp_size)
    else:
        check_rows(BALANCED, queries.documents.num_tokens, cp_size)
        work = Workload.of(queries.documents.num_tokens, own, tile=tile, kernel_cost=kernel_cost, crossing=crossing)
        layout = balanced(work, cp_size)
    if not crossing:
        return layout, layout
    theirs = _level_bands(specs[1], mask, bands_of)
    if theirs is None:
        return layout, make_layout(_known(specs[1]), keys.documents.offsets, cp_size)
    seen = np.concatenate([bands for bands, _ in theirs])
    return layout, place_keys(layout, seen, keys.documents.num_tokens)


def _level_bands(spec: LayoutSpec, mask: Mask, bands_of: BandsOf) -> list[tuple[Table, int]] | None:
    """The bands to be level over, and their weights; None where another layout is asked for."""
    if isinstance(spec, str) and layout_name(spec) == BALANCED:
        spec = Balanced()
    if not isinstance(spec, Balanced):
        return None
    return [(bands_of(each), weight) for each, weight in spec.masks or ((mask, 1),)]


def stream_bands(mask: Mask, queries: StreamMetadata, keys: StreamMetadata) -> Table:
    """A mask's bands over all rows of the batch laid end to end, cut to real tokens.

    Raises:
        InvalidValueError: a mask that does not fit the documents.
        UnsupportedError: a mask that has no meaning across two streams.
    """
    rows = None
    if queries.padded_rows is not None and keys.padded_rows is not None:
        rows = queries.padded_rows, keys.padded_rows
    return visible_bands(mask, (queries.documents, keys.documents), rows)


def _row_bands(bands_of: BandsOf, queries: StreamMetadata, keys: StreamMetadata, mask: Mask) -> Table:
    """A mask's bands over one row of the batch; those of all its rows, one on the other, where they are padded."""
    bands = bands_of(mask)
    if keys.padded_rows is None:
        return bands
    row = bands[:, Q0] // max(queries.documents.num_tokens, 1)
    return shifted(bands, -row * queries.documents.num_tokens, -row * keys.documents.num_tokens)


def _known(spec: LayoutSpec) -> str | Layout:
    """A name or a Layout, for those who know no masks."""
    assert not isinstance(spec, Balanced)
    return spec
