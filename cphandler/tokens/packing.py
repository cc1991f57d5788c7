"""Packing: documents into batches of a token budget, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as short_repr
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count
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
        InvalidTypeError: lengths or a budget that are no ints.
        InvalidValueError: negative ones, or a document longer than the budget.
    """
    token_budget = checked_count("token_budget", token_budget)
    _check_sequence("lengths", lengths, "the tokens of each document, such as [3, 9, 4]")
    lengths = [checked_count(f"lengths[{i}]", length) for i, length in enumerate(lengths)]
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
        InvalidTypeError: documents that are not integer tensors of one dim and one dtype, or settings that are no ints.
        InvalidValueError: more tokens than the budget, a multiple below 1, or a pad token that the dtype does not hold.
    """
    _check_sequence("documents", documents, "a list of 1-D integer tensors")
    dtype = _common_dtype(documents)
    multiple_of = checked_count("multiple_of", multiple_of, least=1)
    if token_budget is not None:
        token_budget = checked_count("token_budget", token_budget, fix="pass the tokens of the whole batch, or None")
    _check_pad_token(pad_token, dtype)
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
    return _packed(documents, lengths, physical, torch.tensor(int(pad_token), dtype=dtype))


def _check_sequence(name: str, value: object, wanted: str) -> None:
    """Refuse what has no length or cannot be gone through: a number, a generator."""
    if isinstance(value, (str, bytes, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise InvalidTypeError(f"{name} must be a sequence", got=type(value).__name__, fix=f"pass {wanted}")
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        raise InvalidTypeError(f"{name} must be a sequence", got="a scalar", fix=f"pass {wanted}")


def _common_dtype(documents: Sequence[Tensor]) -> torch.dtype:
    """The dtype of all documents; int64 where there is none."""
    for i, document in enumerate(documents):
        plain = isinstance(document, Tensor) and document.dim() == 1 and document.dtype in _TOKEN_DTYPES
        if not plain:
            got = (
                f"{document.dtype} {list(document.shape)}" if isinstance(document, Tensor) else type(document).__name__
            )
            raise InvalidTypeError(
                f"document {i} must be a 1-D integer tensor", got=got, fix="pass the token ids of each document"
            )
        if document.dtype != documents[0].dtype:
            raise InvalidTypeError(
                "documents must be of one dtype",
                got=f"{documents[0].dtype} and, in document {i}, {document.dtype}",
                fix="convert them with .to(torch.int64)",
            )
    return documents[0].dtype if len(documents) else torch.int64


_TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def _check_pad_token(pad_token: object, dtype: torch.dtype) -> None:
    fix = "pass the id of the padding token"
    if isinstance(pad_token, bool) or not isinstance(pad_token, (int, np.integer)):
        raise InvalidTypeError("pad_token must be an int", got=short_repr(pad_token), fix=fix)
    if not torch.iinfo(dtype).min <= pad_token <= torch.iinfo(dtype).max:
        raise InvalidValueError(f"pad_token must be a number of the documents' {dtype}", got=pad_token, fix=fix)


def _packed(documents: Sequence[Tensor], lengths: Any, physical: Any, pad_token: Tensor) -> dict[str, Any]:
    offsets, padded = offsets_of(lengths), offsets_of(physical)
    tokens = pad_token.repeat(int(padded[-1]))
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
        InvalidTypeError: no tensor, or offsets that are not integers.
        InvalidValueError: offsets that do not describe the tensor.
    """
    if not isinstance(packed, Tensor) or packed.dim() == 0:
        got = "a scalar" if isinstance(packed, Tensor) else type(packed).__name__
        raise InvalidTypeError("the packed tensor must be [T, ...]", got=got, fix="pass batch['tokens'], say")
    documents = Documents.from_cu_seqlens(cu_seqlens, cu_seqlens_padded)
    if documents.num_tokens != len(packed):
        raise InvalidValueError(
            "the offsets do not end at the tensor's length",
            got=f"{documents.num_tokens} for {len(packed)} rows",
            fix="pass the global tensor and its global offsets",
        )
    starts, lengths = documents.offsets[:-1], np.diff(documents.valid_offsets)
    return [packed[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
