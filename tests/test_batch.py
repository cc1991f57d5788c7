"""Packing documents, and cutting a batch to a rank's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    CPError,
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


LABEL_KEYS = ("labels", "shift_labels", "mtp_2_labels", "label_ids", "targets", "target_ids")


def pads_case(cp_size: int) -> None:
    """What pad rows of every kind of entry hold; the rest is the caller's, row for row."""
    group, seed = group_of(Case(cp_size=cp_size))
    if seed < 0:
        return
    handler = get_cp_handler_cls("p2p")(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 5, 6, 13])
    zeros = ("tokens", "loss_mask", "loss_weights", "attention_mask", "hidden", "labels_mask")
    batch = {key: torch.arange(1, 14) for key in (*LABEL_KEYS, *zeros)}
    batch |= {"soft_labels": torch.rand(13, 3) + 1, "hidden": torch.rand(1, 13, 3) + 1}
    local = get_batch_on_this_cp_rank(batch, cp_handler=handler)
    pads = handler.dispatch(torch.zeros(13), 0, pad_value=1) == 1
    for key in LABEL_KEYS:
        assert (local[key][pads] == -100).all(), key
        assert (local[key][~pads] > 0).all(), key
    assert (local["soft_labels"][pads] == -100).all()
    for key in zeros:
        rows = local[key][0] if key == "hidden" else local[key]
        assert (rows[pads] == 0).all(), key
        assert (rows[~pads] != 0).all(), key
    told = get_batch_on_this_cp_rank(batch, cp_handler=handler, pad_values={"targets": -1, "tokens": 9})
    assert (told["targets"][pads] == -1).all()
    assert (told["tokens"][pads] == 9).all()
    lost = torch.nn.functional.cross_entropy(torch.zeros(len(pads), 20), local["shift_labels"], reduction="sum")
    assert lost.item() == pytest.approx((~pads).sum().item() * torch.tensor(20.0).log().item())


@pytest.mark.parametrize("cp_size", [2, 4])
def test_what_pad_rows_hold(ranks: RankPool, cp_size: int) -> None:
    ranks.run(pads_case, cp_size)


def whole_case() -> None:
    """Entries without a sequence, of any type, in a dense batch of three rows."""
    group, _ = group_of(Case(cp_size=4))
    handler = get_cp_handler_cls("ulysses")(cp_group=group, qkv_format="bshd", max_seqlen_q=10)
    entries = {
        "pixel_values": torch.randn(7, 9),
        "weights": torch.rand(3),
        "sources": ["web", "books", "web"],
        "lengths": (4, 10, 2),
        "array": np.arange(10),
        "count": torch.tensor(10),
        "images": {"deep": torch.zeros(2, 10)},
        "mask": torch.ones(3, 1, 1, 10),
    }
    unnamed = {
        "step": 3,
        "rate": 0.5,
        "last": True,
        "source": "web",
        "digest": b"x",
        "epoch": np.int64(2),
        "nothing": None,
        "cu_seqlens_q": torch.tensor([0, 10]),
        "cu_seq_lens_q": torch.tensor([0, 10]),
        "cu_seq_lens_k": [0, 10],
        "max_seqlen": torch.tensor(10),
        "max_length_q": 10,
        "max_length_k": torch.tensor(10),
    }
    whole = {**entries, **unnamed}
    rows = torch.arange(30).view(3, 10)
    given = {"input_ids": rows, **whole}
    local = get_batch_on_this_cp_rank(given, cp_handler=handler, seq_dims=dict.fromkeys(entries))
    assert all(local[key] is value for key, value in whole.items())
    assert list(local) == [*given, "position_ids"], "in the batch's order"
    assert torch.equal(local["input_ids"], handler.dispatch(rows, 1))
    for key, value in entries.items():
        with pytest.raises((InvalidTypeError, InvalidValueError), match=rf"batch\['{key}'\].*None"):
            get_batch_on_this_cp_rank({key: value}, cp_handler=handler)
    kept = get_batch_on_this_cp_rank({"tokens": rows}, cp_handler=handler, seq_dims={"tokens": None})
    assert kept["tokens"] is rows
    assert "position_ids" not in kept, "whole tokens have other positions than local ones"
    lengths = torch.zeros(10, dtype=torch.int64)
    told = get_batch_on_this_cp_rank({"max_length": lengths}, cp_handler=handler, seq_dims={"max_length": 0})
    assert told["max_length"].shape == (3,), "what the caller says goes before what a name says"


def test_entries_that_stay_whole(ranks: RankPool) -> None:
    ranks.run(whole_case)


@pytest.mark.parametrize("axes", [1, 3, 12])
def test_position_ids_have_the_sequence_last(axes: int) -> None:
    packed = get_cp_handler_cls("ring")(cp_group=Seat(2, 1), qkv_format="thd", cu_seqlens_q=[0, 5, 12])
    dense = get_cp_handler_cls("ring")(cp_group=Seat(2, 1), qkv_format="sbhd", max_seqlen_q=12)
    for handler, shape in ((packed, (axes, 12)), (packed, (axes, 1, 12)), (dense, (axes, 2, 12)), (dense, (12,))):
        positions = torch.randint(0, 99, shape)
        local = get_batch_on_this_cp_rank({"position_ids": positions}, cp_handler=handler)["position_ids"]
        assert torch.equal(local, handler.dispatch(positions, -1))


class Seat:
    """A group object that can only say who it is."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


TOKENS = torch.zeros(13, dtype=torch.int64)

WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "another length": (
        {"labels": torch.zeros(12)},
        {},
        InvalidValueError,
        r"batch\['labels'\] must have 13 rows in dim 0; got shape \[12\].*leave the entry whole with None",
    ),
    "no such dim": ({"x": torch.zeros(13)}, {"seq_dims": {"x": 3}}, InvalidValueError, "must have 13 rows in dim 3"),
    "a list of ids": (
        {"ids": [1, 2]},
        {},
        InvalidTypeError,
        r"batch\['ids'\] must be a tensor, .*got list; .*'ids': None",
    ),
    "an array": ({"ids": np.zeros(13)}, {}, InvalidTypeError, r"batch\['ids'\] .*got ndarray"),
    "a list for a batch": ([TOKENS], {}, InvalidTypeError, "batch must be a mapping; got list; pass {"),
    "nothing for a batch": (None, {}, InvalidTypeError, "batch must be a mapping; got NoneType"),
    "a tensor for a batch": (TOKENS, {}, InvalidTypeError, "batch must be a mapping; got Tensor"),
    "a list of dims": ({"x": TOKENS}, {"seq_dims": ["x"]}, InvalidTypeError, "seq_dims must be a mapping; got list"),
    "an empty list of pads": ({"x": TOKENS}, {"pad_values": []}, InvalidTypeError, "pad_values must be a mapping"),
    "a stream for all": ({"x": TOKENS}, {"streams": "kv"}, InvalidTypeError, "streams must be a mapping; got str"),
    "a key by number": ({3: TOKENS}, {}, InvalidTypeError, "must be strings; got 3"),
    "a misspelt stream": (
        {"memory": TOKENS, "tokens": TOKENS},
        {"streams": {"memry": "kv"}},
        InvalidValueError,
        "streams names what the batch does not have; got 'memry'; the batch has 'memory', 'tokens'",
    ),
    "a misspelt pad": (
        {"tokens": TOKENS},
        {"pad_values": {"token": 3, "tokens": 3}},
        InvalidValueError,
        "pad_values names what the batch does not have; got 'token'; ",
    ),
    "a misspelt dim": ({}, {"seq_dims": {"x": None}}, InvalidValueError, "got 'x'; the batch has no entries"),
    "an unknown stream": ({"x": TOKENS}, {"streams": {"x": "k"}}, InvalidValueError, "unknown stream; got 'k'"),
    "a dim by name": (
        {"x": TOKENS},
        {"seq_dims": {"x": "0"}},
        InvalidTypeError,
        r"seq_dims\['x'\] must be an int or None",
    ),
    "a bool dim": ({"x": TOKENS}, {"seq_dims": {"x": False}}, InvalidTypeError, "must be an int or None; got False"),
    "a sparse tensor": (
        {"x": torch.zeros(13, 2).to_sparse()},
        {},
        InvalidTypeError,
        r"batch\['x'\] must be a dense tensor; got torch.sparse_coo; call to_dense\(\) first",
    ),
    "a nested tensor": (
        {"x": torch.nested.nested_tensor([torch.zeros(6), torch.zeros(7)], layout=torch.jagged)},
        {},
        InvalidTypeError,
        r"batch\['x'\] must be an ordinary tensor; got a nested tensor",
    ),
    "a pad by name": (
        {"x": TOKENS},
        {"pad_values": {"x": "0"}},
        InvalidTypeError,
        r"batch\['x'\] .*got '0' for torch.int64",
    ),
    "a pad that does not fit": (
        {"labels": TOKENS.to(torch.uint8)},
        {},
        InvalidValueError,
        r"batch\['labels'\] cannot hold .* got -100 for torch.uint8; name a value .* pad_values={'labels': ...}",
    ),
    "a pad for metadata": (
        {"cu_seqlens": TOKENS},
        {"pad_values": {"cu_seqlens": 1}},
        InvalidValueError,
        r"batch\['cu_seqlens'\] stays whole, and pad_values would change nothing",
    ),
    "a stream for a number": ({"n": 3}, {"streams": {"n": "kv"}}, InvalidValueError, "stays whole, and streams would"),
    "a pad for an entry left whole": (
        {"x": TOKENS},
        {"seq_dims": {"x": None}, "pad_values": {"x": 1}},
        InvalidValueError,
        "stays whole, and pad_values would",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_entries_are_named(case: tuple[Any, dict[str, Any], type[Exception], str]) -> None:
    batch, settings, kind, message = case
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 6, 13])
    with pytest.raises(kind, match=message) as caught:
        get_batch_on_this_cp_rank(batch, cp_handler=handler, **settings)
    assert isinstance(caught.value, CPError)


@pytest.mark.parametrize("handler", [None, "ring", get_cp_handler_cls("ring")], ids=str)
def test_what_is_no_handler(handler: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"must be the batch's handler; got .*; make one for each batch"):
        get_batch_on_this_cp_rank({"tokens": TOKENS}, cp_handler=handler)


def test_settings_may_wait_for_an_entry_that_is_none() -> None:
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 6, 13])
    settings: dict[str, Any] = {"pad_values": {"labels": -1}, "streams": {"labels": "q"}, "seq_dims": {"labels": 0}}
    with pytest.raises(InvalidTypeError, match="must be a tensor"):
        get_batch_on_this_cp_rank({"labels": [1]}, cp_handler=handler, **settings)
    assert get_batch_on_this_cp_rank({"labels": None}, cp_handler=handler, **settings) == {"labels": None}


def refused_on_one_rank() -> str:
    """One rank's batch is refused: it says why, and the others hear of it at their first exchange."""
    group, _ = group_of(Case(cp_size=4))
    handler = get_cp_handler_cls("ring")(cp_group=group, qkv_format="thd", cu_seqlens_q=[0, 13])
    batch: Any = [TOKENS] if dist.get_rank() == 2 else {"tokens": TOKENS}
    try:
        handler.combine(get_batch_on_this_cp_rank(batch, cp_handler=handler)["tokens"], 0)
    except CPError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_the_others_hear_of_a_refusal(ranks: RankPool) -> None:
    told = ranks.run(refused_on_one_rank)
    assert told[2].startswith("InvalidTypeError: batch must be a mapping")
    for rank in (0, 1, 3):
        assert told[rank].startswith("RankMismatchError"), told[rank]
        assert "rank 2" in told[rank], told[rank]
        assert "batch must be a mapping" in told[rank], told[rank]
