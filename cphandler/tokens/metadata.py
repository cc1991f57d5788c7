"""What a caller says about a batch: packed offsets or dense lengths, checked and made into streams of documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count
from cphandler.tokens.documents import Documents, Offsets, host_offsets
from cphandler.tokens.intervals import Table


class StreamMetadata(NamedTuple):
    """One stream of tokens.

    Attributes:
        documents: the documents of one row of the batch; a dense batch has one, of length S.
        padded_rows: for a dense batch whose rows differ, by a key-padding mask or by a mask for each, the documents of
            all its rows laid end to end.
        max_seqlen: length of the longest physical document, or the upper bound that the caller named.
    """

    documents: Documents
    padded_rows: Documents | None
    max_seqlen: int


def packed_streams(
    offsets: Mapping[str, Offsets | None],
    max_seqlens: Mapping[str, int | None],
    key_padding_mask: Tensor | None,
    *,
    cross: bool | None = None,
) -> tuple[StreamMetadata, StreamMetadata]:
    """The query and the key stream of a packed batch; the same object twice for self attention.

    Args:
        offsets: ``cu_seqlens_q``, ``cu_seqlens_kv`` and their ``_padded`` twins. Key offsets that repeat the query's,
            as packed-sequence parameters often do, mean self attention.
        max_seqlens: ``max_seqlen_q`` and ``max_seqlen_kv``.
        key_padding_mask: must be None.
        cross: whether keys are a stream of their own; None tells by the offsets.

    Raises:
        InvalidTypeError: offsets or lengths that are not integers.
        InvalidValueError: offsets that are missing or contradict each other.
    """
    if offsets["cu_seqlens_q"] is None:
        raise InvalidValueError("qkv_format 'thd' needs cu_seqlens_q", fix="pass global offsets such as [0, 5, 12]")
    if key_padding_mask is not None:
        raise InvalidValueError(
            "key_padding_mask belongs to the dense formats",
            fix="with thd, pass cu_seqlens_q (valid) and cu_seqlens_q_padded (physical)",
        )
    hosted = host_offsets({name: value for name, value in offsets.items() if value is not None})
    queries = _packed(hosted, max_seqlens, "q")
    differing = [name for name in ("cu_seqlens_kv", "cu_seqlens_kv_padded") if _differs(hosted, name)]
    _check_cross(cross, bool(differing))
    if not differing and not cross:
        _checked_max_seqlen(queries.documents, max_seqlens["max_seqlen_kv"], "max_seqlen_kv")
        return queries, queries
    if "cu_seqlens_kv" not in hosted:
        raise InvalidValueError(
            "cross attention needs cu_seqlens_kv",
            got=f"{' and '.join(differing) or 'cross_attention=True'} alone",
            fix="pass the key documents' offsets; leave all three out for self attention",
        )
    return queries, _packed(hosted, max_seqlens, "kv")


def _packed(hosted: Mapping[str, Table], max_seqlens: Mapping[str, int | None], stream: str) -> StreamMetadata:
    name = f"cu_seqlens_{stream}"
    documents = Documents.from_cu_seqlens(hosted[name], hosted.get(f"{name}_padded"), name=name)
    longest = _checked_max_seqlen(documents, max_seqlens[f"max_seqlen_{stream}"], f"max_seqlen_{stream}")
    return StreamMetadata(documents, None, longest)


def _differs(hosted: Mapping[str, Table], name: str) -> bool:
    """Whether key offsets say something else than their query twin."""
    key, query = hosted.get(name), hosted.get(name.replace("_kv", "_q"))
    return key is not None and (query is None or not np.array_equal(query, key))


def _checked_max_seqlen(documents: Documents, max_seqlen: int | None, name: str) -> int:
    longest = documents.max_length
    if max_seqlen is None:
        return longest
    most = checked_count(name, max_seqlen, fix="pass the global maximum as an int, or None")
    if most < longest:
        raise InvalidValueError(
            f"{name} is shorter than the longest document",
            got=f"{most} for {longest} tokens",
            fix="pass the global maximum, or None",
        )
    return most


def dense_streams(
    qkv_format: str,
    offsets: Mapping[str, Offsets | None],
    max_seqlens: Mapping[str, int | None],
    key_padding_mask: Tensor | None,
    *,
    cross: bool | None = None,
    rows: int | None = None,
) -> tuple[StreamMetadata, StreamMetadata]:
    """The query and the key stream of a dense batch; the same object twice where both have one length.

    Args:
        qkv_format: ``"sbhd"`` or ``"bshd"``.
        offsets: must all be None.
        max_seqlens: ``max_seqlen_q``, required, and ``max_seqlen_kv``, None for self attention.
        key_padding_mask: ``[B, S]`` over the keys; over both sides in self attention.
        cross: whether keys are a stream of their own; None tells by the lengths.
        rows: how many rows the mask has one of something for; above one they are documents of their own, as they are
            under a key-padding mask. None, or one, for a mask that is the same for all.

    Raises:
        InvalidTypeError: a length that is no int, or a mask that is not bool or integer.
        InvalidValueError: a length that is missing or negative, offsets, or a mask of another length.
    """
    given = [name for name, value in offsets.items() if value is not None]
    if given:
        raise InvalidValueError(
            f"qkv_format {qkv_format!r} is dense and takes no {' or '.join(given)}",
            fix="use qkv_format='thd' for packed documents, or key_padding_mask for a padded dense batch",
        )
    if max_seqlens["max_seqlen_q"] is None:
        raise InvalidValueError(
            f"qkv_format {qkv_format!r} needs max_seqlen_q",
            fix="pass the global sequence length S, before the split over ranks",
        )
    fix = "pass the global sequence length as an int, before the split over ranks"
    lengths = {name: checked_count(name, value, fix=fix) for name, value in max_seqlens.items() if value is not None}
    queries = lengths["max_seqlen_q"]
    keys = lengths.get("max_seqlen_kv", queries)
    padded = None if rows in (None, 1) else _real_rows(rows, keys)
    if key_padding_mask is not None:
        padded = _padded_rows(key_padding_mask, keys, "kv" if keys != queries else "q")
    _check_cross(cross, keys != queries)
    if keys == queries and not cross:
        stream = StreamMetadata(Documents.dense(queries), padded, queries)
        return stream, stream
    real = None if padded is None else _real_rows(padded.num_documents, queries)
    return (
        StreamMetadata(Documents.dense(queries), real, queries),
        StreamMetadata(Documents.dense(keys), padded, keys),
    )


def _check_cross(cross: object, differs: bool) -> None:
    if not (cross is None or isinstance(cross, bool)):
        raise InvalidTypeError(
            "cross_attention must be a bool or None", got=repr(cross), fix="leave it out: the lengths tell"
        )
    if cross is False and differs:
        raise InvalidValueError(
            "the keys' documents differ from the queries', and cross_attention is False",
            fix="leave cu_seqlens_kv and max_seqlen_kv out for self attention",
        )


def _padded_rows(key_padding_mask: Tensor, length: int, stream: str) -> Documents:
    rows = Documents.from_attention_mask(key_padding_mask, name="key_padding_mask")
    if key_padding_mask.shape[1] != length:
        raise InvalidValueError(
            "key_padding_mask must cover the global sequence",
            got=f"{key_padding_mask.shape[1]} columns for max_seqlen_{stream} {length}",
            fix="pass the [B, S] mask of the keys as it was before the split over ranks",
        )
    return rows


def _real_rows(rows: int, length: int) -> Documents:
    """Rows of a batch without padding, as documents of their own."""
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    runs = np.stack([offsets[:-1], offsets[1:]], axis=1)
    return Documents(offsets, runs[runs[:, 0] < runs[:, 1]])
