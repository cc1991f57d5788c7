"""Documents, layouts and their invariants."""

from __future__ import annotations

import pickle

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


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
