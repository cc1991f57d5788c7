"""Every mask against its docstring, spelled out token by token in this file: no bands, and not the library's reference.

A stream is a list of documents, a document a list of truth values: which of its tokens are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cphandler import (
    AcrossDocuments,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    Documents,
    Full,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
)
from cphandler.testing import visible_pairs
from cphandler.tokens.masks import MASKS, visible_bands
from tests.test_mask import Counts, cross_masks_for, documents_of, masks_for, plain_masks, seen_by, times_seen

Tokens: TypeAlias = list[bool]


def last_real(tokens: Tokens) -> int:
    return max((i for i, real in enumerate(tokens) if real), default=0)


def beside(mask: Causal | SlidingWindow, queries: Tokens, keys: Tokens, q: int) -> int:
    """The key on the diagonal of query q."""
    return q + (last_real(keys) - last_real(queries) if mask.align == "bottom_right" else 0)


def segment_of(token: int, segments: Sequence[int]) -> int:
    """Number of the segment that holds a token; one past the last for what comes after all."""
    for number, length in enumerate(segments):
        if token < length:
            return number
        token -= length
    return len(segments)


def sees_in_document(mask: Mask, number: int, queries: Tokens, keys: Tokens, q: int, k: int) -> bool:  # noqa: C901, PLR0911
    """Whether token q of a document's queries sees token k of its keys; both are real."""
    match mask:
        case Causal():
            return k <= beside(mask, queries, keys, q)
        case Full():
            return True
        case SlidingWindow(left, right):
            return beside(mask, queries, keys, q) - left <= k <= beside(mask, queries, keys, q) + right
        case PrefixLM(prefix):
            first = prefix[number] if isinstance(prefix, tuple) else prefix
            return k <= q or (q < first and k < first)
        case BlockCausal(block):
            return k // block <= q // block
        case Chunked(chunk, origin):
            first = queries.index(True) if origin == "first_valid" else 0
            return k <= q and (k - first) // chunk == (q - first) // chunk
        case PrefixWindow(prefix, left):
            return k <= q and (k < prefix or q - k <= left)
        case SharedQuestion(segments):
            own = segments[number] if segments and isinstance(segments[0], tuple) else segments
            own_question = segment_of(k, own) == 0 and len(own) > 0  # type: ignore[arg-type]
            return k <= q and (own_question or segment_of(k, own) == segment_of(q, own))  # type: ignore[arg-type]
        case PrefixTree(parents, lengths):
            node, way = segment_of(q, lengths), set()
            while node >= 0:
                way.add(node)
                node = parents[node]
            return k <= q and segment_of(k, lengths) in way
        case PerDocument(masks):
            return sees([queries], [keys], masks[number])[q][k]
        case _:
            raise AssertionError(f"this file does not say what {mask} means")


def sees(queries: list[Tokens], keys: list[Tokens], mask: Mask) -> list[list[bool]]:
    """Whether each query of a stream sees each key of one."""
    if isinstance(mask, AcrossDocuments):
        return sees([[*chain(*queries)]], [[*chain(*keys)]], mask.mask)
    of_query, of_key = (
        [(i, t, real) for i, tokens in enumerate(stream) for t, real in enumerate(tokens)] for stream in (queries, keys)
    )
    if isinstance(mask, Bands):
        return [
            [
                real_q
                and real_k
                and any(q0 <= q < q1 and k0 <= k < k1 and lo <= k - q <= hi for q0, q1, k0, k1, lo, hi in mask.rows)
                for k, (_, _, real_k) in enumerate(of_key)
            ]
            for q, (_, _, real_q) in enumerate(of_query)
        ]
    return [
        [
            real_q and real_k and i == j and sees_in_document(mask, i, queries[i], keys[j], q, k)
            for j, k, real_k in of_key
        ]
        for i, q, real_q in of_query
    ]


def as_counts(rows: list[list[bool]], shape: tuple[int, int]) -> Counts:
    return np.array(rows, dtype=np.int64).reshape(shape)


a_document: st.SearchStrategy[Tokens] = st.one_of(
    st.sampled_from([[], [True], [False]]),
    st.tuples(*[st.integers(0, 3)] * 3).map(lambda n: [False] * n[0] + [True] * n[1] + [False] * n[2]),
    st.integers(2, 12).map(lambda n: [True] * n),
    st.lists(st.booleans(), max_size=9),
)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.lists(a_document, min_size=1, max_size=4))
def test_masks_are_what_their_docstrings_say(data: st.DataObject, stream: list[Tokens]) -> None:
    documents = documents_of(stream)
    mask = data.draw(masks_for(documents))
    expected = as_counts(sees(stream, stream, mask), (documents.num_tokens, documents.num_tokens))
    assert (seen_by(mask, documents, documents) == expected).all()
    assert (visible_pairs(mask, documents).numpy() == expected).all()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.tuples(a_document, a_document), min_size=1, max_size=3))
def test_masks_across_two_streams_are_what_their_docstrings_say(
    data: st.DataObject, streams: list[tuple[Tokens, Tokens]]
) -> None:
    queries, keys = [q for q, _ in streams], [k for _, k in streams]
    mask = data.draw(cross_masks_for(documents_of(queries), documents_of(keys)))
    shape = documents_of(queries).num_tokens, documents_of(keys).num_tokens
    expected = as_counts(sees(queries, keys, mask), shape)
    assert (seen_by(mask, documents_of(queries), documents_of(keys)) == expected).all()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 7), st.integers(0, 4))
def test_rows_of_a_dense_batch_see_as_documents_do(data: st.DataObject, length: int, rows: int) -> None:
    """With a mask for all of them, with a PerDocument of one, and with one of something for each."""
    stream = data.draw(
        st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)
    )
    documents = documents_of(stream) if rows else Documents.from_cu_seqlens([0])
    dense = Documents.dense(length)
    own = [data.draw(plain_masks([length])) for _ in range(rows)]
    prefixes = tuple(data.draw(st.integers(0, 9)) for _ in range(rows))
    every: list[Mask] = [
        PerDocument(tuple(own)),
        AcrossDocuments(Causal()),
        PrefixLM(prefixes),
        Chunked(2, "first_valid"),
    ]
    every += [PerDocument((mask,)) for mask in own[:1]] + [AcrossDocuments(mask) for mask in own[:1]]
    for mask in every:
        one_each = mask.num_documents not in (None, 1)
        seen = times_seen(visible_bands(mask, (dense, dense), (documents, documents)), rows * length, rows * length)
        expected = np.zeros_like(seen)
        for i, tokens in enumerate(stream):
            block = slice(i * length, (i + 1) * length)
            of_row = PrefixLM(prefixes[i]) if isinstance(mask, PrefixLM) else own[i]
            alone = sees([tokens], [tokens], of_row if one_each else mask)
            expected[block, block] = as_counts(alone, (length, length))
        assert (seen == expected).all(), mask


@pytest.mark.parametrize(
    "kind", [kind for kind in MASKS if kind not in (AcrossDocuments, Bands)], ids=lambda k: k.__name__
)
def test_the_definitions_tell_masks_apart(kind: type[Mask]) -> None:
    """A definition that allowed all, or nothing, would be no definition."""
    own: dict[type[Mask], Mask] = {
        Causal: Causal(),
        Full: Full(),
        SlidingWindow: SlidingWindow(2, 1),
        PrefixLM: PrefixLM((3,)),
        BlockCausal: BlockCausal(3),
        Chunked: Chunked(4),
        PrefixWindow: PrefixWindow(2, 1),
        SharedQuestion: SharedQuestion((2, 3)),
        PrefixTree: PrefixTree((-1, 0, 1, 1, 0), (2, 1, 2, 2, 2)),
        PerDocument: PerDocument((SlidingWindow(1, 3),)),
    }
    pictures = {other: sees([[True] * 9], [[True] * 9], mask) for other, mask in own.items()}
    assert [other for other in pictures if pictures[other] == pictures[kind]] == [kind]
    documents = Documents.dense(9)
    assert (seen_by(own[kind], documents, documents) == as_counts(pictures[kind], (9, 9))).all()
