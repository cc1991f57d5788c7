"""Masks: their bands, cut to the real tokens, against definitions from token indices; and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cphandler.tokens.masks
from cphandler import (
    AcrossDocuments,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    CPError,
    Documents,
    Full,
    InvalidTypeError,
    InvalidValueError,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
    UnsupportedError,
)
from cphandler.testing import visible_pairs
from cphandler.tokens.bands import restrict
from cphandler.tokens.masks import make_mask, visible_bands
from tests.nonsense import steady

Counts = np.ndarray[Any, np.dtype[np.int64]]


def documents_of(real: Sequence[Sequence[bool]]) -> Documents:
    """Documents whose tokens are real or not, each as listed."""
    offsets = [0, *accumulate(map(len, real))]
    runs = [np.zeros(0, dtype=np.int64)]
    for start, tokens in zip(offsets, real, strict=False):
        runs.append(start + np.flatnonzero(np.diff([0, *map(int, tokens), 0])))
    return Documents(np.array(offsets), np.concatenate(runs))


a_document: st.SearchStrategy[list[bool]] = st.one_of(
    st.just([]),
    st.integers(0, 25).map(lambda n: [True] * n),
    st.tuples(st.integers(0, 20), st.integers(0, 6)).map(lambda n: [True] * n[0] + [False] * n[1]),
    st.lists(st.booleans(), max_size=20),
)
some_documents = st.lists(a_document, min_size=1, max_size=5).map(documents_of)
two_streams = st.lists(st.tuples(a_document, a_document), min_size=1, max_size=4).map(
    lambda pairs: (documents_of([q for q, _ in pairs]), documents_of([k for _, k in pairs]))
)


def segments_in(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Lengths that sum to ``length`` at most, zeros among them."""
    cuts = st.lists(st.integers(0, length), max_size=4).map(sorted)
    return cuts.map(lambda cuts: tuple(b - a for a, b in pairwise([0, *cuts])))


@st.composite
def trees_of(draw: st.DrawFn, length: int) -> PrefixTree:
    """Nodes of so many tokens together, empty ones and several roots among them."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    lengths = tuple(b - a for a, b in pairwise([0, *cuts, length]))
    return PrefixTree(tuple(draw(st.integers(-1, i - 1)) for i in range(len(lengths))), lengths)


@st.composite
def bands_in(draw: st.DrawFn, num_queries: int, num_keys: int) -> Bands:
    """Disjoint bands: the rectangle cut into smaller ones, a diagonal range in each, some left out."""
    q_cuts, k_cuts = (
        sorted(draw(st.sets(st.integers(0, size), max_size=3)) | {0, size}) for size in (num_queries, num_keys)
    )
    rows = []
    for q0, q1 in pairwise(q_cuts):
        for k0, k1 in pairwise(k_cuts):
            lo, hi = sorted(draw(st.tuples(*[st.integers(-num_queries, num_keys)] * 2)))
            ends = draw(st.sampled_from([(lo, hi), (-math.inf, hi), (lo, math.inf), (-math.inf, math.inf), None]))
            if ends is not None:
                rows.append((q0, q1, k0, k1, *ends))
    return Bands(rows)


def plain_masks(lengths: list[int]) -> st.SearchStrategy[Mask]:
    """Every mask that holds no other, over one stream of documents of these lengths."""
    few, many = st.integers(1, 9), st.integers(0, 25)
    shortest = min((n for n in lengths if n), default=0)
    align = st.sampled_from([None, "top_left", "bottom_right"])
    trees = [trees_of(shortest)] if len({n for n in lengths if n}) <= 1 else []
    return st.one_of(
        *trees,
        st.builds(Causal, align),
        st.just(Full()),
        st.builds(SlidingWindow, many, st.integers(0, 6), align),
        st.builds(PrefixLM, many),
        st.builds(PrefixLM, st.tuples(*[many for _ in lengths])),
        st.builds(BlockCausal, few),
        st.builds(Chunked, few, st.sampled_from(["start", "first_valid"])),
        st.builds(PrefixWindow, st.integers(0, 9), st.integers(0, 9)),
        st.builds(SharedQuestion, segments_in(shortest)),
        st.builds(SharedQuestion, st.tuples(*map(segments_in, lengths))),
        bands_in(sum(lengths), sum(lengths)),
    )


def masks_for(documents: Documents) -> st.SearchStrategy[Mask]:
    """Every mask over one stream."""
    lengths = documents.lengths.tolist()
    return st.one_of(
        plain_masks(lengths),
        st.tuples(*[plain_masks([n]) for n in lengths]).map(PerDocument),
        plain_masks([sum(lengths)]).map(AcrossDocuments),
    )


def plain_cross_masks(queries: list[int], keys: list[int]) -> st.SearchStrategy[Mask]:
    align = st.sampled_from(["top_left", "bottom_right"])
    return st.one_of(
        st.builds(Causal, align),
        st.just(Full()),
        st.builds(SlidingWindow, st.integers(0, 25), st.integers(0, 6), align),
        bands_in(sum(queries), sum(keys)),
    )


def cross_masks_for(queries: Documents, keys: Documents) -> st.SearchStrategy[Mask]:
    """Every mask that has a meaning across two streams."""
    q, k = queries.lengths.tolist(), keys.lengths.tolist()
    return st.one_of(
        plain_cross_masks(q, k),
        st.tuples(*[plain_cross_masks([a], [b]) for a, b in zip(q, k, strict=True)]).map(PerDocument),
        plain_cross_masks([sum(q)], [sum(k)]).map(AcrossDocuments),
    )


def times_seen(bands: Counts, num_queries: int, num_keys: int) -> Counts:
    """``[Sq, Sk]`` how many bands each pair is in."""
    query, key = np.arange(num_queries)[:, None], np.arange(num_keys)[None]
    seen = np.zeros((num_queries, num_keys), dtype=np.int64)
    for q0, q1, k0, k1, lo, hi in bands.tolist():
        seen += (query >= q0) & (query < q1) & (key >= k0) & (key < k1) & (key - query >= lo) & (key - query <= hi)
    return seen


def seen_by(mask: Mask, queries: Documents, keys: Documents) -> Counts:
    bands = restrict(mask.bands(queries, keys), queries.runs, keys.runs)
    return times_seen(bands, queries.num_tokens, keys.num_tokens)


def picture_of(mask: Mask, size: int) -> list[str]:
    documents = Documents.dense(size)
    return [" ".join(".x"[seen] for seen in row) for row in seen_by(mask, documents, documents)]


@settings(max_examples=125, deadline=None)
@given(st.data(), some_documents)
def test_bands_are_the_definition(data: st.DataObject, documents: Documents) -> None:
    mask = data.draw(masks_for(documents))
    expected = visible_pairs(mask, documents).numpy()
    assert (seen_by(mask, documents, documents) == expected).all()
    assert not (mask.is_causal and np.triu(expected, 1).any()), "a causal mask never sees a later key"
    assert {mask: 1}[mask] == 1


@settings(max_examples=75, deadline=None)
@given(st.data(), two_streams)
def test_bands_across_two_streams_are_the_definition(data: st.DataObject, streams: tuple[Documents, Documents]) -> None:
    queries, keys = streams
    mask = data.draw(cross_masks_for(queries, keys))
    expected = visible_pairs(mask, queries, key_documents=keys).numpy()
    assert (seen_by(mask, queries, keys) == expected).all()


def test_the_picture_in_the_docstring() -> None:
    lines = [line.strip() for line in (cphandler.tokens.masks.__doc__ or "").splitlines()]
    heads = [i for i, line in enumerate(lines) if re.match(r"\w+\(.*\)$", line)]
    assert len(heads) == 3
    drawn = {}
    for head in heads:
        columns = zip(*(re.split(r" {2,}", line) for line in lines[head : head + 7]), strict=True)
        drawn.update({name: list(rows) for name, *rows in columns})
    assert set(drawn) == {
        "Causal()",
        "SlidingWindow(1)",
        "PrefixLM(3)",
        "BlockCausal(2)",
        "Full()",
        "Chunked(3)",
        "PrefixWindow(1, 1)",
        "SharedQuestion((2, 2, 2))",
        "SlidingWindow(1, 1)",
        "PrefixTree((-1, 0, 1, 1, 0), (1, 1, 2, 1, 1))",
    }
    for name, rows in drawn.items():
        assert rows == picture_of(eval(name, vars(cphandler.tokens.masks)), 6), name


def test_aligned_diagonals() -> None:
    """Three queries, five keys, the last of each not real."""
    queries, keys = documents_of([[True, True, False]]), documents_of([[True] * 4 + [False]])
    assert seen_by(Causal("top_left"), queries, keys).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5]
    assert seen_by(Causal("bottom_right"), queries, keys).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5]
    window = SlidingWindow(0, 1, align="bottom_right")
    assert seen_by(window, queries, keys).tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0] * 5]


def test_chunks_from_the_first_real_token() -> None:
    """Each row of a padded batch has its own."""
    rows = documents_of([[False, True, True, True, True], [True] * 5, [False] * 5, [False, False, True, False, True]])
    seen = visible_bands(Chunked(2, "first_valid"), (Documents.dense(5),) * 2, (rows, rows))
    assert np.argwhere(times_seen(seen, 20, 20)).tolist() == [
        *([1, 1], [2, 1], [2, 2], [3, 3], [4, 3], [4, 4]),
        *([5, 5], [6, 5], [6, 6], [7, 7], [8, 7], [8, 8], [9, 9]),
        *([17, 17], [19, 19]),
    ]
    whole = seen_by(AcrossDocuments(Chunked(3, "first_valid")), rows, rows)
    assert np.flatnonzero(whole[3]).tolist() == [1, 2, 3], "the stream's first real token"
    assert np.flatnonzero(whole[6]).tolist() == [4, 5, 6]


def test_each_document_is_alone_with_its_mask() -> None:
    documents = Documents.from_cu_seqlens([0, 2, 4, 8])
    masks = (PrefixLM((2,)), Bands([(0, 2, 0, 1, -9, 9)]), AcrossDocuments(SharedQuestion((1, 1, 2))))
    seen = seen_by(PerDocument(masks), documents, documents)
    assert seen[:2, :2].tolist() == [[1, 1], [1, 1]]
    assert seen[2:4, 2:4].tolist() == [[1, 0], [1, 0]]
    assert seen[4:, 4:].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert seen.sum() == 4 + 2 + 8


def test_counts_past_every_document() -> None:
    """Also those that int64 sums would wrap."""
    documents = Documents.from_cu_seqlens([0, 0, 1, 6])
    for far in (10, sys.maxsize, 1 << 80):
        for mask, same in (
            (SlidingWindow(far), Causal()),
            (SlidingWindow(far, far), Full()),
            (PrefixLM(far), Full()),
            (PrefixLM((far, far, far)), Full()),
            (BlockCausal(far), Full()),
            (Chunked(far), Causal()),
            (PrefixWindow(far, 0), Causal()),
            (PrefixWindow(0, far), Causal()),
            (PrefixWindow(far, far), Causal()),
        ):
            assert (seen_by(mask, documents, documents) == seen_by(same, documents, documents)).all(), mask


def test_streams_without_documents_or_tokens() -> None:
    nothing, empty = Documents.from_cu_seqlens([0]), Documents.from_cu_seqlens([0, 0, 0])
    every = (Causal(), Full(), SlidingWindow(2), BlockCausal(2), Chunked(2), PrefixWindow(1, 1), Bands([]))
    for mask in (*every, *map(AcrossDocuments, every), PrefixLM(2), SharedQuestion((2, 2)), PrefixTree((-1,), (9,))):
        assert mask.bands(nothing, nothing).shape[1] == 6
        assert seen_by(mask, nothing, nothing).shape == seen_by(mask, empty, empty).shape == (0, 0)
    assert PerDocument(()).bands(nothing, nothing).shape == (0, 6)


def test_masks_by_name() -> None:
    assert make_mask("Causal") == Causal()
    assert make_mask("full") == Full()
    assert make_mask(SlidingWindow(3)) == SlidingWindow(3, 0)
    with pytest.raises(InvalidValueError, match="choose one of causal, full"):
        make_mask("windowed")
    with pytest.raises(InvalidTypeError, match="a name or a Mask"):
        make_mask(128)  # type: ignore[arg-type]


NONE: dict[str, tuple[Callable[[], Mask], type[Exception], str]] = {
    "left": (lambda: SlidingWindow(-1), InvalidValueError, "SlidingWindow left must be at least 0; got -1"),
    "right": (lambda: SlidingWindow(3, -2), InvalidValueError, "SlidingWindow right must be at least 0; got -2"),
    "half a token": (lambda: SlidingWindow(1.5), InvalidTypeError, "left must be an int; got 1.5"),  # type: ignore[arg-type]
    "a bool": (lambda: SlidingWindow(True), InvalidTypeError, "left must be an int; got True"),
    "window align": (
        lambda: SlidingWindow(1, 0, "middle"),  # type: ignore[arg-type]
        InvalidValueError,
        "unknown align; got 'middle'; choose top_left or bottom_right",
    ),
    "causal align": (lambda: Causal("top"), InvalidValueError, "unknown align; got 'top'"),  # type: ignore[arg-type]
    "prefix": (lambda: PrefixLM(-1), InvalidValueError, "PrefixLM prefix must be at least 0; got -1"),
    "one of the prefixes": (lambda: PrefixLM((1, -1)), InvalidValueError, "PrefixLM prefix must be at least 0"),
    "prefixes in a list": (lambda: PrefixLM([1]), InvalidTypeError, r"prefix must be an int; got \[1\]"),  # type: ignore[arg-type]
    "block": (lambda: BlockCausal(0), InvalidValueError, "BlockCausal block must be at least 1; got 0"),
    "block type": (lambda: BlockCausal("2"), InvalidTypeError, "BlockCausal block must be an int; got '2'"),  # type: ignore[arg-type]
    "origin": (
        lambda: Chunked(2, "end"),  # type: ignore[arg-type]
        InvalidValueError,
        "unknown origin; got 'end'; choose start or first_valid",
    ),
    "chunk": (lambda: Chunked(0), InvalidValueError, "Chunked chunk must be at least 1; got 0"),
    "sink prefix": (lambda: PrefixWindow(-1, 1), InvalidValueError, "PrefixWindow prefix must be at least 0; got -1"),
    "sink window": (lambda: PrefixWindow(1, -1), InvalidValueError, "PrefixWindow left must be at least 0; got -1"),
    "segment": (lambda: SharedQuestion((2, -1)), InvalidValueError, "segments must be at least 0; got -1"),
    "segment type": (lambda: SharedQuestion((2, 1.0)), InvalidTypeError, "segments must be an int; got 1.0"),  # type: ignore[arg-type]
    "segments in a list": (
        lambda: SharedQuestion([2, 1]),  # type: ignore[arg-type]
        InvalidTypeError,
        r"SharedQuestion segments must be a tuple; got \[2, 1\]",
    ),
    "segments of one, not of the other": (
        lambda: SharedQuestion(((2, 1), 3)),  # type: ignore[arg-type]
        InvalidTypeError,
        "segments of a document must be a tuple; got 3",
    ),
    "a node before its parent": (
        lambda: PrefixTree((-1, 2, 0), (1, 1, 1)),
        InvalidValueError,
        "a node of a PrefixTree comes after its parent; got parent 2 of node 1; list nodes from the roots on",
    ),
    "a node its own parent": (lambda: PrefixTree((0,), (1,)), InvalidValueError, "got parent 0 of node 0"),
    "no parent": (lambda: PrefixTree((None,), (1,)), InvalidTypeError, "got None; pass .*, or -1 for a root"),  # type: ignore[arg-type]
    "below a root": (lambda: PrefixTree((-2,), (1,)), InvalidValueError, "must be at least -1; got -2"),
    "a node without length": (lambda: PrefixTree((-1, 0), (1,)), InvalidValueError, "got 2 parents and 1 lengths"),
    "masks in a list": (
        lambda: PerDocument([Causal()]),  # type: ignore[arg-type]
        InvalidTypeError,
        "PerDocument masks must be a tuple; got",
    ),
    "a name among masks": (
        lambda: PerDocument((Causal(), "full")),  # type: ignore[arg-type]
        InvalidTypeError,
        r"each of PerDocument must be a Mask; got 'full'; pass Causal\(\)",
    ),
    "a name across documents": (
        lambda: AcrossDocuments("causal"),  # type: ignore[arg-type]
        InvalidTypeError,
        "what AcrossDocuments holds must be a Mask; got 'causal'",
    ),
    "five numbers": (lambda: Bands([(0, 4, 0, 4, 0)]), InvalidValueError, r"band 0 must be .*; got 5 numbers"),
    "a number for a band": (lambda: Bands([5]), InvalidTypeError, r"band 0 must be \(q0, q1, k0, k1, lo, hi\); got 5"),  # type: ignore[list-item]
    "a number for bands": (lambda: Bands(5), InvalidTypeError, r"Bands takes rows; got 5; pass \["),  # type: ignore[arg-type]
    "bounds backwards": (lambda: Bands([(0, 4, 0, 4, 2, 1)]), InvalidValueError, "band 0 is empty or runs backwards"),
    "queries backwards": (lambda: Bands([(4, 0, 0, 4, 0, 1)]), InvalidValueError, "runs backwards"),
    "keys below 0": (lambda: Bands([(0, 4, -1, 4, 0, 1)]), InvalidValueError, "0 <= k0 <= k1"),
    "half a query": (lambda: Bands([(0, 4.5, 0, 4, 0, 1)]), InvalidValueError, "band 0 must hold integers"),
    "no number": (lambda: Bands([(0, 4, 0, 4, math.nan, 1)]), InvalidValueError, "band 0 must hold integers"),
    "endless queries": (lambda: Bands([(0, math.inf, 0, 4, 0, 1)]), InvalidValueError, "band 0 must hold integers"),
    "overlap": (
        lambda: Bands([(0, 4, 0, 4, -1, 0), (2, 6, 0, 4, 0, 0)]),
        InvalidValueError,
        r"bands must be disjoint; got band \(0, 4, 0, 4, -1, 0\) overlaps another; cut one",
    ),
}


WRONG: list[Any] = [None, "x", 1.5, math.nan, math.inf, True, [1], {1}, {}, object(), np.int64(3), np.arange(2)]
WRONG += [torch.tensor(2), torch.arange(3), Causal, -1, (1.5,), (None,), ("x",), (True,), (-1,), ((1,), None), b"x"]


@pytest.mark.parametrize("value", WRONG, ids=steady)
def test_every_argument_of_every_mask_refuses_what_it_is_not(value: Any) -> None:
    """By an error of this library's that says what to pass; nothing else comes through."""
    places: dict[str, Callable[[Any], Mask]] = {
        "SlidingWindow left": SlidingWindow,
        "SlidingWindow right": lambda x: SlidingWindow(1, x),
        "PrefixLM prefix": PrefixLM,
        "BlockCausal block": BlockCausal,
        "Chunked chunk": Chunked,
        "PrefixWindow prefix": lambda x: PrefixWindow(x, 1),
        "PrefixWindow left": lambda x: PrefixWindow(1, x),
        "SharedQuestion segments": SharedQuestion,
        "PerDocument masks": PerDocument,
        "PerDocument a mask": lambda x: PerDocument((Causal(), x)),
        "AcrossDocuments mask": AcrossDocuments,
        "Bands rows": lambda x: Bands([x]),
        "Bands a number": lambda x: Bands([(0, 4, x, 4, 0, 1)]),
    }
    if not (isinstance(value, tuple) and value == (-1,)):  # the parents of a root
        places["PrefixTree parents"] = lambda x: PrefixTree(x, (1,))
    places["PrefixTree lengths"] = lambda x: PrefixTree((-1,), x)
    if value is not None:  # there it is the default
        places |= {"Causal align": Causal, "SlidingWindow align": lambda x: SlidingWindow(1, 1, x)}
    places["Chunked origin"] = lambda x: Chunked(1, x)
    for place, make in places.items():
        if place == "Bands a number" and isinstance(value, np.int64):
            continue  # what numpy counts by is a number among numbers
        with pytest.raises(CPError, match=re.compile(r"; .*(pass|choose|0 <=|end it)", re.DOTALL)):
            raise AssertionError(f"{place} takes {make(value)}")
    if not isinstance(value, (dict, set)):
        with pytest.raises(CPError, match="pass"):
            raise AssertionError(Bands(value))


def test_numbers_of_bands_that_arrays_hold() -> None:
    plain = Bands([(0, 4, 0, 3, -2, 1)])
    for rows in (
        np.array(plain.rows),
        torch.tensor(plain.rows),
        [np.array(plain.rows[0])],
        [tuple(map(np.int64, plain.rows[0]))],
    ):
        assert Bands(rows) == plain
    assert Bands(np.zeros((0, 6))) == Bands([])
    assert Bands([(0, 4, 0, 3, -(10**30), 1e300)]).bands(*[Documents.dense(4)] * 2).tolist() == [
        [0, 4, 0, 3, -(1 << 62), 1 << 62]
    ]
    with pytest.raises(InvalidValueError, match="band 1 reaches past any batch"):
        Bands([(0, 1, 0, 1, 0, 0), (0, 1 << 70, 5, 6, 0, 0)])


def test_hashes_are_made_once_and_stay_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's hash of a string is another in every process."""
    masks: list[Mask] = [
        PerDocument((Causal("top_left"),) * 4000),
        SharedQuestion(((1, 2), (3,))),
        PrefixLM((1, 2)),
        PrefixTree((-1, 0), (4, 5)),
        Bands([(0, 4, 0, 4, -1, 0)]),
    ]
    for mask in masks:
        if isinstance(mask, PrefixTree):
            mask.bands(*[Documents.dense(9)] * 2)
        first = hash(mask)
        travelled, copied = pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)
        assert set(vars(travelled)) == set(vars(copied)) == {field.name for field in fields(mask)}  # type: ignore[arg-type]
        assert {mask: 1}[travelled] == {copied: 1}[mask] == 1
        with monkeypatch.context() as patch:
            for kind in (Causal, SharedQuestion, PrefixLM):
                patch.setattr(kind, "__hash__", None)
            assert type(mask)._hash.__get__(mask) == first, "asked again, nothing is hashed"  # type: ignore[attr-defined]


def test_documents_of_one_mask_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for kind in (Causal, SlidingWindow, SharedQuestion):
        monkeypatch.setattr(kind, "bands", counted(calls, kind.bands))
    lengths = np.arange(10_000) % 7 + 2
    documents = Documents.from_cu_seqlens(np.concatenate([[0], lengths.cumsum()]))
    masks = (Causal(), SlidingWindow(1, 1), SharedQuestion((1, 1)))
    bands = PerDocument(tuple(masks[i % 3] for i in range(10_000))).bands(documents, documents)
    assert len(calls) == 3
    assert (np.diff(documents.document_of(bands[:, 0])) >= 0).all(), "in the order of documents"
    assert (documents.document_of(bands[:, 0]) == documents.document_of(bands[:, 3] - 1)).all()
    assert set(documents.document_of(bands[:, 0]).tolist()) == set(range(10_000))


def counted(calls: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(function)
        return function(*arguments)

    return call


class Diagonal(Mask):
    """A caller's own, which says what it means by the documents it is shown."""

    def bands(self, queries: Documents, keys: Documents) -> Counts:
        return np.array([[0, queries.num_tokens, 0, keys.num_tokens, 0, keys.num_documents - 1]])


def test_masks_of_ones_own_are_asked_about_one_document_at_a_time() -> None:
    documents = documents_of([[True] * 3, [], [False, True], [True] * 4])
    mask = PerDocument((Diagonal(), Causal(), Diagonal(), Diagonal()))
    expected = np.eye(9, dtype=np.int64)
    expected[3, 3] = 0
    assert (seen_by(mask, documents, documents) == expected).all()
    assert visible_bands(Diagonal(), (documents, documents), (documents, documents)).shape == (3, 6)


@pytest.mark.parametrize("value", [[(0, 1, 0, 1, 0, 0)], None, np.zeros((1, 5), dtype=np.int64), np.zeros((1, 6))])
def test_masks_of_ones_own_give_bands(value: Any) -> None:
    documents = Documents.dense(3)
    mask = Diagonal()
    object.__setattr__(mask, "bands", lambda *_: value)
    with pytest.raises(
        InvalidTypeError, match=r"Diagonal.bands must return an int64 array \[n, 6\]; got .*; one row per"
    ):
        visible_bands(mask, (documents, documents), None)


def test_which_masks_are_for_a_number_of_documents() -> None:
    assert [
        mask.num_documents for mask in (Causal(), PrefixLM(3), SharedQuestion((2, 1)), AcrossDocuments(Full()))
    ] == [None] * 4
    for mask in (PrefixLM((3, 4)), SharedQuestion(((2, 1), ())), PerDocument((Full(), Causal()))):
        assert mask.num_documents == 2
        rows = documents_of([[True] * 5] * 3)
        with pytest.raises(InvalidValueError, match=r"got 2 for 3 documents; .* rows of a dense batch are documents"):
            visible_bands(mask, (Documents.dense(5),) * 2, (rows, rows))
        with pytest.raises(InvalidValueError, match=r"got 2 for 1 documents"):
            visible_bands(AcrossDocuments(mask), (Documents.dense(5),) * 2, (rows, rows))


def test_a_mask_that_does_not_fit_names_the_documents_of_the_batch() -> None:
    documents = Documents.from_cu_seqlens([0, 6, 8, 12, 13])
    masks = (SharedQuestion((2, 3)), Causal(), SharedQuestion((2, 3)), SharedQuestion((2, 3)))
    with pytest.raises(InvalidValueError, match=r"longer than document 1; .* of documents 0, 2, 3 of a PerDocument"):
        PerDocument(masks).bands(documents, documents)
    with pytest.raises(InvalidValueError, match=r"got 2 for 4 documents; .*PerDocument\(\(m,\) \* n\) repeats one"):
        PerDocument(masks[:2]).bands(documents, documents)


@pytest.mark.parametrize("name", NONE)
def test_masks_that_are_none(name: str) -> None:
    make, kind, message = NONE[name]
    with pytest.raises(kind, match=message):
        make()


MISFITS: dict[str, tuple[Mask, str]] = {
    "prefixes": (PrefixLM((1, 2, 3)), "PrefixLM needs one prefix per document; got 3 for 2 documents"),
    "segments": (SharedQuestion(((1,),)), "SharedQuestion needs the segments of each document; got 1 for 2 documents"),
    "long segments": (SharedQuestion(((1, 2), (2, 4))), "longer than document 1; got 6 for 5 tokens"),
    "long segments for all": (SharedQuestion((2, 2)), "longer than document 0; got 4 for 3 tokens"),
    "tree": (PrefixTree((-1, 0), (2, 1)), "do not sum to the length of document 1; got 3 for 5 tokens; .* PerDocument"),
    "short tree": (PrefixTree((-1, 0), (1, 1)), "do not sum to the length of document 0; got 2 for 3 tokens"),
    "masks": (PerDocument((Causal(),)), "PerDocument needs one mask per document; got 1 for 2 documents"),
    "prefixes of all in each": (
        PerDocument((PrefixLM((1, 2)), Causal())),
        "PrefixLM needs one prefix per document; got 2 for 1 documents",
    ),
    "prefixes of all in one": (AcrossDocuments(PrefixLM((1, 2))), "got 2 for 1 documents"),
    "queries": (Bands([(0, 9, 0, 8, 0, 0)]), "past the end of the query stream; got token 9 of 8"),
    "keys": (Bands([(0, 8, 0, 9, 0, 0)]), "past the end of the key stream; got token 9 of 8"),
    "bands of all in each": (PerDocument((Bands([(0, 8, 0, 8, 0, 0)]), Causal())), "got token 8 of 3"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_masks_of_other_documents(name: str) -> None:
    mask, message = MISFITS[name]
    documents = Documents.from_cu_seqlens([0, 3, 8])
    with pytest.raises(InvalidValueError, match=message):
        mask.bands(documents, documents)


@pytest.mark.parametrize(
    "mask",
    [
        PrefixLM(2),
        PrefixLM((2, 1)),
        BlockCausal(2),
        Chunked(2),
        PrefixWindow(1, 1),
        SharedQuestion((1, 1)),
        PrefixTree((-1,), (3,)),
    ],
    ids=steady,
)
def test_masks_of_one_stream(mask: Mask) -> None:
    """Equal documents do not make two streams one."""
    queries, keys = Documents.from_cu_seqlens([0, 3, 8]), Documents.from_cu_seqlens([0, 3, 8])
    for held in (mask, AcrossDocuments(mask)) if mask != PrefixLM((2, 1)) else (mask,):
        with pytest.raises(UnsupportedError, match=r"has no meaning across two streams; use Full\(\), or Causal"):
            held.bands(queries, keys)
    with pytest.raises(UnsupportedError, match="Chunked has no meaning"):
        PerDocument((Full(), Chunked(2))).bands(queries, keys)


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(2), AcrossDocuments(Causal())], ids=repr)
def test_a_diagonal_between_unequal_documents_must_be_said(mask: Mask) -> None:
    queries = Documents.from_cu_seqlens([0, 3, 8])
    message = r'over documents of unequal length must say where its diagonal lies; pass \w+\(..., align="top_left"\)'
    with pytest.raises(InvalidValueError, match=message):
        mask.bands(queries, Documents.from_cu_seqlens([0, 3, 9]))
    mask.bands(queries, Documents.from_cu_seqlens([0, 3, 8]))


@pytest.mark.parametrize(
    "mask", [Causal("top_left"), Full(), SlidingWindow(1, 1, "bottom_right"), PerDocument((Full(),) * 2)]
)
def test_streams_of_other_numbers_of_documents(mask: Mask) -> None:
    queries, keys = Documents.from_cu_seqlens([0, 3, 8]), Documents.from_cu_seqlens([0, 4, 6, 9])
    with pytest.raises(InvalidValueError, match=r"both streams need as many; got 2 and 3 documents; give .* length 0"):
        mask.bands(queries, keys)
    whole = AcrossDocuments(Full())
    assert seen_by(whole, queries, keys).all(), "one document each"


CAUSAL: list[Mask] = [
    Causal(),
    SlidingWindow(2),
    PrefixLM(1),
    PrefixLM((1, 0)),
    PrefixLM(()),
    BlockCausal(1),
    Chunked(3),
    PrefixWindow(3, 2),
    SharedQuestion((3, 2, 2)),
    PrefixTree((-1, 0, 0), (3, 2, 2)),
    PerDocument((Causal(), Chunked(2))),
    AcrossDocuments(Causal()),
    Bands([(2, 4, 0, 2, -9, 9)]),
    Bands([(0, 4, 0, 4, -1, 0), (4, 4, 0, 9, -9, 9)]),
    Bands([(0, 4, 0, 2, 1, 1)][:0]),
]
NOT_CAUSAL: list[Mask] = [
    Full(),
    SlidingWindow(2, 1),
    PrefixLM(2),
    PrefixLM((0, 2)),
    BlockCausal(2),
    PerDocument((Causal(), Full())),
    AcrossDocuments(Full()),
    Bands([(0, 4, 0, 4, -1, 1)]),
]


def test_which_masks_are_causal() -> None:
    """A mask that is not says so, and shows a later key where documents have room for it."""
    documents = Documents.from_cu_seqlens([0, 9, 20])
    assert all(mask.is_causal for mask in CAUSAL)
    for mask in NOT_CAUSAL:
        assert not mask.is_causal, mask
        assert np.triu(visible_pairs(mask, documents).numpy(), 1).any(), mask


class Unknown(Mask):
    def bands(self, queries: Documents, keys: Documents) -> Counts:
        return Full().bands(queries, keys)


def test_the_reference_knows_its_limits() -> None:
    documents = Documents.from_cu_seqlens([0, 3])
    assert not Unknown().is_causal
    with pytest.raises(TypeError, match="no dense definition of Unknown"):
        visible_pairs(Unknown(), documents)
    with pytest.raises(ValueError, match="3 queries, 4 keys and no align"):
        visible_pairs(Causal(), documents, key_documents=Documents.from_cu_seqlens([0, 4]))


def test_the_reference_takes_other_tokens_for_real() -> None:
    documents, real = Documents.dense(3), torch.tensor([False, True, True])
    assert visible_pairs(Full(), documents, real).int().tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]
    across = visible_pairs(Causal("bottom_right"), documents, real, key_documents=Documents.dense(2))
    assert across.int().tolist() == [[0, 0], [1, 0], [1, 1]]
