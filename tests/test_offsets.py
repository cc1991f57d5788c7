"""Offsets from position ids, segment ids and masks: of the documents that are there, and of nothing that is none."""

from __future__ import annotations

from itertools import accumulate, chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import CPError, InvalidTypeError, InvalidValueError, cu_seqlens_of, get_cp_handler_cls
from cphandler.tokens.offsets import as_int32

FORMS: list[tuple[dict[str, Any], list[int], list[int]]] = [
    ({"position_ids": [0, 1, 2, 0, 0, 1]}, [0, 3, 4, 6], [0, 3, 4, 6]),
    ({"position_ids": [[0, 1, 2, 0, 0, 1]]}, [0, 3, 4, 6], [0, 3, 4, 6]),
    ({"position_ids": [[0, 1, 0], [0, 1, 2], [0, 0, 0]]}, [0, 2, 3, 6, 7, 8, 9], [0, 2, 3, 6, 7, 8, 9]),
    ({"position_ids": [0]}, [0, 1], [0, 1]),
    ({"segment_ids": [1, 1, 2, 2, 2, 0]}, [0, 2, 5, 6], [0, 2, 5, 5]),
    ({"segment_ids": [[1, 1, 2], [2, 3, 3]]}, [0, 2, 3, 4, 6], [0, 2, 3, 4, 6]),
    ({"segment_ids": [[0, 0, 7, 5], [5, 0, 0, 1], [0, 0, 0, 0]]}, [0, 2, 3, 4, 5, 7, 8, 12], [0, 0, 1, 2, 3, 3, 4, 4]),
    ({"segment_ids": [[4]]}, [0, 1], [0, 1]),
    ({"attention_mask": [[1, 1, 1, 0], [0, 0, 1, 1]]}, [0, 3, 4, 6, 8], [0, 3, 3, 3, 5]),
    ({"attention_mask": [[True, False], [True, True]]}, [0, 1, 2, 4], [0, 1, 1, 3]),
    ({"attention_mask": [[1, 1, 2, 2, 3, 0]]}, [0, 2, 4, 5, 6], [0, 2, 4, 5, 5]),
]


@pytest.mark.parametrize(("described", "physical", "valid"), FORMS, ids=str)
def test_offsets_of_every_form(described: dict[str, Any], physical: list[int], valid: list[int]) -> None:
    given = {name: torch.tensor(value) for name, value in described.items()}
    offsets = cu_seqlens_of(**given)
    assert (offsets.dtype, offsets.tolist()) == (torch.int32, physical)
    both = cu_seqlens_of(**given, return_padded=True)
    assert [x.tolist() for x in both] == [valid, physical]
    assert [x.dtype for x in both] == [torch.int32] * 2
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        assert torch.equal(cu_seqlens_of(**{name: value.to(dtype) for name, value in given.items()}), offsets)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 5), (3, 0)])
def test_offsets_of_nothing(shape: tuple[int, ...]) -> None:
    nothing = torch.zeros(shape, dtype=torch.int64)
    named = ["position_ids", "segment_ids", *(["attention_mask"] if len(shape) == 2 else [])]
    for name in named:
        assert cu_seqlens_of(**{name: nothing}).tolist() == [0]  # type: ignore[call-overload]


IDS = torch.arange(4)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({}, InvalidTypeError, r"got none; pass position_ids=, segment_ids= or attention_mask="),
    "two": ({"position_ids": IDS, "segment_ids": IDS}, InvalidTypeError, "got position_ids and segment_ids"),
    "a jump": ({"position_ids": [0, 1, 3]}, InvalidValueError, "got 3 at token 2; pass ids that count up by one"),
    "a step back": ({"position_ids": [0, 1, 1]}, InvalidValueError, "got 1 at token 2"),
    "a late start": ({"position_ids": [[0, 1], [1, 2]]}, InvalidValueError, "got 1 at token 2"),
    "padding's own ids": ({"position_ids": [1, 1, 0, 1]}, InvalidValueError, "pass the mask or the segment ids"),
    "below 0": ({"position_ids": [-1, 0, 1]}, InvalidValueError, "got -1 at token 0"),
    "a segment below 0": (
        {"segment_ids": [1, 1, -1]},
        InvalidValueError,
        "not be below 0; got -1; number .* padding 0",
    ),
    "a segment again": (
        {"segment_ids": [[1, 2, 2, 3], [4, 5, 4, 5]]},
        InvalidValueError,
        "one run of tokens; got 4 again at token 6, in row 1; number each",
    ),
    "after padding": ({"segment_ids": [1, 0, 1]}, InvalidValueError, "got 1 again at token 2, in row 0"),
    "a mask with a hole": (
        {"attention_mask": [[1, 1, 1], [1, 0, 1]]},
        InvalidValueError,
        "got 1 again at token 5, in row 1; .* a dense handler's key_padding_mask",
    ),
    "a mask in one dim": ({"attention_mask": [1, 0]}, InvalidValueError, r"must be \[B, S\]; got shape \[2\]; pass"),
    "a mask of pairs": ({"attention_mask": torch.ones(1, 1, 4, 4).bool()}, InvalidValueError, "not who sees whom"),
    "a mask of floats": ({"attention_mask": torch.ones(1, 4)}, InvalidTypeError, "integer tensor; got torch.float32"),
    "a list": (
        {"attention_mask": [[1]], "as": list},
        InvalidTypeError,
        "attention_mask must be an integer tensor; got list",
    ),
    "segments in a list": ({"segment_ids": [1], "as": list}, InvalidTypeError, "got list; pass"),
    "true segments": ({"segment_ids": [True, False]}, InvalidTypeError, "got torch.bool"),
    "three axes": ({"position_ids": IDS.expand(3, 1, 4)}, InvalidValueError, r"got shape \[3, 1, 4\]; .* only the one"),
    "a number": ({"segment_ids": torch.tensor(3)}, InvalidValueError, r"got shape \[\]"),
    "no bool": ({"segment_ids": [1], "return_padded": 1}, InvalidTypeError, "return_padded must be a bool; got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_packing_is_refused(name: str) -> None:
    described, kind, message = REFUSED[name]
    keep = described.get("as") is list
    given = {
        key: torch.tensor(value) if isinstance(value, list) and not keep else value
        for key, value in described.items()
        if key != "as"
    }
    with pytest.raises(kind, match=message) as caught:
        cu_seqlens_of(**given)
    assert isinstance(caught.value, CPError)


def test_offsets_count_in_int32() -> None:
    assert as_int32(np.array([0, 2**31 - 1]), torch.device("cpu")).tolist() == [0, 2**31 - 1]
    with pytest.raises(InvalidValueError, match=f"count in int32; got {2**31} tokens; split the batch"):
        as_int32(np.array([0, 2**31]), torch.device("cpu"))


rows_of_documents = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=6).map(lambda parts: cut(parts, width)),
        min_size=1,
        max_size=4,
    )
)


def cut(parts: list[tuple[int, bool]], width: int) -> list[tuple[int, bool]]:
    """Runs ``(tokens, real)`` that fill a row, with no two runs of padding side by side."""
    row: list[tuple[int, bool]] = []
    for length, real in [*parts, (width, False)]:
        left = width - sum(n for n, _ in row)
        if not left:
            break
        if row and not real and not row[-1][1]:
            row[-1] = (row[-1][0] + min(length, left), False)
        else:
            row.append((min(length, left), real))
    return row


@settings(max_examples=100, deadline=None)
@given(rows_of_documents, st.randoms(use_true_random=False))
def test_rows_of_any_documents(rows: list[list[tuple[int, bool]]], random: Any) -> None:
    runs = [*chain(*rows)]
    physical = [0, *accumulate(n for n, _ in runs)]
    valid = [0, *accumulate(n if real else 0 for n, real in runs)]
    numbers = [random.sample(range(1, 50), len(row)) for row in rows]
    ids = [
        [*chain(*([number if real else 0] * n for number, (n, real) in zip(own, row, strict=True)))]
        for own, row in zip(numbers, rows, strict=True)
    ]
    for name in ("segment_ids", "attention_mask"):
        both = cu_seqlens_of(**{name: torch.tensor(ids)}, return_padded=True)  # type: ignore[call-overload]
        assert [x.tolist() for x in both] == [valid, physical]
    positions = torch.tensor([[*chain(*(range(n) for n, _ in row))] for row in rows])
    assert cu_seqlens_of(position_ids=positions).tolist() == physical
    if all(len({real for _, real in row}) == len(row) for row in rows):
        truths = torch.tensor([[number > 0 for number in row] for row in ids])
        assert cu_seqlens_of(attention_mask=truths).tolist() == physical


def test_offsets_are_what_a_handler_takes() -> None:
    ids = torch.tensor([[1, 1, 2, 0], [3, 3, 3, 4]])
    valid, padded = cu_seqlens_of(segment_ids=ids, return_padded=True)
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=valid, cu_seqlens_q_padded=padded)
    assert torch.equal(handler.valid_mask, ids.flatten() != 0)
    assert handler.position_ids.tolist() == [0, 1, 0, 0, 0, 1, 2, 0]
    q = torch.randn(8, 2, 8)
    out = handler.core_attn(None, q, q, q)
    assert (out[3] == 0).all()
    assert torch.equal(out[2], q[2])
    alone = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=cu_seqlens_of(segment_ids=ids))
    own = alone.core_attn(None, q, q, q)
    assert torch.equal(own[3], q[3]), "to offsets alone, padding is a document of its own"
    torch.testing.assert_close(own[handler.valid_mask], out[handler.valid_mask])
    with pytest.raises(InvalidValueError, match="is dense and takes no cu_seqlens_q; use qkv_format='thd'"):
        get_cp_handler_cls("local")(qkv_format="bshd", max_seqlen_q=4, cu_seqlens_q=valid)


def test_offsets_that_int32_cannot_count_are_refused() -> None:
    """No memory is needed: zero strides."""
    tokens = 2**31 + 8
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, tokens])
    x = torch.empty(1, 1, 1).expand(tokens, 1, 1)
    with pytest.raises(InvalidValueError, match="count in int32"):
        handler.core_attn(lambda q, k, v, **_: q, x, x, x)
