"""Documents, layouts and their invariants."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import Documents, InvalidTypeError, InvalidValueError, Layout
from cphandler.layouts.layout import BUILDERS, make_layout, zigzag

lengths_of_documents = st.lists(st.integers(0, 40), min_size=0, max_size=8)


def offsets(lengths: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@settings(max_examples=75, deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.sampled_from(["zigzag", "contiguous", "striped"]))
def test_shares_are_level_and_cover_everything_once(lengths: list[int], cp_size: int, name: str) -> None:
    layout = make_layout(name, offsets(lengths), cp_size)
    total = sum(lengths)
    held = [layout.positions(rank) for rank in range(cp_size)]
    assert all(len(rows) == -(-total // cp_size) for rows in held)
    counts = [int((rows >= 0).sum()) for rows in held]
    assert max(counts) - min(counts) <= 1
    everything = np.concatenate(held)
    assert sorted(everything[everything >= 0].tolist()) == list(range(total))
    for rows in held:
        pads = np.flatnonzero(rows < 0)
        assert len(pads) <= 1
        assert all(pads == len(rows) - 1), "the pad row is the last"
        real = rows[rows >= 0]
        assert (np.diff(real) > 0).all(), "local order keeps global order"
    assert (np.concatenate(held)[layout.inverse] == np.arange(total)).all()
    checked = Layout(name, total, list(layout.spans), num_local_tokens=layout.num_local_tokens)
    for ranks in (None, *([rank] for rank in range(cp_size))):
        for made, expected in zip(layout.tables(ranks), checked.tables(ranks), strict=True):
            assert made.tolist() == expected.tolist()
    assert layout.is_dense == checked.is_dense == (name != "striped" or cp_size == 1 or total <= cp_size)


def test_rows_apart_or_in_another_order_are_not_dense() -> None:
    for local, dense in (((0, 2), True), ((0, 3), False), ((3, 0), False), ((1, 3), False)):
        spans = [[(0, 2, 1, local[0]), (4, 3, 1, local[1])], [(2, 2, 1, 0), (7, 1, 1, 2)]]
        assert Layout("own", 8, spans, num_local_tokens=8).is_dense is dense


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 5))
def test_zigzag_is_dual_chunk_swap_where_lengths_divide(chunks: list[int], cp_size: int) -> None:
    lengths = [n * 2 * cp_size for n in chunks]
    layout = zigzag(offsets(lengths), cp_size)
    for rank in range(cp_size):
        expected: list[int] = []
        for start, n in zip(offsets(lengths)[:-1], chunks, strict=True):
            for chunk in (rank, 2 * cp_size - 1 - rank):
                expected += range(start + chunk * n, start + (chunk + 1) * n)
        assert layout.positions(rank).tolist() == expected


def test_zigzag_chunks_of_other_lengths_differ_by_one_row() -> None:
    layout = zigzag(offsets([11]), 2)
    assert [layout.positions(r).tolist() for r in range(2)] == [[0, 1, 2, 8, 9, 10], [3, 4, 5, 6, 7, -1]]
    for length in range(1, 40):
        for cp_size in (1, 2, 3, 4):
            spans = zigzag(offsets([length]), cp_size).spans
            assert sum(len(s) for s in spans) <= 2 * cp_size - 1, "the last rank's two chunks touch"


def test_spare_rows_rotate_over_ranks() -> None:
    layout = zigzag(offsets([1] * 10), 4)
    counts = [int((layout.positions(r) >= 0).sum()) for r in range(4)]
    assert sorted(counts) == [2, 2, 3, 3]


def test_the_picture_in_the_module() -> None:
    made = {name: build(offsets([8]), 2) for name, build in BUILDERS.items() if build is not None}
    held = {name: [layout.positions(r).tolist() for r in (0, 1)] for name, layout in made.items()}
    assert held == {
        "zigzag": [[0, 1, 6, 7], [2, 3, 4, 5]],
        "contiguous": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "striped": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "replicated": [list(range(8))] * 2,
    }


def test_layouts_are_values() -> None:
    one, same, other = (make_layout("zigzag", offsets(n), 3) for n in ([7, 5], [7, 5], [5, 7]))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(ValueError, match="read-only"):
        one.spans[0][0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        pickle.loads(pickle.dumps(one)).spans[0][0, 0] = 1


def test_stack_repeats_a_layout() -> None:
    layout = make_layout("zigzag", offsets([5]), 2).stack(3)
    assert layout.num_tokens == 15
    assert layout.num_local_tokens == 9
    for rank in range(2):
        once = make_layout("zigzag", offsets([5]), 2).positions(rank)
        expected = np.concatenate([np.where(once >= 0, once + 5 * i, -1) for i in range(3)])
        assert layout.positions(rank).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("spans", "rows", "message"),
    [
        ([[(0, 3, 1)], [(2, 2, 1)]], None, "exactly one rank"),
        ([[(0, 2, 1)], [(3, 1, 1)]], None, "exactly one rank"),
        ([[(0, 2, 2)], [(1, 3, 1)]], None, "exactly one rank"),
        ([[(0, 2, 1)], [(2, 3, 1)]], None, "exactly one rank"),
        ([[(2, 2, 1), (0, 1, 1)], [(1, 1, 1)]], None, "out of order"),
        ([[(0, 3, 1)], [(3, 1, 1)]], 2, "overlapping or missing"),
        ([[(0, 2, 1, 0), (2, 1, 1, 1)], [(3, 1, 1, 0)]], 3, "overlapping or missing"),
        ([], None, "no ranks"),
    ],
)
def test_wrong_layouts_are_refused(spans: list, rows: int | None, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidValueError, match=message):
        Layout("mine", 4, spans, num_local_tokens=rows)


@pytest.mark.parametrize(
    ("spans", "kind", "message"),
    [
        ([[(0, 2)], [(2, 2)]], InvalidValueError, "rank 0 must have three or four columns; got shape"),
        ([[(0, 2, 1)], [(2, 2)]], InvalidValueError, "rank 1 must have three or four columns"),
        ([[(0, 4, 1, 0, 0)], []], InvalidValueError, "three or four columns"),
        ([[0, 4, 1, 0], []], InvalidValueError, "three or four columns"),
        ([[(0, 2, 1), (2, 2)], []], InvalidValueError, r"rank 0 are no table.*give rows \(start, length, stride\)"),
        ([[(0.5, 2, 1)], [(2, 2, 1)]], InvalidTypeError, "rank 0 must be int64; got float64"),
        ([[(0, 2.0, 1)], [(2, 2, 1)]], InvalidTypeError, "must be int64"),
        ([[(0, 2, 1)], [(2, float("nan"), 1)]], InvalidTypeError, "rank 1 must be int64; got float64"),
        ([[(0, 2, 1)], [(2, 2, None)]], InvalidTypeError, "rank 1 must be int64; got object"),
        ([[(0, 2, 1)], [("a", "b", "c")]], InvalidTypeError, "must be int64"),
        ([np.array([[True, True, True]]), []], InvalidTypeError, "must be int64; got bool"),
        ([np.array([[0, 2**63, 1]], dtype=np.uint64), []], InvalidTypeError, "must be int64; got uint64"),
        ([[(0, 2**63, 1)], []], InvalidTypeError, "must be int64; got float64"),
        ([[(0, 2**70, 1)], []], InvalidTypeError, "must be int64; got object"),
        ([[(0, 4, 1), (4, -2, 1)], []], InvalidValueError, "negative lengths; got -2"),
        ([[(0, 4, 0)], []], InvalidValueError, "rank 0 a stride below 1; got 0"),
        ([[(0, 4, 2**62)], []], InvalidValueError, "exactly one rank"),
        ([[(-1, 5, 1)], []], InvalidValueError, "exactly one rank"),
        ([[(0, 4, 1, 2**63 - 2)], []], InvalidValueError, "overlapping or missing local rows"),
        ([[(0, 4, 1, -1)], []], InvalidValueError, "overlapping or missing local rows"),
        (5, InvalidTypeError, "must be a sequence; got 5; give one list of spans per rank"),
        ("ab", InvalidTypeError, "must be int64"),
        ([5, 6], InvalidValueError, "three or four columns"),
    ],
)
def test_spans_that_are_none(spans: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Layout("mine", 4, spans)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_tokens": 4.0}, InvalidTypeError, "num_tokens of layout 'mine' must be an int; got 4.0; pass an int"),
        ({"num_tokens": "4"}, InvalidTypeError, "num_tokens of layout 'mine' must be an int"),
        ({"num_tokens": True}, InvalidTypeError, "num_tokens of layout 'mine' must be an int"),
        ({"num_tokens": None}, InvalidTypeError, "num_tokens of layout 'mine' must be an int"),
        ({"num_tokens": -4}, InvalidValueError, "num_tokens of layout 'mine' must be at least 0; got -4"),
        ({"num_local_tokens": 4.5}, InvalidTypeError, "num_local_tokens of layout 'mine' must be an int"),
        ({"num_local_tokens": True}, InvalidTypeError, "num_local_tokens of layout 'mine' must be an int"),
        ({"num_local_tokens": -1}, InvalidValueError, "num_local_tokens of layout 'mine' must be at least 0"),
        ({"num_local_tokens": 3}, InvalidValueError, "overlapping or missing"),
        ({"num_local_tokens": 2**62}, InvalidValueError, "more (rows than 64 bits can count|than any batch has)"),
        ({"name": 3}, InvalidTypeError, "name must be a string; got 3"),
        ({"replicated": "no"}, InvalidTypeError, "replicated must be a bool; got 'no'"),
    ],
)
def test_counts_that_are_none(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Layout(**{"name": "mine", "num_tokens": 4, "spans": [[(0, 4, 1)]], **arguments})


def test_spans_from_every_source() -> None:
    rows = [[(0, 2, 1), (2, 0, 1)], [(2, 2, 1)]]
    plain = Layout("mine", 4, rows)
    assert [spans.tolist() for spans in plain.spans] == [[[0, 2, 1, 0]], [[2, 2, 1, 0]]]
    own = np.array([[[0, 2, 1]], [[2, 2, 1]]], dtype=np.int32)
    assert plain == Layout("mine", np.int64(4), own) == Layout("mine", 4, [torch.tensor(r) for r in own])
    assert plain == Layout("mine", 4, iter(rows), num_local_tokens=np.int32(2))  # type: ignore[arg-type]
    own[0, 0, 1] = 9
    assert plain.spans[0].flags.writeable is False
    mine = np.array([[0, 4, 1, 0]])
    held = Layout("mine", 4, [mine])
    mine[0, 1] = 3
    assert held.spans[0].tolist() == [[0, 4, 1, 0]], "a caller's own array is copied"
    mine[0, 1] = 4
    assert mine.flags.writeable
    assert Layout("none", 0, [[], np.zeros((0, 3))]).num_local_tokens == 0


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 14), st.sampled_from([(1, 2), (2,), (2, 3), (3, 4, 6), (1, 5, 13), (7, 11)]))
def test_strided_spans_cover_everything_once(data: st.DataObject, num_tokens: int, strides: tuple[int, ...]) -> None:
    """Against the tokens written down: spans of several strides, some of which leave out or repeat."""
    free, spans = list(range(num_tokens)), []
    while free:
        start, stride = free[0], data.draw(st.sampled_from(strides))
        most = 0
        while start + most * stride in free:
            most += 1
        length = data.draw(st.integers(1, most))
        spans.append((start, length, stride))
        free = [token for token in free if token not in range(start, start + length * stride, stride)]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(spans) - 1))
        start, length, stride = spans[at]
        spans[at] = data.draw(
            st.sampled_from([(start + 1, length, stride), (start, length + 1, stride), (start, length, stride + 1)])
        )
    tokens = [start + i * stride for start, length, stride in spans for i in range(length)]
    if sorted(tokens) == list(range(num_tokens)):
        layout = Layout("mine", num_tokens, [sorted(spans)])
        assert layout.positions(0).tolist() == [s + i * stride for s, n, stride in sorted(spans) for i in range(n)]
        return
    with pytest.raises(InvalidValueError, match="exactly one rank"):
        Layout("mine", num_tokens, [sorted(spans)])


def test_strides_past_what_can_be_written_down() -> None:
    total = 10**15 + 7
    lengths = [-(-(total - rank) // 6) for rank in range(6)]
    every_sixth = [[(rank, lengths[rank], 6)] for rank in range(6)]
    assert Layout("mine", total, every_sixth).cp_size == 6
    halves = [[(1, total // 2, 2)], [(0, lengths[0], 6)], [(2, lengths[2], 6)], [(4, lengths[4], 6)]]
    assert Layout("mine", total, halves).strides == {2, 6}
    halves[0] = [(1, total // 2 - 1, 2)]
    with pytest.raises(InvalidValueError, match="exactly one rank"):
        Layout("mine", total, halves)


def test_one_rank_in_global_order() -> None:
    assert Layout("mine", 6, [[(0, 2, 1), (2, 4, 1)]]).keeps_global_order
    assert not Layout("mine", 6, [[(0, 2, 1, 4), (2, 4, 1, 0)]]).keeps_global_order
    assert not Layout("mine", 6, [[(0, 6, 1)]], num_local_tokens=7).keeps_global_order
    assert not Layout("mine", 6, [[(0, 3, 2), (1, 3, 2)]]).keeps_global_order
    assert not Layout("mine", 6, [[(0, 6, 1)], []]).keeps_global_order
    assert zigzag(offsets([5, 1]), 1).keeps_global_order


def test_layouts_by_name_and_by_value() -> None:
    assert make_layout("ZigZag", offsets([8]), 2).name == "zigzag"
    with pytest.raises(InvalidValueError, match="choose one of balanced, contiguous"):
        make_layout("diagonal", offsets([8]), 2)
    with pytest.raises(InvalidTypeError, match="a name or a Layout"):
        make_layout(3, offsets([8]), 2)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="made for another batch"):
        make_layout(zigzag(offsets([8]), 2), offsets([9]), 2)
    with pytest.raises(InvalidValueError, match="made for another batch"):
        make_layout(zigzag(offsets([8]), 2), offsets([8]), 4)


def test_documents_from_every_source() -> None:
    packed = Documents.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32))
    assert packed.lengths.tolist() == [3, 0, 2]
    assert packed.runs.tolist() == [[0, 3], [3, 5]]
    padded = Documents.from_cu_seqlens([0, 3, 5], np.array([0, 4, 8]))
    assert padded.runs.tolist() == [[0, 3], [4, 6]]
    assert padded.valid_offsets.tolist() == [0, 3, 5]
    assert padded.valid_tokens.tolist() == [0, 1, 2, 4, 5]
    assert padded.has_padding
    assert (padded.num_tokens, padded.num_valid_tokens, padded.max_length) == (8, 5, 4)
    holes = Documents.from_attention_mask(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]))
    assert holes.offsets.tolist() == [0, 3, 6, 9]
    assert holes.runs.tolist() == [[0, 1], [2, 3], [6, 9]]
    assert holes.valid_offsets.tolist() == [0, 2, 2, 5]
    assert Documents.from_position_ids(torch.tensor([0, 1, 2, 0, 0, 1])).offsets.tolist() == [0, 3, 4, 6]
    assert Documents.from_position_ids(torch.tensor([[0, 1], [0, 1]])).offsets.tolist() == [0, 2, 4]
    again = pickle.loads(pickle.dumps(padded))
    assert again.offsets.tolist() == padded.offsets.tolist()


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        (torch.tensor([1, 2, 0]), InvalidValueError, "restart at 0"),
        (torch.tensor([0, 1, 3]), InvalidValueError, "got 3 at token 2"),
        (torch.zeros(3), InvalidTypeError, "integer tensor"),
        (torch.zeros(3, 1, 4, dtype=torch.int64), InvalidValueError, "shape"),
    ],
)
def test_position_ids_that_are_none(ids: torch.Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Documents.from_position_ids(ids)


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(2, 3), InvalidTypeError, "bool or integer"),
        (torch.ones(3, dtype=torch.bool), InvalidValueError, r"\[B, S\]"),
        (torch.full((1, 3), 2), InvalidValueError, "only 0 and 1"),
    ],
)
def test_attention_masks_that_are_none(mask: torch.Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Documents.from_attention_mask(mask)
