"""Masks: who may see whom, as bands in global coordinates. No layout, no padding, no ranks.

A band ``(q0, q1, k0, k1, lo, hi)`` lets query rows ``[q0, q1)`` see key rows ``[k0, k1)`` where
``lo <= k - q <= hi``. A mask is a set of disjoint bands. Padding is not the mask's business: bands speak of physical
rows, and :func:`restrict` cuts them to the valid ones.

Who sees whom in one document of 6 tokens, rows are queries::

    Causal()      SlidingWindow(1)   PrefixLM(3)   BlockCausal(2)
    x . . . . .   x . . . . .        x x x . . .   x x . . . .
    x x . . . .   x x . . . .        x x x . . .   x x . . . .
    x x x . . .   . x x . . .        x x x . . .   x x x x . .
    x x x x . .   . . x x . .        x x x x . .   x x x x . .
    x x x x x .   . . . x x .        x x x x x .   x x x x x x
    x x x x x x   . . . . x x        x x x x x x   x x x x x x

    Full()        Chunked(3)         PrefixWindow(1, 1)   SharedQuestion((2, 2, 2))
    x x x x x x   x . . . . .        x . . . . .          x . . . . .
    x x x x x x   x x . . . .        x x . . . .          x x . . . .
    x x x x x x   x x x . . .        x x x . . .          x x x . . .
    x x x x x x   . . . x . .        x . x x . .          x x x x . .
    x x x x x x   . . . x x .        x . . x x .          x x . . x .
    x x x x x x   . . . x x x        x . . . x x          x x . . x x

    SlidingWindow(1, 1)   PrefixTree((-1, 0, 1, 1, 0), (1, 1, 2, 1, 1))
    x x . . . .           x . . . . .
    x x x . . .           x x . . . .
    . x x x . .           x x x . . .
    . . x x x .           x x x x . .
    . . . x x x           x x . . x .
    . . . . x x           x . . . . x
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from reprlib import repr as short_repr
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.tokens.bands import HI, K0, K1, LO, Q0, Q1, restrict, shifted, tightened
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import MOST_TOKENS, UNBOUNDED, Flags, Table, expand, table
from cphandler.tokens.trees import tree_bands, tree_positions

Align: TypeAlias = Literal["top_left", "bottom_right"]
"""Where the diagonal lies when a document has more keys than queries, or fewer: through its first query and its first
key, or through its last real ones. Kernels disagree, so that it has to be said."""

Tree: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"
"""Parents and lengths of the nodes of a document; see :class:`PrefixTree`."""

Origin: TypeAlias = Literal["start", "first_valid"]
"""Where a document is counted from: its first token, padding included, or its first real one."""


class Mask(ABC):
    """A value that says which keys a query may see; hashable, the same on every rank."""

    @abstractmethod
    def bands(self, queries: Documents, keys: Documents) -> Table:
        """``[n, 6]`` disjoint bands; document i of the queries sees document i of the keys.

        Args:
            queries: documents of the query stream.
            keys: documents of the key stream; the same object for self attention.

        Raises:
            InvalidValueError: parameters that do not fit the documents.
            UnsupportedError: two different streams, for a mask that has no meaning there.
        """

    @property
    def num_documents(self) -> int | None:
        """How many documents this mask has numbers for, one after the other; None for a mask of any documents.

        Of a dense batch they are its rows.
        """
        return None

    def positions(self, documents: Documents) -> Table | None:
        """``[T]`` position of each token that the mask implies, for rope; None where they follow from the documents.

        The answers of a shared question go on where the question ended, each of them, and so do the branches of a tree.

        Args:
            documents: documents of the stream; the rows of a padded dense batch laid end to end.

        Raises:
            InvalidValueError: parameters that do not fit the documents.
        """
        del documents
        return None

    def alone(self) -> Mask:
        """The mask that says of each document of a stream what this one says of a stream of that document alone.

        ``PrefixLM((3,))`` gives ``PrefixLM(3)``, a mask that treats all documents alike gives itself. A class of one's
        own need not say: its masks are asked about one document after the other.

        Raises:
            InvalidValueError: a mask for several documents.
        """
        return _Alone(self)

    @property
    def is_causal(self) -> bool:
        """True where no query sees a later key of its own stream."""
        return False


class _Alike(Mask):
    """A mask that treats all documents alike, each by itself."""

    def alone(self) -> Mask:
        """Itself."""
        return self


class _Remembering(Mask):
    """A mask of many numbers. What follows from them is kept, the hash above all, which every layer asks for.

    None of it is pickled: the hashes of strings differ from process to process.
    """

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(cast(Any, self))))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}


def _pairs(queries: Documents, keys: Documents) -> tuple[Table, Table]:
    """``[n, 4]`` rows ``(q0, q1, k0, k1)`` of the documents that have both, and which documents they are.

    Raises:
        InvalidValueError: streams of different numbers of documents.
    """
    if queries.num_documents != keys.num_documents:
        raise InvalidValueError(
            "document i of the queries sees document i of the keys, so that both streams need as many",
            got=f"{queries.num_documents} and {keys.num_documents} documents",
            fix="give a document without keys, or without queries, length 0 in the other stream",
        )
    q, k = queries.offsets, keys.offsets
    every = np.stack([q[:-1], q[1:], k[:-1], k[1:]], axis=1)
    kept = np.flatnonzero((every[:, 0] < every[:, 1]) & (every[:, 2] < every[:, 3]))
    return every[kept], kept


def _bounded(pairs: Table, lo: Table | int, hi: Table | int) -> Table:
    """Bands over whole pairs of documents; bounds that no distance reaches become the sentinel."""
    columns = [np.broadcast_to(np.clip(bound, -UNBOUNDED, UNBOUNDED), len(pairs)) for bound in (lo, hi)]
    return np.concatenate([pairs, np.stack(columns, axis=1)], axis=1)


def _as_long(queries: Documents, keys: Documents) -> bool:
    """Whether documents are equally long on both sides, with padding and without."""
    real_queries, real_keys = (documents.valid_ends - documents.offsets[:-1] for documents in (queries, keys))
    return np.array_equal(queries.lengths, keys.lengths) and np.array_equal(real_queries, real_keys)


def _diagonals(name: str, queries: Documents, keys: Documents, align: Align | None) -> tuple[Table, Table]:
    """Pairs of documents, and ``k - q`` on the diagonal of each.

    Raises:
        InvalidValueError: documents of unequal length and no ``align``.
    """
    pairs, documents = _pairs(queries, keys)
    if align is None and queries is not keys and not _as_long(queries, keys):
        raise InvalidValueError(
            f"{name} over documents of unequal length must say where its diagonal lies",
            fix=f'pass {name}(..., align="top_left") for first query beside first key, "bottom_right" for last by last',
        )
    if align == "bottom_right":
        return pairs, keys.valid_ends[documents] - queries.valid_ends[documents]
    return pairs, pairs[:, 2] - pairs[:, 0]


def _own_documents(mask: Mask, queries: Documents, keys: Documents) -> tuple[Table, Table]:
    """``[n, 2]`` starts and stops of the documents of self attention that have tokens, and which documents they are.

    Raises:
        UnsupportedError: two different streams.
    """
    if queries is not keys:
        raise UnsupportedError(
            f"{type(mask).__name__} has no meaning across two streams",
            fix="use Full(), or Causal and SlidingWindow with align=",
        )
    pairs, documents = _pairs(queries, keys)
    return pairs[:, :2], documents


def _capped(count: int) -> int:
    """A count of tokens, or the sentinel for one past all of them (``sys.maxsize``), which int64 sums would wrap."""
    return min(count, UNBOUNDED)


def _check_count(name: str, value: object, least: int, fix: str | None = None) -> None:
    """A plain int, since masks are compared and printed: what numpy and torch have for one is not taken."""
    fix = f"pass a Python int, {least} or more" if fix is None else fix
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidTypeError(f"{name} must be an int", got=short_repr(value), fix=fix)
    if value < least:
        raise InvalidValueError(f"{name} must be at least {least}", got=value, fix=fix)


def _check_tuple(name: str, value: object) -> None:
    """A list would do as well, but for its hash: masks are keys of dicts."""
    if not isinstance(value, tuple):
        raise InvalidTypeError(
            f"{name} must be a tuple", got=short_repr(value), fix="pass a tuple, which can be hashed, of Python ints"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise InvalidValueError(f"unknown {name}", got=short_repr(value), fix=f"choose {' or '.join(choices)}")


def _check_align(align: object) -> None:
    if align is not None:
        _check_choice("align", align, ("top_left", "bottom_right"))


def _check_mask(name: str, value: object) -> None:
    if not isinstance(value, Mask):
        raise InvalidTypeError(
            f"{name} must be a Mask", got=short_repr(value), fix="pass Causal() rather than its name or its class"
        )


_ONE_EACH = (
    "give one per document; PerDocument((m,) * n) repeats one; rows of a dense batch are documents where its handler "
    "has such a mask of one per row, or a key_padding_mask"
)


def _check_number(what: str, given: int, documents: Documents) -> None:
    """One of something for each document."""
    if given != documents.num_documents:
        raise InvalidValueError(what, got=f"{given} for {documents.num_documents} documents", fix=_ONE_EACH)


@dataclass(frozen=True)
class Causal(_Alike):
    """Each token sees itself and the tokens before it in its document.

    Attributes:
        align: for two streams whose documents differ in length; see :data:`Align`. None is ``"top_left"`` where all
            are equally long, padding included, and refused elsewhere.

    Raises:
        InvalidValueError: an unknown ``align``.
    """

    align: Align | None = None

    def __post_init__(self) -> None:
        _check_align(self.align)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """One band per document."""
        pairs, diagonal = _diagonals("Causal", queries, keys, self.align)
        return _bounded(pairs, -UNBOUNDED, diagonal)

    @property
    def is_causal(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class Full(_Alike):
    """Each token sees its whole document."""

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """One unbounded band per document."""
        return _bounded(_pairs(queries, keys)[0], -UNBOUNDED, UNBOUNDED)


@dataclass(frozen=True)
class SlidingWindow(_Alike):
    """Each token sees ``left`` tokens before and ``right`` tokens after itself, inside its document.

    Both bounds are inclusive and count physical positions, itself not counted: ``SlidingWindow(1)`` sees itself and
    the token before.

    Attributes:
        left: tokens before.
        right: tokens after.
        align: for two streams whose documents differ in length, as in :class:`Causal`.

    Raises:
        InvalidTypeError: a bound that is not an int.
        InvalidValueError: a negative bound, or an unknown ``align``.
    """

    left: int
    right: int = 0
    align: Align | None = None

    def __post_init__(self) -> None:
        _check_count("SlidingWindow left", self.left, 0)
        _check_count("SlidingWindow right", self.right, 0)
        _check_align(self.align)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """One band per document, ``-left <= k - q <= right`` about the diagonal."""
        pairs, diagonal = _diagonals("SlidingWindow", queries, keys, self.align)
        return _bounded(pairs, diagonal - _capped(self.left), diagonal + _capped(self.right))

    @property
    def is_causal(self) -> bool:
        """True where ``right`` is 0."""
        return self.right == 0


@dataclass(frozen=True)
class PrefixLM(_Remembering):
    """The first tokens of each document see each other both ways, the others are causal (arXiv 1910.10683, 3.2.2).

    Attributes:
        prefix: tokens of the prefix, one number for all documents or one for each; a shorter document is all prefix.

    Raises:
        InvalidTypeError: not ints.
        InvalidValueError: negative.
    """

    prefix: int | tuple[int, ...]

    __hash__ = _Remembering.__hash__

    def __post_init__(self) -> None:
        for value in self._prefixes:
            _check_count("PrefixLM prefix", value, 0, "pass a Python int, 0 or more, or a tuple of one per document")

    @property
    def _prefixes(self) -> tuple[int, ...]:
        return self.prefix if isinstance(self.prefix, tuple) else (self.prefix,)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """Two bands per document: the prefix, and the causal rest."""
        documents, which = _own_documents(self, queries, keys)
        prefix = np.array([_capped(value) for value in self._prefixes], dtype=np.int64)
        if isinstance(self.prefix, tuple):
            _check_number("PrefixLM needs one prefix per document", len(prefix), queries)
            prefix = prefix[which]
        starts, stops = documents[:, 0], documents[:, 1]
        cut = np.minimum(starts + prefix, stops)
        inside = _bounded(np.stack([starts, cut, starts, cut], axis=1), -UNBOUNDED, UNBOUNDED)
        after = _bounded(np.stack([cut, stops, starts, stops], axis=1), -UNBOUNDED, 0)
        bands = np.concatenate([inside, after])
        return bands[bands[:, Q0] < bands[:, Q1]]

    @property
    def num_documents(self) -> int | None:
        """The number of prefixes, unless one serves all."""
        return len(self.prefix) if isinstance(self.prefix, tuple) else None

    def alone(self) -> Mask:
        """The one prefix for all."""
        if not isinstance(self.prefix, tuple):
            return self
        _check_number("PrefixLM needs one prefix per document", len(self.prefix), _ONE_DOCUMENT)
        return PrefixLM(self.prefix[0])

    @property
    def is_causal(self) -> bool:
        """True where no prefix holds two tokens."""
        return max(self._prefixes, default=0) <= 1


@dataclass(frozen=True)
class BlockCausal(_Alike):
    """Documents are cut into blocks; a token sees its whole block and all blocks before it (block diffusion).

    Attributes:
        block: tokens of a block, counted from each document's start.

    Raises:
        InvalidTypeError: not an int.
        InvalidValueError: below 1.
    """

    block: int

    def __post_init__(self) -> None:
        _check_count("BlockCausal block", self.block, 1)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """One unbounded band per block, over the keys from the document's start to the block's end."""
        starts, blocks = _cut(_own_documents(self, queries, keys)[0], self.block)
        return _bounded(np.stack([blocks[:, 0], blocks[:, 1], starts, blocks[:, 1]], axis=1), -UNBOUNDED, UNBOUNDED)

    @property
    def is_causal(self) -> bool:
        """True where blocks are single tokens."""
        return self.block == 1


@dataclass(frozen=True)
class Chunked(_Alike):
    """Documents are cut into chunks; a token sees itself and the tokens before it in its chunk (Llama 4).

    Attributes:
        chunk: tokens of a chunk.
        origin: where the first chunk begins. ``"start"``: at the document's first token. ``"first_valid"``: at its
            first real token, which differs under left padding, row by row of a batch; Hugging Face counts so.

    Raises:
        InvalidTypeError: not an int.
        InvalidValueError: below 1, or an unknown ``origin``.
    """

    chunk: int
    origin: Origin = "start"

    def __post_init__(self) -> None:
        _check_count("Chunked chunk", self.chunk, 1)
        _check_choice("origin", self.origin, ("start", "first_valid"))

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """One causal band per chunk."""
        documents, which = _own_documents(self, queries, keys)
        if self.origin == "first_valid":  # what is before sees nothing and is not seen
            documents = np.stack([queries.valid_starts[which], documents[:, 1]], axis=1)
        _, chunks = _cut(documents, self.chunk)
        return _bounded(np.concatenate([chunks, chunks], axis=1), -UNBOUNDED, 0)

    @property
    def is_causal(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class PrefixWindow(_Alike):
    """Each token sees itself, ``left`` tokens before it, and the first tokens of its document (arXiv 2309.17453).

    Attributes:
        prefix: tokens of a document that all its later tokens see.
        left: tokens before.

    Raises:
        InvalidTypeError: not ints.
        InvalidValueError: negative.
    """

    prefix: int
    left: int

    def __post_init__(self) -> None:
        _check_count("PrefixWindow prefix", self.prefix, 0)
        _check_count("PrefixWindow left", self.left, 0)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """Two bands per document: the window, and the prefix where the window has left it."""
        documents, _ = _own_documents(self, queries, keys)
        left = _capped(self.left)
        window = _bounded(np.concatenate([documents, documents], axis=1), -left, 0)
        stops = np.minimum(documents[:, 0] + _capped(self.prefix), documents[:, 1])
        prefix = np.stack([documents[:, 0], documents[:, 1], documents[:, 0], stops], axis=1)
        return tightened(np.concatenate([window, _bounded(prefix, -UNBOUNDED, -left - 1)]))

    @property
    def is_causal(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class SharedQuestion(_Remembering):
    """A document is one question and several answers; each answer sees the question and itself, no other answer.

    Attributes:
        segments: the tokens of the question and of each answer: one tuple ``(question, answer, ...)`` for all
            documents, or a tuple of such tuples, one for each. Tokens after the last answer are one answer more.

    Raises:
        InvalidTypeError: not tuples of ints.
        InvalidValueError: negative.
    """

    segments: tuple[int, ...] | tuple[tuple[int, ...], ...]

    __hash__ = _Remembering.__hash__

    def __post_init__(self) -> None:
        _check_tuple("SharedQuestion segments", self.segments)
        for segments in self._rows:
            _check_tuple("SharedQuestion segments of a document", segments)
            for value in segments:
                _check_count("SharedQuestion segments", value, 0)

    @property
    def _is_shared(self) -> bool:
        """Whether one tuple serves all documents."""
        return not any(isinstance(value, tuple) for value in self.segments)

    @property
    def _rows(self) -> tuple[tuple[int, ...], ...]:
        return cast(tuple[tuple[int, ...], ...], (self.segments,) if self._is_shared else self.segments)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """One causal band per segment, and one unbounded band from each answer to its question.

        Raises:
            InvalidValueError: segments of other documents than these, or longer than one that has tokens.
            UnsupportedError: two different streams.
        """
        documents, which = _own_documents(self, queries, keys)
        trees = self._trees(documents, which, queries)
        return _laid_out([tree_bands(*tree) for tree in trees[0]], trees[1], documents[:, 0])

    def positions(self, documents: Documents) -> Table:
        """Those of an answer follow the question's, whichever answer it is.

        Raises:
            InvalidValueError: segments of other documents than these, or longer than one that has tokens.
        """
        own, which = _own_documents(self, documents, documents)
        trees = self._trees(own, which, documents)
        return _spread([tree_positions(*tree) for tree in trees[0]], trees[1], which, documents)

    def _trees(self, own: Table, which: Table, documents: Documents) -> tuple[list[Tree], list[int]]:
        """The distinct trees of documents that have tokens, and which of them each has."""
        if not self._is_shared:
            _check_number("SharedQuestion needs the segments of each document", len(self._rows), documents)
        real = _have_real_tokens(documents)
        known: dict[tuple[tuple[int, ...], int], int] = {}
        kinds = []
        for i, length in zip(which.tolist(), (own[:, 1] - own[:, 0]).tolist(), strict=True):
            segments = self._rows[0 if self._is_shared else i] if real[i] else ()
            if sum(segments) > length:
                raise InvalidValueError(
                    f"SharedQuestion segments are longer than document {i}",
                    got=f"{sum(segments)} for {length} tokens",
                    fix="give each document its own: SharedQuestion(((question, answer, ...), ...))",
                )
            kinds.append(known.setdefault((segments, length), len(known)))
        return [_question_and_answers(*key) for key in known], kinds

    @property
    def num_documents(self) -> int | None:
        """The number of tuples, unless one serves all."""
        return None if self._is_shared else len(self.segments)

    def alone(self) -> Mask:
        """The one document's segments for all."""
        if self._is_shared:
            return self
        _check_number("SharedQuestion needs the segments of each document", len(self._rows), _ONE_DOCUMENT)
        return SharedQuestion(self._rows[0])

    @property
    def is_causal(self) -> bool:
        """Always true."""
        return True


def _question_and_answers(segments: tuple[int, ...], length: int) -> Tree:
    """The question as the root of its answers; what is left of the document is one more."""
    lengths = (*segments, length - sum(segments))
    return (-1, *[0] * (len(lengths) - 1)), lengths


@dataclass(frozen=True)
class PrefixTree(_Remembering):
    """A document is a tree of nodes; a token sees what is before it in its node, and all nodes on the way to its root.

    Prompts with continuations that share beginnings, such as the rollouts of one prompt, each beginning held once.
    Positions go on along the branch: those of a node begin where its parent's end.

    All documents of the batch have this tree; ``PerDocument((PrefixTree(...), ...))`` gives each its own. A document
    that is all padding needs none.

    Attributes:
        parents: for each node the number of its parent, an earlier node, or -1 for a root; there may be several.
        lengths: tokens of each node, in the order in which the document holds them. They sum to the document's length,
            or to its length without the padding at its end.

    Raises:
        InvalidTypeError: not tuples of ints.
        InvalidValueError: not one parent and one length per node, a negative length, or a node before its parent.
    """

    parents: tuple[int, ...]
    lengths: tuple[int, ...]

    __hash__ = _Remembering.__hash__

    def __post_init__(self) -> None:
        _check_tuple("PrefixTree parents", self.parents)
        _check_tuple("PrefixTree lengths", self.lengths)
        if len(self.parents) != len(self.lengths):
            raise InvalidValueError(
                "PrefixTree needs a parent and a length for each node",
                got=f"{len(self.parents)} parents and {len(self.lengths)} lengths",
                fix="pass as many of each; a root's parent is -1",
            )
        for length in self.lengths:
            _check_count("PrefixTree lengths", length, 0)
        for node, parent in enumerate(self.parents):
            _check_count("PrefixTree parents", parent, -1, "pass the number of an earlier node, or -1 for a root")
            if parent >= node:
                raise InvalidValueError(
                    "a node of a PrefixTree comes after its parent",
                    got=f"parent {parent} of node {node}",
                    fix="list nodes from the roots on, in the order of their tokens",
                )

    @cached_property
    def _bands(self) -> Table:
        return tree_bands(self.parents, self.lengths)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """A causal band for each run of nodes in which each follows its parent, and one to each run of nodes before.

        Raises:
            InvalidValueError: a document of another length.
            UnsupportedError: two different streams.
        """
        which = self._checked(_own_documents(self, queries, keys)[1], queries)
        return _laid_out([self._bands], [0] * len(which), queries.offsets[which])

    def positions(self, documents: Documents) -> Table:
        """Those of a node follow its parent's.

        Raises:
            InvalidValueError: a document of another length.
        """
        which = self._checked(_own_documents(self, documents, documents)[1], documents)
        return _spread([tree_positions(self.parents, self.lengths)], [0] * len(which), which, documents)

    def _checked(self, which: Table, documents: Documents) -> Table:
        """Those of some documents that have real tokens, each of the tree's length."""
        which = which[_have_real_tokens(documents)[which]]
        total = sum(self.lengths)
        starts = documents.offsets[which]
        misfits = (documents.offsets[which + 1] - starts != total) & (documents.valid_ends[which] - starts != total)
        if misfits.any():
            i = int(which[misfits][0])
            raise InvalidValueError(
                f"PrefixTree lengths do not sum to the length of document {i}",
                got=f"{total} for {int(documents.lengths[i])} tokens",
                fix="give each document its own tree: PerDocument((PrefixTree(...), ...))",
            )
        return which

    def alone(self) -> Mask:
        """Itself."""
        return self

    @property
    def is_causal(self) -> bool:
        """Always true."""
        return True


def _have_real_tokens(documents: Documents) -> Flags:
    """``[D]``: whether a document is more than padding."""
    some: Flags = documents.valid_ends > documents.offsets[:-1]
    return some


def _laid_out(kinds: list[Table], which: list[int], starts: Table) -> Table:
    """Bands of documents that begin at ``starts``, each of one of several kinds."""
    parts = [kinds[kind] for kind in which]
    moves = np.repeat(starts, [len(part) for part in parts])
    return shifted(np.concatenate([table([], 6), *parts]), moves, moves)


def _spread(kinds: list[Table], which: list[int], owners: Table, documents: Documents) -> Table:
    """``[T]`` positions: those of a kind in each document of ``owners``, and elsewhere what follows from documents."""
    positions = _within(documents)
    if len(owners):
        parts = [kinds[kind] for kind in which]
        sizes = np.array([len(part) for part in parts], dtype=np.int64)
        positions[expand(documents.offsets[owners], sizes)] = np.concatenate(parts)
    return positions


def _within(documents: Documents) -> Table:
    """``[T]`` each token's place in its document."""
    return np.arange(documents.num_tokens, dtype=np.int64) - np.repeat(documents.offsets[:-1], documents.lengths)


@dataclass(frozen=True)
class PerDocument(_Remembering):
    """Another mask for each document, or each row of a dense batch: some bidirectional, some causal, say.

    Each mask is asked about its document alone, as if the batch held no other: what it takes per document it takes
    once, the rows of :class:`Bands` count from the document's start, and :class:`AcrossDocuments` changes nothing.

    Attributes:
        masks: one per document, in order.

    Raises:
        InvalidTypeError: not a tuple of masks.
    """

    masks: tuple[Mask, ...]

    __hash__ = _Remembering.__hash__

    def __post_init__(self) -> None:
        if not isinstance(self.masks, tuple):
            raise InvalidTypeError(
                "PerDocument masks must be a tuple", got=short_repr(self.masks), fix="pass PerDocument((m0, m1, ...))"
            )
        for mask in self.masks:
            _check_mask("each of PerDocument", mask)

    @cached_property
    def _groups(self) -> list[tuple[Mask, Table]]:
        """The distinct masks, and which documents have each."""
        places: dict[Mask, list[int]] = {}
        for i, mask in enumerate(self.masks):
            places.setdefault(mask, []).append(i)
        return [(mask, np.array(which, dtype=np.int64)) for mask, which in places.items()]

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """Each document's bands of its mask, in the order of documents; a mask of several is asked once.

        Raises:
            InvalidValueError: masks for other documents than these, or one that does not fit its document.
            UnsupportedError: two different streams, for a mask that has no meaning there.
        """
        _pairs(queries, keys)
        _check_number("PerDocument needs one mask per document", len(self.masks), queries)
        parts, owners = [table([], 6)], [np.zeros(0, dtype=np.int64)]
        for mask, which in self._groups:
            own_queries = queries.chosen(which)
            own_keys = own_queries if queries is keys else keys.chosen(which)
            with _naming(which):
                bands = mask.alone().bands(own_queries, own_keys)
            bands = bands[(bands[:, Q0] < bands[:, Q1]) & (bands[:, K0] < bands[:, K1])]
            owner = own_queries.document_of(bands[:, Q0])
            moves = [all_.offsets[which] - own.offsets[:-1] for all_, own in ((queries, own_queries), (keys, own_keys))]
            parts.append(shifted(bands, moves[0][owner], moves[1][owner]))
            owners.append(which[owner])
        return np.concatenate(parts)[np.argsort(np.concatenate(owners), kind="stable")]

    @property
    def num_documents(self) -> int | None:
        """The number of masks."""
        return len(self.masks)

    def positions(self, documents: Documents) -> Table | None:
        """Those of each document's mask.

        Raises:
            InvalidValueError: masks for other documents than these, or one that does not fit its document.
        """
        _check_number("PerDocument needs one mask per document", len(self.masks), documents)
        positions = None
        for mask, which in self._groups:
            with _naming(which):
                own = mask.alone().positions(documents.chosen(which))
            if own is not None:
                positions = _within(documents) if positions is None else positions
                positions[expand(documents.offsets[which], documents.lengths[which])] = own
        return positions

    def alone(self) -> Mask:
        """The one document's mask."""
        _check_number("PerDocument needs one mask per document", len(self.masks), _ONE_DOCUMENT)
        return self.masks[0].alone()

    @property
    def is_causal(self) -> bool:
        """True where every document's mask is."""
        return all(mask.is_causal for mask, _ in self._groups)

    @cached_property
    def _is_value(self) -> bool:
        return type(self) is PerDocument and all(is_value(mask) for mask in self.masks)


@contextmanager
def _naming(which: Table) -> Iterator[None]:
    """A mask that does not fit its documents is told which they are of the whole batch."""
    try:
        yield
    except InvalidValueError as error:
        shown = ", ".join(map(str, which[:4].tolist())) + (", ..." if len(which) > 4 else "")
        which_ones = f"this is of documents {shown} of a PerDocument, counted from 0"
        raise InvalidValueError(str(error), fix=which_ones) from error


@dataclass(frozen=True)
class AcrossDocuments(Mask):
    """A mask over the packed stream as if it were one document, so that documents see each other.

    Attributes:
        mask: what the stream as a whole is held to.

    Raises:
        InvalidTypeError: not a mask.
    """

    mask: Mask

    def __post_init__(self) -> None:
        _check_mask("what AcrossDocuments holds", self.mask)

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """The mask's bands over one document of all tokens."""
        whole = _as_one(queries)
        return self.mask.bands(whole, whole if queries is keys else _as_one(keys))

    def positions(self, documents: Documents) -> Table | None:
        """The mask's over one document of all tokens; where it has none, positions go on restarting per document."""
        return self.mask.positions(_as_one(documents))

    def alone(self) -> Mask:
        """The mask inside: one document is all there is."""
        return self.mask.alone()

    @property
    def is_causal(self) -> bool:
        """As the mask inside."""
        return self.mask.is_causal

    @property
    def _is_value(self) -> bool:
        return type(self) is AcrossDocuments and is_value(self.mask)


@dataclass(frozen=True)
class _Alone(Mask):
    """A mask of a caller's own class, asked about each document alone.

    Attributes:
        mask: that mask.
    """

    mask: Mask

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """The mask's bands of one document after the other."""
        parts, counts = [table([], 6)], []
        for i in range(queries.num_documents):
            query = queries.chosen(np.array([i]))
            parts.append(self.mask.bands(query, query if queries is keys else keys.chosen(np.array([i]))))
            counts.append(len(parts[-1]))
        starts = (np.repeat(documents.offsets[:-1], counts) for documents in (queries, keys))
        return shifted(np.concatenate(parts), *starts)

    def positions(self, documents: Documents) -> Table | None:
        """The mask's of one document after the other."""
        every = [self.mask.positions(documents.chosen(np.array([i]))) for i in range(documents.num_documents)]
        if all(own is None for own in every):
            return None
        pieces = np.split(_within(documents), documents.offsets[1:-1])
        return np.concatenate([piece if own is None else own for piece, own in zip(pieces, every, strict=True)])

    def alone(self) -> Mask:
        """Itself."""
        return self


_ONE_DOCUMENT = Documents.dense(0)


def _as_one(documents: Documents) -> Documents:
    return Documents(documents.offsets[[0, -1]], documents.runs)


def _cut(documents: Table, size: int) -> tuple[Table, Table]:
    """Documents cut into pieces of ``size`` tokens: each piece's document start, and ``(start, stop)``."""
    lengths = documents[:, 1] - documents[:, 0]
    size = min(size, int(lengths.max(initial=1)))  # a piece past every document is one document
    counts = -(-lengths // size)
    starts = expand(documents[:, 0], counts, np.full(len(documents), size, dtype=np.int64))
    stops = np.minimum(starts + size, np.repeat(documents[:, 1], counts))
    return np.repeat(documents[:, 0], counts), np.stack([starts, stops], axis=1)


@dataclass(frozen=True, init=False)
class Bands(_Remembering):
    """A mask given as its bands ``(q0, q1, k0, k1, lo, hi)`` in packed coordinates.

    It may cross documents. ``lo`` may be ``-math.inf`` and ``hi`` ``math.inf``. The same bands serve every row of a
    dense batch.

    Raises:
        InvalidTypeError: rows that are not sequences of numbers.
        InvalidValueError: rows that are not six integers, intervals that run backwards or below 0, ``lo > hi``, or
            bands that overlap.
    """

    rows: tuple[tuple[int, int, int, int, int, int], ...]

    __hash__ = _Remembering.__hash__

    def __init__(self, rows: Iterable[Sequence[float]]) -> None:
        if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
            raise InvalidTypeError("Bands takes rows", got=short_repr(rows), fix=f"pass [{_BAND}, ...]")
        given = rows.tolist() if hasattr(rows, "tolist") else rows  # numbers of arrays and tensors become Python's
        if not isinstance(given, Iterable):
            raise InvalidTypeError("Bands takes rows", got="one number", fix=f"pass [{_BAND}, ...]")
        object.__setattr__(self, "rows", tuple(_checked_band(i, row) for i, row in enumerate(given)))
        self._refuse_overlap()

    def _refuse_overlap(self) -> None:
        """A pair of cells seen twice would count twice in the softmax."""
        bands = tightened(table(self.rows, 6))
        order = np.argsort(bands[:, Q0], kind="stable")
        bands = bands[order]
        for i in range(len(bands) - 1):
            a = bands[i]
            rest = bands[i + 1 :]
            rest = rest[: np.searchsorted(rest[:, Q0], a[Q1], side="left")]
            both = np.stack(
                [
                    np.maximum(a[Q0], rest[:, Q0]),
                    np.minimum(a[Q1], rest[:, Q1]),
                    np.maximum(a[K0], rest[:, K0]),
                    np.minimum(a[K1], rest[:, K1]),
                    np.maximum(a[LO], rest[:, LO]),
                    np.minimum(a[HI], rest[:, HI]),
                ],
                axis=1,
            )
            if len(tightened(both)):
                raise InvalidValueError(
                    "bands must be disjoint",
                    got=f"band {tuple(int(x) for x in a)} overlaps another",
                    fix="cut one of the two so that no (query, key) pair is in both",
                )

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """The bands as given.

        Raises:
            InvalidValueError: a band that reaches past the last token of a stream.
        """
        bands = table(self.rows, 6)
        for name, column, documents in (("query", Q1, queries), ("key", K1, keys)):
            reach = int(bands[:, column].max(initial=0))
            if reach > documents.num_tokens:
                raise InvalidValueError(
                    f"a band reaches past the end of the {name} stream",
                    got=f"token {reach} of {documents.num_tokens}",
                    fix="bands are in packed coordinates of the global sequence",
                )
        return bands

    def alone(self) -> Mask:
        """The same bands in each document, counted from its start."""
        return _BandsOfEach(self)

    @property
    def is_causal(self) -> bool:
        """True where no band reaches a later key."""
        bands = tightened(table(self.rows, 6))
        return bool((np.minimum(bands[:, HI], bands[:, K1] - 1 - bands[:, Q0]) <= 0).all())


_BAND = "(q0, q1, k0, k1, lo, hi)"


def _checked_band(number: int, row: object) -> tuple[int, int, int, int, int, int]:
    """One row of :class:`Bands`, infinities as the sentinel."""
    row = cast(Any, row).tolist() if hasattr(row, "tolist") else row
    fix = f"pass {_BAND}, integers but for lo, which may be -math.inf, and hi, which may be math.inf"
    if not isinstance(row, (tuple, list)) or not all(isinstance(x, Real) and not isinstance(x, bool) for x in row):
        raise InvalidTypeError(f"band {number} must be {_BAND}", got=short_repr(row), fix=fix)
    if len(row) != len(_BAND.split(",")):
        raise InvalidValueError(f"band {number} must be {_BAND}", got=f"{len(row)} numbers", fix=fix)
    numbers = [int(x) if isinstance(x, Integral) else float(x) for x in row]
    if not all(math.isfinite(x) and int(x) == x for x in numbers[:4]) or not all(
        math.isinf(x) or (not math.isnan(x) and int(x) == x) for x in numbers[4:]
    ):
        raise InvalidValueError(f"band {number} must hold integers", got=tuple(row), fix=fix)
    q0, q1, k0, k1 = (int(x) for x in numbers[:4])
    lo, hi = (int(min(max(x, -UNBOUNDED), UNBOUNDED)) for x in numbers[4:])
    if not (0 <= q0 <= q1 and 0 <= k0 <= k1 and lo <= hi):
        raise InvalidValueError(
            f"band {number} is empty or runs backwards",
            got=tuple(row),
            fix="0 <= q0 <= q1, 0 <= k0 <= k1, lo <= hi",
        )
    if max(q1, k1) > MOST_TOKENS:
        raise InvalidValueError(
            f"band {number} reaches past any batch", got=tuple(row), fix="end it with the global sequence"
        )
    return q0, q1, k0, k1, lo, hi


@dataclass(frozen=True)
class _BandsOfEach(_Alike):
    """The bands of each document, counted from its start.

    Attributes:
        mask: those bands.
    """

    mask: Bands

    def bands(self, queries: Documents, keys: Documents) -> Table:
        """The rows again for every document.

        Raises:
            InvalidValueError: a band that reaches past the last token of the shortest document.
        """
        _pairs(queries, keys)
        if not queries.num_documents:
            return table([], 6)
        shortest = (Documents.dense(int(documents.lengths.min())) for documents in (queries, keys))
        rows = self.mask.bands(*shortest)
        starts = (np.repeat(documents.offsets[:-1], len(rows)) for documents in (queries, keys))
        return shifted(np.tile(rows, (queries.num_documents, 1)), *starts)


def visible_bands(
    mask: Mask, documents: tuple[Documents, Documents], rows: tuple[Documents, Documents] | None
) -> Table:
    """A mask's bands cut to real tokens.

    Rows that are documents are asked about one by one, unless the mask has another number, or another mask, for each:
    where a diagonal or a chunk lies may depend on a row's padding.

    Args:
        mask: who sees whom.
        documents: of the query and of the key stream; the same object twice for self attention.
        rows: for a dense batch whose rows are documents of their own, those of both streams laid end to end.

    Raises:
        InvalidTypeError: a mask of a caller's own that gives something else than bands.
        InvalidValueError: a mask that does not fit the documents.
        UnsupportedError: a mask that has no meaning across two streams.
    """
    if rows is not None:
        documents, mask = rows, _row_by_row(mask)
    queries, keys = documents
    bands = mask.bands(queries, keys)
    if not (isinstance(bands, np.ndarray) and bands.dtype == np.int64 and bands.ndim == 2 and bands.shape[1] == 6):
        got = f"{bands.dtype} {list(bands.shape)}" if isinstance(bands, np.ndarray) else type(bands).__name__
        raise InvalidTypeError(
            f"{type(mask).__name__}.bands must return an int64 array [n, 6]", got=got, fix=f"one row per band {_BAND}"
        )
    return restrict(bands, queries.runs, keys.runs)


def implied_positions(mask: Mask, documents: Documents, rows: Documents | None) -> Table | None:
    """The positions that a mask implies: ``[T]``, or ``[B, S]`` where rows are documents; None where they follow.

    Args:
        mask: who sees whom.
        documents: of the stream; one of length S for a dense batch.
        rows: for a dense batch whose rows are documents of their own, those rows laid end to end.

    Raises:
        InvalidValueError: a mask that does not fit the documents.
    """
    if rows is None:
        return mask.positions(documents)
    positions = _row_by_row(mask).positions(rows)
    return None if positions is None else positions.reshape(rows.num_documents, documents.num_tokens)


def _row_by_row(mask: Mask) -> Mask:
    """A mask over rows that are documents: as it is where it has one of something for each, else about each alone."""
    return mask.alone() if mask.num_documents in (None, 1) else mask


def make_mask(mask: str | Mask) -> Mask:
    """A mask by name (``"causal"``, ``"full"``), or the one given.

    Raises:
        InvalidTypeError: neither a name nor a Mask.
        InvalidValueError: an unknown name.
    """
    if isinstance(mask, Mask):
        if type(mask).__hash__ is None:
            raise InvalidTypeError(
                "a mask must be hashable: what follows from it is kept by it",
                got=type(mask).__name__,
                fix="let the class be a frozen dataclass, or define __hash__ beside __eq__",
            )
        return mask
    if not isinstance(mask, str):
        raise InvalidTypeError(
            "mask must be a name or a Mask", got=type(mask).__name__, fix='pass "causal", "full" or a cphandler mask'
        )
    named: dict[str, Mask] = {"causal": Causal(), "full": Full()}
    if mask.lower() not in named:
        raise InvalidValueError(
            "unknown mask",
            got=repr(mask),
            fix=f"choose one of {', '.join(named)}, or pass a Mask such as SlidingWindow(128)",
        )
    return named[mask.lower()]


def is_value(mask: Mask) -> bool:
    """Whether a mask is one of the library's, all through: it never changes, and equal ones say the same.

    One of a caller's own class may be equal to others, or not equal to itself, for reasons of its own.
    """
    return mask._is_value if isinstance(mask, (PerDocument, AcrossDocuments)) else type(mask) in _VALUES


MASKS: tuple[type[Mask], ...] = (
    Causal,
    Full,
    SlidingWindow,
    PrefixLM,
    BlockCausal,
    Chunked,
    PrefixWindow,
    SharedQuestion,
    PrefixTree,
    PerDocument,
    AcrossDocuments,
    Bands,
)
"""The library's masks."""

_VALUES = frozenset(MASKS)
