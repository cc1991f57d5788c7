"""Packing documents, and cutting a batch to a rank's rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    InvalidTypeError,
    InvalidValueError,
    get_batch_on_this_cp_rank,
    get_cp_handler_cls,
    pack_documents,
    pack_lengths,
    unpack_documents,
)
from cphandler.testing import RankPool
from cphandler.testing.cases import Case, group_of

DOCUMENTS = [torch.arange(1, 1 + n) + 100 * i for i, n in enumerate([5, 1, 0, 7])]


def test_a_packed_batch() -> None:
    batch = pack_documents(DOCUMENTS)
    assert batch["tokens"].tolist() == [1, 2, 3, 4, 5, 101, 301, 302, 303, 304, 305, 306, 307]
    assert batch["labels"].tolist() == [2, 3, 4, 5, -100, -100, 302, 303, 304, 305, 306, 307, -100]
    assert batch["loss_mask"].sum() == sum(max(0, len(d) - 1) for d in DOCUMENTS)
    assert batch["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6]
    assert batch["cu_seqlens"].tolist() == [0, 5, 6, 6, 13]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens_padded"] is None
    assert batch["max_seqlen"] == 7


def test_a_padded_batch() -> None:
    batch = pack_documents(DOCUMENTS, token_budget=32, multiple_of=4, pad_token=9)
    assert batch["cu_seqlens"].tolist() == [0, 5, 6, 6, 13, 13]
    assert batch["cu_seqlens_padded"].tolist() == [0, 8, 12, 12, 20, 32]
    assert batch["tokens"][5:8].tolist() == [9, 9, 9]
    assert (batch["labels"][5:8] == -100).all()
    assert batch["max_seqlen"] == 12
    assert pack_documents([])["tokens"].tolist() == []
    back = unpack_documents(batch["tokens"], batch["cu_seqlens"], batch["cu_seqlens_padded"])
    assert [x.tolist() for x in back] == [x.tolist() for x in DOCUMENTS] + [[]]


def test_packing_refuses() -> None:
    with pytest.raises(InvalidValueError, match="got 13 tokens for 12"):
        pack_documents(DOCUMENTS, token_budget=12)
    with pytest.raises(InvalidTypeError, match="document 1 must be a 1-D integer tensor"):
        pack_documents([torch.arange(3), torch.zeros(2)])
    with pytest.raises(InvalidValueError, match="longer than the token budget"):
        pack_lengths([3, 9], 8)
    with pytest.raises(InvalidValueError, match="do not end at the tensor's length"):
        unpack_documents(torch.arange(5), torch.tensor([0, 4]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=40))
def test_packs_hold_every_document_once(lengths: list[int]) -> None:
    packs = pack_lengths(lengths, 50)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(load <= 50 for load in loads)
    assert sum(load <= 25 for load in loads) <= 1, "two half-empty packs would have been one"


def cut_case(cp_size: int, two_dims: bool) -> None:
    group, seed = group_of(Case(cp_size=cp_size))
    if seed < 0:
        return
    batch = pack_documents(DOCUMENTS)
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=batch["cu_seqlens"])
    if two_dims:
        batch = {
            k: v.unsqueeze(0) if k in ("tokens", "labels", "loss_mask", "position_ids") else v for k, v in batch.items()
        }
    del batch["position_ids"]
    batch["hidden"] = torch.randn(13, 4) if not two_dims else torch.randn(1, 13, 4)
    before = dict(batch)
    local = get_batch_on_this_cp_rank(batch, cp_handler=handler, pad_values={"tokens": 7})
    assert batch.keys() == before.keys()
    assert all(batch[key] is before[key] for key in before), "the caller's batch is untouched"
    dim = int(two_dims)
    rows = -(-13 // cp_size)
    assert all(local[k].shape[dim] == rows for k in ("tokens", "labels", "loss_mask", "hidden", "position_ids"))
    assert local["cu_seqlens"] is batch["cu_seqlens"]
    assert local["max_seqlen"] == 7
    assert local["cu_seqlens_padded"] is None
    assert local["position_ids"].shape == local["tokens"].shape
    pads = handler.dispatch(torch.zeros(13), 0, pad_value=1) == 1
    assert (local["tokens"].flatten()[pads] == 7).all()
    assert (local["labels"].flatten()[pads] == -100).all()
    assert (local["loss_mask"].flatten()[pads] == 0).all()
    whole = handler.combine(local["labels"], dim)
    assert torch.equal(whole, batch["labels"])


@pytest.mark.parametrize("two_dims", [False, True], ids=["T", "1T"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a_batch_is_cut(ranks: RankPool, cp_size: int, two_dims: bool) -> None:
    ranks.run(cut_case, cp_size, two_dims)


def dense_case() -> None:
    group, _ = group_of(Case(cp_size=4))
    handler = get_cp_handler_cls("all_gather")(cp_group=group, qkv_format="sbhd", max_seqlen_q=10)
    rows = torch.arange(10)
    batch = {
        "input_ids": torch.stack([rows, rows + 10]),
        "attention_mask": torch.ones(2, 1, 10, 10, dtype=torch.bool).tril(),
        "position_ids": torch.stack([rows * 2, rows * 3]),
        "images": None,
        "frames": torch.randn(10, 2, 5),
    }
    local = get_batch_on_this_cp_rank(batch, cp_handler=handler, seq_dims={"frames": 0})
    assert local["input_ids"].shape == (2, 3)
    assert local["attention_mask"].shape == (2, 1, 3, 10)
    assert local["frames"].shape == (3, 2, 5)
    assert local["images"] is None
    assert torch.equal(local["position_ids"], handler.dispatch(batch["position_ids"], 1)), "the caller's own are cut"
    del batch["position_ids"]
    made = get_batch_on_this_cp_rank(batch, cp_handler=handler, seq_dims={"frames": 0})["position_ids"]
    assert torch.equal(made, handler.position_ids.expand(2, -1))


def test_a_dense_batch_is_cut(ranks: RankPool) -> None:
    ranks.run(dense_case)


def test_wrong_entries_are_named() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 6, 13])
    with pytest.raises(InvalidValueError, match=r"batch\['labels'\] must have 13 rows in dim 0; got shape \[12\]"):
        get_batch_on_this_cp_rank({"labels": torch.zeros(12)}, cp_handler=handler)
    with pytest.raises(InvalidTypeError, match=r"batch\['ids'\] must be a tensor or None; got list"):
        get_batch_on_this_cp_rank({"ids": [1, 2]}, cp_handler=handler)
    with pytest.raises(InvalidValueError, match="must have 13 rows in dim 3"):
        get_batch_on_this_cp_rank({"x": torch.zeros(13)}, cp_handler=handler, seq_dims={"x": 3})
