"""Rotary embedding at the positions of the micro-batch's handler: tables, and their use on queries and keys."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from cphandler.errors import InvalidValueError
from cphandler.handler.contract import ContextParallelHandler, FreqsMode
from cphandler.integrations.megatron.parameters import handler_of
from cphandler.sharding.rope import deinterleaved


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    config: Any,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: Any = None,
    *,
    handler: ContextParallelHandler,
    freqs_mode: FreqsMode = "per_document",
    stream: str = "q",
) -> Tensor:
    """Megatron's ``apply_rotary_pos_emb`` with the handler of the micro-batch: any layout, any lengths.

    Args:
        t: queries or keys, ``[L, B, N, D]`` or ``[L, N, D]``.
        freqs: the whole table ``[rows, 1, 1, R]``, in ``thd`` and ``sbhd`` alike.
        config: read for ``rotary_interleaved`` and ``multi_latent_attention``.
        cu_seqlens: as Megatron passes them; the handler has them already, and only their presence is compared.
        mscale: factor on cos and sin.
        cp_group: as Megatron passes it; its size is compared with the handler's.
        handler: the micro-batch's.
        freqs_mode: ``"packed"`` where the table has a row for each packed token. Megatron takes that from the table's
            length, and a table that happens to be as long as the batch is then read at other rows.
        stream: ``"kv"`` for the keys of cross attention.

    Raises:
        InvalidValueError: a table that is too short; offsets or a group that are not the handler's.
    """
    if cu_seqlens is not None and handler.qkv_format != "thd":
        raise InvalidValueError("a dense batch has no offsets", got="cu_seqlens", fix="pass cu_seqlens=None")
    if cp_group is not None and cp_group.size() != handler.cp_size:
        raise InvalidValueError(
            "cp_group is not the handler's",
            got=f"{cp_group.size()} ranks, {handler.cp_size} in the handler's",
            fix="make the handler with the group of this micro-batch",
        )
    rows = handler.get_emb_on_this_cp_rank(freqs, freqs_mode=freqs_mode, stream=stream)
    return rotated(t, rows, config, mscale, handler, stream)


def rotated(
    t: Tensor, rows: Tensor, config: Any, mscale: float, handler: ContextParallelHandler, stream: str
) -> Tensor:
    """Local rows turned by angles that were chosen for them."""
    if getattr(config, "multi_latent_attention", False):
        t = deinterleaved(t, rows.shape[-1])
    interleaved = bool(getattr(config, "rotary_interleaved", False))
    return handler.rope(t, rows, interleaved=interleaved, mscale=mscale, stream=stream)


class _TableLength(int):
    """How many rows a whole table needs, and the handler that will choose among them.

    Megatron's model asks its rotary embedding for a length, with the micro-batch's parameters in hand, and passes what
    it gets on to the embedding's ``forward`` in the next line. So the handler travels with the number, and nothing is
    kept from one micro-batch to the next.
    """

    handler: ContextParallelHandler


def _local_rows(made: Any, handler: ContextParallelHandler) -> Any:
    """A table, or Megatron's pair of a table and YaRN's factor, with this rank's rows alone."""
    table, *others = made if isinstance(made, tuple) else (made,)
    rows = handler.get_emb_on_this_cp_rank(table)
    return (rows, *others) if others else rows


class RotaryRows(nn.Module):
    """A rotary embedding for one call: the angles of the rows that this rank has of one micro-batch.

    Args:
        rotary: Megatron's.
        handler: the micro-batch's.
    """

    def __init__(self, rotary: Any, handler: ContextParallelHandler) -> None:
        super().__init__()
        self.rotary, self.handler = rotary, handler

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Rows of the whole table."""
        return self.handler.get_rotary_seq_len()

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Any:
        """Angles ``[L, 1, 1, R]``, and YaRN's factor where Megatron gives one."""
        del packed_seq, cp_group
        return _local_rows(self.rotary(max_seq_len, offset, True, None), self.handler)


class HandledRotary:
    """In front of Megatron's rotary embeddings: a micro-batch with a handler gets the angles of this rank's rows."""

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> int:
        """Rows of the table: the handler's answer where there is one, else Megatron's."""
        handler = handler_of(packed_seq_params)
        if handler is None:
            number: int = super().get_rotary_seq_len(  # type: ignore[misc]
                inference_context, transformer, transformer_input, transformer_config, packed_seq_params, **options
            )
            return number
        length = _TableLength(handler.get_rotary_seq_len())
        length.handler = handler
        return length

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Any:
        """Angles ``[L, 1, 1, R]`` of this rank's rows, and YaRN's factor where Megatron gives one; else Megatron's."""
        if not isinstance(max_seq_len, _TableLength):
            return super().forward(max_seq_len, offset, packed_seq, cp_group)  # type: ignore[misc]
        made = super().forward(int(max_seq_len), offset, True, None)  # type: ignore[misc] # packed: the whole table
        return _local_rows(made, max_seq_len.handler)


@cache
def handled_rotary_cls(rotary_cls: type) -> type:
    """A class of rotary embeddings that asks the handler first."""
    return type(f"Handled{rotary_cls.__name__}", (HandledRotary, rotary_cls), {})
