"""Plans: the tasks of all ranks cover each visible pair exactly once, whatever the mask and the layouts."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import BlockCausal, Causal, Documents, Full, Mask, PrefixLM, SlidingWindow
from cphandler.errors import UnsupportedError
from cphandler.layouts.layout import Layout, make_layout
from cphandler.plan.plan import FROM, Plan, make_plan
from cphandler.plan.runs import ordered_tasks
from cphandler.plan.tasks import OWNER, K, Q, coalesced, cut, visibility
from cphandler.sharding.shard import Shard, ShardPair
from cphandler.testing import visible_pairs
from cphandler.tokens.bands import restrict
from cphandler.tokens.intervals import UNBOUNDED, in_order
from tests.test_mask import Counts, cross_masks_for, masks_for, some_documents, two_streams

layouts = st.sampled_from(["zigzag", "contiguous", "striped"])


def key_rows(plan: Plan, owner: int, keys: Layout) -> Counts:
    """The owner's rows in the order in which this rank's tasks count them."""
    received = [i for i, source in enumerate(plan.stages[:, FROM]) if source == owner]
    if not received:
        return np.arange(keys.num_local_tokens)
    return np.concatenate([start + np.arange(length) for start, length in plan.runs(received[0], sent=False)])


def pairs_of(plan: Plan, queries: Layout, keys: Layout) -> Counts:
    """``[Sq, Sk]`` how often the plan's tasks compute each pair."""
    seen = np.zeros((queries.num_tokens, keys.num_tokens), dtype=np.int64)
    held = queries.positions(plan.rank)
    for owner, q, nq, k, nk, lo, hi in plan.tasks.tolist():
        i, j = np.arange(nq)[:, None], np.arange(nk)[None]
        inside = (j - i >= lo) & (j - i <= hi)
        assert inside.any(1).all(), "every row of a task sees something"
        assert inside.any(0).all(), "every key of a task is seen"
        assert inside.all() == (lo == -UNBOUNDED and hi == UNBOUNDED), "full tasks say so"
        rows, columns = held[q : q + nq], keys.positions(owner)[key_rows(plan, owner, keys)[k : k + nk]]
        assert (rows >= 0).all()
        assert (columns >= 0).all()
        seen[np.ix_(rows, columns)] += inside
    return seen


def check(
    mask: Mask, queries: Documents, keys: Documents, names: tuple[str, str], cp_size: int, *, direct: bool = False
) -> list[Plan]:
    """Every rank's plan of self attention (both streams one object) or across two streams."""
    q_layout, k_layout = (
        make_layout(name, documents.offsets, cp_size) for name, documents in zip(names, (queries, keys), strict=True)
    )
    bands = restrict(mask.bands(queries, keys), queries.runs, keys.runs)
    expected = visible_pairs(mask, queries, key_documents=None if keys is queries else keys).numpy()
    sees = visibility(bands, q_layout, k_layout)
    plans = [make_plan(bands, q_layout, k_layout, r, needs="stages" if direct else "hops") for r in range(cp_size)]
    assert (sum(pairs_of(plan, q_layout, k_layout) for plan in plans) == expected).all()
    for plan in plans:
        assert [len(plan.tasks_of(owner)) > 0 for owner in range(cp_size)] == sees[plan.rank].tolist()
        again = Plan.from_tensor(plan.to_tensor())
        assert (again.cp_size, again.rank) == (cp_size, plan.rank)
        for name in ("tasks", "hops", "stages", "sends", "receives"):
            assert getattr(again, name).tolist() == getattr(plan, name).tolist()
        if not direct:
            steps = (plan.rank - plan.tasks[:, 0]) % cp_size
            assert (np.diff(steps) >= 0).all(), "own keys first, then backwards round the ring"
            needed = [[s for s in range(1, cp_size) if sees[(o + s) % cp_size, o]] for o in range(cp_size)]
            assert plan.hops.tolist() == [[min(s, default=0), max(s, default=0)] for s in needed]
    return plans


@settings(max_examples=150, deadline=None)
@given(st.data(), some_documents, layouts, st.integers(1, 6))
def test_tasks_cover_each_visible_pair_once(data: st.DataObject, documents: Documents, name: str, cp_size: int) -> None:
    check(data.draw(masks_for(documents)), documents, documents, (name, name), cp_size)


@settings(max_examples=75, deadline=None)
@given(
    st.data(),
    two_streams,
    st.sampled_from([("zigzag", "zigzag"), ("zigzag", "contiguous"), ("striped", "striped")]),
    st.integers(1, 5),
)
def test_tasks_across_two_streams_and_layouts(
    data: st.DataObject, streams: tuple[Documents, Documents], names: tuple[str, str], cp_size: int
) -> None:
    check(data.draw(cross_masks_for(*streams)), *streams, names, cp_size)


@settings(max_examples=75, deadline=None)
@given(st.data(), some_documents, layouts, st.integers(1, 6))
def test_direct_sends_bring_each_row_that_is_seen_once(
    data: st.DataObject, documents: Documents, name: str, cp_size: int
) -> None:
    mask = data.draw(masks_for(documents))
    plans = check(mask, documents, documents, (name, name), cp_size, direct=True)
    seen = visible_pairs(mask, documents).numpy()
    layout = make_layout(name, documents.offsets, cp_size)
    for plan in plans:
        assert plan.rank not in plan.stages, "nobody sends to himself"
        mine = layout.positions(plan.rank)
        for stage, (to, source) in enumerate(plan.stages.tolist()):
            if to >= 0:
                assert plans[to].stages[stage, FROM] == plan.rank
                assert plans[to].runs(stage, sent=False).tolist() == plan.runs(stage, sent=True).tolist()
            if source >= 0:
                rows = key_rows(plan, source, layout)
                theirs = layout.positions(source)
                wanted = np.flatnonzero((theirs >= 0) & seen[np.ix_(mine[mine >= 0], theirs)].any(0))
                assert rows.tolist() == wanted.tolist()


def dealt(data: st.DataObject, num_tokens: int, cp_size: int) -> Layout:
    """Tokens in pieces of any length, for any rank; each holds its own in order."""
    walls = sorted({0, num_tokens, *data.draw(st.lists(st.integers(0, num_tokens), max_size=4 * cp_size))})
    spans: list[list[tuple[int, int, int]]] = [[] for _ in range(cp_size)]
    for start, stop in pairwise(walls):
        spans[data.draw(st.integers(0, cp_size - 1))].append((start, stop - start, 1))
    return Layout("dealt", num_tokens, spans)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_tasks_made_of_runs_are_those_made_of_spans(
    data: st.DataObject, lengths: list[int], cp_size: int, crossing: bool
) -> None:
    queries = keys = Documents.from_cu_seqlens([0, *accumulate(lengths)])
    if crossing:
        counts = [data.draw(st.integers(0, 12)) for _ in lengths]
        keys = Documents.from_cu_seqlens([0, *accumulate(counts)])
    align = data.draw(st.sampled_from(["top_left", "bottom_right"]))
    masks: list[Mask] = [Causal(align), Full(), SlidingWindow(data.draw(st.integers(0, 9)), 0, align)]
    mask = data.draw(st.sampled_from(masks if crossing else [*masks, BlockCausal(2), PrefixLM(5)]))
    bands = restrict(mask.bands(queries, keys), queries.runs, keys.runs)
    layout = dealt(data, queries.num_tokens, cp_size)
    key_layout = dealt(data, keys.num_tokens, cp_size) if crossing else layout
    assert layout.is_dense
    turn = np.array(data.draw(st.permutations(range(cp_size))))
    for rank in range(cp_size):
        spanwise = coalesced(cut(bands, layout, key_layout, [rank])[0])
        expected = in_order(spanwise, turn[spanwise[:, OWNER]], spanwise[:, Q], spanwise[:, K])
        assert ordered_tasks(bands, layout, key_layout, rank, turn).tolist() == expected.tolist()


def test_own_chunks_are_one_causal_task() -> None:
    """A rank's two zigzag chunks of a document make one causal task, and a remote block one full task."""
    documents = Documents.dense(64)
    layout = make_layout("zigzag", documents.offsets, 4)
    plan = make_plan(Causal().bands(documents, documents), layout, layout, 1)
    assert plan.tasks.tolist() == [
        [1, 0, 16, 0, 16, -UNBOUNDED, 0],
        [0, 0, 16, 0, 8, -UNBOUNDED, UNBOUNDED],
        [3, 8, 8, 0, 16, -UNBOUNDED, UNBOUNDED],
        [2, 8, 8, 0, 16, -UNBOUNDED, UNBOUNDED],
    ]


def test_windows_and_short_documents_stop_blocks_early() -> None:
    long = Documents.dense(64)
    layout = make_layout("contiguous", long.offsets, 4)
    window = make_plan(SlidingWindow(3).bands(long, long), layout, layout, 0, needs="hops")
    assert window.hops.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    causal = make_plan(Causal().bands(long, long), layout, layout, 0, needs="hops")
    assert causal.hops.tolist() == [[1, 3], [1, 2], [1, 1], [0, 0]]
    short = Documents.from_cu_seqlens(np.arange(5) * 16)
    alone = make_layout("contiguous", short.offsets, 4)
    assert not make_plan(Full().bands(short, short), alone, alone, 0, needs="hops").hops.any()


def test_rows_of_a_batch_are_documents_of_their_own() -> None:
    row = Documents.dense(4)
    rows = Documents.from_attention_mask(torch.tensor([[True] * 4, [False, True, True, False]]))
    stream = Shard(row, make_layout("zigzag", row.offsets, 2), 0, rows)
    assert ShardPair(stream, stream).visible_bands(Causal())[:, :4].tolist() == [[0, 4, 0, 4], [5, 7, 5, 7]]


def test_a_diagonal_through_the_last_real_key_of_each_row() -> None:
    rows = Documents.from_attention_mask(torch.tensor([[True] * 5, [True, True, True, False, False]]))
    queries, keys = Documents.dense(3), Documents.dense(5)
    real = Documents.from_attention_mask(torch.ones(2, 3, dtype=torch.bool))
    pair = ShardPair(
        Shard(queries, make_layout("zigzag", queries.offsets, 1), 0, real),
        Shard(keys, make_layout("zigzag", keys.offsets, 1), 0, rows),
    )
    assert pair.visible_bands(Causal(align="bottom_right")).tolist() == [
        [0, 3, 0, 5, -UNBOUNDED, 2],
        [3, 6, 5, 8, -UNBOUNDED, 2],
    ]


def test_unequal_strides_are_refused() -> None:
    documents = Documents.dense(16)
    queries, keys = (make_layout(name, documents.offsets, 2) for name in ("striped", "contiguous"))
    with pytest.raises(UnsupportedError, match="one stride"):
        make_plan(Causal().bands(documents, documents), queries, keys, 0)
