"""Offsets of documents from what people have in their place: position ids, segment ids, two-dim masks."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tensors import device_copy
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Table


@overload
def cu_seqlens_of(
    *,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_padded: Literal[False] = False,
) -> Tensor: ...


@overload
def cu_seqlens_of(
    *,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_padded: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def cu_seqlens_of(
    *,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_padded: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cu_seqlens`` of the documents that position ids, segment ids or a mask tell apart; for ``qkv_format="thd"``.

    Rows ``[B, S]`` are read one after the other, as ``reshape(B * S, ...)`` lays them out; no document goes on from
    one row to the next. A run of padding is a document of its own, so that offsets end at the number of tokens::

        cu_seqlens_of(segment_ids=torch.tensor([1, 1, 2, 2, 2, 0]))          # [0, 2, 5, 6]

    To such offsets alone padding is a document like others, which sees itself. To a handler that knows both offsets
    it is padding, in no document's valid tokens::

        valid, padded = cu_seqlens_of(segment_ids=ids, return_padded=True)   # [0, 2, 5, 5] and [0, 2, 5, 6]
        handler_cls(qkv_format="thd", cu_seqlens_q=valid, cu_seqlens_q_padded=padded)

    Args:
        position_ids: ``[T]``, ``[1, T]`` or ``[B, S]`` ids that count up by one and restart at 0 with each document;
            they know no padding.
        segment_ids: ``[T]``, ``[1, T]`` or ``[B, S]``: equal numbers side by side are one document, 0 is padding.
        attention_mask: ``[B, S]`` bool, or 0 and 1: the real tokens of one document per row; or segment numbers, as
            above.
        return_padded: also return the padded offsets, and padding as documents without valid tokens.

    Returns:
        ``[D + 1]`` int32 offsets on the argument's device; with ``return_padded`` the valid and the physical ones.

    Raises:
        InvalidTypeError: not one of the three, or not integers.
        InvalidValueError: what is no packing of documents: ids that jump, numbers below 0, a segment that comes again
            after another (a mask with holes: a dense handler's ``key_padding_mask`` keeps them), or another number of
            dims.
    """
    given = {"position_ids": position_ids, "segment_ids": segment_ids, "attention_mask": attention_mask}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InvalidTypeError(
            "cu_seqlens_of takes one description of the documents",
            got=" and ".join(named) or "none",
            fix="pass position_ids=, segment_ids= or attention_mask=",
        )
    if not isinstance(return_padded, bool):
        raise InvalidTypeError("return_padded must be a bool", got=repr(return_padded), fix="pass True or False")
    if position_ids is not None:
        documents, device = Documents.from_position_ids(position_ids), position_ids.device
    elif segment_ids is not None:
        documents, device = Documents.from_segment_ids(segment_ids), segment_ids.device
    else:
        documents, device = _of_mask(attention_mask)
    padded = as_int32(documents.offsets, device)
    return (as_int32(documents.valid_offsets, device), padded) if return_padded else padded


def _of_mask(attention_mask: object) -> tuple[Documents, torch.device]:
    """The documents of a mask in two dims; bools are a segment 1 and padding."""
    if isinstance(attention_mask, Tensor):
        if attention_mask.dim() != 2:
            raise InvalidValueError(
                "attention_mask must be [B, S]",
                got=f"shape {list(attention_mask.shape)}",
                fix="pass the mask that says which tokens are real, not who sees whom",
            )
        if attention_mask.dtype == torch.bool:
            attention_mask = attention_mask.to(torch.int32)
    documents = Documents.from_segment_ids(attention_mask, name="attention_mask")  # type: ignore[arg-type]
    assert isinstance(attention_mask, Tensor)
    return documents, attention_mask.device


def as_int32(offsets: Table, device: torch.device) -> Tensor:
    """Offsets as packed kernels take them.

    Raises:
        InvalidValueError: more tokens than int32 counts.
    """
    most = np.iinfo(np.int32).max
    if offsets[-1] > most:
        raise InvalidValueError(
            "cu_seqlens count in int32", got=f"{int(offsets[-1])} tokens", fix="split the batch; no kernel takes more"
        )
    return device_copy(offsets.astype(np.int32), device)
