"""Random masks with parameters that fit their documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from cphandler.testing.cases import Batch
from cphandler.testing.fuzz.chance import Chance
from cphandler.tokens.masks import (
    AcrossDocuments,
    Align,
    Bands,
    BlockCausal,
    Causal,
    Chunked,
    Full,
    Mask,
    PerDocument,
    PrefixLM,
    PrefixTree,
    PrefixWindow,
    SharedQuestion,
    SlidingWindow,
)


@dataclass(frozen=True)
class Lengths:
    """What a mask's parameters must fit.

    Attributes:
        queries: physical tokens of each query document.
        keys: of each key document; the same for self attention.
        is_cross: whether keys are a stream of their own.
        may_align: whether a diagonal needs no word on where it lies.
        rows: rows of a dense batch for which a mask may have one of something each; 0 for none.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    is_cross: bool
    may_align: bool = True
    rows: int = 0

    @classmethod
    def of(cls, batch: Batch, qkv_format: str) -> Lengths:
        """Those of a batch; a dense one is one document."""
        if qkv_format != "thd":
            length = len(batch.real[0]) if batch.real is not None and batch.keys is None else sum(batch.lengths)
            other = length if batch.keys is None else sum(batch.keys)
            fits = batch.keys is None or (other == length and batch.real is None)
            return cls((length,), (other,), batch.keys is not None, fits, len(batch.real or "x" * batch.rows))
        queries = batch.padded or batch.lengths
        if batch.keys is None:
            return cls(queries, queries, False)
        keys = batch.keys_padded or batch.keys
        return cls(queries, keys, True, queries == keys and batch.lengths == batch.keys)

    def of_known_rows(self, rows: int | None) -> Lengths:
        """The same for the calls of a handler that knows its rows, or that knows of none."""
        return replace(self, rows=rows or 0)

    @property
    def by_row(self) -> Lengths:
        """The rows of a dense batch, each a document."""
        return replace(self, queries=self.queries * self.rows, keys=self.keys * self.rows, rows=0)

    @property
    def as_one(self) -> Lengths:
        """All documents as one."""
        queries, keys = (sum(self.queries),), (sum(self.keys),)
        return Lengths(queries, keys, self.is_cross, not self.is_cross)

    def alone(self, number: int) -> Lengths:
        """One document."""
        return Lengths((self.queries[number],), (self.keys[number],), self.is_cross, self.may_align)


def random_mask(chance: Chance, lengths: Lengths, *, depth: int = 0) -> Mask:
    """A mask that fits the documents.

    Args:
        chance: random choices.
        lengths: of the documents.
        depth: masks that hold this one.
    """
    if lengths.rows > 1 and not depth and chance.happens(0.2):
        return chance.pick(_BY_ROW_CROSS if lengths.is_cross else _BY_ROW)(chance, lengths.by_row, 1)
    simple = _CROSS if lengths.is_cross else {**_CROSS, **_SELF}
    weights = dict(simple) if depth > 1 else {**simple, _per_document: 2, _across_documents: 1.5}
    return chance.pick(weights)(chance, lengths, depth)


def _causal(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    return Causal(_align(chance, lengths))


def _full(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    return Full()


def _window(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    left, right = chance.choice((0, 1, 3, 9, 10**12)), chance.choice((0, 0, 1, 4))
    return SlidingWindow(left, right, _align(chance, lengths))


def _align(chance: Chance, lengths: Lengths) -> Align | None:
    choices: list[Align | None] = ["top_left", "bottom_right"]
    return chance.choice([*choices, None] if lengths.may_align else choices)


def _prefix(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    if chance.happens(0.5):
        return PrefixLM(chance.randint(0, 8))
    return PrefixLM(tuple(chance.randint(0, length + 1) for length in lengths.queries))


def _blocks(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    return BlockCausal(chance.choice((1, 2, 3, 5, 40)))


def _chunks(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    return Chunked(chance.choice((1, 2, 3, 7, 40)), chance.choice(("start", "start", "first_valid")))


def _prefix_window(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    return PrefixWindow(chance.choice((0, 1, 2, 5)), chance.choice((0, 1, 3, 8)))


def _shared_question(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    if chance.happens(0.4):
        shortest = min((length for length in lengths.queries if length), default=0)
        return SharedQuestion(_segments(chance, shortest))
    return SharedQuestion(tuple(_segments(chance, length) for length in lengths.queries))


def _trees(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    """A tree for each document, or one for all where they are equally long."""
    if len(set(lengths.queries)) == 1:
        return _tree(chance, lengths.queries[0])
    return PerDocument(tuple(_tree(chance, length) for length in lengths.queries))


def _tree(chance: Chance, length: int) -> PrefixTree:
    nodes = chance.randint(1, 6)
    return PrefixTree(tuple(chance.randint(-1, node - 1) for node in range(nodes)), tuple(chance.cuts(length, nodes)))


def _segments(chance: Chance, length: int) -> tuple[int, ...]:
    """A question and some answers; what is left over is an answer more."""
    return tuple(chance.cuts(length, chance.randint(2, 5))[: chance.randint(1, 5)])


def _bands(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    """Disjoint rectangles, each with one or two bands."""
    rectangles = [(0, sum(lengths.queries), 0, sum(lengths.keys))]
    for _ in range(chance.randint(0, 4)):
        q0, q1, k0, k1 = rectangles.pop(chance.randrange(len(rectangles)))
        if chance.happens(0.5):
            cut = chance.randint(q0, q1)
            rectangles += [(q0, cut, k0, k1), (cut, q1, k0, k1)]
        else:
            cut = chance.randint(k0, k1)
            rectangles += [(q0, q1, k0, cut), (q0, q1, cut, k1)]
    rows: list[tuple[float, ...]] = []
    for q0, q1, k0, k1 in rectangles:
        if chance.happens(0.25):
            continue
        lo = chance.choice((-math.inf, float(chance.randint(-20, 5))))
        hi = chance.choice((math.inf, max(lo, -20.0) + chance.randint(0, 30)))
        if chance.happens(0.2) and math.isfinite(lo) and math.isfinite(hi):
            rows.append((q0, q1, k0, k1, hi + 1 + chance.randint(0, 3), math.inf))
        rows.append((q0, q1, k0, k1, lo, hi))
    return Bands(rows)


def _per_document(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    numbers = range(len(lengths.queries))
    return PerDocument(tuple(random_mask(chance, lengths.alone(i), depth=depth + 1) for i in numbers))


def _across_documents(chance: Chance, lengths: Lengths, depth: int) -> Mask:
    return AcrossDocuments(random_mask(chance, lengths.as_one, depth=2))


_Maker = Callable[[Chance, Lengths, int], Mask]

_CROSS: dict[_Maker, float] = {_causal: 4, _full: 2, _window: 3, _bands: 2}
"""What has a meaning across two streams, and how often."""

_SELF: dict[_Maker, float] = {
    _prefix: 1.5,
    _blocks: 1,
    _chunks: 1,
    _prefix_window: 1,
    _shared_question: 1.5,
    _trees: 1.5,
}

_BY_ROW_CROSS: dict[_Maker, float] = {_per_document: 1}
"""What may be another for each row of a dense batch, across two streams."""

_BY_ROW: dict[_Maker, float] = {_per_document: 4, _prefix: 1, _shared_question: 1, _trees: 1}
"""The same in self attention."""
