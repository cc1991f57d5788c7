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
from cphandler.sharding.order import SequenceOrder
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Flags, Table, frozen, overlaps
from cphandler.tokens.masks import Mask, visible_bands


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


def device_copy(array: Table | Flags, device: torch.device) -> Tensor:
    """An index array on a device; an ordinary tensor also under inference mode, since a batch may train later."""
    with torch.inference_mode(mode=False):
        return torch.from_numpy(np.array(array)).to(device)


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
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}
        self._orders: dict[torch.device, SequenceOrder] = {}

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

    @cached_property
    def tokens(self) -> Table:
        """``[L]`` global token of each local row; -1 for a pad row."""
        return frozen(self.layout.positions(self.rank))

    @cached_property
    def held_rows(self) -> Table:
        """``[n]`` local rows that hold a token, ascending."""
        return frozen(np.flatnonzero(self.tokens >= 0))

    @cached_property
    def held_tokens(self) -> Table:
        """``[n]`` global tokens of those rows."""
        return frozen(self.tokens[self.held_rows])

    @cached_property
    def positions(self) -> Table:
        """``[L]`` position of each local row in its document; 0 for a pad row."""
        held = np.maximum(self.tokens, 0)
        offsets = self.documents.offsets[self.documents.document_of(held)] if len(held) else held
        return frozen(np.where(self.tokens >= 0, held - offsets, 0))

    @cached_property
    def valid(self) -> Flags:
        """``[L]``, or ``[B, L]`` where rows of the batch differ: True where a local row holds a real token."""
        shift = np.arange(self.copies, dtype=np.int64)[:, None] * self.layout.num_tokens
        valid = self.validity.is_valid(self.tokens[None] + shift) & (self.tokens >= 0)
        valid = valid if self.padded_rows is not None else valid[0]
        valid.setflags(write=False)
        return valid

    def shifted_validity(self, shift: int, device: torch.device) -> Tensor:
        """``[B, L]``: where a local row and the one ``shift`` tokens before it are real, row of the batch by row."""
        key = f"valid {shift}", device
        if key not in self._tensors:
            first = np.arange(self.copies, dtype=np.int64)[:, None] * self.layout.num_tokens
            source = self.tokens - shift
            inside = (self.tokens >= 0) & (source >= 0) & (source < self.layout.num_tokens)
            real = self.validity.is_valid(np.where(inside, source, 0)[None] + first)
            self._tensors[key] = device_copy(inside[None] & real & np.atleast_2d(self.valid), device)
        return self._tensors[key]

    @cached_property
    def fragments(self) -> Fragments:
        """The runs of one document each that this rank holds."""
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
        key = name, device
        if key not in self._tensors:
            self._tensors[key] = device_copy(getattr(self, name), device)
        return self._tensors[key]

    def pads(self, device: torch.device) -> Tensor:
        """``[L]`` bool: True for a local row that holds no token at all, cached."""
        key = "pads", device
        if key not in self._tensors:
            self._tensors[key] = device_copy(self.tokens < 0, device)
        return self._tensors[key]

    def order(self, device: torch.device) -> SequenceOrder:
        """How rows of all ranks and global tokens correspond, cached."""
        if device not in self._orders:
            places = self.layout.inverse
            everyone = np.concatenate([self.layout.positions(rank) for rank in range(self.layout.cp_size)])
            identity = len(places) == len(everyone) and bool((np.diff(places) == 1).all())
            self._orders[device] = SequenceOrder(device_copy(places, device), device_copy(everyone, device), identity)
        return self._orders[device]


class ShardPair:
    """Who attends to whom: a rank's shards of the query and the key stream, the same one twice in self attention.

    Args:
        queries: of the query stream.
        keys: of the key stream; as many rows of the batch as the query stream.
    """

    def __init__(self, queries: Shard, keys: Shard) -> None:
        self.queries = queries
        self.keys = keys
        self._bands: dict[Mask, Table] = {}
        self._fingerprints: dict[Mask, bytes] = {}

    @property
    def is_crossing(self) -> bool:
        """Whether keys are a stream of their own."""
        return self.keys is not self.queries

    def __getitem__(self, stream: str) -> Shard:
        """The shard of stream ``"q"`` or ``"kv"``."""
        return self.queries if stream == "q" else self.keys

    def visible_bands(self, mask: Mask) -> Table:
        """A mask's bands over all rows of the batch laid end to end, cut to real tokens; cached.

        Raises:
            InvalidValueError: a mask that does not fit the documents.
            UnsupportedError: a mask that has no meaning across two streams.
        """
        if mask not in self._bands:
            documents, rows = (self.queries.documents, self.keys.documents), None
            if self.keys.padded_rows is not None:
                rows = self.queries.validity, self.keys.validity
            self._bands[mask] = visible_bands(mask, documents, rows)
        return self._bands[mask]

    def fingerprint(self, mask: Mask) -> bytes:
        """Bytes that two masks share where they say the same of this batch, cached."""
        if mask not in self._fingerprints:
            self._fingerprints[mask] = hashlib.blake2b(self.visible_bands(mask).tobytes(), digest_size=8).digest()
        return self._fingerprints[mask]
