"""Batches that were met before: their shards, and what was planned for them, found again by value."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import NamedTuple

import torch

from cphandler.layouts.layout import BALANCED, Layout, layout_name
from cphandler.layouts.placement import Balanced, LayoutSpec, place, stream_bands
from cphandler.sharding.memo import Memo
from cphandler.sharding.shard import Shard
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Table, frozen
from cphandler.tokens.masks import Mask, is_value
from cphandler.tokens.metadata import StreamMetadata

MOST_BATCHES = 64
"""Batches that are kept, those that were used last."""

MOST_BYTES = 256 << 20
"""Bytes of all that is kept of them, on the host and on devices."""

MOST_VALUES = 1024
"""Values that are kept with one batch, several for each mask: one that has more is made anew when it comes again."""


class Seat(NamedTuple):
    """Whose shards are wanted.

    Attributes:
        cp_size: ranks P.
        rank: this one.
        device: where facts are handed out.
        tile: see :func:`place`.
        kernel_cost: see :func:`place`.
    """

    cp_size: int
    rank: int
    device: torch.device
    tile: int | None
    kernel_cost: int = 0


class Batch(NamedTuple):
    """A rank's shards of both streams, the same object twice for self attention, and what follows from them."""

    queries: Shard
    keys: Shard
    memo: Memo

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept with it: it grows as methods are called."""
        return sum(memo.nbytes for memo in self._memos)

    @property
    def num_values(self) -> int:
        """Values that are kept with it: as many more as there are masks."""
        return sum(map(len, self._memos))

    @property
    def _memos(self) -> list[Memo]:
        return list({id(x): x for x in (self.queries.memo, self.keys.memo, self.memo)}.values())


class BatchCache:
    """The batches that were used last, by value; safe for threads.

    Handlers hold their batch themselves: what leaves the cache, its tables on devices with it, is freed with the last
    handler that uses it.

    Args:
        most_batches: how many to keep.
        most_bytes: bytes of all of them. A batch that has more alone is not kept.
        most_values: values of one of them. What a batch holds grows by its masks, also while it is kept.
    """

    def __init__(
        self, most_batches: int = MOST_BATCHES, most_bytes: int = MOST_BYTES, most_values: int = MOST_VALUES
    ) -> None:
        self.most_batches, self.most_bytes, self.most_values = most_batches, most_bytes, most_values
        self._kept: OrderedDict[Hashable, Batch] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return sum(batch.nbytes for batch in self._kept.values())

    def clear(self) -> None:
        """Forget all of it."""
        with self._lock:
            self._kept.clear()
            self._sizes.clear()

    def find(self, key: Hashable) -> Batch | None:
        """The batch of a key, which is then the one used last; None also where it has grown past what is kept."""
        with self._lock:
            batch = self._kept.get(key)
            if batch is None:
                return None
            self._kept.move_to_end(key)
            self._sizes[key] = batch.nbytes
            self._trim()
            return self._kept.get(key)

    def keep(self, key: Hashable, batch: Batch) -> Batch:
        """Keep a batch, and drop the ones used longest ago where there are too many; the first of those with one key.

        What batches hold is measured here, with what they have grown by, and that of one that is found again.
        """
        with self._lock:
            batch = self._kept.setdefault(key, batch)
            self._sizes = {each: kept.nbytes for each, kept in self._kept.items()}
            self._trim()
            return batch

    def _trim(self) -> None:
        """Drop the last batch used where it has grown too much, and the first where all are too much."""
        last = next(reversed(self._kept))
        if self._kept[last].num_values > self.most_values:
            del self._kept[last], self._sizes[last]
        total = sum(self._sizes.values())
        while self._kept and (len(self._kept) > self.most_batches or total > self.most_bytes):
            oldest, _ = self._kept.popitem(last=False)
            total -= self._sizes.pop(oldest)

    def after_fork(self) -> None:
        """Begin anew in a forked process: locks may be held there by threads that it has not.

        What was kept stays where it is, since tensors on a device must not be freed by a child.
        """
        self._left = self._kept
        self._kept, self._sizes, self._lock = OrderedDict(), {}, Lock()


cache = BatchCache()
"""The batches of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=cache.after_fork)


def clear_plan_cache() -> None:
    """Forget the batches that this process has met: their layouts, plans and index tables, those on devices too.

    The batches used last are kept so that a handler for one that comes again is made at once: 64 at most, 256 MiB in
    all. Memory of those that no handler uses is free after this; a handler that is gone lets go of its batch when
    Python next collects cycles (``gc.collect``).
    """
    cache.clear()


def cut_batch(
    specs: tuple[LayoutSpec, LayoutSpec], queries: StreamMetadata, keys: StreamMetadata, mask: Mask, seat: Seat
) -> Batch:
    """A rank's shards of a batch: those of one met before, or made, and kept where all it follows from has a value.

    Args:
        specs: what was asked for the query and the key stream; see :func:`place`.
        queries: the query stream.
        keys: the key stream; the same object for self attention.
        mask: who sees whom.
        seat: whose shards.

    Raises:
        InvalidTypeError: see :func:`place`.
        InvalidValueError: see :func:`place`.
        UnsupportedError: see :func:`place`.
    """
    key = _key(specs, queries, keys, mask, seat)
    if key is None:
        return _made(specs, queries, keys, mask, seat)
    return cache.find(key) or cache.keep(key, _made(specs, queries, keys, mask, seat))


def _made(
    specs: tuple[LayoutSpec, LayoutSpec], queries: StreamMetadata, keys: StreamMetadata, mask: Mask, seat: Seat
) -> Batch:
    memo = Memo()

    def bands_of(mask: Mask) -> Table:
        """What the plan will ask for again."""
        if not is_value(mask):
            return stream_bands(mask, queries, keys)
        return memo.get(("bands", mask), lambda: frozen(stream_bands(mask, queries, keys)))

    layouts = place(
        specs, queries, keys, mask, seat.cp_size, tile=seat.tile, kernel_cost=seat.kernel_cost, bands=bands_of
    )
    first = _shard(queries, layouts[0], seat)
    return Batch(first, first if keys is queries else _shard(keys, layouts[1], seat), memo)


def _shard(stream: StreamMetadata, layout: Layout, seat: Seat) -> Shard:
    shard = Shard(stream.documents, layout, seat.rank, stream.padded_rows, seat.device)
    named = [stream.documents, *([] if stream.padded_rows is None else [stream.padded_rows])]
    tables = sum(documents.offsets.nbytes + documents.runs.nbytes for documents in named)
    shard.memo.count(2 * (tables + layout.nbytes))  # the tables, and again what they are found by and sorted as
    return shard


def _key(
    specs: tuple[LayoutSpec, LayoutSpec], queries: StreamMetadata, keys: StreamMetadata, mask: Mask, seat: Seat
) -> Hashable | None:
    """What a batch's shards follow from; None where some of it may change, or is not told from others by value."""
    crossing = keys is not queries
    asked = [_spec_key(spec, mask) for spec in (specs if crossing else specs[:1])]
    if None in asked:
        return None
    streams = (queries, keys) if crossing else (queries,)
    documents = [_bytes(part) for stream in streams for part in (stream.documents, stream.padded_rows)]
    return (*documents, *asked, seat)


def _bytes(documents: Documents | None) -> Hashable:
    if documents is None:
        return None
    return documents.offsets.tobytes(), documents.runs.tobytes()


def _spec_key(spec: LayoutSpec, mask: Mask) -> Hashable | None:
    """What was asked for, with the mask where it counts; None where it has no value to go by."""
    if type(spec) is Layout:
        return spec.name, spec.fingerprint
    if isinstance(spec, str):
        name = layout_name(spec)
        if name != BALANCED:
            return name
        spec = Balanced()
    if type(spec) is not Balanced:
        return None
    masks = spec.masks or ((mask, 1),)
    return masks if all(is_value(each) for each, _ in masks) else None
