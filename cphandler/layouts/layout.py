"""Layouts: which rank holds which tokens, in which local order. Integers only, and no masks.

Who holds what, for one document of 8 tokens over 2 ranks::

    zigzag      rank 0: 0 1 | 6 7      rank 1: 2 3 | 4 5      chunks r and 2P - 1 - r of each document
    contiguous  rank 0: 0 1 2 3        rank 1: 4 5 6 7        the packed stream cut into P pieces
    striped     rank 0: 0 2 4 6        rank 1: 1 3 5 7        token t on rank t mod P
    replicated  rank 0: 0 1 ... 7      rank 1: 0 1 ... 7      every rank holds everything

The ``balanced`` layout depends on masks; :mod:`cphandler.layouts.balance` makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from math import lcm
from typing import SupportsIndex

import numpy as np

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count
from cphandler.tokens.intervals import (
    Narrow,
    Table,
    by_number,
    chosen,
    expand,
    frozen,
    narrowed,
    offsets_of,
    overlaps,
    table,
    widened,
)

START, LENGTH, STRIDE, LOCAL, RANK = range(5)
"""Columns of :meth:`Layout.tables`; a rank's own span table has the first four."""

MOST_ROWS = 1 << 62
"""All ranks together have fewer rows than this, so that sums of rows and of places fit int64."""


class Layout:
    """An immutable map from global tokens to (rank, local row).

    A rank's share is a list of spans ``(start, length, stride)`` over global tokens; ``local`` says where each span
    begins in the rank's local order. Every rank has the same number of local rows ``L``; a local row in no span is a
    pad row.

    Args:
        name: how errors and tables call it.
        num_tokens: global tokens S.
        spans: per rank, rows ``(start, length, stride)`` or ``(start, length, stride, local)`` in ascending order of
            start; without ``local`` the spans stand one after the other.
        num_local_tokens: rows L each rank holds; None means the largest share.
        replicated: every rank holds every token; otherwise each token lives on exactly one rank.

    Raises:
        InvalidTypeError: spans or counts that are not integers.
        InvalidValueError: spans that leave out, repeat or overrun tokens or local rows; that are no table of three or
            four columns; a count or a length below 0; more rows than can be counted.
    """

    def __init__(
        self,
        name: str,
        num_tokens: SupportsIndex,
        spans: Sequence[object],
        *,
        num_local_tokens: SupportsIndex | None = None,
        replicated: bool = False,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidTypeError("a layout's name must be a string", got=repr(name), fix="pass the name first")
        if not isinstance(replicated, bool):
            raise InvalidTypeError(
                f"layout {name!r}: replicated must be a bool",
                got=repr(replicated),
                fix="pass True where every rank holds every token",
            )
        self.name = name
        self.num_tokens = checked_count(f"num_tokens of layout {name!r}", num_tokens)
        self.replicated = replicated
        self.spans = tuple(
            frozen(_with_local(_checked(name, rank, rank_spans))) for rank, rank_spans in enumerate(_ranks(name, spans))
        )
        if not all(_covers(rows, self.num_tokens) for rows in self._coverings()):
            raise InvalidValueError(
                f"layout {name!r} must place each of its {self.num_tokens} tokens on "
                + ("every rank" if replicated else "exactly one rank"),
                got=f"{sum(sum(s[:, LENGTH].tolist()) for s in self.spans)} placements over {self.cp_size} ranks",
                fix="spans are (start, length, stride) in global tokens",
            )
        largest = max(int(s[:, LENGTH].sum()) for s in self.spans)
        self.num_local_tokens = (
            largest
            if num_local_tokens is None
            else checked_count(f"num_local_tokens of layout {name!r}", num_local_tokens)
        )
        check_rows(name, max(self.num_tokens, self.num_local_tokens), self.cp_size)
        self._check_places()

    @classmethod
    def _placed(
        cls, name: str, num_tokens: int, spans: Table, counts: Table, rows: int, *, replicated: bool = False
    ) -> Layout:
        """A layout whose spans are known to be right: ``[n, 4]``, rank by rank, so many of each rank."""
        made = cls.__new__(cls)
        made.name, made.num_tokens, made.replicated, made.num_local_tokens = name, num_tokens, replicated, rows
        walls = offsets_of(counts).tolist()
        spans = frozen(spans)
        made.spans = tuple(spans[first:stop] for first, stop in pairwise(walls))
        return made

    @classmethod
    def _dealt(cls, name: str, lengths: Table, ranks: Table, local: Table, cp_size: int) -> Layout:
        """A layout of pieces one after the other: tokens of each, and the rank that holds it, from which row on.

        Every rank must hold its pieces in order, with no row between them.
        """
        filled = np.flatnonzero(lengths)
        holders = ranks.take(filled)
        opens = filled[np.append(True, holders[1:] != holders[:-1])[: len(filled)]]
        starts = offsets_of(lengths)
        columns = np.empty((5, len(opens)), dtype=np.int64)
        starts.take(opens, out=columns[START], mode="clip")
        local.take(opens, out=columns[LOCAL], mode="clip")
        columns[STRIDE], columns[RANK] = 1, ranks.take(opens)
        np.subtract(columns[START, 1:], columns[START, :-1], out=columns[LENGTH, :-1])
        columns[LENGTH, -1:] = starts[-1] - columns[START, -1:]
        columns.setflags(write=False)
        made = cls.__new__(cls)
        made.name, made.num_tokens, made.replicated = name, int(starts[-1]), False
        made.num_local_tokens = -(-made.num_tokens // cp_size)
        made._plain, made.cp_size, made.is_dense = columns.T, cp_size, True
        return made

    @cached_property
    def spans(self) -> tuple[Table, ...]:
        """Per rank ``[n, 4]`` spans ``(start, length, stride, local)``, ascending."""
        assert self._plain is not None
        every = frozen(self._plain[by_number(self._plain[:, RANK]), :RANK])
        walls = offsets_of(np.bincount(self._plain[:, RANK], minlength=self.cp_size)).tolist()
        return tuple(every[first:stop] for first, stop in pairwise(walls))

    @cached_property
    def cp_size(self) -> int:
        """Ranks P that the tokens are spread over."""
        return len(self.spans)

    @property
    def nbytes(self) -> int:
        """Bytes of the spans of all ranks."""
        return sum(own.nbytes for own in self.spans) if self._plain is None else self._plain[:, :RANK].nbytes

    def _check_places(self) -> None:
        """Refuse spans out of order, and local rows that overlap or do not exist."""
        for rank, spans in enumerate(self.spans):
            start, length, local = spans[:, START], spans[:, LENGTH], spans[:, LOCAL]
            if (start[1:] < start[:-1]).any():
                raise InvalidValueError(
                    f"layout {self.name!r} gives rank {rank} spans out of order", fix="sort by start"
                )
            outside = (local < 0) | (local > self.num_local_tokens - length)
            if (local[1:] < (local + length)[:-1]).any():  # a caller's own order, or rows used twice
                by_place = np.argsort(local, kind="stable")
                local, length = local[by_place], length[by_place]
            if outside.any() or (local[1:] < (local + length)[:-1]).any():
                raise InvalidValueError(
                    f"layout {self.name!r} gives rank {rank} overlapping or missing local rows",
                    fix=f"place each span inside {self.num_local_tokens} rows, none on another",
                )

    def _numbered(self, ranks: Sequence[int]) -> Table:
        """The spans of some ranks one after the other, each with its rank."""
        held = [self.spans[rank] for rank in ranks]
        counts = np.array([len(spans) for spans in held], dtype=np.int64)
        numbers = np.repeat(np.array(ranks, dtype=np.int64), counts)
        return np.column_stack([np.concatenate([table([], 4), *held]), numbers])

    def _coverings(self) -> list[Table]:
        """The span tables each of which must cover every token once."""
        return list(self.spans) if self.replicated else [np.concatenate(self.spans)]

    def __reduce__(self) -> tuple[Callable[..., Layout], tuple[object, ...]]:
        counts = np.array([len(spans) for spans in self.spans], dtype=np.int64)
        sizes = self.num_tokens, self.num_local_tokens
        return _unpickled, (self.name, *sizes, self.replicated, counts, narrowed(np.concatenate(self.spans)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and self.num_tokens == other.num_tokens
            and self.num_local_tokens == other.num_local_tokens
            and self.replicated == other.replicated
            and len(self.spans) == len(other.spans)
            and all(np.array_equal(a, b) for a, b in zip(self.spans, other.spans, strict=True))
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Layout({self.name!r}, num_tokens={self.num_tokens}, cp_size={self.cp_size})"

    @cached_property
    def fingerprint(self) -> bytes:
        """A digest, 16 bytes, that two layouts share where they are equal."""
        sizes = [self.num_tokens, self.num_local_tokens, self.replicated, *map(len, self.spans)]
        numbers = np.concatenate([np.array(sizes, dtype=np.int64), *map(np.ravel, self.spans)])
        return hashlib.sha256(numbers.tobytes()).digest()[:16]

    def positions(self, rank: int) -> Table:
        """``[L]`` global token of each local row of a rank; -1 for a pad row."""
        result = np.full(self.num_local_tokens, -1, dtype=np.int64)
        for spans in self.tables([rank]):
            rows = expand(spans[:, LOCAL], spans[:, LENGTH])
            result[rows] = expand(spans[:, START], spans[:, LENGTH], spans[:, STRIDE])
        return result

    @cached_property
    def strides(self) -> frozenset[int]:
        """Strides of the spans of more than one token, on any rank."""
        if self._plain is not None:
            return frozenset({1}) if (self._plain[:, LENGTH] > 1).any() else frozenset()
        every = np.concatenate([spans[spans[:, LENGTH] > 1, STRIDE] for spans in self.spans])
        return frozenset(np.unique(every).tolist())

    @property
    def keeps_global_order(self) -> bool:
        """True where one rank holds all tokens as they come, so that nothing has to move."""
        if self.cp_size > 1 or self.num_local_tokens != self.num_tokens:
            return False
        spans = self.spans[0]
        return bool(((spans[:, STRIDE] == 1) & (spans[:, START] == spans[:, LOCAL])).all())

    @cached_property
    def inverse(self) -> Table:
        """``[S]`` place ``rank * L + local`` of each global token (of its first copy where replicated)."""
        if self._plain is not None:
            _, length, _, local, rank_of = self._plain.T
            return frozen(expand(rank_of * self.num_local_tokens + local, length))
        result = np.empty(self.num_tokens, dtype=np.int64)
        for rank in reversed(range(self.cp_size)):
            spans = self.spans[rank]
            tokens = expand(spans[:, START], spans[:, LENGTH], spans[:, STRIDE])
            result[tokens] = rank * self.num_local_tokens + expand(spans[:, LOCAL], spans[:, LENGTH])
        return frozen(result)

    @cached_property
    def _plain(self) -> Table | None:
        """The one table of all ranks, column by column in memory, as it is read; None where spans interleave."""
        spans = self._numbered(range(self.cp_size))
        if self.replicated or (spans[:, STRIDE] != 1).any():
            return None
        result = chosen(spans, np.argsort(spans[:, START]))
        result.setflags(write=False)
        return result

    @cached_property
    def is_dense(self) -> bool:
        """Whether spans have stride 1, and ranks hold theirs in the order of tokens with no pad row between them."""
        if self._plain is None:
            return False
        spans, counts = np.concatenate(self.spans), np.array([len(own) for own in self.spans])
        before = offsets_of(spans[:, LENGTH])
        return np.array_equal(spans[:, LOCAL] + np.repeat(before.take(offsets_of(counts)[:-1]), counts), before[:-1])

    def tables(self, ranks: Sequence[int] | None = None) -> Iterator[Table]:
        """Span tables ``(start, length, stride, local, rank)`` of the ranks; the spans of a table do not interleave.

        One table for all ranks where every stride is 1. Strided spans interleave, those of several ranks by nature and
        those of one rank if a caller laid them so; each table then holds as many of one rank's as do not.
        """
        if ranks is None and self._plain is not None:
            yield self._plain
            return
        if ranks is not None and len(ranks) == 1 and self._plain is not None:
            yield chosen(self._plain, np.flatnonzero(self._plain[:, RANK] == ranks[0]))
            return
        ranks = range(self.cp_size) if ranks is None else ranks
        merged = self._numbered(ranks)
        if self.replicated or (merged[:, STRIDE] != 1).any():
            for part in np.split(merged, np.flatnonzero(np.diff(merged[:, RANK])) + 1):
                yield from _apart(part)
            return
        yield merged[np.argsort(merged[:, START], kind="stable")]

    def merged(self, size: int) -> Layout:
        """Neighbours joined: rank p of the result holds what ranks ``p * size`` to ``p * size + size - 1`` hold.

        Rows come in ascending order of tokens, pad rows last. Needs spans of stride 1.
        """
        spans = []
        for first in range(0, self.cp_size, size):
            held = np.concatenate(self.spans[first : first + size])
            held = held[np.argsort(held[:, START], kind="stable")]
            spans.append(joined(held[:, START], held[:, LENGTH]))
        return Layout(self.name, self.num_tokens, spans, num_local_tokens=size * self.num_local_tokens)

    def stack(self, copies: int) -> Layout:
        """The same cut applied to ``copies`` streams of S tokens laid end to end, each with L local rows."""
        if copies == 1:
            return self
        shifts = np.arange(copies, dtype=np.int64)
        spans = []
        for rank_spans in self.spans:
            repeated = np.concatenate([rank_spans] * copies) if copies else rank_spans[:0].copy()
            repeated[:, START] += np.repeat(shifts * self.num_tokens, len(rank_spans))
            repeated[:, LOCAL] += np.repeat(shifts * self.num_local_tokens, len(rank_spans))
            spans.append(repeated)
        return Layout(
            self.name,
            self.num_tokens * copies,
            spans,
            num_local_tokens=self.num_local_tokens * copies,
            replicated=self.replicated,
        )


def _unpickled(
    name: str, num_tokens: int, num_local_tokens: int, replicated: bool, counts: Table, spans: Narrow
) -> Layout:
    """What a checked layout was pickled as."""
    return Layout._placed(name, num_tokens, widened(spans), counts, num_local_tokens, replicated=replicated)


def _apart(spans: Table) -> Iterator[Table]:
    """Split ascending spans into tables in which each span ends before the next one starts."""
    ends = spans[:, START] + (spans[:, LENGTH] - 1) * spans[:, STRIDE]
    if (ends[:-1] < spans[1:, START]).all():
        yield spans
        return
    tables: list[list[int]] = []
    for row, start in enumerate(spans[:, START].tolist()):
        fitting = next((rows for rows in tables if ends[rows[-1]] < start), None)
        if fitting is None:
            tables.append([row])
        else:
            fitting.append(row)
    for rows in tables:
        yield spans[rows]


def check_rows(name: str, rows: int, cp_size: int) -> None:
    """Refuse a layout whose places cannot be numbered.

    Raises:
        InvalidValueError: tokens, or rows of a rank, that are too many times the ranks.
    """
    if rows * cp_size >= MOST_ROWS:
        raise InvalidValueError(
            f"layout {name!r} has more rows than 64 bits can count",
            got=f"{rows} times {cp_size} ranks",
            fix="that must stay below 2**62; cut the batch, or see whether its offsets count tokens",
        )


def _ranks(name: str, spans: Iterable[object]) -> list[object]:
    """The spans of each rank, of which there is one at least."""
    try:
        ranks = list(spans)
    except TypeError as error:
        raise InvalidTypeError(
            f"the spans of layout {name!r} must be a sequence", got=repr(spans), fix="give one list of spans per rank"
        ) from error
    if not ranks:
        raise InvalidValueError(f"layout {name!r} has no ranks", fix="give one list of spans per rank")
    return ranks


def _checked(name: str, rank: int, spans: object) -> Table:
    """A rank's spans as a table of three or four integer columns."""
    where, fix = f"layout {name!r}: the spans of rank {rank}", "give rows (start, length, stride) of integers"
    try:
        given = np.asarray(spans)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{where} are no table", got=str(error), fix=fix) from error
    if not given.size:
        return table([], 4)
    if _holds_flags(spans):
        raise InvalidTypeError(f"{where} must be integers", got="True or False among them", fix=fix)
    if given.dtype.kind not in "iu" or (given.dtype.kind == "u" and int(given.max()) >= MOST_ROWS):
        raise InvalidTypeError(f"{where} must be int64", got=given.dtype, fix=fix)
    if given.ndim != 2 or given.shape[1] not in (3, 4):
        raise InvalidValueError(f"{where} must have three or four columns", got=f"shape {list(given.shape)}", fix=fix)
    rows: Table = given.astype(np.int64, copy=False)
    if rows[:, LENGTH].min() < 0:
        raise InvalidValueError(f"{where} must not have negative lengths", got=int(rows[:, LENGTH].min()), fix=fix)
    if rows[:, STRIDE].min() < 1:
        raise InvalidValueError(
            f"layout {name!r} gives rank {rank} a stride below 1",
            got=int(rows[:, STRIDE].min()),
            fix="local order is ascending inside a span",
        )
    return rows


def _holds_flags(spans: object) -> bool:
    """Whether rows that are Python's own hold a bool, which an array of integers takes for a number."""
    rows = spans if isinstance(spans, (list, tuple)) else ()
    return any(isinstance(number, bool) for row in rows if isinstance(row, (list, tuple)) for number in row)


def _covers(spans: Table, num_tokens: int) -> bool:
    """True where the spans hold each token of ``[0, num_tokens)`` exactly once."""
    start, length, stride = spans[:, START], spans[:, LENGTH], spans[:, STRIDE]
    if ((start < 0) | (start >= num_tokens)).any() or (length - 1 > (num_tokens - 1 - start) // stride).any():
        return False
    if (stride != 1).any():
        start, length = _side_by_side(start, length, stride, num_tokens)
    order = np.argsort(start, kind="stable")
    edges = np.append(0, start[order] + length[order])
    return np.array_equal(np.append(start[order], num_tokens), edges)


def _side_by_side(start: Table, length: Table, stride: Table, num_tokens: int) -> tuple[Table, Table]:
    """Spans as spans of stride 1, of tokens in another order: all that share a rest modulo one common stride together.

    A span whose stride is a part of the common one falls apart into several, never into more than it has tokens.
    """
    common = min(lcm(*np.unique(stride[length > 1]).tolist()), num_tokens)
    alone = common % stride != 0  # the common stride was cut short: these have few tokens
    parts = np.where(alone, length, np.minimum(common // stride, length))
    which, part = np.repeat(np.arange(len(parts)), parts), expand(np.zeros_like(parts), parts)
    first = start[which] + part * stride[which]
    rows = np.where(alone[which], 1, -(-(length[which] - part) // np.maximum(common // stride[which], 1)))
    before, rest = divmod(num_tokens, common)
    turn = first % common
    return first // common + turn * before + np.minimum(turn, rest), rows


def _with_local(rows: Table) -> Table:
    """Drop empty spans and add the local column where the caller left it out."""
    local = offsets_of(rows[:, LENGTH])[:-1, None] if rows.shape[1] == 3 else rows[:, LOCAL:]
    rows = np.concatenate([rows[:, :LOCAL], local], axis=1)
    empty = rows[:, LENGTH] == 0
    rows = rows[~empty] if empty.any() else rows
    rows[rows[:, LENGTH] == 1, STRIDE] = 1
    return rows


def joined(starts: Table, lengths: Table) -> Table:
    """Spans of stride 1 from ascending pieces, neighbours that touch made one."""
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    opens = np.ones(len(starts), dtype=bool)
    opens[1:] = starts[1:] != starts[:-1] + lengths[:-1]
    first = np.flatnonzero(opens)
    total = np.add.reduceat(lengths, first) if len(first) else lengths
    return np.stack([starts[first], total, np.ones_like(total)], axis=1)


def cut_by_spans(starts: Table, stops: Table, spans: Table) -> tuple[Table, Table, Table, Table]:
    """Where intervals of tokens meet spans that do not interleave.

    Returns:
        ``(interval, span, first, stop)``: rows ``[first, stop)`` of a span are in an interval; none is empty.
    """
    ends = spans[:, START] + (spans[:, LENGTH] - 1) * spans[:, STRIDE] + 1
    interval, span = overlaps(starts, stops, spans[:, START], ends)
    start, stride = spans[:, START].take(span), spans[:, STRIDE]
    first, stop = starts.take(interval) - start, stops.take(interval) - start
    if (stride != 1).any():
        stride = stride.take(span)
        first, stop = -(-first // stride), -(-stop // stride)
    first, stop = np.maximum(first, 0), np.minimum(stop, spans[:, LENGTH].take(span))
    keep = first < stop
    if keep.all():
        return interval, span, first, stop
    return interval[keep], span[keep], first[keep], stop[keep]


def zigzag(offsets: Table, cp_size: int) -> Layout:
    """Each document cut into ``2 * cp_size`` chunks; rank r holds chunks r and ``2 * cp_size - 1 - r``.

    With lengths divisible by ``2 * cp_size`` this is what TransformerEngine calls DualChunkSwap, row for row. For
    other lengths chunks differ by one row, and the spare rows rotate over the ranks from document to document, so that
    the ranks' totals differ by one row at most.
    """
    lengths = np.diff(offsets)
    base, spare = lengths[:, None] // (2 * cp_size), lengths[:, None] % (2 * cp_size)
    turn = offsets_of(spare[:, 0])[:-1, None] % cp_size
    ranks = np.arange(cp_size, dtype=np.min_scalar_type(cp_size))
    place = ranks - turn
    place += cp_size * (place < 0)
    chunks, local = np.empty((2, len(lengths), 2 * cp_size), dtype=np.int64)
    early, late = chunks[:, :cp_size], chunks[:, : cp_size - 1 : -1]  # both by rank
    np.add(base, place < spare, out=early)
    np.add(base, place < spare - cp_size, out=late)
    local[:, : cp_size - 1 : -1] = np.cumsum(early + late, axis=0) - late
    local[:, :cp_size] = local[:, : cp_size - 1 : -1] - early
    check_rows("zigzag", int(offsets[-1]), cp_size)
    holders = np.tile(np.append(ranks, ranks[::-1]), len(lengths))
    return Layout._dealt("zigzag", chunks.reshape(-1), holders, local.reshape(-1), cp_size)


def padded_zigzag(offsets: Table, cp_size: int) -> Layout:
    """:func:`zigzag` of documents each padded at its end to a multiple of ``2 * cp_size``.

    What an engine needs that cuts every document into equal chunks. The padding is pad rows, in no document; all other
    rows stand where they would if it were tokens.
    """
    lengths = np.diff(offsets)
    padded = padded_offsets(offsets, 2 * cp_size)
    whole, starts = zigzag(padded, cp_size), padded[:-1]
    check_rows("padded zigzag", whole.num_tokens, cp_size)
    filled = np.flatnonzero(lengths)
    (rows,) = whole.tables()
    which, span, first, stop = cut_by_spans(starts[filled], starts[filled] + lengths[filled], rows)
    document = filled[which]
    tokens = rows[span, START] + first - starts[document] + offsets[:-1][document]
    order = np.argsort(rows[span, RANK], kind="stable")
    spans = np.stack([tokens, stop - first, np.ones_like(first), rows[span, LOCAL] + first], axis=1)[order]
    counts = np.bincount(rows[span, RANK], minlength=cp_size)
    return Layout._placed("padded zigzag", int(offsets[-1]), spans, counts, whole.num_local_tokens)


def padded_offsets(offsets: Table, multiple: int) -> Table:
    """``[D + 1]`` offsets of documents each padded at its end to a multiple."""
    return offsets_of(-(-np.diff(offsets) // multiple) * multiple)


def contiguous(offsets: Table, cp_size: int) -> Layout:
    """Rank r holds tokens ``[r * S // P, (r + 1) * S // P)`` of the packed stream."""
    total = int(offsets[-1])
    cuts = [rank * total // cp_size for rank in range(cp_size + 1)]
    spans = [[(cuts[r], cuts[r + 1] - cuts[r], 1)] for r in range(cp_size)]
    return Layout("contiguous", total, spans, num_local_tokens=-(-total // cp_size))


def striped(offsets: Table, cp_size: int) -> Layout:
    """Token t lives on rank ``t mod P`` (Striped Attention, arXiv 2311.09431)."""
    total = int(offsets[-1])
    spans = [[(rank, max(0, -(-(total - rank) // cp_size)), cp_size)] for rank in range(cp_size)]
    return Layout("striped", total, spans, num_local_tokens=-(-total // cp_size))


def replicated(offsets: Table, cp_size: int) -> Layout:
    """Every rank holds every token; only attention heads are split."""
    total = int(offsets[-1])
    return Layout("replicated", total, [[(0, total, 1)]] * cp_size, num_local_tokens=total, replicated=True)


BALANCED = "balanced"
"""Name of the layout that follows from masks too."""

BUILDERS: dict[str, Callable[[Table, int], Layout] | None] = {
    "zigzag": zigzag,
    "contiguous": contiguous,
    "striped": striped,
    BALANCED: None,
    "replicated": replicated,
}
"""The library's layouts by name: functions of the physical offsets and the number of ranks; None for the one that
:mod:`cphandler.layouts.placement` makes."""

LAYOUTS = tuple(BUILDERS)
"""Names of the library's layouts."""

LEVEL_LAYOUTS = tuple(name for name in LAYOUTS if name != "replicated")
"""Names of those that give every rank its share of the tokens, ``ceil(S / P)`` rows."""


def layout_name(name: str) -> str:
    """A layout's name as the registry spells it: any case will do, and ``-`` for ``_``."""
    return name.strip().lower().replace("-", "_")


def make_layout(layout: str | Layout, offsets: Table, cp_size: int) -> Layout:
    """Build a layout by name, or check one that the caller brings against the batch.

    Raises:
        InvalidTypeError: neither a name nor a Layout.
        InvalidValueError: an unknown name, or a Layout made for other tokens or ranks.
    """
    if isinstance(layout, Layout):
        if layout.num_tokens != int(offsets[-1]) or layout.cp_size != cp_size:
            raise InvalidValueError(
                f"layout {layout.name!r} was made for another batch",
                got=f"{layout.num_tokens} tokens over {layout.cp_size} ranks for {int(offsets[-1])} over {cp_size}",
                fix="build the layout from this batch's physical offsets, or pass its name",
            )
        return layout
    if not isinstance(layout, str):
        raise InvalidTypeError(
            "layout must be a name or a Layout", got=type(layout).__name__, fix=f"choose one of {', '.join(LAYOUTS)}"
        )
    name = layout_name(layout)
    if name not in BUILDERS:
        raise InvalidValueError(
            "unknown layout", got=repr(layout), fix=f"choose one of {', '.join(sorted(LAYOUTS))}, or pass a Layout"
        )
    build = BUILDERS[name]
    if build is None:
        raise InvalidValueError(
            "offsets alone make no such layout", got=repr(layout), fix="plan_batch makes it from a mask as well"
        )
    return build(offsets, cp_size)
