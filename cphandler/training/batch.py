"""Batches: packing documents, and cutting a batch to this rank's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler, check_stream

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
