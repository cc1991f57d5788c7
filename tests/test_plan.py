"""Masks and plans: the tasks of all ranks cover each visible pair exactly once, whatever the layout."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import Bands, Causal, Documents, Full, InvalidTypeError, InvalidValueError, Mask, SlidingWindow
from cphandler.errors import UnsupportedError
from cphandler.intervals import UNBOUNDED
from cphandler.layout import Layout, make_layout
from cphandler.mask import make_mask, restrict, stack
from cphandler.plan import Plan, make_plan, visibility
from cphandler.testing import visible_pairs

masks = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    st.builds(SlidingWindow, st.integers(0, 25), st.integers(0, 6)),
)
documents_with_padding = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 8)), min_size=1, max_size=5)


def pairs_of(plan: Plan, queries: Layout, keys: Layout) -> np.ndarray:  # type: ignore[type-arg]
    """``[S, S]`` how often the plan's tasks compute each pair."""
    seen = np.zeros((queries.num_tokens, keys.num_tokens), dtype=int)
    held = queries.positions(plan.rank)
    for owner, q, nq, k, nk, lo, hi in plan.tasks.tolist():
        i, j = np.arange(nq)[:, None], np.arange(nk)[None]
        inside = (j - i >= lo) & (j - i <= hi)
        assert inside.any(1).all(), "every row of a task sees something"
        assert inside.any(0).all(), "every key of a task is seen"
        assert inside.all() == (lo == -UNBOUNDED and hi == UNBOUNDED), "full tasks say so"
        rows, columns = held[q : q + nq], keys.positions(owner)[k : k + nk]
        assert (rows >= 0).all()
        assert (columns >= 0).all()
        seen[np.ix_(rows, columns)] += inside
    return seen


def check(documents: Documents, mask: Mask, name: str, cp_size: int) -> None:
    layout = make_layout(name, documents.offsets, cp_size)
    bands = restrict(mask.bands(documents.offsets), documents.runs)
    expected = visible_pairs(mask, documents).numpy().astype(int)
    sees = visibility(bands, layout, layout)
    total = np.zeros_like(expected)
    for rank in range(cp_size):
        plan = make_plan(bands, layout, layout, rank, ring=True)
        total += pairs_of(plan, layout, layout)
        for owner in range(cp_size):
            assert sees[rank, owner] == (len(plan.tasks_of(owner)) > 0)
        steps = (rank - plan.tasks[:, 0]) % cp_size
        assert (np.diff(steps) >= 0).all(), "own keys first, then backwards round the ring"
        needed = [[s for s in range(1, cp_size) if sees[(o + s) % cp_size, o]] for o in range(cp_size)]
        assert plan.hops.tolist() == [[min(s, default=0), max(s, default=0)] for s in needed]
    assert (total == expected).all()


@settings(max_examples=200, deadline=None)
@given(documents_with_padding, masks, st.sampled_from(["zigzag", "contiguous", "striped"]), st.integers(1, 6))
def test_tasks_cover_each_visible_pair_once(
    lengths: list[tuple[int, int]], mask: Mask, name: str, cp_size: int
) -> None:
    valid = np.concatenate([[0], np.cumsum([n for n, _ in lengths])])
    physical = np.concatenate([[0], np.cumsum([n + pad for n, pad in lengths])])
    check(Documents.from_cu_seqlens(valid, physical), mask, name, cp_size)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=30), masks, st.sampled_from(["zigzag", "striped"]), st.integers(1, 4)
)
def test_holes_are_exact(real: list[bool], mask: Mask, name: str, cp_size: int) -> None:
    check(Documents.from_attention_mask(torch.tensor([real])), mask, name, cp_size)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(["zigzag", "contiguous", "striped"]), st.integers(1, 4))
def test_any_bands(data: st.DataObject, name: str, cp_size: int) -> None:
    """Random disjoint bands: cut the square into rectangles, a diagonal range in each."""
    size = data.draw(st.integers(1, 24))
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=3)) | {0, size})
    rows = []
    for q0, q1 in pairwise(cuts):
        for k0, k1 in pairwise(cuts):
            lo = data.draw(st.integers(-size, size))
            rows.append((q0, q1, k0, k1, lo, data.draw(st.integers(lo, size))))
    check(Documents.dense(size), Bands(rows), name, cp_size)


def test_own_chunks_are_one_causal_task() -> None:
    """A rank's two zigzag chunks of a document make one causal task, and a remote block one full task."""
    offsets = np.array([0, 64])
    layout = make_layout("zigzag", offsets, 4)
    plan = make_plan(Causal().bands(offsets), layout, layout, 1)
    assert plan.tasks.tolist() == [
        [1, 0, 16, 0, 16, -UNBOUNDED, 0],
        [0, 0, 16, 0, 8, -UNBOUNDED, UNBOUNDED],
        [3, 8, 8, 0, 16, -UNBOUNDED, UNBOUNDED],
        [2, 8, 8, 0, 16, -UNBOUNDED, UNBOUNDED],
    ]


def test_a_plan_travels_as_a_tensor() -> None:
    offsets = np.array([0, 13, 30])
    layout = make_layout("zigzag", offsets, 3)
    plan = make_plan(SlidingWindow(5, 1).bands(offsets), layout, layout, 2, ring=True)
    again = Plan.from_tensor(plan.to_tensor())
    assert (again.cp_size, again.rank) == (3, 2)
    assert again.tasks.tolist() == plan.tasks.tolist()
    assert again.hops.tolist() == plan.hops.tolist()


def test_windows_and_short_documents_stop_blocks_early() -> None:
    offsets = np.array([0, 64])
    layout = make_layout("contiguous", offsets, 4)
    window = make_plan(SlidingWindow(3).bands(offsets), layout, layout, 0, ring=True)
    assert window.hops.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    causal = make_plan(Causal().bands(offsets), layout, layout, 0, ring=True)
    assert causal.hops.tolist() == [[1, 3], [1, 2], [1, 1], [0, 0]]
    short = np.arange(5) * 16
    alone = make_layout("contiguous", short, 4)
    assert not make_plan(Full().bands(short), alone, alone, 0, ring=True).hops.any()


def test_rows_of_a_batch_are_documents_of_their_own() -> None:
    documents = Documents.from_attention_mask(torch.tensor([[True] * 4, [False, True, True, False]]))
    bands = restrict(stack(Causal().bands(np.array([0, 4])), 2, 4), documents.runs)
    assert bands[:, :4].tolist() == [[0, 4, 0, 4], [5, 7, 5, 7]]


def test_unequal_strides_are_refused() -> None:
    offsets = np.array([0, 16])
    queries, keys = make_layout("striped", offsets, 2), make_layout("contiguous", offsets, 2)
    with pytest.raises(UnsupportedError, match="one stride"):
        make_plan(Causal().bands(offsets), queries, keys, 0)


def test_masks_by_name() -> None:
    assert make_mask("Causal") == Causal()
    assert make_mask(SlidingWindow(3)) == SlidingWindow(3, 0)
    with pytest.raises(InvalidValueError, match="choose one of causal, full"):
        make_mask("windowed")
    with pytest.raises(InvalidTypeError, match="a name or a Mask"):
        make_mask(128)  # type: ignore[arg-type]


@pytest.mark.parametrize(("left", "right", "kind"), [(-1, 0, ValueError), (3, -2, ValueError), (1.5, 0, TypeError)])
def test_windows_that_are_none(left: int, right: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="SlidingWindow"):
        SlidingWindow(left, right)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 4, 0, 4, 0)], "5 numbers"),
        ([(0, 4, 0, 4, 2, 1)], "runs backwards"),
        ([(4, 0, 0, 4, 0, 1)], "runs backwards"),
        ([(0, 4, 0, 4, -1, 0), (2, 6, 0, 4, 0, 0)], "disjoint"),
        ([(0, 4.5, 0, 4, 0, 1)], "integers"),
    ],
)
def test_bands_that_are_none(rows: list, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidValueError, match=message):
        Bands(rows)


def test_bands_past_the_end_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="past the end"):
        Bands([(0, 9, 0, 9, 0, 0)]).bands(np.array([0, 8]))


def test_which_masks_are_causal() -> None:
    assert [m.is_causal for m in (Causal(), Full(), SlidingWindow(2), SlidingWindow(2, 1))] == [
        True,
        False,
        True,
        False,
    ]
    assert Bands([(2, 4, 0, 2, -9, 9)]).is_causal
    assert not Bands([(0, 4, 0, 4, -1, 1)]).is_causal
