"""Batches planned ahead: what a plan says of each rank, counted again from the dense mask and who holds what."""

from __future__ import annotations

import pickle
import time
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cphandler import (
    Bands,
    BatchPlan,
    Causal,
    Documents,
    InvalidValueError,
    Layout,
    Mask,
    PerDocument,
    PrefixTree,
    SharedQuestion,
    SlidingWindow,
    UnsupportedError,
    plan_batch,
)
from cphandler.layouts.layout import LENGTH, START
from cphandler.plan.plan import FROM, TO
from cphandler.plan.tasks import NK, NQ, task_counts
from cphandler.testing import RankPool, visible_pairs
from cphandler.testing.cases import Case, make_handler
from tests.test_mask import Counts, masks_for, some_documents
from tests.test_support import masks_over
from tests.test_traffic import BATCHES, MASKS, groups, planned, row_width, sizes_of

LENGTHS = (13, 0, 7, 1, 11)
PADDED = (16, 0, 9, 2, 11)
SIZES = (1, 2, 3, 4, 8)

COMM_TYPES = ("p2p", "ring", "all_gather")


def offsets(lengths: Any) -> list[int]:
    return [0, *accumulate(lengths)]


def scattered(num_tokens: int, cp_size: int, *, stride: int = 1, seed: int = 0) -> Layout:
    """Runs of random lengths on random ranks; of a stride above 1, runs that interleave on one rank too."""
    generator = np.random.default_rng([num_tokens, cp_size, stride, seed])
    held: list[list[tuple[int, int, int]]] = [[] for _ in range(cp_size)]
    for first in range(stride):
        at, stop = first, num_tokens
        while at < stop:
            length = min(int(generator.integers(1, 6)), -(-(stop - at) // stride))
            held[int(generator.integers(cp_size))].append((at, length, stride))
            at += length * stride
    return Layout("scattered", num_tokens, [sorted(spans) for spans in held])


def layouts_of(num_tokens: int, cp_size: int) -> list[str | Layout]:
    mine = [scattered(num_tokens, cp_size), scattered(num_tokens, cp_size, stride=3)]
    return ["zigzag", "contiguous", "striped", "replicated", *mine]


def check(made: BatchPlan) -> None:
    """Area and rows of each rank, from all pairs; then what each exchange would bring it."""
    seen = visible_pairs(made.mask, made.documents).numpy()
    layout, size = made.layout, made.cp_size
    area, rows, sees = [], [], np.zeros((size, size), dtype=bool)
    for rank in range(size):
        mine = layout.positions(rank)
        mine = mine[mine >= 0]
        keys = seen[mine].any(0)
        area.append(int(seen[mine].sum()))
        rows.append(int(np.delete(keys, mine).sum()))
        sees[rank] = [keys[theirs[theirs >= 0]].any() for theirs in map(layout.positions, range(size))]
    stats = made.stats()
    assert stats.area.tolist() == area
    assert stats.needed.tolist() == rows
    assert stats.area_balance == (max(area) * size / sum(area) if sum(area) else 1.0)
    assert stats.received.tolist() == received(made, rows, sees)
    ring = layout.num_tokens * (size - 1) / size
    assert np.allclose(stats.shares, stats.received / ring if ring else 0)
    assert stats.volume == pytest.approx(stats.shares.mean())
    assert stats.worst == stats.shares.max()


def received(made: BatchPlan, needed: list[int], sees: Any) -> list[int]:
    """Rows that reach each rank: a ring's block goes as far as the last rank that sees a key of it."""
    size, block = made.cp_size, made.layout.num_local_tokens
    if made.cp_comm_type == "p2p" or made.layout.replicated:
        return needed
    if made.cp_comm_type == "all_gather":
        return [(size - 1) * block] * size
    last = [max((s for s in range(1, size) if sees[(o + s) % size, o]), default=0) for o in range(size)]
    return [block * sum(0 < (rank - o) % size <= last[o] for o in range(size)) for rank in range(size)]


@pytest.mark.parametrize("padded", [None, PADDED], ids=["plain", "padded"])
@pytest.mark.parametrize("cp_size", SIZES)
def test_every_mask_over_every_layout(cp_size: int, padded: tuple[int, ...] | None) -> None:
    physical = padded or LENGTHS
    trees = tuple(PrefixTree((-1, 0, 0, 2), (n // 3, n // 4, n // 5, n - n // 3 - n // 4 - n // 5)) for n in LENGTHS)
    masks = masks_over(5) | {
        "SharedQuestion": SharedQuestion(((5, 4, 4), (), (2, 0, 3), (1,), (0, 4, 5))),
        "PrefixTree": PerDocument(trees),
    }
    for mask in masks.values():
        for layout in layouts_of(sum(physical), cp_size):
            made = plan_batch(
                offsets(LENGTHS), cp_size, layout=layout, mask=mask, cu_seqlens_padded=padded and offsets(padded)
            )
            check(made)


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize("cp_size", SIZES)
def test_every_exchange(cp_size: int, comm_type: str) -> None:
    for mask in (Causal(), SlidingWindow(3), SlidingWindow(0), Bands([])):
        for layout in layouts_of(sum(LENGTHS), cp_size):
            check(plan_batch(offsets(LENGTHS), cp_size, layout=layout, mask=mask, cp_comm_type=comm_type))


@settings(max_examples=100, deadline=None)
@given(st.data(), some_documents, st.integers(1, 6), st.integers(0, 99), st.sampled_from([1, 2, 3]))
def test_any_documents_masks_and_layouts(
    data: st.DataObject, documents: Documents, cp_size: int, seed: int, stride: int
) -> None:
    mask: Mask = data.draw(masks_for(documents))
    layout = scattered(documents.num_tokens, cp_size, stride=stride, seed=seed)
    valid, physical = documents.valid_offsets, documents.offsets
    assume(np.array_equal(Documents.from_cu_seqlens(valid, physical).runs, documents.runs))  # padded at ends alone
    check(plan_batch(valid, cp_size, layout=layout, mask=mask, cu_seqlens_padded=physical))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_the_plans_of_all_ranks_move_what_the_stats_say(layout: str) -> None:
    for mask in MASKS[:-1]:
        made = plan_batch(offsets((70, 33, 2, 19)), 4, layout=layout, mask=mask)
        plans = [made.plan(rank) for rank in range(4)]
        stats = made.stats(count_tasks=True)
        assert stats.received.tolist() == [sum(planned(plan, FROM).values()) for plan in plans]
        assert sum(stats.received.tolist()) == sum(sum(planned(plan, TO).values()) for plan in plans)
        assert stats.tasks is not None
        assert stats.tasks.tolist() == [len(plan.tasks) for plan in plans]
        assert task_counts(made.bands, made.layout, made.layout, room=1).tolist() == stats.tasks.tolist()
        most = [int((plan.tasks[:, NQ] * plan.tasks[:, NK]).sum()) for plan in plans]
        assert all(area <= cells for area, cells in zip(stats.area.tolist(), most, strict=True))


@pytest.mark.parametrize("backend", COMM_TYPES)
def test_the_bytes_that_ranks_send(ranks: RankPool, backend: str) -> None:
    """Forward and backward, summed over the group, under the counts that every exchange is held to."""
    for batch in BATCHES:
        for layout in ("zigzag", "contiguous"):
            for mask in (Causal(), SlidingWindow(9, 3)):
                case = Case(backend, 4, layout=layout, mask=mask, batch=batch, dtype=torch.float32)
                made = plan_batch(
                    offsets(batch.lengths),
                    4,
                    layout=layout,
                    mask=mask,
                    cu_seqlens_padded=batch.padded and offsets(batch.padded),
                    cp_comm_type=backend,
                )
                itemsize, gradient = sizes_of(case)
                stats = made.stats(
                    kv_heads=case.heads[1], head_dim=case.head_dim, itemsize=itemsize, gradient_itemsize=gradient
                )
                assert stats.forward_bytes is not None
                assert stats.both_bytes is not None
                assert stats.forward_bytes.tolist() == (stats.received * row_width(case) * itemsize).tolist()
                (shares,) = groups(ranks, case)
                assert int(stats.forward_bytes.sum()) == sum(share.forward.sent for share in shares)
                assert int(stats.both_bytes.sum()) == sum(s.forward.sent + s.backward.sent for s in shares)


def results(case: Case, made: BatchPlan) -> list[list[int]]:
    """Each rank's tokens under the layout that a plan brings."""
    handler = make_handler(case, torch.distributed.group.WORLD, layout=made.layout)
    assert handler.layout == made.layout
    return [handler.position_ids.tolist()]


def test_a_handler_takes_the_layout_of_a_plan(ranks: RankPool) -> None:
    case = Case("p2p", 4)
    made = plan_batch(offsets(case.batch.lengths), 4, layout="contiguous")
    found = ranks.run(results, case, made)
    starts = np.repeat(made.documents.offsets[:-1], made.documents.lengths)
    held = [made.layout.positions(rank) for rank in range(4)]
    assert found == [[(rows - starts[rows]).tolist()] for rows in held]


def test_plans_travel_by_pickle() -> None:
    for layout in layouts_of(sum(PADDED), 3):
        made = plan_batch(offsets(LENGTHS), 3, layout=layout, cu_seqlens_padded=offsets(PADDED), mask=SlidingWindow(5))
        made.stats()
        again = pickle.loads(pickle.dumps(made))
        assert again.layout == made.layout
        assert (again.mask, again.cp_comm_type, again.cp_size) == (made.mask, made.cp_comm_type, made.cp_size)
        check(again)
        if "replicated" not in (made.layout.name, layout):
            for rank in range(3):
                assert torch.equal(again.plan(rank).to_tensor(), made.plan(rank).to_tensor())
        stats = pickle.loads(pickle.dumps(made.stats(kv_heads=2, head_dim=4)))
        assert str(stats) == str(made.stats(kv_heads=2, head_dim=4))


def test_the_line_to_read() -> None:
    made = plan_batch([0, 4, 8], 2, layout="contiguous")
    line = str(made.stats(kv_heads=2, head_dim=64, count_tasks=True))
    assert line.startswith("contiguous over 2 ranks, 8 tokens in 2 documents; area max/mean 1.000; p2p receives 0.0%")
    assert "0.0 MiB a rank forward" in line
    assert "2 tasks, 1 at most" in line
    assert "a rank's plan" in line


def pairs_before(rows: int, reach: int, keys: int) -> int:
    """Keys below ``min(i + reach, keys)`` that rows i below ``rows`` see, added up in Python's integers."""
    rising = min(max(keys - reach, 0), rows)
    start = min(max(-reach, 0), rising)  # rows before this one see none
    return sum_of(start + reach, rising - start) + (rows - rising) * keys


def sum_of(first: int, count: int) -> int:
    return count * first + count * (count - 1) // 2


def exact_areas(lengths: list[int], layout: Layout, window: tuple[int, int] | None) -> list[int]:
    """Pairs of each rank from nothing but its spans, in Python's integers; None for the window means causal."""
    starts = offsets(lengths)
    result = []
    for spans in layout.spans:
        total = 0
        for start, length, stride, _ in spans.tolist():
            stop = start + (length - 1) * stride + 1
            for document, first in zip(lengths, starts, strict=False):
                low, high = max(start, first), min(stop, first + document)
                if low >= high:
                    continue
                low += (start - low) % stride
                rows = max(0, -(-(high - low) // stride))
                if stride > 1:
                    assert window is None
                    total += rows * (low - first + 1) + stride * (rows * (rows - 1) // 2)
                    continue
                begin, end = low - first, high - first
                left, right = window or (document, 0)
                for row, sign in ((end, 1), (begin, -1)):
                    total += sign * (pairs_before(row, right + 1, document) - pairs_before(row, -left, document))
        result.append(total)
    return result


HUGE = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**33), st.integers(2**38, 2**45)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(HUGE, st.integers(1, 9), st.sampled_from(["zigzag", "contiguous", "striped", "balanced"]), st.booleans())
def test_counts_past_64_bits(lengths: list[int], cp_size: int, layout: str, windowed: bool) -> None:
    window = (2**39 + 5, 1000) if windowed and layout != "striped" else None
    mask = Causal() if window is None else SlidingWindow(*window)
    made = plan_batch(offsets(lengths), cp_size, layout=layout, mask=mask)
    stats = made.stats(kv_heads=1 << 20, head_dim=1 << 20)
    area = exact_areas(lengths, made.layout, window)
    assert stats.area.tolist() == area
    if window is None:
        assert sum(area) == sum(n * (n + 1) // 2 for n in lengths)
    assert int(stats.area.sum()) == sum(area), "what adds up to more than int64 is not int64"
    assert stats.area_balance == (max(area) * cp_size / sum(area) if sum(area) else 1.0)
    assert stats.forward_bytes is not None
    assert stats.both_bytes is not None
    assert stats.forward_bytes.tolist() == [rows * 2**42 for rows in stats.received.tolist()]
    assert stats.both_bytes.tolist() == [rows * 2**44 for rows in stats.received.tolist()]
    assert "area max/mean" in str(stats)


def test_pairs_in_python_integers_are_those_of_the_dense_mask() -> None:
    """The count that the one above is held to, where a mask can be written down."""
    for mask, window in ((Causal(), None), (SlidingWindow(3), (3, 0)), (SlidingWindow(2, 4), (2, 4))):
        for layout in ("zigzag", "contiguous", "balanced", *(("striped",) if window is None else ())):
            made = plan_batch(offsets(LENGTHS), 3, layout=layout, mask=mask)
            seen = visible_pairs(made.mask, made.documents).numpy()
            held = [rows[rows >= 0] for rows in map(made.layout.positions, range(3))]
            assert exact_areas(list(LENGTHS), made.layout, window) == [int(seen[rows].sum()) for rows in held]


def test_tasks_of_a_document_past_64_bits() -> None:
    made = plan_batch([0, 2**40], 8)
    areas = made.stats(count_tasks=True).area.tolist()
    for rank in (0, 5):
        total = 0
        for _, _, rows, _, keys, lo, hi in made.plan(rank).tasks.tolist():
            assert lo == -(2**62)
            total += pairs_before(rows, min(hi, keys) + 1, keys)
        assert total == areas[rank] == (2**40) * (2**40 + 1) // 2 // 8


def test_offsets_of_any_integer_type() -> None:
    for dtype in (np.int32, np.uint32, np.int64):
        made = plan_batch(np.array([0, 5, 2**31 - 1], dtype=dtype), 4, layout="contiguous")
        assert sum(made.stats().area.tolist()) == 15 + (2**31 - 6) * (2**31 - 5) // 2
    made = plan_batch(torch.tensor([0, 2**31 - 1], dtype=torch.int32), 4, cp_comm_type="all_gather")
    assert made.stats().received.tolist() == [3 * 2**29] * 4


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped", "balanced", "replicated"])
def test_more_rows_than_can_be_numbered(layout: str) -> None:
    """2**62 rows of all ranks together; one rank's row of them less is planned, and counted to the pair."""
    for length in (2**59, 2**59 + 1, 2**60):
        with pytest.raises(
            InvalidValueError, match=f"has more rows than 64 bits can count; got {length} times 8 ranks"
        ):
            plan_batch([0, length], 8, layout=layout)
    most = 2**59 - 1
    for comm_type in COMM_TYPES:
        stats = plan_batch([0, most], 8, layout=layout, cp_comm_type=comm_type).stats()
        copies = 8 if layout == "replicated" else 1
        assert sum(stats.area.tolist()) == copies * most * (most + 1) // 2
        assert min(stats.received.tolist()) >= 0
        assert max(stats.received.tolist()) < 2**59


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"cp_size": 0}, ValueError, "at least 1"),
        ({"cp_size": 2.0}, TypeError, "cp_size must be an int"),
        ({"cp_size": True}, TypeError, "pass a number of ranks"),
        ({"tile": "x"}, TypeError, "tile must be an int or None; got 'x'; pass the rows of the kernel's tile"),
        ({"tile": 1.5}, TypeError, "tile must be an int"),
        ({"tile": True}, TypeError, "tile must be an int"),
        ({"tile": 0}, ValueError, "tile must be at least 1; got 0; pass the rows"),
        ({"tile": -3, "layout": "balanced"}, ValueError, "tile must be at least 1"),
        ({"kernel_cost": -1}, ValueError, "kernel_cost must be at least 0; got -1; pass the pairs that a launch"),
        ({"kernel_cost": "x"}, TypeError, "kernel_cost must be an int"),
        ({"kernel_cost": 2**41}, ValueError, "kernel_cost is more than any kernel takes"),
        ({"cp_comm_type": "a2a"}, ValueError, "p2p, ring, all_gather"),
        ({"cp_comm_type": None}, TypeError, "cp_comm_type must be a string"),
        ({"layout": "diagonal"}, ValueError, "unknown layout"),
        ({"layout": Layout("mine", 4, [[(0, 4, 1)]])}, ValueError, "made for another batch"),
        ({"mask": "diagonal"}, ValueError, "unknown mask"),
        ({"mask": Bands([(0, 9, 0, 9, 0, 0)])}, ValueError, "past the end"),
        ({"cu_seqlens": [1, 2]}, ValueError, "start at 0"),
        ({"cu_seqlens_padded": [0, 4]}, ValueError, "fewer tokens"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan_batch(**{"cu_seqlens": [0, 8], "cp_size": 2, **arguments})


def test_what_a_plan_refuses() -> None:
    made = plan_batch([0, 8], 2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match="no such rank"):
            made.plan(rank)
    for none in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="rank must be an int"):
            made.plan(none)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass both"):
        made.stats(kv_heads=2)
    with pytest.raises(UnsupportedError, match="a2a"):
        plan_batch([0, 8], 2, layout="replicated").plan(0)
    mixed = Layout("mixed", 8, [[(0, 2, 2), (4, 4, 1)], [(1, 2, 2)]])
    assert plan_batch([0, 8], 2, layout=mixed).stats().area.tolist() == [30, 6]
    with pytest.raises(UnsupportedError, match="one stride"):
        plan_batch([0, 8], 2, layout=mixed).stats(count_tasks=True)


def test_a_thousand_ranks_take_no_table_of_pairs() -> None:
    """Eight million tokens in eight thousand documents."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 2000, 8192)
    started = time.process_time()
    made = plan_batch(offsets(lengths.tolist()), 1024, layout="contiguous")
    stats = made.stats()
    assert time.process_time() - started < 5
    spans = np.concatenate(made.layout.spans)
    assert int(stats.area.sum()) == int((lengths * (lengths + 1) // 2).sum())
    inside = made.documents.offsets[made.documents.document_of(spans[:, START])]
    before: Counts = np.where(spans[:, LENGTH] > 0, spans[:, START] - inside, 0)
    assert stats.needed.tolist() == before.tolist(), "each rank sees the beginning of its first document"


def test_statistics_cannot_be_edited() -> None:
    made = plan_batch([0, 9, 16], 4, layout="zigzag")
    needed, area = made.stats().needed.copy(), made.stats().area.copy()
    for name in ("needed", "area", "received"):
        column = getattr(made.stats(), name)
        if column.flags.writeable:
            column[:] = 0
    assert (made.stats().needed == needed).all()
    assert (made.stats().area == area).all()
