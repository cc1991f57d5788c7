"""The balanced layout: level in tokens and in attention, cut in few places, the same everywhere, for every mask."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    Balanced,
    Causal,
    Chunked,
    CPConfig,
    Documents,
    Full,
    InvalidTypeError,
    InvalidValueError,
    Layout,
    Mask,
    SharedQuestion,
    SlidingWindow,
    UnsupportedError,
    get_cp_handler_cls,
    plan_batch,
)
from cphandler.layouts.balance import balanced
from cphandler.layouts.layout import contiguous, cut_by_spans, zigzag
from cphandler.layouts.placement import LayoutSpec, place
from cphandler.layouts.pool import AREA, ROWS, Pool, Remainder
from cphandler.layouts.workload import Workload
from cphandler.plan.cost import rank_cost
from cphandler.tokens.intervals import Table
from cphandler.tokens.metadata import StreamMetadata, dense_streams
from tests.test_errors import Seat
from tests.test_support import LENGTHS, masks_over

Dense = npt.NDArray[np.bool_]


def documents_of(lengths: list[int]) -> Documents:
    return Documents.from_cu_seqlens([0, *accumulate(lengths)])


def dense(bands: Table, queries: int, keys: int) -> Dense:
    """Who sees whom, as a matrix."""
    result = np.zeros((queries, keys), dtype=bool)
    for q0, q1, k0, k1, lo, hi in bands.tolist():
        distance = np.arange(k0, k1)[None] - np.arange(q0, q1)[:, None]
        result[q0:q1, k0:k1] |= (distance >= lo) & (distance <= hi)
    return result


def workload(lengths: list[int], mask: Mask, tile: int | None = None) -> Workload:
    documents = documents_of(lengths)
    return Workload.of(documents.num_tokens, [(mask.bands(documents, documents), 1)], tile=tile)


def placed(lengths: list[int], cp_size: int, spec: LayoutSpec = "balanced", mask: Mask | None = None) -> Layout:
    stream = stream_of(lengths)
    return place((spec, spec), stream, stream, mask or Causal(), cp_size)[0]


def stream_of(lengths: list[int]) -> StreamMetadata:
    documents = documents_of(lengths)
    return StreamMetadata(documents, None, documents.max_length)


def quality(layout: Layout, seen: Dense) -> tuple[float, float]:
    """Largest area over the mean, and rows received as a share of a ring's, counted from the dense mask."""
    area, received = [], 0
    for rank in range(layout.cp_size):
        held = layout.positions(rank)
        rows = seen[held[held >= 0]]
        area.append(rows.sum())
        others = np.ones(layout.num_tokens, dtype=bool)
        others[held[held >= 0]] = False
        received += (rows.any(axis=0) & others).sum()
    return max(area) / np.mean(area), received / (layout.num_tokens * (layout.cp_size - 1))


@pytest.mark.parametrize("name", masks_over(5))
def test_rows_weigh_what_they_see(name: str) -> None:
    documents, mask = documents_of(list(LENGTHS)), masks_over(5)[name]
    tables = [(mask.bands(documents, documents), 2), (SlidingWindow(4).bands(documents, documents), 3)]
    seen = [dense(table, 32, 32) for table, _ in tables]
    rows = 2 * seen[0].sum(axis=1) + 3 * seen[1].sum(axis=1)
    work = Workload.of(32, tables)
    assert [unit.row(i) for unit in work.units for i in range(unit.length)] == rows.tolist()
    assert work.area == rows.sum()
    assert work.weight == 5
    for unit in work.units:
        last = unit.start + unit.length
        for row in range(unit.length + 1):
            assert unit.upto(row) == rows[unit.start : unit.start + row].sum()
            assert unit.area(row, unit.length) == rows[unit.start + row : last].sum()
        outside = (seen[0] | seen[1])[unit.start : last].copy()
        outside[:, unit.start : last] = False
        assert not outside.any(), "a unit sees another one"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 2**45), min_size=1, max_size=4),
    st.sampled_from([Causal(), Full(), SlidingWindow(2**31, 7)]),
    st.integers(1, 1000),
    st.data(),
)
def test_work_past_64_bits(lengths: list[int], mask: Mask, weight: int, data: st.DataObject) -> None:
    """Sums over rows, against Python's integers added up row by row around the place where they are asked."""
    documents = documents_of(lengths)
    bands = mask.bands(documents, documents)
    work = Workload.of(documents.num_tokens, [(bands, weight)])
    for unit in work.units:
        row = data.draw(st.integers(0, unit.length - 1))
        stop = min(row + 50, unit.length)

        def seen(at: int, length: int) -> int:
            left, right = {Causal(): (length, 0), Full(): (length, length)}.get(mask, (2**31, 7))
            return weight * (min(at + right, length - 1) - max(at - left, 0) + 1)

        rows = [seen(at, unit.length) for at in range(row, stop)]
        assert [unit.row(at) for at in range(row, stop)] == rows
        assert unit.area(row, stop) == sum(rows) == unit.upto(stop) - unit.upto(row)
        whole = {Causal(): unit.length * (unit.length + 1) // 2, Full(): unit.length**2}
        if mask in whole:
            assert unit.upto(unit.length) == weight * whole[mask]
    assert work.area == sum(unit.area(0, unit.length) for unit in work.units)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**30), st.integers(1, 2**20), st.integers(1, 2**9), st.data())
def test_tiles_past_64_bits(length: int, tile: int, weight: int, data: st.DataObject) -> None:
    """A row of a tile has a part of its work, rounded up; one row of the last tile may have nearly all that fits."""
    tile = max(tile, length >> 9)
    (unit,) = Workload.of(length, [(np.array([[0, length, 0, length, -(2**62), 0]]), weight)], tile=tile).units

    def work(first: int) -> tuple[int, int]:
        last = min(first + tile, length)
        return last - first, weight * -(-(tile * tile * -(-last // tile)) // (last - first))

    row = data.draw(st.integers(0, length - 1))
    assert unit.row(row) == work(row // tile * tile)[1]
    assert unit.upto(length) == sum(rows * each for rows, each in map(work, range(0, length, tile)))


def test_units_are_as_small_as_masks_allow() -> None:
    assert [unit.length for unit in workload([10, 4], Causal()).units] == [10, 4]
    assert [unit.length for unit in workload([10, 4], Chunked(4)).units] == [4, 4, 2, 4]
    padded = Documents.from_cu_seqlens([0, 3, 5], [0, 6, 9])
    assert [u.length for u in Workload.of(9, [(Causal().bands(padded, padded)[:0], 1)]).units] == [9]


@pytest.mark.parametrize("cut", ["end", "ends", "beginning"])
def test_a_cut_costs_what_the_dense_mask_says(cut: str) -> None:
    pieces = {"end": [(20, 31)], "ends": [(0, 7), (20, 31)], "beginning": [(0, 7)]}[cut]
    for mask in (Causal(), Full(), SlidingWindow(5), SlidingWindow(2, 3)):
        (unit,) = workload([31], mask).units
        seen = dense(mask.bands(documents_of([31]), documents_of([31])), 31, 31) if mask == Full() else None
        documents = documents_of([31])
        seen = dense(mask.bands(documents, documents), 31, 31)
        own = np.zeros(31, dtype=bool)
        for start, stop in pieces:
            own[start:stop] = True
        assert unit.received(pieces) == (seen[own].any(axis=0) & ~own).sum(), mask


LENGTHS_OF_ANY_KIND = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 400)), max_size=12)


@settings(max_examples=75, deadline=None)
@given(
    LENGTHS_OF_ANY_KIND,
    st.integers(1, 9),
    st.sampled_from([Causal(), Full(), SlidingWindow(7), SlidingWindow(3, 9), Chunked(16), SharedQuestion((0,))]),
    st.sampled_from([None, 1, 8]),
)
def test_shares_are_equal_and_the_same_everywhere(lengths: list[int], cp_size: int, mask: Mask, tile: int) -> None:
    work = workload(lengths, mask, tile)
    layout = balanced(work, cp_size)  # a Layout refuses tokens left out or held twice
    held = [int(spans[:, 1].sum()) for spans in layout.spans]
    assert max(held) - min(held) <= 1
    assert layout.num_local_tokens == -(-sum(lengths) // cp_size)
    assert layout.strides <= {1}
    assert balanced(workload(lengths, mask, tile), cp_size) == layout == pickle.loads(pickle.dumps(layout))


@pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(40), SlidingWindow(20, 20), Chunked(64)], ids=str)
@pytest.mark.parametrize("lengths", [[2000], [750, 450, 350, 250, 150, 31, 9], [500] * 3, [1]], ids=len)
@pytest.mark.parametrize("cp_size", [2, 5, 8])
def test_level_and_less_travels_than_in_zigzag(mask: Mask, lengths: list[int], cp_size: int) -> None:
    if lengths == [1]:
        assert placed(lengths, cp_size).num_local_tokens == 1
        return
    documents = documents_of(lengths)
    seen = dense(mask.bands(documents, documents), documents.num_tokens, documents.num_tokens)
    level, volume = quality(placed(lengths, cp_size, mask=mask), seen)
    others = [quality(cut(documents.offsets, cp_size), seen) for cut in (zigzag, contiguous)]
    assert level <= max(1.025, min(other[0] for other in others))
    assert volume <= others[0][1] + 1e-9


@pytest.mark.parametrize("cp_size", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("length", [64, 1001, 5003])
def test_one_causal_document_is_never_worse_than_zigzag(cp_size: int, length: int) -> None:
    documents = documents_of([length])
    seen = dense(Causal().bands(documents, documents), length, length)
    ours, theirs = (quality(layout, seen) for layout in (placed([length], cp_size), zigzag(documents.offsets, cp_size)))
    assert ours[0] <= theirs[0] + 1e-12
    assert ours[1] <= theirs[1] + 1e-12


def test_documents_that_fit_stay_whole() -> None:
    for cp_size in (2, 4, 8):
        documents = documents_of([100] * 16)
        seen = dense(Causal().bands(documents, documents), 1600, 1600)
        assert quality(placed([100] * 16, cp_size), seen) == (1.0, 0.0)


def test_a_document_many_shares_long() -> None:
    lengths = [7000, 300, 200, 200, 100, 100, 60, 40]
    documents = documents_of(lengths)
    seen = dense(Causal().bands(documents, documents), 8000, 8000)
    level, volume = quality(placed(lengths, 32), seen)
    assert level <= 1.02
    assert volume < quality(zigzag(documents.offsets, 32), seen)[1]


def test_a_mix_is_level_on_the_sum() -> None:
    lengths, window = [3000, 1100, 700, 500, 300, 200, 100, 100], SlidingWindow(64)
    documents = documents_of(lengths)
    seen = [dense(mask.bands(documents, documents), 6000, 6000).astype(np.int64) for mask in (Causal(), window)]

    def level(spec: LayoutSpec, weights: tuple[int, int]) -> float:
        layout = placed(lengths, 4, spec)
        rows = weights[0] * seen[0].sum(axis=1) + weights[1] * seen[1].sum(axis=1)
        area = [rows[layout.positions(rank)].sum() for rank in range(4)]
        return float(max(area) / np.mean(area))

    mix = Balanced({Causal(): 1, window: 30})
    assert level(mix, (1, 30)) <= 1.02
    assert level("balanced", (1, 0)) <= 1.02
    assert level(mix, (1, 0)) > 1.05, "negative control: level on the sum is not level on each"
    assert placed(lengths, 4, Balanced({Causal(): 3})) == placed(lengths, 4) == placed(lengths, 4, Balanced())


def test_work_in_whole_tiles() -> None:
    tile, lengths = 128, [1500, 1200, *[8] * 200]

    def level(layout: Layout) -> float:
        """Of what a kernel computes in whole tiles for each run of a document."""
        starts = np.append(documents_of(lengths).offsets, 10**6)
        cost = []
        for spans in layout.spans:
            total = 0
            for start, rows in spans[:, :2].tolist():
                edges = np.unique(np.clip(starts, start, start + rows))
                for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                    document = int(starts[np.searchsorted(starts, first, side="right") - 1])
                    for row in range(first, last, tile):
                        total += -(-(min(row + tile, last) - document) // tile)
            cost.append(total)
        return float(max(cost) / np.mean(cost))

    documents = documents_of(lengths)
    stream = StreamMetadata(documents, None, documents.max_length)
    in_tiles, in_pairs = (
        place(("balanced", "balanced"), stream, stream, Causal(), 4, tile=rows)[0] for rows in (tile, None)
    )
    assert level(in_tiles) <= 1.06
    assert level(in_pairs) > 1.2, "negative control: level in pairs is not level in tiles"


def test_a_cost_for_each_document() -> None:
    """Level in pairs and launches together; where launches cost nothing, the rank of the short documents is late."""
    cost, lengths = 5000, [1500, 1200, 900, *[8] * 300]
    offsets = documents_of(lengths).offsets

    def level(layout: Layout) -> float:
        spent = []
        for spans in layout.spans:
            total = 0
            for start, rows in spans[:, :2].tolist():
                first = np.searchsorted(offsets, start, side="right") - 1
                last = np.searchsorted(offsets, start + rows, side="left")
                for i in range(first, last):
                    low, high = max(start, offsets[i]) - offsets[i], min(start + rows, offsets[i + 1]) - offsets[i]
                    share = cost * (high - low) / lengths[i]  # of a cut document, a part
                    total += (high * (high + 1) - low * (low + 1)) / 2 + share
            spent.append(total)
        return float(max(spent) / np.mean(spent))

    documents = documents_of(lengths)
    stream = StreamMetadata(documents, None, documents.max_length)
    counted, free = (
        place(("balanced", "balanced"), stream, stream, Causal(), 4, kernel_cost=price)[0] for price in (cost, 0)
    )
    assert level(counted) <= 1.03
    assert level(free) > 1.2, "negative control: level in pairs alone is not level"
    ahead = plan_batch(offsets, 4, layout="balanced", kernel_cost=cost).layout
    assert ahead == counted != free
    for rank in range(4):
        handler = get_cp_handler_cls("p2p")(
            cp_group=Seat(4, rank),
            qkv_format="thd",
            cu_seqlens_q=offsets,
            layout="balanced",
            config=CPConfig(kernel_cost=cost),
        )
        assert handler.layout == counted


def test_padding_weighs_nothing() -> None:
    """Rows of a padded batch are one on the other; a row that is padding in all of them costs nothing."""
    real = torch.zeros(2, 400, dtype=torch.bool)
    real[0, :300] = True
    real[1, 100:300] = True
    stream, _ = dense_streams("sbhd", {}, {"max_seqlen_q": 400, "max_seqlen_kv": None}, real)
    layout = place(("balanced", "balanced"), stream, stream, Causal(), 4)[0]
    rows = np.zeros(400, dtype=np.int64)
    rows[:300] += np.arange(1, 301)
    rows[100:300] += np.arange(1, 201)
    area = [rows[layout.positions(rank)].sum() for rank in range(4)]
    assert max(area) <= 1.03 * np.mean(area)


def test_keys_of_cross_attention_lie_beside_their_queries() -> None:
    queries, keys = documents_of([60, 20, 20, 0, 60]), documents_of([5, 40, 35, 30, 90])
    streams = [StreamMetadata(documents, None, documents.max_length) for documents in (queries, keys)]
    seen = dense(Full().bands(queries, keys), 160, 200)

    def received(spec: LayoutSpec) -> int:
        own, theirs = place((spec, spec), streams[0], streams[1], Full(), 4)
        total = 0
        for rank in range(4):
            rows, held = own.positions(rank), theirs.positions(rank)
            others = np.ones(200, dtype=bool)
            others[held[held >= 0]] = False
            total += int((seen[rows[rows >= 0]].any(axis=0) & others).sum())
        assert [int(spans[:, 1].sum()) for spans in theirs.spans] == [50] * 4
        return total

    assert received("balanced") < 0.7 * received("zigzag")
    own, theirs = place(("zigzag", "balanced"), streams[0], streams[1], Full(), 4)
    assert (own.name, theirs.name) == ("zigzag", "balanced")


def test_time_grows_with_the_documents() -> None:
    """CPU seconds, the best of three: eight times the documents take about eight times as long, and never 64 times."""
    seconds = []
    for count in (3_000, 24_000):
        lengths = np.random.default_rng(5).integers(0, 50, count).tolist()
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            layout = placed(lengths, 8)
            best = min(best, time.process_time() - started)
        seconds.append(best)
        documents = documents_of(lengths)
        stats = rank_cost(Causal().bands(documents, documents), layout, layout)
        assert stats.area.max() <= 1.01 * stats.area.mean()
        assert stats.rows.sum() < 0.01 * sum(lengths), "all but a few documents are whole"
    assert seconds[1] < 24 * seconds[0], seconds


def searched(pool: Pool, field: int, least: int) -> list[int]:
    return [i for i, remainder in enumerate(pool.remainders) if remainder[field] >= least]


@settings(max_examples=50, deadline=None)
@given(st.data(), st.lists(st.integers(1, 60), min_size=1, max_size=20), st.booleans())
def test_searches_of_the_pool(data: st.DataObject, lengths: list[int], by_last_row: bool) -> None:
    """While remainders are taken, cut and put back, many or few, and of a copy, which is a pool of its own."""
    pool = Pool(workload(lengths, Causal()), by_last_row)
    other, before = pool.copy(), list(pool.remainders)
    for _ in range(data.draw(st.integers(0, 12))):
        field = data.draw(st.sampled_from([AREA, ROWS]))
        least = data.draw(st.integers(0, 2000 if field == AREA else 70))
        assert list(pool.search(field, least)) == searched(pool, field, least)
        assert list(pool.search(field, least, backwards=True)) == searched(pool, field, least)[::-1]
        if pool.remainders:
            at = data.draw(st.integers(0, len(pool.remainders) - 1))
            taken = pool.remainders[at:]
            del pool.remainders[at:]
            assert list(pool.search(field, least)) == searched(pool, field, least)
            first = taken.pop()
            middle = (first.start + first.stop) // 2
            pool.cut(first, [(middle, middle + 1)])
            pool.put_back(taken)
        assert pool.remainders == sorted(pool.remainders)
    assert other.remainders == before
    pool.put_back([Remainder(float(i), 0, i, i + 1, 7, 1) for i in range(40)])
    assert pool.remainders == sorted(pool.remainders)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_keys_of_a_stream_past_64_bits(layout: str) -> None:
    """Products of two lengths: the keys of a band go to ranks in proportion to the queries that they hold of it."""
    queries, keys = documents_of([3 * 2**38 + 1, 2**39]), documents_of([2**41 + 3, 5])
    streams = [StreamMetadata(documents, None, documents.max_length) for documents in (queries, keys)]
    own, theirs = place((layout, "balanced"), *streams, Full(), 4)
    assert [int(spans[:, 1].sum()) for spans in theirs.spans] == [2**39 + 2] * 4
    held = [cut_by_spans(np.array([0]), np.array([3 * 2**38 + 1]), spans) for spans in own.spans]
    rows = list(accumulate(sum((stop - first).tolist()) for _, _, first, stop in held))
    wanted = [0, *((2**41 + 3) * row // rows[-1] for row in rows)]
    for rank in range(4):  # each rank holds what it wants of them, up to its share
        _, _, first, stop = cut_by_spans(np.array([wanted[rank]]), np.array([wanted[rank + 1]]), theirs.spans[rank])
        assert sum((stop - first).tolist()) == min(wanted[rank + 1] - wanted[rank], 2**39 + 2)


def test_work_that_cannot_be_counted_is_refused() -> None:
    for weight, tile in ((2**60, None), (2**70, None), (1, 2**40)):
        with pytest.raises(InvalidValueError, match=r"past what 64 bits can count; got .* layers.*; weigh masks"):
            place((Balanced({Causal(): weight}),) * 2, *[stream_of([100])] * 2, Causal(), 2, tile=tile)
    with pytest.raises(InvalidValueError, match="too many tiles to weigh one by one; got 8589934592 of 128 rows"):
        place(("balanced", "balanced"), *[stream_of([2**40])] * 2, Causal(), 2, tile=128)
    assert place(("balanced", "balanced"), *[stream_of([2**40])] * 2, Causal(), 2)[0].num_local_tokens == 2**39


def test_made_ahead_of_time_without_torch_distributed() -> None:
    """In a data loader's process: no group, and the very layout that a handler makes."""
    program = """
import pickle, sys
from cphandler import plan_batch
sys.stdout.buffer.write(pickle.dumps(plan_batch([0, 300, 310, 400, 1000], 4, layout="balanced").layout))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=120)
    assert pickle.loads(done.stdout) == placed([300, 10, 90, 600], 4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match="takes a mapping"):
        Balanced([Causal()])  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="rather than its name"):
        Balanced({"causal": 1})  # type: ignore[dict-item]
    with pytest.raises(InvalidTypeError, match=r"must be an int.*count the layers"):
        Balanced({Causal(): 0.5})  # type: ignore[dict-item]
    with pytest.raises(InvalidValueError, match="at least"):
        Balanced({Causal(): 0})
    with pytest.raises(InvalidValueError, match="choose one of balanced, contiguous"):
        placed([4], 2, "even")
    queries, keys = (StreamMetadata(documents_of(lengths), None, 9) for lengths in ([4, 5], [9, 1]))
    with pytest.raises(UnsupportedError, match="no meaning across two streams"):
        place((Balanced({Chunked(4): 1}),) * 2, queries, keys, Full(), 2)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        CPConfig(tile=0)
