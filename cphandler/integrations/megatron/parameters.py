"""Handlers to Megatron's ``PackedSeqParams`` and back: what every Megatron module hands on to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from cphandler.comm.groups import GroupSource, resolve_group
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls
from cphandler.tokens.offsets import as_int32

PARTITION_MODES = ("zigzag", "contiguous")
"""Layouts that Megatron has names for (``PackedSeqParams.cp_partition_mode``, ``ContextParallelBatch``)."""


@dataclass
class HandlerParams(PackedSeqParams):  # type: ignore[misc]
    """``PackedSeqParams`` of one micro-batch that carry its handler.

    They pass through decoder, multi-token prediction, recomputation and pipeline stages like Megatron's own, dense
    batches included: ``qkv_format`` is then ``"sbhd"`` and there are no offsets.

    Attributes:
        handler: the micro-batch's handler.
        dropout_seed: seed of attention dropout in this micro-batch, the same on all ranks of the group.
        rotary: angles of this rank's rows, from one attention layer to its core attention; nobody else sets it.
        mscale: factor on their cos and sin.
    """

    handler: ContextParallelHandler | None = None
    dropout_seed: int | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    mscale: float = 1.0

    def rotated_by(self, rotary: tuple[Tensor, Tensor], mscale: float) -> HandlerParams:
        """The same batch with the angles of one layer."""
        return replace(self, rotary=rotary, mscale=mscale)


def handler_of(packed_seq_params: object) -> ContextParallelHandler | None:
    """The handler that a micro-batch's parameters carry; None for Megatron's own parameters, and for none at all."""
    return packed_seq_params.handler if isinstance(packed_seq_params, HandlerParams) else None


def packed_params(
    handler: ContextParallelHandler, *, local_cp_size: int | None = None, dropout_seed: int | None = None
) -> HandlerParams:
    """A handler as the ``packed_seq_params`` of a Megatron model.

    Args:
        handler: of one micro-batch, in ``thd`` or ``sbhd``.
        local_cp_size: dynamic context parallelism: the size of the handler's group, which is then named too.
        dropout_seed: required where the model drops attention weights.

    Returns:
        Offsets are int32 and global, on the handler's device; the padded ones are None where nothing is padded.

    Raises:
        InvalidTypeError: no handler.
        InvalidValueError: a ``local_cp_size`` that is not the handler's.
        UnsupportedError: ``bshd``, which Megatron's models do not compute in.
    """
    if not isinstance(handler, ContextParallelHandler):
        raise InvalidTypeError(
            "packed_params takes the micro-batch's handler",
            got=type(handler).__name__,
            fix="make one: cp_handler_cls(config)(cp_group=..., qkv_format=..., ...)",
        )
    if handler.qkv_format == "bshd":
        raise UnsupportedError(
            "Megatron's models compute in sbhd and thd", got="bshd", fix='make the handler with qkv_format="sbhd"'
        )
    if local_cp_size not in (None, handler.cp_size):
        raise InvalidValueError(
            "local_cp_size must be the size of the handler's group",
            got=f"{local_cp_size} with {handler.cp_size} ranks",
            fix="make the handler with the group that this micro-batch uses",
        )
    made = HandlerParams(
        qkv_format=handler.qkv_format,
        max_seqlen_q=handler.max_seqlen_q,
        max_seqlen_kv=handler.max_seqlen_kv,
        local_cp_size=local_cp_size,
        cp_group=handler.group if local_cp_size is not None and local_cp_size > 1 else None,
        handler=handler,
        dropout_seed=dropout_seed,
    )
    for name, value in _offsets(handler).items():
        setattr(made, name, value)
    if any(field.name == "cp_partition_mode" for field in fields(PackedSeqParams)):
        made.cp_partition_mode = partition_mode(handler)
    return made


def handler_from_params(
    packed_seq_params: Any, *, cp_group: GroupSource = None, handler_cls: Any = None, **arguments: Any
) -> ContextParallelHandler:
    """The handler that a micro-batch's parameters carry, or one made from Megatron's own.

    Args:
        packed_seq_params: global offsets; ``cp_group`` and ``local_cp_size`` of dynamic context parallelism where set
            (a ``local_cp_size`` of 1 without a group is one rank). Dense parameters need ``max_seqlen_q``.
        cp_group: the group where the parameters name none.
        handler_cls: the class to make; the one for ``p2p`` unless told.
        **arguments: further ones of the handler: ``mask``, ``config``. The layout is the one that Megatron's own batch
            functions cut by: ``cp_partition_mode`` where the parameters have one, else zigzag.

    Raises:
        InvalidTypeError: no ``PackedSeqParams``.
        UnsupportedError: a ``qkv_format`` that is neither ``thd`` nor ``sbhd``, or an unknown ``cp_partition_mode``.
    """
    carried = handler_of(packed_seq_params)
    if carried is not None:
        return carried
    if not isinstance(packed_seq_params, PackedSeqParams):
        raise InvalidTypeError(
            "packed_seq_params must be a PackedSeqParams",
            got=type(packed_seq_params).__name__,
            fix="packed_params(handler)",
        )
    params = packed_seq_params
    if params.qkv_format not in ("thd", "sbhd"):
        raise UnsupportedError(
            "packed_seq_params must be thd or sbhd", got=repr(params.qkv_format), fix="Megatron's models take no others"
        )
    mode = getattr(params, "cp_partition_mode", None) or "zigzag"
    if mode not in PARTITION_MODES:
        raise UnsupportedError("unknown cp_partition_mode", got=repr(mode), fix=f"one of {', '.join(PARTITION_MODES)}")
    group = params.cp_group if params.cp_group is not None else None if params.local_cp_size == 1 else cp_group
    made_by = handler_cls or get_cp_handler_cls("local", "p2p")
    given = _given_offsets(params) if params.qkv_format == "thd" else {}
    handler: ContextParallelHandler = made_by(
        cp_group=group,
        qkv_format=params.qkv_format,
        max_seqlen_q=params.max_seqlen_q,
        max_seqlen_kv=params.max_seqlen_kv,
        local_cp_size=params.local_cp_size,
        **given,
        **{"layout": mode if resolve_group(group).size > 1 else None, **arguments},
    )
    return handler


def partition_mode(handler: ContextParallelHandler) -> str:
    """Megatron's name for a handler's layout.

    Raises:
        UnsupportedError: a layout that Megatron has no name for, or lengths that Megatron cuts otherwise.
    """
    lengths, ranks = handler.documents.lengths, handler.cp_size
    name = handler.layout.name if ranks > 1 else PARTITION_MODES[0]
    if name not in PARTITION_MODES:
        raise UnsupportedError(
            "Megatron has no name for this layout",
            got=name,
            fix=f"make the handler with layout={' or '.join(map(repr, PARTITION_MODES))}",
        )
    parts = 2 * ranks if name == "zigzag" else ranks
    odd = [int(n) for n in (lengths if name == "zigzag" else [lengths.sum()]) if n % parts] if ranks > 1 else []
    if odd:
        raise UnsupportedError(
            f"Megatron's {name} layout wants lengths that divide by {parts}",
            got=", ".join(map(str, odd[:4])),
            fix="pad them (cu_seqlens_q_padded), or leave the layout to the handler alone",
        )
    return name


def _offsets(handler: ContextParallelHandler) -> dict[str, Tensor | None]:
    """Megatron's four offsets of a packed batch, empty ones for a dense batch."""
    found: dict[str, Tensor | None] = {}
    if handler.qkv_format != "thd":
        return found
    for name, documents in (("q", handler.documents), ("kv", handler.kv_documents)):
        same = np.array_equal(documents.valid_offsets, documents.offsets)
        found[f"cu_seqlens_{name}"] = as_int32(documents.valid_offsets, handler.device)
        found[f"cu_seqlens_{name}_padded"] = None if same else as_int32(documents.offsets, handler.device)
    return found


def _given_offsets(params: Any) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return {name: getattr(params, name) for name in names}
