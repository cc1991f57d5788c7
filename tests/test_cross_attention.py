"""The key stream of cross attention: facts, layouts, and when keys are a stream of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cphandler import get_batch_on_this_cp_rank, get_cp_handler_cls
from cphandler.testing import RankPool
from cphandler.testing.cases import Case, group_of


def cross_facts() -> None:
    """The key stream has its own rows, positions and gradients; batches are cut by stream."""
    group, _ = group_of(Case(cp_size=4))
    handler = get_cp_handler_cls("p2p")(
        cp_group=group,
        qkv_format="thd",
        cu_seqlens_q=[0, 4, 9],
        cu_seqlens_kv=torch.tensor([0, 7, 8]),
        cu_seqlens_kv_padded=torch.tensor([0, 8, 10]),
        mask="full",
    )
    assert handler.is_cross_attention
    assert (handler.num_local_tokens, handler.kv_num_local_tokens) == (3, 3)
    assert (handler.max_seqlen_q, handler.max_seqlen_kv) == (5, 8)
    assert (handler.get_rotary_seq_len(), handler.get_rotary_seq_len(stream="kv")) == (5, 8)
    keys = torch.arange(10)
    local = handler.dispatch(keys, 0, pad_value=-1, stream="kv")
    assert torch.equal(handler.combine(local, 0, stream="kv"), keys)
    positions = torch.cat([torch.arange(8), torch.arange(2)])
    assert torch.equal(handler.kv_position_ids, handler.dispatch(positions, 0, stream="kv"))
    real = torch.tensor([True] * 7 + [False, True, False])
    assert torch.equal(handler.kv_valid_mask, handler.dispatch(real, 0, pad_value=False, stream="kv"))
    table = torch.randn(8, 4)
    freqs = handler.get_emb_on_this_cp_rank(table, stream="kv")
    assert torch.equal(freqs, table[handler.kv_position_ids])
    rolled, _ = handler.roll_tensor(local + 1, -1, 0, stream="kv")
    assert torch.equal(handler.combine(rolled, 0, stream="kv"), torch.tensor([2, 3, 4, 5, 6, 7, 0, 0, 0, 0]))
    batch = {"tokens": torch.arange(9), "pages": keys}
    cut = get_batch_on_this_cp_rank(batch, cp_handler=handler, streams={"pages": "kv"}, pad_values={"pages": -1})
    assert torch.equal(cut["pages"], local)
    with pytest.raises(ValueError, match="cu_seqlens_kv says that the sequence has 10 tokens"):
        handler.dispatch(torch.arange(11), 0, stream="kv")
    with pytest.raises(ValueError, match="unknown stream; got 'k'"):
        handler.dispatch(keys, 0, stream="k")
    x = torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match="key must hold this rank's 3 rows"):
        handler.core_attn(None, x, x[:2], x[:2])


def test_cross_attention_facts(ranks: RankPool) -> None:
    ranks.run(cross_facts)


def test_key_offsets_that_repeat_the_querys_are_self_attention() -> None:
    same = get_cp_handler_cls("local")(
        qkv_format="thd", cu_seqlens_q=[0, 4], cu_seqlens_kv=torch.tensor([0, 4]), max_seqlen_q=4, max_seqlen_kv=4
    )
    assert not same.is_cross_attention
    assert same.kv_layout is same.layout
    with pytest.raises(ValueError, match="must say where its diagonal lies"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], cu_seqlens_kv=[0, 5])
    with pytest.raises(ValueError, match="both streams need as many; got 1 and 2 documents"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], cu_seqlens_kv=[0, 2, 5], mask="full")
    with pytest.raises(ValueError, match="cross attention needs cu_seqlens_kv; got cu_seqlens_kv_padded alone"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], cu_seqlens_kv_padded=[0, 5])
    with pytest.raises(ValueError, match="a pair of layouts is for"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], layout=("zigzag", "zigzag"))


def test_a_key_stream_that_happens_to_be_as_long() -> None:
    """Said explicitly: padding is then the keys' alone, and queries keep all their rows."""
    real = torch.tensor([[True] * 4 + [False] * 2])
    make = partial(get_cp_handler_cls("local"), qkv_format="bshd", max_seqlen_q=6, max_seqlen_kv=6, mask="full")
    q = torch.randn(1, 6, 2, 8)
    own, cross = make(key_padding_mask=real), make(key_padding_mask=real, cross_attention=True)
    assert (own.is_cross_attention, cross.is_cross_attention) == (False, True)
    assert own.core_attn(None, q, q, q)[:, 4:].abs().sum() == 0
    assert cross.core_attn(None, q, q, q)[:, 4:].abs().min() > 0
    packed = get_cp_handler_cls("local")(
        qkv_format="thd",
        cu_seqlens_q=[0, 4],
        cu_seqlens_kv=[0, 4],
        cross_attention=True,
        layout=("zigzag", "contiguous"),
    )
    assert packed.is_cross_attention
    with pytest.raises(ValueError, match="cross attention needs cu_seqlens_kv; got cross_attention=True alone"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], cross_attention=True)
    with pytest.raises(ValueError, match="cross_attention is False"):
        get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], cu_seqlens_kv=[0, 5], cross_attention=False)
