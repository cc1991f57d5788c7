"""Megatron's two functions that cut a batch, by their names and shapes, for any handler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from cphandler.comm.groups import GroupSource, Place
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls
from cphandler.integrations.megatron.parameters import HandlerParams, packed_params
from cphandler.integrations.megatron.process_groups import context_parallel_group
from cphandler.tokens.documents import Documents
from cphandler.training.batch import get_batch_on_this_cp_rank as cut_batch

UNCUT = ("attention_mask", "cu_seqlens", "cu_seqlens_padded", "max_seqlen")
"""Keys of a packed batch that Megatron leaves whole."""


def get_batch_on_this_cp_rank(
    batch: Mapping[str, Any], cp_group: GroupSource = None, *, cp_handler: ContextParallelHandler | None = None
) -> dict[str, Any]:
    """Megatron's ``get_batch_on_this_cp_rank``: this rank's rows of a dense batch, as a new dict of the same keys.

    Args:
        batch: global ``[B, S]`` tensors, the same on every rank; an ``attention_mask`` ``[B, 1, S, S]`` keeps its query
            rows. None stays None.
        cp_group: where there is no handler: the group, Megatron's own for None.
        cp_handler: the micro-batch's handler, of any layout and format. Without one the batch is cut as Megatron cuts
            it, zigzag, and S need not divide by ``2 * cp_size``: shares differ by a row, and pad rows hold label -100
            and loss mask 0.

    Raises:
        InvalidValueError: a batch without a tensor to tell its length, or one that does not fit the handler.
    """
    if cp_handler is None:
        group = context_parallel_group() if cp_group is None else cp_group
        cp_handler = _zigzag(group, {"qkv_format": "bshd", "max_seqlen_q": _length(batch)})
    elif cp_group is not None:
        raise InvalidValueError("the handler has its group", got="cp_group beside cp_handler", fix="pass one of them")
    seq_dims = {"attention_mask": 2} if batch.get("attention_mask") is not None else {}
    cut = cut_batch(batch, cp_handler=cp_handler, seq_dims=seq_dims)
    return {key: cut[key] for key in batch}


def get_thd_batch_on_this_cp_rank(
    batch: Mapping[str, Any],
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor | None,
    max_seqlen: Tensor | int,
    cp_size: int | None = None,
    cp_rank: int | None = None,
    *,
    cp_handler: ContextParallelHandler | None = None,
) -> tuple[dict[str, Any], HandlerParams]:
    """Megatron's ``get_thd_batch_on_this_cp_rank``: a packed batch cut to this rank's rows, and its parameters.

    Args:
        batch: ``[1, T]`` tensors; ``attention_mask``, ``cu_seqlens``, ``cu_seqlens_padded`` and ``max_seqlen`` stay
            whole.
        cu_seqlens: global offsets of the valid tokens.
        cu_seqlens_padded: global physical offsets; None where nothing is padded.
        max_seqlen: a tensor with one number, or the number.
        cp_size: with ``cp_rank``: cut for that seat. The handler then has no group: it cuts, and sends nothing.
        cp_rank: see ``cp_size``.
        cp_handler: the micro-batch's handler in ``thd``, of any layout; without one the batch is cut zigzag by document
            over Megatron's own group.

    Returns:
        A new dict of the same keys, and parameters that carry the handler and the offsets that were given.

    Raises:
        InvalidValueError: ``cp_size`` without ``cp_rank``, or either beside a handler; offsets and batch that disagree.
        InvalidTypeError: a ``max_seqlen`` that is no number.
    """
    if (cp_size is None) != (cp_rank is None) or (cp_size is not None and cp_handler is not None):
        raise InvalidValueError(
            "cp_size and cp_rank name a seat together, in place of a handler",
            got=f"cp_size={cp_size}, cp_rank={cp_rank}, {'a' if cp_handler else 'no'} handler",
            fix="pass both and no cp_handler, or cp_handler alone",
        )
    if cp_handler is None:
        group = context_parallel_group() if cp_size is None or cp_rank is None else Place(cp_size, cp_rank)
        offsets = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_q_padded": cu_seqlens_padded}
        cp_handler = _zigzag(group, {"qkv_format": "thd", "max_seqlen_q": _number(max_seqlen), **offsets})
    else:
        _check_offsets(cp_handler, Documents.from_cu_seqlens(cu_seqlens, cu_seqlens_padded))
    seq_dims = {key: None if key in UNCUT else 1 for key, value in batch.items() if value is not None}
    cut = cut_batch(batch, cp_handler=cp_handler, seq_dims=seq_dims)
    params = packed_params(cp_handler)
    params.cu_seqlens_q = params.cu_seqlens_kv = cu_seqlens
    params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = cu_seqlens_padded
    return {key: cut[key] for key in batch}, params


def _zigzag(group: Any, arguments: dict[str, Any]) -> ContextParallelHandler:
    alone = group is None or group.size() == 1
    return get_cp_handler_cls("local", "p2p")(cp_group=group, layout=None if alone else "zigzag", **arguments)


def _check_offsets(handler: ContextParallelHandler, given: Documents) -> None:
    own = handler.documents
    if not (np.array_equal(own.offsets, given.offsets) and np.array_equal(own.runs, given.runs)):
        raise InvalidValueError(
            "the offsets are not the handler's",
            got=f"{given.offsets.tolist()} for {own.offsets.tolist()}",
            fix="pass those that the handler was made with",
        )


def _length(batch: Mapping[str, Any]) -> int:
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and key != "attention_mask":
            return int(value.shape[1])
    raise InvalidValueError("the batch has no [B, S] tensor", got=list(batch), fix="pass tokens, or cp_handler")


def _number(max_seqlen: object) -> int:
    if isinstance(max_seqlen, Tensor) and max_seqlen.numel() == 1:
        return int(max_seqlen.item())
    if isinstance(max_seqlen, int) and not isinstance(max_seqlen, bool):
        return max_seqlen
    raise InvalidTypeError("max_seqlen must be one number", got=repr(max_seqlen), fix="pass an int, or a tensor [1]")
