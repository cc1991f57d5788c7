"""A rank's shard of a stream of tokens: documents x layout -> positions, index tensors, fragments."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.layouts.layout import LENGTH, LOCAL, START, STRIDE, Layout
from cphandler.sharding.memo import Memo, counted
from cphandler.sharding.order import SequenceOrder
from cphandler.tensors import device_copy
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Flags, Table, frozen, overlaps
from cphandler.tokens.masks import Mask, is_value, visible_bands


class Fragments(NamedTuple):
    """The pieces of documents a rank holds, ascending.

    Piece i says that local row ``local[i] + j`` holds position ``start[i] + stride[i] * j`` of document
    ``document[i]``, for ``j`` below ``length[i]``. Each column is ``[n]`` int64 and read-only.
    """

    document: Table
    start: Table
    length: Table
    stride: Table
    local: Table


HOST = torch.device("cpu")


class ShardFacts(Protocol):
    """What a handler tells of the rows that its rank holds of one stream; tensors are the caller's own."""

    @property
    def layout(self) -> Layout:
        """Which rank holds which tokens."""

    @property
    def num_local_tokens(self) -> int:
        """Physical rows L this rank holds."""

    @property
    def position_ids(self) -> Tensor:
        """``[L]`` int64 position of each local row in its document; for a dense batch, in every row of it."""

    @property
    def valid_mask(self) -> Tensor:
        """``[L]`` bool (``[B, L]`` where rows of the batch differ): True where a local row holds a real token."""

    @property
    def fragments(self) -> Fragments:
        """The runs of one document each that this rank holds."""


class EngineShard:
    """The facts of a shard whose layout an engine keeps to itself.

    Args:
        position_ids: ``[L]`` int64.
        valid_mask: ``[L]`` or ``[B, L]`` bool.
    """

    def __init__(self, position_ids: Tensor, valid_mask: Tensor) -> None:
        self._position_ids, self._valid_mask = position_ids, valid_mask

    @property
    def layout(self) -> Layout:
        """Unknown here.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("this engine does not show its layout", fix="ask position_ids and valid_mask instead")

    @property
    def num_local_tokens(self) -> int:
        """Physical rows L this rank holds."""
        return len(self._position_ids)

    @property
    def position_ids(self) -> Tensor:
        """``[L]`` int64 position of each local row in its document."""
        return self._position_ids.clone()

    @property
    def valid_mask(self) -> Tensor:
        """``[L]`` or ``[B, L]`` bool: True where a local row holds a real token."""
        return self._valid_mask.clone()

    @property
    def fragments(self) -> Fragments:
        """Unknown here.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("this engine does not list its fragments", fix="ask position_ids and valid_mask instead")


class Shard:
    """Documents cut by a layout, seen from one rank.

    Args:
        documents: the documents of one row of the batch; a dense batch has one, of length S.
        layout: how the rows are spread.
        rank: this rank.
        padded_rows: for a dense batch with a key-padding mask, or a mask of one per row, the documents of all its rows
            laid end to end; None where the batch dim is inert.
        device: where facts are handed out.
    """

    def __init__(
        self,
        documents: Documents,
        layout: Layout,
        rank: int,
        padded_rows: Documents | None = None,
        device: torch.device = HOST,
    ) -> None:
        self.device = device
        self.documents = documents
        self.layout = layout
        self.rank = rank
        self.padded_rows = padded_rows
        self.memo = Memo()

    @property
    def copies(self) -> int:
        """Rows of the batch that are documents of their own: B where they differ, else 1."""
        return 1 if self.padded_rows is None else self.padded_rows.num_documents

    @property
    def validity(self) -> Documents:
        """The documents that say which tokens are real, over ``copies * S`` tokens."""
        return self.documents if self.padded_rows is None else self.padded_rows

    @property
    def num_local_tokens(self) -> int:
        """Local rows L."""
        return self.layout.num_local_tokens

    @property
    def position_ids(self) -> Tensor:
        """``[L]`` int64 position of each local row in its document; the caller's own."""
        return self.tensor("positions", self.device).clone()

    @property
    def valid_mask(self) -> Tensor:
        """``[L]``, or ``[B, L]`` where rows of the batch differ, bool; the caller's own."""
        return self.tensor("valid", self.device).clone()

    @counted
    def tokens(self) -> Table:
        """``[L]`` global token of each local row; -1 for a pad row."""
        return frozen(self.layout.positions(self.rank))

    @counted
    def held_rows(self) -> Table:
        """``[n]`` local rows that hold a token, ascending."""
        return frozen(np.flatnonzero(self.tokens >= 0))

    @counted
    def held_tokens(self) -> Table:
        """``[n]`` global tokens of those rows."""
        return frozen(self.tokens[self.held_rows])

    @counted
    def positions(self) -> Table:
        """``[L]`` position of each local row in its document; 0 for a pad row."""
        held = np.maximum(self.tokens, 0)
        offsets = self.documents.offsets[self.documents.document_of(held)] if len(held) else held
        return frozen(np.where(self.tokens >= 0, held - offsets, 0))

    @counted
    def valid(self) -> Flags:
        """``[L]``, or ``[B, L]`` where rows of the batch differ: True where a local row holds a real token."""
        shift = np.arange(self.copies, dtype=np.int64)[:, None] * self.layout.num_tokens
        valid: Flags = self.validity.is_valid(self.tokens[None] + shift) & (self.tokens >= 0)
        valid = valid if self.padded_rows is not None else valid[0]
        valid.setflags(write=False)
        return valid

    def shifted_validity(self, shift: int, device: torch.device) -> Tensor:
        """``[B, L]``: where a local row and the one ``shift`` tokens before it are real, row of the batch by row."""

        def valid() -> Tensor:
            first = np.arange(self.copies, dtype=np.int64)[:, None] * self.layout.num_tokens
            source = self.tokens - shift
            inside = (self.tokens >= 0) & (source >= 0) & (source < self.layout.num_tokens)
            real = self.validity.is_valid(np.where(inside, source, 0)[None] + first)
            return device_copy(inside[None] & real & np.atleast_2d(self.valid), device)

        return self.memo.on(("valid", shift), device, valid)

    @counted
    def inverse(self) -> Table:
        """``[S]``: :attr:`Layout.inverse`."""
        return self.layout.inverse

    @property
    def fragments(self) -> Fragments:
        """The runs of one document each that this rank holds."""
        return self.memo.get("fragments", self._fragments)

    def _fragments(self) -> Fragments:
        spans = self.layout.spans[self.rank]
        starts, offsets = spans[:, START], self.documents.offsets
        stops = starts + (spans[:, LENGTH] - 1) * spans[:, STRIDE] + 1
        filled = np.flatnonzero(np.diff(offsets) > 0)
        span, which = overlaps(starts, stops, offsets[filled], offsets[filled + 1])
        document, stride = filled[which].astype(np.int64), spans[span, STRIDE]
        first = np.maximum(-(-(offsets[document] - starts[span]) // stride), 0)
        stop = np.minimum(-(-(offsets[document + 1] - starts[span]) // stride), spans[span, LENGTH])
        start = starts[span] + first * stride - offsets[document]
        keep = stop > first
        columns = (document, start, stop - first, stride, spans[span, LOCAL] + first)
        return Fragments(*(frozen(column[keep]) for column in columns))

    @cached_property
    def pad_runs(self) -> list[tuple[int, int]]:
        """``(first local row, count)`` of the runs of pad rows."""
        pads = np.flatnonzero(self.tokens < 0)
        cuts = np.flatnonzero(np.diff(pads) > 1) + 1
        return [(int(run[0]), len(run)) for run in np.split(pads, cuts) if len(run)]

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One of this shard's index arrays (``tokens``, ``held_rows``, ``valid``, ...) on a device, cached."""
        return self.memo.on(name, device, lambda: device_copy(getattr(self, name), device))

    def pads(self, device: torch.device) -> Tensor:
        """``[L]`` bool: True for a local row that holds no token at all, cached."""
        return self.memo.on("pads", device, lambda: device_copy(self.tokens < 0, device))

    def order(self, device: torch.device) -> SequenceOrder:
        """How rows of all ranks and global tokens correspond, cached."""

        def made() -> SequenceOrder:
            ranks = self.layout.cp_size
            everyone = np.concatenate([self.layout.positions(rank) for rank in range(ranks)])
            return SequenceOrder.over(self.inverse, everyone, ranks, device)

        return self.memo.on("order", device, made)


class ShardPair:
    """Who attends to whom: a rank's shards of the query and the key stream, the same one twice in self attention.

    Args:
        queries: of the query stream.
        keys: of the key stream; as many rows of the batch as the query stream.
        memo: what follows from the two, for all that hold the same batch; None for one of this pair's own.
    """

    def __init__(self, queries: Shard, keys: Shard, memo: Memo | None = None) -> None:
        self.queries = queries
        self.keys = keys
        self.memo = Memo() if memo is None else memo
        self._own = Memo()

    @property
    def is_crossing(self) -> bool:
        """Whether keys are a stream of their own."""
        return self.keys is not self.queries

    def __getitem__(self, stream: str) -> Shard:
        """The shard of stream ``"q"`` or ``"kv"``."""
        return self.queries if stream == "q" else self.keys

    def memo_of(self, mask: Mask) -> Memo:
        """Where to keep what follows from a mask: with the batch, or where masks may change, with this pair alone."""
        return self.memo if is_value(mask) else self._own

    def visible_bands(self, mask: Mask) -> Table:
        """A mask's bands over all rows of the batch laid end to end, cut to real tokens; cached.

        Raises:
            InvalidValueError: a mask that does not fit the documents.
            UnsupportedError: a mask that has no meaning across two streams.
        """

        def bands() -> Table:
            documents, rows = (self.queries.documents, self.keys.documents), None
            if self.keys.padded_rows is not None:
                rows = self.queries.validity, self.keys.validity
            return frozen(visible_bands(mask, documents, rows))

        return self.memo_of(mask).get(("bands", mask), bands)

    def fingerprint(self, mask: Mask) -> bytes:
        """Bytes that two masks share where they say the same of this batch, cached."""

        def digest() -> bytes:
            return hashlib.blake2b(self.visible_bands(mask).tobytes(), digest_size=8).digest()

        return self.memo_of(mask).get(("fingerprint", mask), digest)
