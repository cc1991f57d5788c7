"""Packing: documents into batches of a token budget, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import offsets_of


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
