"""Megatron's functions and ours on the same input: batch, rope and roll, bit by bit where Megatron is right."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import InvalidValueError, UnsupportedError, get_cp_handler_cls
from cphandler.testing import RankPool
from cphandler.testing.cases import Case, group_of

pytest.importorskip("megatron.core")

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.core.utils import get_batch_on_this_cp_rank as megatrons_batch

from cphandler.integrations.megatron import (
    apply_rotary_pos_emb,
    get_batch_on_this_cp_rank,
    get_thd_batch_on_this_cp_rank,
    handler_from_params,
    handler_of,
    packed_params,
    roll_tensor,
)
from tests.integrations.gpt import causal_mask, dense, megatron, zigzag_rows


def batches_case(cp_size: int) -> None:
    with megatron(cp=cp_size):
        batch: dict[str, Any] = dense(2, 8 * cp_size, dist.get_rank() // cp_size) | {"nothing": None}
        batch["attention_mask"] = causal_mask(8 * cp_size).expand(2, -1, -1, -1)
        kept = {key: value if value is None else value.clone() for key, value in batch.items()}
        ours = get_batch_on_this_cp_rank(batch)
        assert all(batch[key] is None or torch.equal(batch[key], kept[key]) for key in kept), "the caller's batch"
        expected = megatrons_batch(dict(batch))
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert (ours[key] is None and value is None) or torch.equal(ours[key], value), key
        odd = dense(2, 8 * cp_size + 3, 1)
        rows = get_batch_on_this_cp_rank(odd)["loss_mask"].sum()
        dist.all_reduce(rows)
        assert rows == dist.get_world_size() // cp_size * odd["loss_mask"].sum()
        with pytest.raises(RuntimeError):
            megatrons_batch(dict(odd))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_a_dense_batch_has_megatrons_rows(ranks: RankPool, cp_size: int) -> None:
    ranks.run(batches_case, cp_size)


def thd_case(cp_size: int) -> None:
    """By hand: each padded document in 2 * cp_size chunks, of which a rank has one from either end."""

    valid, padded = [0, 5, 12, 12, 13], [0, 8, 24, 24, 32]
    batch: dict[str, Any] = {"tokens": torch.arange(100, 132)[None], "labels": torch.arange(200, 232)[None]}
    batch |= {"attention_mask": None, "cu_seqlens": torch.tensor([valid])}
    offsets = torch.tensor(valid, dtype=torch.int32), torch.tensor(padded, dtype=torch.int32)
    rows: dict[int, list[int]] = {}
    for rank in range(cp_size):
        rows[rank] = []
        for start, stop in pairwise(padded):
            chunk = (stop - start) // (2 * cp_size)
            for number in (rank, 2 * cp_size - 1 - rank):
                rows[rank] += range(start + number * chunk, start + (number + 1) * chunk)
    with megatron(cp=cp_size):
        local, params = get_thd_batch_on_this_cp_rank(batch, *offsets, torch.tensor([16]))
        mine = rows[dist.get_rank() % cp_size]
        assert local["tokens"].tolist() == [[100 + row for row in mine]]
        assert local["labels"].tolist() == [[200 + row for row in mine]]
        assert local["attention_mask"] is None
        assert local["cu_seqlens"] is batch["cu_seqlens"]
        assert params.cu_seqlens_q is offsets[0]
        assert params.cu_seqlens_kv_padded is offsets[1]
        assert (params.qkv_format, params.max_seqlen_q, params.max_seqlen_kv) == ("thd", 16, 16)
        assert handler_of(params).position_ids.tolist() == [row - max(o for o in padded if o <= row) for row in mine]
        for rank in range(cp_size):
            seat, _ = get_thd_batch_on_this_cp_rank(batch, *offsets, 16, cp_size, rank)
            assert seat["tokens"].tolist() == [[100 + row for row in rows[rank]]]
        with pytest.raises(InvalidValueError, match="cp_size and cp_rank name a seat together"):
            get_thd_batch_on_this_cp_rank(batch, *offsets, 16, cp_size)
        with pytest.raises(InvalidValueError, match="the offsets are not the handler's"):
            get_thd_batch_on_this_cp_rank(batch, offsets[1], None, 16, cp_handler=handler_of(params))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_a_packed_batch_has_the_rows_counted_by_hand(ranks: RankPool, cp_size: int) -> None:
    ranks.run(thd_case, cp_size)


def table(rows: int, width: int, interleaved: bool) -> Tensor:
    angles = torch.outer(torch.arange(rows).float(), 1.0 / 100 ** (torch.arange(0, width, 2).float() / width))
    both = torch.stack([angles, angles], -1).flatten(1) if interleaved else torch.cat([angles, angles], -1)
    return both[:, None, None]


def rope_case(cp_size: int) -> None:

    group, seed = group_of(Case(cp_size=cp_size))
    if seed < 0:
        return
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    cu_seqlens = torch.tensor([0, 8, 24, 32]) * cp_size // 2 * 2
    handlers = {
        "sbhd": get_cp_handler_cls("p2p")(cp_group=group, max_seqlen_q=16 * cp_size),
        "thd": get_cp_handler_cls("p2p")(cp_group=group, qkv_format="thd", cu_seqlens_q=cu_seqlens),
    }
    for interleaved, mla in ((False, False), (True, False), (False, True)):
        config = SimpleNamespace(
            rotary_interleaved=interleaved, multi_latent_attention=mla, apply_rope_fusion=False, mrope_section=None
        )
        for name, handler in handlers.items():
            shape = (handler.num_local_tokens, 2, 3, 12) if name == "sbhd" else (handler.num_local_tokens, 3, 12)
            t = torch.randn(shape, generator=generator)
            whole = table(handler.get_rotary_seq_len() + 5 * (name == "thd"), 8, interleaved)
            freqs = zigzag_rows(whole, 0, group) if name == "sbhd" else whole
            offsets = cu_seqlens if name == "thd" else None
            expected = rope_utils.apply_rotary_pos_emb(t, freqs, config, offsets, 1.25, group)
            found = apply_rotary_pos_emb(t, whole, config, offsets, 1.25, group, handler=handler)
            assert torch.equal(found, expected), (name, interleaved, mla)
    thd = handlers["thd"]
    t, packed_table = (
        torch.randn(thd.num_local_tokens, 3, 12, generator=generator),
        table(int(cu_seqlens[-1]), 8, False),
    )
    config.multi_latent_attention = False
    expected = rope_utils.apply_rotary_pos_emb(t, packed_table, config, cu_seqlens, 1.0, group)
    found = apply_rotary_pos_emb(t, packed_table, config, cu_seqlens, handler=thd, freqs_mode="packed")
    assert torch.equal(found, expected)
    assert not torch.equal(apply_rotary_pos_emb(t, packed_table, config, cu_seqlens, handler=thd), expected)
    with pytest.raises(InvalidValueError, match="a dense batch has no offsets"):
        apply_rotary_pos_emb(t, packed_table, config, cu_seqlens, handler=handlers["sbhd"])


@pytest.mark.parametrize("cp_size", [2, 4])
def test_rope_has_megatrons_bits(ranks: RankPool, cp_size: int) -> None:
    """The groups of two are ranks 0 and 2, 1 and 3: neither is the world."""
    ranks.run(rope_case, cp_size)


def roll_case(cp_size: int) -> None:

    group, seed = group_of(Case(cp_size=cp_size))
    if seed < 0:
        return
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    with megatron():
        handler = get_cp_handler_cls("p2p")(cp_group=group, max_seqlen_q=6 * cp_size)
        x = torch.randint(0, 50, (2, 6), generator=generator)
        expected = multi_token_prediction.roll_tensor(x, cp_group=group)
        found = roll_tensor(x, cp_group=group, packed_seq_params=packed_params(handler))
        assert all(map(torch.equal, found, expected))
        cu_seqlens = torch.tensor([0, 4, 4, 12, 14]) * cp_size
        handler = get_cp_handler_cls("p2p")(cp_group=group, qkv_format="thd", cu_seqlens_q=cu_seqlens)
        full = cu_seqlens[[0, 1, 3, 4]]  # Megatron cannot roll an empty document
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=full)
        y = torch.randn(1, 14, generator=generator)
        expected = multi_token_prediction.roll_tensor(y, cp_group=group, packed_seq_params=params)
        found = roll_tensor(y, cp_group=group, packed_seq_params=packed_params(handler))
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, roll_tensor(y, -1, -1, group, params), expected)), (
            "without a handler, Megatron's own"
        )
        padded_roll(group, generator)


def padded_roll(group: Any, generator: torch.Generator) -> None:
    """Megatron cuts by the valid offsets, so that rows of other documents come in; the truth is a loop."""

    lengths, unit = [5, 9, 3], 2 * group.size()
    valid = torch.tensor([0, *lengths]).cumsum(0)
    padded = torch.tensor([0, *[-(-n // unit) * unit for n in lengths]]).cumsum(0)
    offsets = {"cu_seqlens_q": valid, "cu_seqlens_q_padded": padded}
    handler = get_cp_handler_cls("p2p")(cp_group=group, qkv_format="thd", **offsets)
    tokens = torch.arange(1, int(padded[-1]) + 1)
    truth = torch.zeros_like(tokens)
    for start, n in zip(padded[:-1].tolist(), lengths, strict=True):
        truth[start : start + n - 1] = tokens[start + 1 : start + n]
    local = handler.dispatch(tokens, 0)[None]
    real = handler.valid_mask
    found, number = roll_tensor(local, packed_seq_params=packed_params(handler))
    assert torch.equal(found[:, real], handler.dispatch(truth, 0)[None, real])
    assert number == found.sum()
    wrong = torch.tensor(0)
    try:
        megatrons, _ = multi_token_prediction.roll_tensor(
            local, cp_group=group, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=valid)
        )
        wrong += (megatrons[:, real] != handler.dispatch(truth, 0)[None, real]).sum()
    except (RuntimeError, IndexError):
        wrong += 1
    dist.all_reduce(wrong, group=group)
    assert wrong > 0, "Megatron has mended its roll: take the difference out of the documentation"
    assert generator is not None


@pytest.mark.parametrize("cp_size", [2, 4])
def test_rolls_have_megatrons_bits(ranks: RankPool, cp_size: int) -> None:
    ranks.run(roll_case, cp_size)


def params_case() -> None:
    group, _ = group_of(Case(cp_size=2))
    cls = get_cp_handler_cls("p2p")
    valid, padded = torch.tensor([0, 5, 8]), torch.tensor([0, 8, 12])
    handler = cls(cp_group=group, qkv_format="thd", cu_seqlens_q=valid, cu_seqlens_q_padded=padded)
    params = packed_params(handler, local_cp_size=2)
    assert handler_of(params) is handler
    assert handler_from_params(params) is handler
    assert params.cu_seqlens_q.tolist() == [0, 5, 8]
    assert params.cu_seqlens_kv_padded.tolist() == [0, 8, 12]
    assert (params.cp_group, params.local_cp_size, params.max_seqlen_kv) == (group, 2, 8)
    fields = {name: getattr(params, name) for name in PackedSeqParams.__dataclass_fields__}
    again = handler_from_params(PackedSeqParams(**fields))
    assert again is not handler
    assert again.layout == handler.layout
    assert packed_params(again).cu_seqlens_q_padded.tolist() == [0, 8, 12]
    alone = handler_from_params(PackedSeqParams(**fields | {"cp_group": None, "local_cp_size": 1}), cp_group=group)
    assert alone.cp_size == 1
    rows = cls(cp_group=group, max_seqlen_q=9)
    assert (packed_params(rows).qkv_format, packed_params(rows).max_seqlen_q) == ("sbhd", 9)
    assert packed_params(rows).cu_seqlens_q is None
    assert handler_of(PackedSeqParams()) is None
    assert handler_of(None) is None
    with pytest.raises(InvalidValueError, match="local_cp_size must be the size"):
        packed_params(handler, local_cp_size=4)
    with pytest.raises(UnsupportedError, match="sbhd and thd"):
        packed_params(cls(cp_group=group, qkv_format="bshd", max_seqlen_q=9))


def test_handlers_become_parameters_and_back(ranks: RankPool) -> None:
    ranks.run(params_case)
