"""Trees and shared questions: how few bands they are, and the positions that they give."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    AcrossDocuments,
    Bands,
    Causal,
    Documents,
    InvalidValueError,
    Mask,
    PerDocument,
    PrefixTree,
    SharedQuestion,
)
from cphandler.tokens.intervals import UNBOUNDED
from cphandler.tokens.masks import implied_positions
from cphandler.tokens.trees import tree_bands, tree_positions
from tests.test_mask import Diagonal, documents_of, seen_by, times_seen, trees_of

FREE = (-UNBOUNDED, UNBOUNDED)
CAUSAL = (-UNBOUNDED, 0)


def bands_of(*tree: Any) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for row in tree_bands(*tree).tolist())


def test_few_bands() -> None:
    assert bands_of((), ()) == []
    assert bands_of((-1, 0, 1, 2), (3, 0, 2, 4)) == [(0, 9, 0, 9, *CAUSAL)], "a chain is one causal band"
    assert bands_of((-1, -1), (2, 3)) == [(0, 2, 0, 2, *CAUSAL), (2, 5, 2, 5, *CAUSAL)], "a forest"
    assert bands_of((-1, 0, 0, 0), (4, 2, 2, 2)) == [
        (0, 6, 0, 6, *CAUSAL),  # the first answer goes on where the question ends
        (6, 8, 6, 8, *CAUSAL),
        (6, 10, 0, 4, *FREE),  # all others see it by one band
        (8, 10, 8, 10, *CAUSAL),
    ]
    depth_first = ((-1, 0, 1, 1, 0, 4, 4), (10, 10, 5, 5, 10, 5, 5))
    assert bands_of(*depth_first) == [
        (0, 25, 0, 25, *CAUSAL),
        (25, 30, 0, 20, *FREE),
        (25, 30, 25, 30, *CAUSAL),
        (30, 45, 30, 45, *CAUSAL),
        (30, 50, 0, 10, *FREE),
        (45, 50, 30, 40, *FREE),
        (45, 50, 45, 50, *CAUSAL),
    ]
    many = tree_bands((-1, *[0] * 999), (7,) * 1000)
    assert len(many) == 1000, "a band for each answer but the first, the question's own, and one for all to see it"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 14).flatmap(trees_of))
def test_bands_and_positions_of_a_tree(tree: PrefixTree) -> None:
    """Each pair once, no band that a merge would save, and a token's position is how many it sees before itself."""
    total = sum(tree.lengths)
    bands = tree_bands(tree.parents, tree.lengths)
    seen = times_seen(bands, total, total)
    assert seen.max(initial=0) <= 1
    assert (seen.sum(axis=1) - 1).tolist() == tree_positions(tree.parents, tree.lengths).tolist()
    filled = sum(n > 0 for n in tree.lengths)
    assert len(bands) <= max(filled, filled * (filled + 1) // 2)
    rows = {tuple(row) for row in bands.tolist()}
    for a in rows:
        for b in rows:
            assert not (a[1] == b[0] and a[2:] == b[2:]), "two bands, one below the other, that are one"
            assert not (a[3] == b[2] and a[:2] == b[:2] and a[4:] == b[4:] == FREE), "side by side"


def test_positions_go_on_where_the_question_ended() -> None:
    documents = documents_of([[True] * 9, [], [True] * 4, [False] * 3, [True] * 3 + [False] * 3])
    each = SharedQuestion(((3, 2, 2), (), (0, 2), (1, 1), (2, 1)))
    expected = [*(0, 1, 2, 3, 4, 3, 4, 3, 4), *(0, 1, 0, 1), *(0, 1, 2), *(0, 1, 2, 2, 3, 4)]
    assert each.positions(documents).tolist() == expected
    assert SharedQuestion((2, 1)).positions(documents).tolist() == [
        *(0, 1, 2, 2, 3, 4, 5, 6, 7),
        *(0, 1, 2, 2),
        *(0, 1, 2),  # padding alone: as if there were no mask
        *(0, 1, 2, 2, 3, 4),
    ]
    with pytest.raises(InvalidValueError, match="longer than document 2; got 5 for 4 tokens"):
        SharedQuestion((5,)).positions(documents)
    with pytest.raises(InvalidValueError, match="segments of each document; got 1 for 5 documents"):
        SharedQuestion(((5,),)).positions(documents)


def test_positions_of_trees() -> None:
    tree = PrefixTree((-1, 0, 1, 1, 0), (1, 1, 2, 1, 1))
    documents = documents_of([[True] * 6, [True] * 6 + [False] * 2, [False] * 3, [False] + [True] * 5])
    assert tree.positions(documents).tolist() == [
        *(0, 1, 2, 3, 2, 1),
        *(0, 1, 2, 3, 2, 1, 6, 7),  # what is after the tree is padding
        *(0, 1, 2),
        *(0, 1, 2, 3, 2, 1),
    ]
    seen = seen_by(tree, documents, documents)
    alone = seen[:6, :6]
    assert (seen[6:12, 6:12] == alone).all()
    assert (seen[18:, 18:] == alone[1:, 1:]).all()
    assert seen.sum() == 2 * alone.sum() + alone[1:, 1:].sum(), "and nothing else"
    with pytest.raises(InvalidValueError, match="length of document 0; got 5 for 6 tokens"):
        PrefixTree((-1,), (5,)).positions(documents)


def test_positions_of_masks_that_hold_masks() -> None:
    documents = documents_of([[True] * 3, [True] * 4, [], [True] * 3])
    question, tree = SharedQuestion((1, 1)), PrefixTree((-1, 0, 0), (2, 1, 1))
    assert PerDocument((question, tree, Causal(), question)).positions(documents).tolist() == [
        *(0, 1, 1),
        *(0, 1, 2, 2),
        *(0, 1, 1),
    ]
    mixed = PerDocument((Causal(), tree, Causal(), AcrossDocuments(question))).positions(documents)
    assert mixed is not None
    assert mixed.tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1, 1]
    whole = AcrossDocuments(SharedQuestion((4, 3))).positions(documents)
    assert whole is not None
    assert whole.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    plain: list[Mask] = [Causal(), AcrossDocuments(Causal()), PerDocument((Causal(),) * 4), Bands([]), Diagonal()]
    plain += [PerDocument((Diagonal(),) * 4), PerDocument((Bands([]),) * 4)]
    for mask in plain:
        assert mask.positions(documents) is None, mask
    with pytest.raises(InvalidValueError, match="one mask per document; got 1 for 4"):
        PerDocument((question,)).positions(documents)
    with pytest.raises(
        InvalidValueError, match=r"sum to the length of document 1; .* of documents 1, 3 of a PerDocument"
    ):
        PerDocument((question, tree, Causal(), tree)).positions(documents)


def test_positions_of_rows() -> None:
    rows, dense = documents_of([[True] * 4, [False, True, True, True]]), Documents.dense(4)
    question, tree = SharedQuestion((2, 1)), PrefixTree((-1, 0, 0), (2, 1, 1))
    expected = {
        question: [[0, 1, 2, 2]] * 2,
        SharedQuestion(((2, 1), (1, 1))): [[0, 1, 2, 2], [0, 1, 1, 2]],
        PerDocument((tree,)): [[0, 1, 2, 2]] * 2,
        PerDocument((Causal(), tree)): [[0, 1, 2, 3], [0, 1, 2, 2]],
        AcrossDocuments(question): [[0, 1, 2, 2]] * 2,
    }
    for mask, wanted in expected.items():
        positions = implied_positions(mask, dense, rows)
        assert positions is not None
        assert positions.tolist() == wanted
    alone = implied_positions(question, dense, None)
    assert alone is not None
    assert alone.tolist() == [0, 1, 2, 2]
    assert implied_positions(Causal(), dense, rows) is None


class Backwards(Mask):
    """A caller's own that gives positions, to documents of more than three tokens."""

    def bands(self, queries: Documents, keys: Documents) -> Any:
        return Causal().bands(queries, keys)

    def positions(self, documents: Documents) -> Any:
        return None if documents.num_tokens <= 3 else np.arange(documents.num_tokens)[::-1]


def test_positions_of_masks_of_ones_own() -> None:
    documents = documents_of([[True] * 4, [True] * 2, [], [True] * 5])
    positions = PerDocument((Backwards(),) * 4).positions(documents)
    assert positions is not None
    assert positions.tolist() == [3, 2, 1, 0, 0, 1, 4, 3, 2, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_any_positions(data: st.DataObject, lengths: list[int]) -> None:
    """Against a walk from node to node."""
    masks: list[PrefixTree] = [data.draw(trees_of(n)) for n in lengths]
    documents = Documents.from_cu_seqlens([0, *np.cumsum(lengths).tolist()])
    expected = []
    for mask in masks:
        for node, length in enumerate(mask.lengths):
            before, parent = 0, mask.parents[node]
            while parent >= 0:
                before, parent = before + mask.lengths[parent], mask.parents[parent]
            expected += range(before, before + length)
    positions = PerDocument(tuple(masks)).positions(documents)
    assert positions is not None
    assert positions.tolist() == expected
    for start, stop in pairwise(documents.offsets.tolist()):
        assert positions[start:stop].max(initial=-1) < max(1, stop - start), "no rope table need be longer"
