"""Batches: packing documents, and cutting a batch to this rank's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler import ContextParallelHandler, check_stream
from cphandler.intervals import offsets_of
from cphandler.sequence import Documents

PASSED_THROUGH = ("cu_seqlens", "max_seqlen")
"""Keys that start so are metadata of the global batch and stay as they are."""

PAD_VALUES: dict[str, float] = {"labels": -100, "loss_mask": 0}
"""What a pad row holds; 0 for keys not named."""

TOKEN_KEYS = ("tokens", "input_ids")
"""Keys whose shape ``position_ids`` take."""


def get_batch_on_this_cp_rank(
    batch: Mapping[str, Any],
    *,
    cp_handler: ContextParallelHandler,
    seq_dims: Mapping[str, int] | None = None,
    pad_values: Mapping[str, float] | None = None,
    streams: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """This rank's rows of every tensor of a global batch, as a new dict.

    ``cu_seqlens*`` and ``max_seqlen*`` pass through unchanged (they are global by definition), and so does None.
    ``position_ids`` in the tokens' shape are added from the layout; where the batch has its own, those are cut instead.
    Nothing is sent. Where a batch is refused, though, the other ranks hear of it at their first exchange.

    Args:
        batch: tensors that are the same on every rank. Dense formats: ``[B, S, ...]``; ``thd``: ``[T, ...]`` or
            ``[1, T, ...]``; a four-dim ``attention_mask`` ``[B, 1, S, S]`` keeps its query rows (dim 2).
        cp_handler: the batch's handler.
        seq_dims: sequence dim per key, where it is another.
        pad_values: what pad rows hold per key; labels are -100 and everything else 0 unless told.
        streams: in cross attention, ``"kv"`` for the keys of the batch that are cut as the key stream is.

    Raises:
        InvalidTypeError: a value that is neither a tensor nor None; names its key.
        InvalidValueError: a tensor without a dim as long as the sequence where it should be; names its key.
    """
    cutter = _Cutter(cp_handler, seq_dims or {}, pad_values or {}, streams or {})
    try:
        local = {key: cutter.cut(key, value) for key, value in batch.items()}
    except Exception as error:
        cp_handler.agree("get_batch_on_this_cp_rank", error)
        raise
    key = next((key for key in TOKEN_KEYS if isinstance(local.get(key), Tensor)), None)
    if key is not None and local.get("position_ids") is None:
        tokens: Tensor = local[key]
        shape = [1] * tokens.dim()
        shape[cutter.seq_dim(key, batch[key])] = -1
        positions = cp_handler.position_ids if cutter.stream(key) == "q" else cp_handler.kv_position_ids
        local["position_ids"] = (
            positions.to(tokens.device).view(shape).expand(tokens.shape).clone(memory_format=torch.contiguous_format)
        )
    return local


@dataclass(frozen=True)
class _Cutter:
    """Cuts the entries of a batch to this rank's rows."""

    handler: ContextParallelHandler
    seq_dims: Mapping[str, int]
    pad_values: Mapping[str, float]
    streams: Mapping[str, str]

    def stream(self, key: str) -> str:
        """The stream of an entry."""
        return self.streams.get(key, "q")

    def cut(self, key: str, value: Any) -> Any:
        """One entry of the local batch."""
        if value is None or key.startswith(PASSED_THROUGH):
            return value
        if not isinstance(value, Tensor):
            raise InvalidTypeError(
                f"batch[{key!r}] must be a tensor or None",
                got=type(value).__name__,
                fix="keep other values out of the batch",
            )
        pad_value = self.pad_values.get(key, PAD_VALUES.get(key, 0))
        return self.handler.dispatch(value, self.seq_dim(key, value), pad_value=pad_value, stream=self.stream(key))

    def seq_dim(self, key: str, value: Tensor) -> int:
        """Where the sequence is in a global tensor of the batch, refusing by name what has none."""
        handler, stream = self.handler, self.stream(key)
        check_stream(stream)
        length = (handler.documents if stream == "q" else handler.kv_documents).num_tokens
        if key in self.seq_dims:
            dim = self.seq_dims[key]
        elif key == "attention_mask" and value.dim() == 4:
            dim = 2
        elif handler.qkv_format == "thd" and (value.dim() <= 1 or value.shape[0] != 1 or length == 1):
            dim = 0
        else:
            dim = 1
        exists = -value.dim() <= dim < value.dim()
        if not exists or value.shape[dim] != length:
            forms = "[T, ...] or [1, T, ...]" if handler.qkv_format == "thd" else "[B, S, ...]"
            why = handler.explain_length(value.shape[dim], length, stream) if exists else "the sequence is missing"
            raise InvalidValueError(
                f"batch[{key!r}] must have {length} rows in dim {dim}",
                got=f"shape {list(value.shape)}",
                fix=f"{why}; batches are global and {forms}; name another dim with seq_dims={{{key!r}: ...}}",
            )
        return dim % value.dim()


def pack_lengths(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Which documents go together: first fit, longest first, so that few tokens of each budget stay empty.

    Args:
        lengths: tokens of each document.
        token_budget: most tokens of a pack.

    Returns:
        Packs of indices into ``lengths``, ascending inside a pack; deterministic.

    Raises:
        InvalidValueError: a document longer than the budget.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise InvalidValueError(
            "a document is longer than the token budget",
            got=f"{longest} tokens for a budget of {token_budget}",
            fix="cut long documents first, or raise the budget",
        )
    packs: list[list[int]] = []
    room = np.empty(0, dtype=np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = np.flatnonzero(room >= lengths[index])
        if len(fits):
            pack = int(fits[0])
        else:
            pack = len(packs)
            packs.append([])
            room = np.append(room, token_budget)
        packs[pack].append(index)
        room[pack] -= lengths[index]
    return [sorted(pack) for pack in packs]


def pack_documents(
    documents: Sequence[Tensor], *, token_budget: int | None = None, multiple_of: int = 1, pad_token: int = 0
) -> dict[str, Any]:
    """One packed batch from documents kept apart, labels included.

    The layouts of this library need no padding: leave ``multiple_of`` at 1 unless an engine asks for aligned documents.

    Args:
        documents: ``[n_i]`` integer tensors.
        token_budget: length T of the batch; the rest is padding. None: no more than the documents need.
        multiple_of: pad each document to a multiple of this.
        pad_token: what padding holds.

    Returns:
        ``tokens [T]``; ``labels [T]``, the next token of the same document, -100 at its end and on padding;
        ``loss_mask [T]`` float32, 1 where there is a label; ``position_ids [T]``, from 0 in each document;
        ``cu_seqlens [D + 1]`` int32 of the valid tokens; ``cu_seqlens_padded [D + 1]`` int32 of the physical ones, None
        where nothing is padded; ``max_seqlen``, the longest physical document. Padding at the end of the budget is a
        last document without valid tokens.

    Raises:
        InvalidTypeError: documents that are not integer tensors of one dim.
        InvalidValueError: more tokens than the budget, or a multiple below 1.
    """
    for i, document in enumerate(documents):
        if not isinstance(document, Tensor) or document.dim() != 1 or document.is_floating_point():
            got = (
                f"{document.dtype} {list(document.shape)}" if isinstance(document, Tensor) else type(document).__name__
            )
            raise InvalidTypeError(f"document {i} must be a 1-D integer tensor", got=got)
    if multiple_of < 1:
        raise InvalidValueError("multiple_of must be at least 1", got=multiple_of)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    physical = -(-lengths // multiple_of) * multiple_of
    total = int(physical.sum())
    if token_budget is not None and total > token_budget:
        raise InvalidValueError(
            "the documents do not fit the token budget",
            got=f"{total} tokens for {token_budget}",
            fix="choose documents with pack_lengths",
        )
    if token_budget is not None and total < token_budget:
        lengths, physical = np.append(lengths, 0), np.append(physical, token_budget - total)
    return _packed(documents, lengths, physical, pad_token)


def _packed(documents: Sequence[Tensor], lengths: Any, physical: Any, pad_token: int) -> dict[str, Any]:
    offsets, padded = offsets_of(lengths), offsets_of(physical)
    dtype = documents[0].dtype if len(documents) else torch.int64
    tokens = torch.full((int(padded[-1]),), pad_token, dtype=dtype)
    labels = torch.full((int(padded[-1]),), -100, dtype=torch.int64)
    for start, document in zip(padded[:-1].tolist(), documents, strict=False):
        tokens[start : start + len(document)] = document
        if len(document):
            labels[start : start + len(document) - 1] = document[1:]
    positions = np.arange(int(padded[-1]), dtype=np.int64) - np.repeat(padded[:-1], physical)
    is_padded = bool((lengths != physical).any())
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (labels != -100).to(torch.float32),
        "position_ids": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(offsets).to(torch.int32),
        "cu_seqlens_padded": torch.from_numpy(padded).to(torch.int32) if is_padded else None,
        "max_seqlen": int(physical.max(initial=0)),
    }


def unpack_documents(packed: Tensor, cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None = None) -> list[Tensor]:
    """The valid rows of each document of a packed global tensor ``[T, ...]``; the inverse of :func:`pack_documents`.

    Raises:
        InvalidValueError: offsets that do not describe the tensor.
    """
    documents = Documents.from_cu_seqlens(cu_seqlens, cu_seqlens_padded)
    if documents.num_tokens != len(packed):
        raise InvalidValueError(
            "the offsets do not end at the tensor's length",
            got=f"{documents.num_tokens} for {len(packed)} rows",
            fix="pass the global tensor and its global offsets",
        )
    starts, lengths = documents.offsets[:-1], np.diff(documents.valid_offsets)
    return [packed[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
