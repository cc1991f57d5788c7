"""Documents and what a caller says of a batch: whose memory it is, what is refused, and how often a device is read."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from reprlib import repr as short_repr
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    CPError,
    Documents,
    InvalidTypeError,
    InvalidValueError,
    get_cp_handler_cls,
    pack_lengths,
    unpack_documents,
)
from cphandler import pack_documents as pack
from cphandler.tokens.documents import host_offsets
from cphandler.tokens.metadata import dense_streams, packed_streams
from tests.test_mask import documents_of

NAMES = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def test_a_callers_arrays_stay_the_callers() -> None:
    offsets, runs = np.array([0, 3, 8]), np.array([[0, 3], [4, 8]])
    documents = Documents(offsets, runs)
    packed = Documents.from_cu_seqlens(offsets, offsets)
    offsets += 1
    runs += 1
    assert documents.offsets.tolist() == packed.offsets.tolist() == [0, 3, 8]
    assert documents.runs.tolist() == [[0, 3], [4, 8]]
    tensor = torch.tensor([0, 3, 8])
    of_tensor = Documents.from_cu_seqlens(tensor)
    tensor.mul_(2)
    assert of_tensor.offsets.tolist() == [0, 3, 8]
    frozen = np.array([0, 2])
    shared = Documents(view := frozen.view(), np.zeros((0, 2), dtype=np.int64))
    view.setflags(write=False)
    frozen[1] = 7
    assert shared.num_tokens == 2


@pytest.mark.parametrize(
    "name", ["offsets", "runs", "valid_offsets", "valid_starts", "valid_ends", "valid_tokens", "lengths"]
)
def test_what_is_handed_out_cannot_change_the_documents(name: str) -> None:
    documents = Documents.from_cu_seqlens([0, 3, 8], [0, 4, 9])
    before = getattr(documents, name).tolist()
    with suppress(ValueError):  # numpy's word for read-only; lengths are new each time
        getattr(documents, name)[...] = 0
    assert getattr(documents, name).tolist() == before
    for again in (pickle.loads(pickle.dumps(documents)), copy.deepcopy(documents)):
        assert getattr(again, name).tolist() == before


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "floats": (lambda: Documents([0.0, 3.0], []), InvalidTypeError, "offsets must hold integers; got float64"),  # type: ignore[arg-type]
    "a number": (lambda: Documents(3, []), InvalidValueError, "offsets must be 1-D"),  # type: ignore[arg-type]
    "runs of three": (
        lambda: Documents([0, 3], [[0, 1, 2]]),
        InvalidValueError,
        r"must be \[R, 2\]; got shape \[1, 3\]",
    ),  # type: ignore[arg-type]
    "an odd run": (lambda: Documents([0, 3], [0, 1, 2]), InvalidValueError, r"must be \[R, 2\]; got shape \[3\]"),  # type: ignore[arg-type]
    "an empty run": (lambda: Documents([0, 3], [[1, 1]]), InvalidValueError, "in order and inside the stream; pass"),  # type: ignore[arg-type]
    "runs twice": (lambda: Documents([0, 3], [[0, 2], [1, 3]]), InvalidValueError, "in order"),  # type: ignore[arg-type]
    "a run below 0": (lambda: Documents([0, 3], [[-1, 2]]), InvalidValueError, "inside the stream"),  # type: ignore[arg-type]
    "a run too far": (lambda: Documents([0, 3], [[1, 4]]), InvalidValueError, "inside the stream"),  # type: ignore[arg-type]
    "a run of two": (
        lambda: Documents([0, 3, 3, 5], [[0, 1], [2, 4]]),  # type: ignore[arg-type]
        InvalidValueError,
        r"lies in one document; got \[2, 4\) across two; pass ascending",
    ),
    "half a row": (lambda: Documents.dense(2.5), InvalidTypeError, "seq_len must be an int; got 2.5; pass"),  # type: ignore[arg-type]
    "ragged": (
        lambda: Documents.from_cu_seqlens([[0], [1, 2]]),
        InvalidTypeError,
        "must hold integers; got list; pass",
    ),  # type: ignore[list-item]
    "words": (lambda: Documents.from_cu_seqlens("abc"), InvalidTypeError, "must hold integers; got <U3; pass"),  # type: ignore[arg-type]
    "nothing": (lambda: Documents.from_cu_seqlens([]), InvalidValueError, r"got none; an empty batch is \[0\]"),
    "no data": (
        lambda: Documents.from_cu_seqlens(torch.zeros(3, dtype=torch.int64, device="meta")),
        InvalidTypeError,
        "got a torch.strided tensor on meta",
    ),
    "sparse": (
        lambda: Documents.from_cu_seqlens(torch.tensor([0, 3]).to_sparse()),
        InvalidTypeError,
        "must hold integers; got a torch.sparse_coo tensor on cpu",
    ),
    "bfloat16": (
        lambda: Documents.from_cu_seqlens(torch.tensor([0.0, 3.0], dtype=torch.bfloat16)),
        InvalidTypeError,
        "got bfloat16",
    ),
    "past int64": (
        lambda: Documents.from_cu_seqlens(np.array([0, 2**63 + 5], dtype=np.uint64)),
        InvalidValueError,
        f"more tokens than any batch has; got {2**63 + 5}",
    ),
    "mask in a list": (lambda: Documents.from_attention_mask([[1]]), InvalidTypeError, "got list; pass a tensor"),  # type: ignore[arg-type]
    "a mask of sevens": (
        lambda: Documents.from_attention_mask(torch.tensor([[1, 0], [7, -1]])),
        InvalidValueError,
        "only 0 and 1; got 7; pass a bool mask",
    ),
    "position ids in a list": (lambda: Documents.from_position_ids([0, 1]), InvalidTypeError, "got list; pass"),  # type: ignore[arg-type]
    "lengths that are none": (
        lambda: pack_lengths(5, 3),
        InvalidTypeError,
        "lengths must be a sequence; got int; pass",
    ),  # type: ignore[arg-type]
    "a length that is none": (lambda: pack_lengths([3, 2.5], 9), InvalidTypeError, r"lengths\[1\] must be an int"),  # type: ignore[list-item]
    "a length below 0": (lambda: pack_lengths([3, -1], 9), InvalidValueError, r"lengths\[1\] must be at least 0"),
    "a budget in words": (lambda: pack_lengths([3], "x"), InvalidTypeError, "token_budget must be an int; got 'x'"),  # type: ignore[arg-type]
    "an endless budget": (lambda: pack_lengths([3], float("inf")), InvalidTypeError, "must be an int; got inf"),  # type: ignore[arg-type]
    "one tensor": (lambda: pack(torch.tensor(3)), InvalidTypeError, "documents must be a sequence; got a scalar"),  # type: ignore[arg-type]
    "a generator": (lambda: pack(iter([])), InvalidTypeError, "must be a sequence; got list_iterator; pass a list"),  # type: ignore[arg-type]
    "truths": (lambda: pack([torch.ones(3, dtype=torch.bool)]), InvalidTypeError, r"got torch.bool \[3\]; pass the"),
    "complex tokens": (lambda: pack([torch.ones(3, dtype=torch.complex64)]), InvalidTypeError, "got torch.complex64"),
    "tokens in two dims": (lambda: pack([torch.ones(3, 2, dtype=torch.int64)]), InvalidTypeError, r"\[3, 2\]"),
    "two dtypes": (
        lambda: pack([torch.arange(3, dtype=torch.int32), torch.tensor([1 << 40])]),
        InvalidTypeError,
        "one dtype; got torch.int32 and, in document 1, torch.int64; convert",
    ),
    "budget of a batch": (lambda: pack([], token_budget="x"), InvalidTypeError, "token_budget .*; pass the tokens"),  # type: ignore[arg-type]
    "budget below 0": (lambda: pack([], token_budget=-1), InvalidValueError, "at least 0; got -1"),
    "half a multiple": (lambda: pack([], multiple_of=1.5), InvalidTypeError, "multiple_of must be an int; got 1.5"),  # type: ignore[arg-type]
    "no multiple": (lambda: pack([], multiple_of=0), InvalidValueError, "at least 1; got 0; pass an int, 1 or more"),
    "pad word": (lambda: pack([], pad_token="x"), InvalidTypeError, "pad_token must be an int; got 'x'; pass the id"),  # type: ignore[arg-type]
    "pad too large": (
        lambda: pack([torch.zeros(2, dtype=torch.uint8)], pad_token=300),
        InvalidValueError,
        "a number of the documents' torch.uint8; got 300",
    ),
    "unpacked list": (lambda: unpack_documents([1, 2], torch.tensor([0, 2])), InvalidTypeError, "got list; pass"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_document_is_refused(name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind, match=message) as caught:
        make()
    assert isinstance(caught.value, CPError)


@pytest.mark.parametrize(
    "value", ["x", float("inf"), 7.9, 8.0, True, torch.tensor(8.0), np.bool_(True), [8]], ids=short_repr
)
def test_lengths_that_are_no_ints(value: Any) -> None:
    thd: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": [0, 3]}
    for arguments in (
        {**thd, "max_seqlen_q": value},
        {**thd, "max_seqlen_kv": value},
        {**thd, "cu_seqlens_kv": [0, 5], "max_seqlen_kv": value, "mask": "full"},
        {"max_seqlen_q": value},
        {"max_seqlen_q": 8, "max_seqlen_kv": value, "mask": "full"},
    ):
        with pytest.raises(InvalidTypeError, match=r"max_seqlen_k?[qv] must be an int; got .*; pass the global"):
            get_cp_handler_cls("local")(**arguments)
    with pytest.raises(InvalidTypeError, match=r"cross_attention must be a bool or None; got .*; leave it out"):
        get_cp_handler_cls("local")(**thd, cross_attention="no" if value is True else value)


def test_lengths_as_numpy_and_torch_have_them() -> None:
    for value in (9, np.int32(9), torch.tensor(9), torch.tensor([9], dtype=torch.int32)):
        handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 3], max_seqlen_q=value)  # type: ignore[arg-type]
        assert type(handler.max_seqlen_q) is int
        assert handler.max_seqlen_q == 9
    with pytest.raises(InvalidValueError, match="more than any batch has"):
        get_cp_handler_cls("local")(max_seqlen_q=1 << 70)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True] * 4], "must be a bool or integer tensor .*; got list; pass a tensor"),
        (np.ones((1, 4), dtype=bool), "got ndarray"),
        (torch.ones(1, 4, dtype=torch.complex64), "got torch.complex64"),
        (torch.ones(1, 4, device="meta"), "got a torch.strided tensor on meta"),
        (torch.ones(4, dtype=torch.bool), r"must be \[B, S\]; got shape \[4\]; pass one row"),
        (torch.ones(1, 1, 1, 4, dtype=torch.bool), r"must be \[B, S\]; got shape \[1, 1, 1, 4\]"),
        (torch.ones(0, dtype=torch.bool), r"must be \[B, S\]; got shape \[0\]"),
        (torch.ones(2, 0, dtype=torch.bool), "0 columns for max_seqlen_q 4; pass the"),
        (torch.full((1, 4), 2), "only 0 and 1; got 2"),
    ],
)
def test_padding_masks_that_are_none(mask: Any, message: str) -> None:
    with pytest.raises(CPError, match=message):
        get_cp_handler_cls("local")(max_seqlen_q=4, key_padding_mask=mask)


class Far(torch.Tensor):
    """A tensor that says it lives on an accelerator, and counts how often it, or what was made of it, comes home."""

    trips = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        Far.trips += 1
        return self.as_subclass(torch.Tensor)


def far(*numbers: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype).as_subclass(Far)


def test_offsets_leave_their_device_once() -> None:
    q, padded, kv = far(0, 3, 5), far(0, 4, 6), far(0, 2, 9)
    for offsets, trips in (
        ({"cu_seqlens_q": q}, 1),
        ({"cu_seqlens_q": q, "cu_seqlens_kv": q}, 1),
        ({"cu_seqlens_q": q, "cu_seqlens_kv": far(0, 3, 5)}, 1),
        ({"cu_seqlens_q": q, "cu_seqlens_kv": kv}, 1),
        ({"cu_seqlens_q": q, "cu_seqlens_q_padded": padded, "cu_seqlens_kv": kv, "cu_seqlens_kv_padded": kv}, 1),
        ({"cu_seqlens_q": q, "cu_seqlens_q_padded": far(0, 4, 6, dtype=torch.int64)}, 2),
        ({"cu_seqlens_q": [0, 3, 5], "cu_seqlens_q_padded": padded}, 1),
        ({"cu_seqlens_q": [0, 3, 5]}, 0),
    ):
        Far.trips = 0
        queries, keys = packed_streams(
            {name: offsets.get(name) for name in NAMES}, {"max_seqlen_q": None, "max_seqlen_kv": None}, None
        )
        assert Far.trips == trips, offsets
        valid = [documents.valid_offsets.tolist() for documents in (queries.documents, keys.documents)]
        assert valid == [[0, 3, 5], [0, 2, 9] if offsets.get("cu_seqlens_kv") is kv else [0, 3, 5]]
        if "cu_seqlens_q_padded" in offsets:
            assert queries.documents.offsets.tolist() == [0, 4, 6]
    Far.trips = 0
    assert Documents.from_cu_seqlens(q, padded).offsets.tolist() == [0, 4, 6]
    assert Far.trips == 1
    with pytest.raises(InvalidValueError, match=re.escape("b must be 1-D; got shape [1, 2]")):
        host_offsets({"a": q, "b": far(0, 3).view(1, 2)})


a_document = st.lists(st.booleans(), max_size=7)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(a_document, min_size=1, max_size=6))
def test_chosen_documents(data: st.DataObject, stream: list[list[bool]]) -> None:
    which = data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=6))
    chosen = documents_of(stream).chosen(np.array(which, dtype=np.int64))
    expected = documents_of([stream[i] for i in which]) if which else Documents.from_cu_seqlens([0])
    assert chosen.offsets.tolist() == expected.offsets.tolist()
    assert chosen.runs.tolist() == expected.runs.tolist()
    for ends, last in ((chosen.valid_starts, False), (chosen.valid_ends, True)):
        for i, (start, stop) in enumerate(zip(chosen.offsets[:-1], chosen.offsets[1:], strict=True)):
            real = [t for t in range(start, stop) if chosen.is_valid(np.array([t]))[0]]
            assert ends[i] == (start if not real else real[-1] + 1 if last else real[0])


def test_rows_that_a_mask_tells_apart_are_documents() -> None:
    offsets = dict.fromkeys(NAMES)
    lengths = {"max_seqlen_q": 3, "max_seqlen_kv": None}
    for rows in (None, 1):
        assert dense_streams("sbhd", offsets, lengths, None, rows=rows)[0].padded_rows is None
    queries, keys = dense_streams("sbhd", offsets, lengths, None, rows=2)
    assert queries is keys
    assert queries.padded_rows is not None
    assert (queries.padded_rows.offsets.tolist(), queries.padded_rows.has_padding) == ([0, 3, 6], False)
    queries, keys = dense_streams("sbhd", offsets, lengths | {"max_seqlen_kv": 5}, None, rows=2)
    assert [side.padded_rows.lengths.tolist() for side in (queries, keys) if side.padded_rows] == [[3, 3], [5, 5]]
    real = torch.tensor([[True, True, False]])
    padded = dense_streams("sbhd", offsets, lengths, real, rows=2)[0].padded_rows
    assert padded is not None
    assert padded.num_documents == 1, "the padding mask says how many rows there are; the mask is refused"


def test_dense_streams_without_tokens() -> None:
    offsets = dict.fromkeys(NAMES)
    queries, keys = dense_streams("sbhd", offsets, {"max_seqlen_q": 0, "max_seqlen_kv": None}, torch.ones(2, 0).bool())
    assert queries is keys
    assert (queries.documents.num_documents, queries.documents.num_tokens) == (1, 0)
    assert queries.padded_rows is not None
    assert queries.padded_rows.num_documents == 2
