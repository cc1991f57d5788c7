"""Facts are the caller's: what a handler hands out may be edited, or cannot be, and what it was given may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cphandler import Bands, CoreAttention, Layout, get_cp_handler_cls
from tests.test_errors import Seat

TABLE = torch.arange(20.0)[:, None].repeat(1, 8)
REAL = torch.tensor([[1] * 11, [1] * 8 + [0] * 3], dtype=torch.bool)

HANDLERS: dict[str, dict[str, Any]] = {
    "packed": {"qkv_format": "thd", "cu_seqlens_q": [0, 7, 11]},
    "packed with padding": {"qkv_format": "thd", "cu_seqlens_q": [0, 5, 8], "cu_seqlens_q_padded": [0, 7, 11]},
    "dense": {"qkv_format": "bshd", "max_seqlen_q": 11},
    "dense with padding": {"qkv_format": "bshd", "max_seqlen_q": 11, "key_padding_mask": REAL},
    "two streams": {"qkv_format": "thd", "cu_seqlens_q": [0, 7, 11], "cu_seqlens_kv": [0, 2, 5], "mask": "full"},
    "positions": {"qkv_format": "thd", "cu_seqlens_q": [0, 7, 11], "position_ids": torch.arange(11).flip(0)},
}
LAYOUTS = (None, "striped", "replicated")


def handler_of(size: int, layout: str | None, **arguments: Any) -> Any:
    name = "ulysses" if layout == "replicated" else "ring" if size > 1 else "local"
    seat = {} if size == 1 else {"cp_group": Seat(size, size - 1)}
    return get_cp_handler_cls(name)(**seat, layout=layout, **arguments)


def shown(handler: Any) -> list[Any]:
    """Everything that a handler says and does without its group, as values."""
    said: list[Any] = []
    for prefix, stream in (("", "q"), ("kv_", "kv")):
        documents = getattr(handler, f"{prefix}documents")
        said += [getattr(handler, f"{prefix}{fact}").tolist() for fact in ("position_ids", "valid_mask")]
        said += [column.tolist() for column in getattr(handler, f"{prefix}fragments")]
        said += [spans.tolist() for spans in getattr(handler, f"{prefix}layout").spans]
        said += [documents.offsets.tolist(), documents.runs.tolist(), documents.valid_offsets.tolist()]
        said += [
            handler.get_emb_on_this_cp_rank(TABLE, stream=stream).tolist(),
            handler.get_rotary_seq_len(stream=stream),
        ]
        tokens = torch.arange(documents.num_tokens)
        said.append(handler.dispatch(tokens, 0, pad_value=-1, stream=stream).tolist())
    return said


def handed_out(handler: Any) -> list[Any]:
    """Tensors and arrays that a caller gets hold of."""
    got: list[Any] = []
    for prefix in ("", "kv_"):
        documents, layout = (getattr(handler, f"{prefix}{fact}") for fact in ("documents", "layout"))
        got += [getattr(handler, f"{prefix}{fact}") for fact in ("position_ids", "valid_mask")]
        got += [*getattr(handler, f"{prefix}fragments"), *layout.spans, layout.positions(0), layout.inverse]
        got += [documents.offsets, documents.runs, documents.lengths, documents.valid_offsets]
        got += [documents.valid_starts, documents.valid_ends, documents.valid_tokens]
    shard = handler.shard()
    return [*got, shard.tokens, shard.positions, shard.valid, shard.held_rows, shard.held_tokens]


def edited(value: Tensor | np.ndarray) -> None:
    """Write into it, or find that it cannot be written to."""
    if isinstance(value, Tensor):
        value.copy_(1 - value.long())
    elif value.flags.writeable:
        value[...] = 1 - value.astype(np.int64)
    else:
        with pytest.raises(ValueError, match="read-only"):
            value[...] = 0


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", HANDLERS.values(), ids=HANDLERS.keys())
def test_what_is_handed_out_may_be_edited(arguments: dict[str, Any], layout: str | None, size: int) -> None:
    if size == 1 and layout is not None:
        layout = None if layout == "replicated" else layout
    handler = handler_of(size, layout, **arguments)
    before = shown(handler)
    for value in handed_out(handler):
        edited(value)
    assert shown(handler) == before


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": lambda: {"cu_seqlens_q": torch.tensor([0, 5, 8]), "cu_seqlens_q_padded": torch.tensor([0, 7, 11])},
    "arrays": lambda: {"cu_seqlens_q": np.array([0, 5, 8]), "cu_seqlens_q_padded": np.array([0, 7, 11])},
    "lists": lambda: {"cu_seqlens_q": [0, 5, 8], "cu_seqlens_q_padded": [0, 7, 11]},
    "int32 arrays": lambda: {"cu_seqlens_q": np.array([0, 7, 11], dtype=np.int32)},
    "keys": lambda: {"cu_seqlens_q": torch.tensor([0, 11]), "cu_seqlens_kv": torch.tensor([0, 6]), "mask": "full"},
    "a key-padding mask": lambda: {"qkv_format": "sbhd", "max_seqlen_q": 11, "key_padding_mask": REAL.clone()},
    "one of integers": lambda: {"qkv_format": "sbhd", "max_seqlen_q": 11, "key_padding_mask": REAL.long()},
    "positions": lambda: {"cu_seqlens_q": [0, 11], "position_ids": torch.arange(22).view(2, 11) // 2},
    "positions in a list": lambda: {"cu_seqlens_q": [0, 11], "position_ids": [*range(11)]},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_what_a_handler_was_given_may_change(given: Callable[[], dict[str, Any]]) -> None:
    arguments = given()
    handler = handler_of(2, None, **{"qkv_format": "thd", **arguments})
    before = shown(handler_of(2, None, **{"qkv_format": "thd", **given()}))
    for value in arguments.values():
        if isinstance(value, (Tensor, np.ndarray)):
            value[...] = 0 * value  # a caller's own stays writable, and writing changes nothing here
        elif isinstance(value, list):
            value[:] = [0] * 50
    assert shown(handler) == before


def test_spans_and_bands_of_a_callers_may_change() -> None:
    spans = [np.array([[0, 3, 1], [5, 1, 1]]), np.array([[3, 2, 1], [6, 2, 1]])]
    layout = Layout("mine", 8, spans, num_local_tokens=4)
    rows = [[0, 8, 0, 8, -4, 0]]
    mask = Bands(rows)  # type: ignore[arg-type]
    handler = handler_of(2, None, qkv_format="thd", cu_seqlens_q=[0, 8])
    own = get_cp_handler_cls("ring")(
        cp_group=Seat(2, 1), qkv_format="thd", cu_seqlens_q=[0, 8], layout=layout, mask=mask
    )
    before, bands = shown(own), own.shards.visible_bands(mask).tolist()
    for table in spans:
        table[...] = 0
    rows[0][4] = 0
    assert (shown(own), own.shards.visible_bands(mask).tolist()) == (before, bands)
    assert shown(handler) != before
    with pytest.raises(ValueError, match="read-only"):
        layout.spans[0][...] = 0


def test_a_callable_may_edit_the_offsets_that_it_is_given() -> None:
    seen: list[list[int]] = []

    def own(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
        seen.append(told["cu_seqlens_q"].tolist())
        told["cu_seqlens_q"].zero_()
        told["cu_seqlens_kv"].zero_()
        return q

    handler = handler_of(1, None, **HANDLERS["packed with padding"])
    x = torch.zeros(11, 2, 8)
    for _ in range(2):
        handler.core_attn(own, x, x, x)
    assert seen == [[0, 5, 8]] * 2
    assert handler.documents.valid_offsets.tolist() == [0, 5, 8]


def test_the_largest_score_may_be_edited() -> None:
    """What a call gives back is not what the module keeps."""
    handler, module = handler_of(1, None, **HANDLERS["packed"]), CoreAttention(record_max_logit=True)
    x = torch.randn(11, 2, 8, generator=torch.Generator().manual_seed(0))
    result = handler.core_attn(module, x, x, x, return_max_logit=True)
    kept = result.max_logit.clone()
    result.max_logit.zero_()
    assert torch.equal(module.current_max_attn_logits, kept)
