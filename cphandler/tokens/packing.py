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
from cphandler.tokens.documents import Documents, Offsets
from cphandler.tokens.intervals import offsets_of
from cphandler.tokens.offsets import as_int32


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
    check_sequence("lengths", lengths, "the tokens of each document, such as [3, 9, 4]")
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
    documents: Sequence[Tensor | Mapping[str, Tensor]],
    *,
    token_budget: int | None = None,
    multiple_of: int = 1,
    pad_to_multiple_of: int = 1,
    pad_token: int = 0,
) -> dict[str, Any]:
    """One packed batch from documents kept apart, labels included.

    The layouts of this library need no padding: leave ``multiple_of`` and ``pad_to_multiple_of`` at 1 unless an engine
    asks for aligned documents, or something around attention for an aligned batch.

    Args:
        documents: ``[n_i]`` integer tensors; or mappings of one, ``tokens``, and further rows of the same tokens,
            ``[n_i, ...]`` of any dtype, under names of the caller's. ``target_mask [n_i]``, one of such, is True for
            tokens that are to be learned, a response's say; without it all are.
        token_budget: length T of the batch; the rest is padding. None: no more than the documents need.
        multiple_of: pad each document to a multiple of this.
        pad_to_multiple_of: pad the batch to a multiple of this; see :func:`cphandler.length_multiple`.
        pad_token: what padding holds in ``tokens``; everything else holds 0 there.

    Returns:
        ``tokens [T]``; ``labels [T]``, the next token of the same document, -100 at its end, on padding, and where the
        next token is no target; ``loss_mask [T]`` float32, 1 where there is a label; ``position_ids [T]``, from 0 in
        each document; ``cu_seqlens [D + 1]`` int32 of the valid tokens; ``cu_seqlens_padded [D + 1]`` int32 of the
        physical ones, None where nothing is padded; ``max_seqlen``, the longest physical document; ``num_documents``,
        how many were given; and the further rows, ``[T, ...]`` each. Padding at the end of the batch is a last document
        without valid tokens.

    Raises:
        InvalidTypeError: documents that are not integer tensors of one dim and one dtype, or mappings with the same
            entries; settings that are no ints.
        InvalidValueError: more tokens than the budget, a budget that is not the multiple, a multiple below 1, a pad
            token that the dtype does not hold, rows that are not as many as tokens, or a name that the batch has.
    """
    streams = _streams(documents)
    dtype = _common_dtype(streams["tokens"])
    multiple_of = checked_count("multiple_of", multiple_of, least=1)
    whole = checked_count("pad_to_multiple_of", pad_to_multiple_of, least=1)
    if token_budget is not None:
        token_budget = checked_count("token_budget", token_budget, fix="pass the tokens of the whole batch, or None")
    _check_pad_token(pad_token, dtype)
    _check_rows(streams)
    lengths = np.array([len(document) for document in streams["tokens"]], dtype=np.int64)
    physical = -(-lengths // multiple_of) * multiple_of
    total = _length(int(physical.sum()), token_budget, whole)
    if total > physical.sum():
        lengths, physical = np.append(lengths, 0), np.append(physical, total - physical.sum())
    offsets, padded = offsets_of(lengths), offsets_of(physical)
    tokens = _laid_out(streams.pop("tokens"), padded, torch.tensor(int(pad_token), dtype=dtype))
    targets = streams.pop("target_mask", None)
    labels = _labels(tokens, lengths, padded, None if targets is None else _laid_out(targets, padded))
    positions = np.arange(total, dtype=np.int64) - np.repeat(padded[:-1], physical)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (labels != -100).to(torch.float32),
        "position_ids": torch.from_numpy(positions),
        "cu_seqlens": as_int32(offsets, torch.device("cpu")),
        "cu_seqlens_padded": as_int32(padded, torch.device("cpu")) if (lengths != physical).any() else None,
        "max_seqlen": int(physical.max(initial=0)),
        "num_documents": len(documents),
        **{name: _laid_out(rows, padded) for name, rows in streams.items()},
    }


MADE = ("labels", "loss_mask", "position_ids", "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "num_documents")
"""What a packed batch has by itself beside its tokens."""


def _streams(documents: object) -> dict[str, list[Tensor]]:
    """The documents' tensors by name, ``tokens`` among them."""
    check_sequence("documents", documents, "a list of 1-D integer tensors")
    given: list[object] = list(documents)  # type: ignore[call-overload]
    if not any(isinstance(document, Mapping) for document in given):
        return {"tokens": given}  # type: ignore[dict-item]
    names = list(given[0]) if isinstance(given[0], Mapping) else []
    for i, document in enumerate(given):
        if not isinstance(document, Mapping) or set(document) != set(names) or "tokens" not in document:
            got = ", ".join(map(repr, document)) if isinstance(document, Mapping) else type(document).__name__
            raise InvalidTypeError(
                f"document {i} must be a mapping with tokens and the entries that the first one has",
                got=got or "nothing",
                fix="pass {'tokens': ids, ...} for each document, with the same entries in all",
            )
    taken = [name for name in names if name in MADE or not isinstance(name, str)]
    if taken:
        raise InvalidValueError(
            "a packed batch makes these entries itself",
            got=", ".join(map(repr, taken)),
            fix="leave them out; target_mask says which tokens are to be learned, and labels follow from it",
        )
    return {name: [document[name] for document in given] for name in names}  # type: ignore[index]


def _check_rows(streams: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse further rows that are not rows of the same tokens."""
    for name, rows in streams.items():
        for i, (given, tokens) in enumerate(zip(rows, streams["tokens"], strict=True)):
            like = rows[0]
            plain = isinstance(given, Tensor) and given.layout is torch.strided and given.dim() > 0
            if not plain or given.dtype != like.dtype or given.shape[1:] != like.shape[1:]:
                got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise InvalidTypeError(
                    f"{name} of document {i} must be a tensor with a row for each token, of one dtype in all",
                    got=got,
                    fix="pass [n, ...]; what belongs to a document as a whole stays outside the batch",
                )
            if len(given) != len(tokens):
                raise InvalidValueError(
                    f"{name} of document {i} must have a row for each token",
                    got=f"{len(given)} rows for {len(tokens)} tokens",
                    fix="leave out, in all entries alike, what is not to be in the batch",
                )
        if name == "target_mask" and len(rows) and (rows[0].dtype != torch.bool or rows[0].dim() != 1):
            raise InvalidTypeError(
                "target_mask must be bool [n]", got=f"{rows[0].dtype} {list(rows[0].shape)}", fix="pass mask.bool()"
            )


def _length(total: int, token_budget: int | None, multiple: int) -> int:
    """Tokens of the batch, padding included."""
    if token_budget is None:
        return -(-total // multiple) * multiple
    if total > token_budget:
        raise InvalidValueError(
            "the documents do not fit the token budget",
            got=f"{total} tokens for {token_budget}",
            fix="choose documents with pack_lengths",
        )
    if token_budget % multiple:
        raise InvalidValueError(
            "the token budget must be a multiple of pad_to_multiple_of",
            got=f"{token_budget} and {multiple}",
            fix=f"make the budget {-(-token_budget // multiple) * multiple}, or leave one of the two out",
        )
    return token_budget


def check_sequence(name: str, value: object, wanted: str) -> None:
    """Refuse what has no length or cannot be gone through: a number, a generator.

    Args:
        name: how errors call it.
        value: what was given.
        wanted: what to pass instead.

    Raises:
        InvalidTypeError: no sequence.
    """
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


def _laid_out(rows: Sequence[Tensor], padded: Any, pad: Tensor | None = None) -> Tensor:
    """Rows of documents at their physical offsets, with padding between them; on the host."""
    shape = rows[0].shape[1:] if len(rows) else ()
    pad = torch.zeros((), dtype=rows[0].dtype if len(rows) else torch.int64) if pad is None else pad
    laid = pad.expand(int(padded[-1]), *shape).clone()
    for start, document in zip(padded[:-1].tolist(), rows, strict=False):
        laid[start : start + len(document)] = document
    return laid


def _labels(tokens: Tensor, lengths: Any, padded: Any, targets: Tensor | None) -> Tensor:
    """The next token of the same document, where it is a target."""
    labels = torch.full_like(tokens, -100, dtype=torch.int64)
    for start, length in zip(padded[:-1].tolist(), lengths.tolist(), strict=True):
        labels[start : start + max(length - 1, 0)] = tokens[start + 1 : start + length]
    if targets is not None:
        labels[:-1].masked_fill_(~targets[1:], -100)
    return labels


def unpack_documents(
    packed: Tensor, cu_seqlens: Offsets, cu_seqlens_padded: Offsets | None = None, *, num_documents: int | None = None
) -> list[Tensor]:
    """The valid rows of each document of a packed global tensor ``[T, ...]``; the inverse of :func:`pack_documents`.

    Args:
        packed: rows of all tokens, views of which are returned.
        cu_seqlens: ``[D + 1]`` offsets of the valid tokens.
        cu_seqlens_padded: ``[D + 1]`` physical offsets; None where nothing is padded.
        num_documents: how many to return, ``batch["num_documents"]``, which leaves out the padding at the batch's end;
            None for all.

    Raises:
        InvalidTypeError: no tensor, or offsets that are not integers.
        InvalidValueError: offsets that do not describe the tensor, or more documents than there are.
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
    given = documents.num_documents
    wanted = given if num_documents is None else checked_count("num_documents", num_documents)
    if wanted > given:
        raise InvalidValueError(
            "the batch has fewer documents", got=f"{wanted} of {given}", fix="pass batch['num_documents'], or None"
        )
    starts, lengths = documents.offsets[:wanted], np.diff(documents.valid_offsets)[:wanted]
    return [packed[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
