"""A batch, cut to this rank's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from cphandler.errors import CPError, InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler, check_stream
from cphandler.sharding.dispatch import filler
from cphandler.tensors import check_plain, where_rows_are
from cphandler.training.labels import IGNORED

METADATA = ("cu_seqlens", "cu_seq_lens", "max_seqlen", "max_length")
"""Keys that start so are metadata of the global batch (Megatron's names and Hugging Face's) and stay as they are."""

LABELS = ("labels", "label_ids", "targets", "target_ids")
"""Keys that end so are what a loss compares with: their pad rows must be left out of it."""

TOKEN_KEYS = ("tokens", "input_ids")
"""Keys whose shape ``position_ids`` take."""


def get_batch_on_this_cp_rank(
    batch: Mapping[str, Any],
    *,
    cp_handler: ContextParallelHandler,
    seq_dims: Mapping[str, int | None] | None = None,
    pad_values: Mapping[str, float] | None = None,
    streams: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """This rank's rows of every tensor of a global batch, as a new dict.

    A tensor has the sequence where ``seq_dims`` says or where one expects it, and one that has it nowhere is refused:
    passed on whole by mistake, it would be read beside rows that are not its own. What must stay whole (pixel values,
    one weight per row of the batch, a list of names) is named, whatever its type: ``seq_dims={"pixel_values": None}``.
    These stay whole by themselves: None, numbers and strings, which have no rows, and metadata, which is global by
    definition: ``cu_seqlens*``, ``max_seqlen*``, and Hugging Face's ``cu_seq_lens_*`` and ``max_length_*``.

    ``position_ids`` in the tokens' shape are added from the layout; where the batch has its own, those are cut instead.
    Where a batch is refused, the other ranks hear of it at their first exchange.

    Args:
        batch: tensors that are the same on every rank. Dense formats: ``[B, S, ...]``; ``thd``: ``[T, ...]`` or
            ``[1, T, ...]``; a four-dim ``attention_mask`` ``[B, 1, S, S]`` keeps its query rows (dim 2);
            ``position_ids`` have the sequence last, after any axes: ``[A, B, S]``, ``[A, T]``.
        cp_handler: the batch's handler.
        seq_dims: sequence dim per key, where it is another; None leaves the entry whole.
        pad_values: what pad rows hold per key; -100 unless told for keys that end in ``labels``, ``label_ids``,
            ``targets`` or ``target_ids``, so that no loss counts them, and 0 for masks, weights and everything else.
        streams: in cross attention, ``"kv"`` for the keys of the batch that are cut as the key stream is.

    Raises:
        InvalidTypeError: a batch that is no mapping, or an entry that may hold rows and is no tensor; names its key.
        InvalidValueError: a tensor without a dim as long as the sequence where it should be, or one that cannot hold
            its pad value; a setting for an entry that the batch does not have, or that stays whole. Names the key.
    """
    if not isinstance(cp_handler, ContextParallelHandler):
        raise InvalidTypeError(
            "cp_handler must be the batch's handler",
            got=cp_handler.__name__ if isinstance(cp_handler, type) else type(cp_handler).__name__,
            fix="make one for each batch: get_cp_handler_cls(...)(cp_group=..., qkv_format=..., ...)",
        )
    cutter = _Cutter(
        cp_handler,
        {} if seq_dims is None else seq_dims,
        {} if pad_values is None else pad_values,
        {} if streams is None else streams,
    )
    try:
        cutter.check(batch)
        dims = {key: cutter.seq_dim(key, value) for key, value in batch.items()}
        local = {key: cutter.cut(key, value, dims[key]) for key, value in batch.items()}
    except Exception as error:
        cp_handler.agree("get_batch_on_this_cp_rank", error)
        raise
    tokens = next((key for key in TOKEN_KEYS if dims.get(key) is not None), None)
    if tokens is not None and local.get("position_ids") is None:
        local["position_ids"] = cutter.positions(tokens, local[tokens], dims[tokens])
    return local


@dataclass(frozen=True)
class _Cutter:
    """Cuts the entries of a batch to this rank's rows."""

    handler: ContextParallelHandler
    seq_dims: Mapping[str, int | None]
    pad_values: Mapping[str, float]
    streams: Mapping[str, str]

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse what is no batch, and settings for entries that it does not have."""
        settings = {"seq_dims": self.seq_dims, "pad_values": self.pad_values, "streams": self.streams}
        for name, value in {"batch": batch, **settings}.items():
            if not isinstance(value, Mapping):
                raise InvalidTypeError(
                    f"{name} must be a mapping", got=type(value).__name__, fix=f"pass {_FORMS[name]}, say"
                )
        for name, mapping in settings.items():
            unknown = [key for key in mapping if key not in batch]
            if unknown:
                raise InvalidValueError(
                    f"{name} names what the batch does not have",
                    got=", ".join(map(repr, unknown)),
                    fix=f"the batch has {', '.join(map(repr, batch)) or 'no entries'}",
                )
        for stream in self.streams.values():
            check_stream(stream)

    def seq_dim(self, key: str, value: Any) -> int | None:
        """Where the sequence of an entry is, not negative; None for one that stays whole."""
        if not isinstance(key, str):
            raise InvalidTypeError("the keys of a batch must be strings", got=repr(key), fix="give the entry a name")
        if self._stays_whole(key, value):
            self._check_nothing_else(key, value)
            return None
        if not isinstance(value, Tensor):
            raise InvalidTypeError(
                f"batch[{key!r}] must be a tensor, a number, a string or None",
                got=type(value).__name__,
                fix=f"make it a tensor, to be cut, or leave it whole with seq_dims={{{key!r}: None}}",
            )
        check_plain(value, f"batch[{key!r}]")
        dim = self.seq_dims.get(key)
        dim = self._expected_dim(key, value) if dim is None else dim
        self._check_length(key, value, dim)
        self._check_pad_value(key, value)
        return dim % value.dim()

    def cut(self, key: str, value: Any, dim: int | None) -> Any:
        """One entry of the local batch."""
        if dim is None:
            return value
        return self.handler.dispatch(value, dim, pad_value=self._pad_value(key), stream=self._stream(key))

    def positions(self, key: str, tokens: Tensor, dim: int | None) -> Tensor:
        """The handler's positions in the shape of local tokens; of A rotary axes, A such shapes in front."""
        positions = self.handler.position_ids if self._stream(key) == "q" else self.handler.kv_position_ids
        positions = positions.to(tokens.device)
        most = 1 if self.handler.qkv_format == "thd" else 2
        if positions.dim() > most:
            return torch.stack([_spread(axis, tokens, dim or 0) for axis in positions])
        return _spread(positions, tokens, dim or 0)

    def _stays_whole(self, key: str, value: Any) -> bool:
        if value is None:
            return True
        if key in self.seq_dims:
            return self.seq_dims[key] is None
        return isinstance(value, (Number, str, bytes)) or key.startswith(METADATA)

    def _check_nothing_else(self, key: str, value: Any) -> None:
        """What stays whole has neither pad rows nor a stream; settings may wait for an entry that is None."""
        named = [name for name in ("pad_values", "streams") if key in getattr(self, name)]
        if named and value is not None:
            raise InvalidValueError(
                f"batch[{key!r}] stays whole, and {' and '.join(named)} would change nothing",
                got=type(value).__name__,
                fix=f"leave it out there, or name the entry's sequence dim with seq_dims={{{key!r}: ...}}",
            )

    def _expected_dim(self, key: str, value: Tensor) -> int:
        if key.endswith("position_ids"):
            return -1
        if key == "attention_mask" and value.dim() == 4:
            return 2
        unbatched = value.dim() <= 1 or value.shape[0] != 1 or self._length(key) == 1
        return 0 if self.handler.qkv_format == "thd" and unbatched else 1

    def _check_length(self, key: str, value: Tensor, dim: int) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise InvalidTypeError(
                f"seq_dims[{key!r}] must be an int or None", got=repr(dim), fix="None leaves the entry whole"
            )
        length, handler = self._length(key), self.handler
        exists = -value.dim() <= dim < value.dim()
        if exists and value.shape[dim] == length:
            return
        forms = "[T, ...] or [1, T, ...]" if handler.qkv_format == "thd" else "[B, S, ...]"
        why = "the sequence is missing"
        if exists:
            elsewhere = where_rows_are(value.shape, dim % value.dim(), length)
            why = handler.explain_length(value.shape[dim], length, self._stream(key), elsewhere=elsewhere)
        raise InvalidValueError(
            f"batch[{key!r}] must have {length} rows in dim {dim}",
            got=f"shape {list(value.shape)}",
            fix=f"{why}; batches are global and {forms}; name another dim with seq_dims={{{key!r}: ...}}, or leave the "
            "entry whole with None there",
        )

    def _check_pad_value(self, key: str, value: Tensor) -> None:
        pad_value = self._pad_value(key)
        try:
            filler(pad_value, value)
        except CPError as error:
            raise type(error)(
                f"batch[{key!r}] cannot hold what its pad rows should",
                got=f"{pad_value!r} for {value.dtype}",
                fix=f"name a value that fits with pad_values={{{key!r}: ...}}",
            ) from error

    def _pad_value(self, key: str) -> float:
        return self.pad_values.get(key, IGNORED if key.endswith(LABELS) else 0)

    def _stream(self, key: str) -> str:
        return self.streams.get(key, "q")

    def _length(self, key: str) -> int:
        documents = self.handler.documents if self._stream(key) == "q" else self.handler.kv_documents
        return documents.num_tokens


def _spread(positions: Tensor, tokens: Tensor, dim: int) -> Tensor:
    """Positions ``[L]``, or ``[B, L]``, in the shape of tokens with the sequence in ``dim``."""
    shape = [1] * tokens.dim()
    shape[dim] = positions.shape[-1]
    if positions.dim() == 2:
        shape[1 - dim] = len(positions)
        positions = positions if dim == 1 else positions.T
    return positions.reshape(shape).expand(tokens.shape).clone(memory_format=torch.contiguous_format)


_FORMS = {
    "batch": '{"tokens": ..., "labels": ...}',
    "seq_dims": '{"frames": 0, "pixel_values": None}',
    "pad_values": '{"tokens": 0}',
    "streams": '{"memory": "kv"}',
}
"""What the arguments look like, for errors."""
