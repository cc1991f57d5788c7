"""What kernels add to: sums over pieces of rows, in which the first piece that covers a row is written, not added.

Nothing is filled with zeros that a piece will cover, and where the first piece covers all rows it becomes the sum: one
task over everything, as on one rank, costs no accumulator, no merge and no cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.kernels.merge import merge_into
from cphandler.precision import accumulator_dtype
from cphandler.tokens.intervals import Flags, expand

ALL = slice(None)
"""Every row."""

FEW_RUNS = 16
"""Up to so many runs of rows are copied or written one by one; more are taken by an index.

In ``benchmarks/blocks.py`` an index is ahead from between 32 and 64 runs on a Xeon core; fewer here, since each run is
a launch on a GPU, where nothing was timed."""


class Spaced(NamedTuple):
    """Runs of rows of one length, at one distance from each other.

    Attributes:
        first: row of the first run.
        length: rows of each.
        apart: rows from the start of one to that of the next; at least ``length``.
        number: of the runs.
    """

    first: int
    length: int
    apart: int
    number: int

    @property
    def around(self) -> slice:
        """All rows from the first one to the last, those between the runs too."""
        return slice(self.first, self.first + (self.number - 1) * self.apart + self.length)

    def of(self, x: Tensor) -> Tensor:
        """The rows ``[B, number, length, ...]`` of ``[B, L, ...]``; a view."""
        return x[:, self.around].unfold(1, self.length, self.apart).movedim(-1, 2)


class _Covered:
    """Which rows have been written.

    Args:
        length: how many there are.

    Attributes:
        complete: a piece of all rows was.
    """

    def __init__(self, length: int) -> None:
        self._rows = bytearray(length)
        self.complete = False

    def of(self, rows: slice | Spaced) -> tuple[bool, bool]:
        """Whether any and whether all of some rows have been written; of no rows, none and all."""
        if self.complete:
            return True, True
        if isinstance(rows, Spaced):
            cells = self._cells(rows)
            return bool(cells.any()), bool(cells.all())
        start, stop, _ = rows.indices(len(self._rows))
        written = self._rows.count(1, start, stop)
        return written > 0, written == stop - start

    @property
    def none(self) -> bool:
        """Nothing has been written."""
        return not self.complete and 1 not in self._rows

    def _cells(self, rows: Spaced) -> Flags:
        cells: Flags = np.ndarray((rows.number, rows.length), np.bool_, self._rows, rows.first, (rows.apart, 1))
        return cells

    def holes(self, rows: slice | Spaced) -> list[slice]:
        """Runs of rows among these, and between them, that have not been written."""
        return [] if self.complete else list(self._holes(rows))

    def _holes(self, rows: slice | Spaced) -> Iterator[slice]:
        rows = rows.around if isinstance(rows, Spaced) else rows
        start, end, _ = rows.indices(len(self._rows))
        while (start := self._rows.find(0, start, end)) >= 0:
            stop = self._rows.find(1, start, end)
            stop = end if stop < 0 else stop
            yield slice(start, stop)
            start = stop

    def mark(self, rows: slice | Spaced) -> None:
        """These are written now."""
        if isinstance(rows, Spaced):
            self._cells(rows)[:] = True
            return
        start, stop, _ = rows.indices(len(self._rows))
        if stop - start == len(self._rows):
            self.complete = True
        self._rows[start:stop] = b"\1" * (stop - start)


class _Accumulator:
    """Room for rows ``[B, L, ...]``, made when it is needed; the first piece may become it.

    Args:
        shape: of the rows.
        dtype: to add in.
        device: where they are.

    Attributes:
        made: the room; None while nothing has been written.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.made: Tensor | None = None

    def takes(self, part: Tensor) -> bool:
        """Make a part that covers all rows the accumulator itself, in its own dtype until more comes; if it can be."""
        if self.made is not None or part.shape != self.shape:
            return False
        self.made = part.contiguous()
        return True

    @property
    def tensor(self) -> Tensor:
        """The rows, in the dtype to add in; whatever memory held where nothing was written."""
        if self.made is None:
            self.made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        elif self.made.dtype != self.dtype:
            self.made = self.made.to(self.dtype)
        return self.made

    def at(self, rows: slice | Spaced) -> Tensor:
        """Some of the rows, to be written to."""
        x = self.made
        if x is None or x.dtype != self.dtype:
            x = self.tensor
        return rows.of(x) if isinstance(rows, Spaced) else x[:, rows]

    def clear(self, runs: list[slice], value: float = 0.0) -> None:
        """Write a number to runs of rows: to many by one index, on the host alone, where that waits for nothing."""
        if len(runs) <= FEW_RUNS or self.device.type != "cpu":
            for run in runs:
                self.tensor[:, run] = value
            return
        starts, stops = np.array([(run.start, run.stop) for run in runs], dtype=np.int64).T
        self.tensor.index_fill_(1, torch.from_numpy(expand(starts, stops - starts)), value)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The rows in another dtype; what came in it alone was never anything else."""
        rows = self.tensor if self.made is None else self.made
        return rows if rows.dtype == dtype else rows.to(dtype)


class RowSum:
    """A sum of pieces of rows ``[B, L, ...]``; 0 where no piece was.

    A first piece of some of the rows is left where it is until more comes: it may be all that there is to add to
    another sum.

    Args:
        shape: of the rows.
        dtype: to add in.
        device: where they are.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._covered, self._sum = _Covered(shape[1]), _Accumulator(shape, dtype, device)
        self._alone: tuple[slice | Spaced, Tensor] | None = None

    @classmethod
    def like(cls, x: Tensor, dtype: torch.dtype | None = None) -> RowSum:
        """For rows in the shape of ``x``; in its accumulator's dtype where none is named."""
        return cls(x.shape, dtype or accumulator_dtype(x.dtype), x.device)

    @property
    def shape(self) -> torch.Size:
        """Of the rows."""
        return torch.Size(self._sum.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum."""
        return self._sum.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._sum.device

    def add(self, rows: slice | Spaced, part: Tensor) -> None:
        """Add a piece.

        Args:
            rows: where it belongs.
            part: ``[B, n, ...]``, or ``[B, number, length, ...]`` where the rows lie apart, in the sum's dtype or a
                narrower one. It may become the sum, and then be written to: a tensor that nobody else keeps.
        """
        if self._alone is not None:
            self._write_down()
        is_first = self._sum.made is None
        some, every = (False, False) if is_first else self._covered.of(rows)
        if some and not every:
            self._sum.clear(self._covered.holes(rows))
        if some:
            self._sum.at(rows).add_(part)
        elif not is_first:
            self._sum.at(rows).copy_(part)
        elif not (part.shape[1] == self._sum.shape[1] and self._sum.takes(part)):
            self._alone = rows, part
        self._covered.mark(rows)

    def _write_down(self) -> None:
        """Put the piece that came alone among the rows."""
        if self._alone is not None:
            rows, part = self._alone
            self._alone = None
            self._sum.at(rows).copy_(part)

    def add_at(self, index: Tensor, part: Tensor) -> None:
        """Add a piece whose rows lie apart.

        Args:
            index: ``[n]`` different rows.
            part: ``[B, n, ...]`` in the sum's dtype or a narrower one.
        """
        self._write_down()
        first = self._covered.none
        self._sum.clear(self._covered.holes(ALL))
        self._covered.mark(ALL)
        total = self._sum.tensor
        total.index_copy_(1, index, part.to(total.dtype) if first else total.index_select(1, index).add_(part))

    def total(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum, contiguous, in its own dtype or another; nothing is to be added afterwards."""
        if self._alone is not None:
            self._write_down()
        if not self._covered.complete:
            self._sum.clear(self._covered.holes(ALL))
        return self._sum.rounded(dtype or self._sum.dtype)

    def add_to(self, rows: Tensor) -> None:
        """Add the sum to rows of the same shape, in place, a piece that is all of it to its own rows alone.

        Args:
            rows: ``[B, L, ...]`` in the sum's dtype.
        """
        if self._alone is None:
            rows.add_(self.total())
            return
        where, part = self._alone
        (where.of(rows) if isinstance(where, Spaced) else rows[:, where]).add_(part)


class AttentionSum:
    """Attention of rows over the keys of all tasks so far; 0 and ``-inf`` where a row has seen nothing.

    Args:
        q: the queries, ``[B, L, N, D]``.
        channels: head dim of the values.
    """

    def __init__(self, q: Tensor, channels: int) -> None:
        self._dtype, dtype = q.dtype, accumulator_dtype(q.dtype)
        self._covered = _Covered(q.shape[1])
        self._out = _Accumulator((*q.shape[:-1], channels), dtype, q.device)
        self._lse = _Accumulator(q.shape[:-1], dtype, q.device)

    def merge(self, rows: slice | Spaced, out: Tensor, lse: Tensor) -> None:
        """Merge attention of some rows over further keys.

        Args:
            rows: the query rows. Where they lie apart, ``number, length`` stands for n below.
            out: ``[B, n, N, D_v]``. Both may become the result, and then be written to: tensors that nobody else keeps.
            lse: ``[B, n, N]`` natural log-sum-exp of the scaled (and capped) scores, in the accumulators' dtype.
        """
        some, every = self._covered.of(rows)
        whole = out.shape[1] == self._out.shape[1]
        if some and not every:
            self._blank(rows)
        if some:
            merge_into(self._out.at(rows), self._lse.at(rows), out, lse)
        else:
            if not (whole and self._out.takes(out)):
                self._out.at(rows).copy_(out)
            if not (whole and self._lse.takes(lse)):
                self._lse.at(rows).copy_(lse)
        self._covered.mark(rows)

    def merge_at(self, index: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge attention of rows that lie apart over further keys.

        Args:
            index: ``[n]`` different rows.
            out: ``[B, n, N, D_v]``.
            lse: ``[B, n, N]``, as in :meth:`merge`.
        """
        if self._covered.none:
            self._blank(ALL)
            self._out.tensor.index_copy_(1, index, out.to(self._out.dtype))
            self._lse.tensor.index_copy_(1, index, lse)
        else:
            self._blank(ALL)
            merge_into(self._out.tensor, self._lse.tensor, out, lse, index)
        self._covered.mark(ALL)

    def _blank(self, rows: slice | Spaced) -> None:
        holes = self._covered.holes(rows)
        self._out.clear(holes)
        self._lse.clear(holes, float("-inf"))

    def total(self, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``out [B, L, N, D_v]`` in the queries' dtype and ``lse [B, L, N]``, contiguous; nothing is merged afterwards.

        Args:
            sinks: ``[N]``: one more logit per head in the softmax of every row that has seen something.
        """
        if not self._covered.complete:
            self._blank(ALL)
        lse = self._lse.tensor
        if sinks is not None:
            lse = _absorb(self._out.tensor, lse, sinks.to(lse.dtype))
        return self._out.rounded(self._dtype), lse


def _absorb(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Widen each row's softmax by its head's sink: scales ``out`` in place, returns the new log-sum-exp.

    A row that sees nothing keeps ``-inf`` and 0: padding stays padding.
    """
    seen = lse > float("-inf")
    merged = torch.where(seen, torch.logaddexp(lse, sinks.expand_as(lse)), lse)
    out.mul_(torch.where(seen, torch.exp(lse - merged), 0.0).unsqueeze(-1))
    return merged
