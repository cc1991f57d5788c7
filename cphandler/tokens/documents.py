"""Documents: where each sequence of a packed batch starts, and which of its rows are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.counts import checked_count
from cphandler.tokens.intervals import MOST_TOKENS, Flags, Table, expand, frozen, offsets_of

Offsets: TypeAlias = "Tensor | Table | Sequence[int]"
"""What a caller may give as ``cu_seqlens``: an integer tensor, array or sequence, global, starting at 0."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one packed stream of tokens.

    Attributes:
        offsets: ``[D + 1]`` physical offsets; document i owns tokens ``[offsets[i], offsets[i + 1])``, alignment
            padding included. They decide ownership, rope, roll neighbours and traffic.
        runs: ``[R, 2]`` ascending, disjoint ``[start, stop)`` runs of valid tokens, none across documents. They
            decide masks, zero fill, labels and counts.

    Both are copies of what was given, and read-only.

    Raises:
        InvalidTypeError: not integers.
        InvalidValueError: offsets that are none, or runs that are empty, out of order or across documents.
    """

    offsets: Table
    runs: Table = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", frozen(checked_offsets(self.offsets, "offsets")))
        object.__setattr__(self, "runs", frozen(self._checked_runs()))

    def _checked_runs(self) -> Table:
        runs = host_integers(self.runs, "runs", "pass [start, stop) of each run of real tokens")
        runs = runs.astype(np.int64)
        flat = runs.reshape(-1)
        wanted = "ascending, disjoint [start, stop) pairs, none empty and none across documents"
        if runs.size % 2 or (runs.ndim == 2 and runs.shape[1] != 2) or runs.ndim > 2:
            raise InvalidValueError("runs must be [R, 2]", got=f"shape {list(runs.shape)}", fix=f"pass {wanted}")
        starts, stops = flat[::2], flat[1::2]
        whole = bool((starts < stops).all() and (stops[:-1] <= starts[1:]).all())
        if not whole or (len(flat) and not 0 <= flat[0] <= flat[-1] <= self.offsets[-1]):
            raise InvalidValueError("runs must be in order and inside the stream", fix=f"pass {wanted}")
        across = np.flatnonzero(self.document_of(starts) != self.document_of(stops - 1))
        if len(across):
            i = int(across[0])
            raise InvalidValueError(
                "a run of real tokens lies in one document",
                got=f"[{int(starts[i])}, {int(stops[i])}) across two",
                fix=f"pass {wanted}",
            )
        return flat.reshape(-1, 2)

    def __reduce__(self) -> tuple[type[Documents], tuple[Table, Table]]:
        return Documents, (self.offsets, self.runs)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Offsets, cu_seqlens_padded: Offsets | None = None, *, name: str = "cu_seqlens"
    ) -> Documents:
        """Documents of a packed batch.

        Args:
            cu_seqlens: ``[D + 1]`` global offsets of the valid tokens, int32 or int64.
            cu_seqlens_padded: ``[D + 1]`` global physical offsets where each document is padded at its end; None
                means that there is no padding.
            name: how errors call the first argument.

        Raises:
            InvalidTypeError: not integers.
            InvalidValueError: not 1-D, not starting at 0, decreasing, or padded shorter than valid.
        """
        if cu_seqlens_padded is None:
            offsets = checked_offsets(cu_seqlens, name)
            return cls(offsets, _prefix_runs(offsets[:-1], np.diff(offsets)))
        hosted = host_offsets({name: cu_seqlens, f"{name}_padded": cu_seqlens_padded})
        offsets, padded = hosted[name], hosted[f"{name}_padded"]
        if len(padded) != len(offsets):
            raise InvalidValueError(
                f"{name} and {name}_padded must name the same documents",
                got=f"{len(offsets) - 1} and {len(padded) - 1} documents",
                fix="pass both with one entry per document plus one",
            )
        lengths, padded_lengths = np.diff(offsets), np.diff(padded)
        short = np.flatnonzero(padded_lengths < lengths)
        if len(short):
            i = int(short[0])
            raise InvalidValueError(
                f"{name}_padded gives document {i} fewer tokens than {name}",
                got=f"{int(padded_lengths[i])} padded, {int(lengths[i])} valid",
                fix="padded offsets are physical: every document at least as long as its valid part",
            )
        return cls(padded, _prefix_runs(padded[:-1], lengths))

    @classmethod
    def dense(cls, seq_len: int) -> Documents:
        """One document of ``seq_len`` valid tokens: a dense batch, whose batch dim rides along.

        Raises:
            InvalidTypeError: no int.
            InvalidValueError: negative.
        """
        offsets = np.array([0, checked_count("seq_len", seq_len)], dtype=np.int64)
        return cls(offsets, _prefix_runs(offsets[:1], np.diff(offsets)))

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor, *, name: str = "attention_mask") -> Documents:
        """B documents of physical length S from a ``[B, S]`` mask, non-zero where the token is real.

        Left padding, right padding and holes are all exact: each document keeps its runs of valid rows. The
        stream is the batch flattened row by row, B * S tokens.

        Raises:
            InvalidTypeError: not a bool or integer tensor.
            InvalidValueError: not 2-D, or values other than 0 and 1.
        """
        if not _is_plain(attention_mask) or attention_mask.is_floating_point() or attention_mask.is_complex():
            raise InvalidTypeError(
                f"{name} must be a bool or integer tensor [B, S]",
                got=_kind(attention_mask),
                fix="pass a tensor in which True marks a real token",
            )
        if attention_mask.dim() != 2:
            raise InvalidValueError(
                f"{name} must be [B, S]",
                got=f"shape {list(attention_mask.shape)}",
                fix="pass one row per sequence, in which True marks a real token",
            )
        values = attention_mask.detach().cpu().numpy()
        if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
            raise InvalidValueError(
                f"{name} must hold only 0 and 1",
                got=int(values[~np.isin(values, (0, 1))][0]),
                fix="pass a bool mask, in which True marks a real token",
            )
        rows, length = values.shape
        edges = np.zeros((rows, length + 1), dtype=np.int8)
        edges[:, :length] = values
        change = np.diff(edges, axis=1, prepend=0)
        row, column = np.nonzero(change == 1)
        stop_row, stop_column = np.nonzero(change == -1)
        runs = np.stack([row * length + column, stop_row * length + stop_column], axis=1)
        return cls(np.arange(rows + 1, dtype=np.int64) * length, runs)

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Documents:
        """Documents from position ids ``[T]``, ``[1, T]`` or ``[B, S]`` that restart at 0 with each document.

        Rows of a ``[B, S]`` tensor are read one after the other, each a document boundary.

        Raises:
            InvalidTypeError: not integers.
            InvalidValueError: more than two dims, or a document that does not start at 0.
        """
        rows = _rows_of_integers(position_ids, "position_ids")
        is_start = np.ones(rows.shape, dtype=bool)
        is_start[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
        starts = np.flatnonzero(is_start)
        wrong = np.flatnonzero(rows.reshape(-1)[starts] != 0)
        if len(wrong):
            at = int(starts[wrong[0]])
            raise InvalidValueError(
                "position_ids must restart at 0 where a document starts",
                got=f"{int(rows.reshape(-1)[at])} at token {at}",
                fix="pass ids that count up by one inside a document, or cu_seqlens; where padding has ids of its own, "
                "pass the mask or the segment ids to cu_seqlens_of",
            )
        offsets = np.append(starts, rows.size)
        return cls(offsets, _prefix_runs(offsets[:-1], np.diff(offsets)))

    @classmethod
    def from_segment_ids(cls, segment_ids: Tensor, *, name: str = "segment_ids") -> Documents:
        """Documents from segment ids ``[T]``, ``[1, T]`` or ``[B, S]``: equal numbers side by side, 0 for padding.

        A run of padding is a document without valid tokens. Rows of a ``[B, S]`` tensor are read one after the other,
        each a document boundary.

        Raises:
            InvalidTypeError: not integers.
            InvalidValueError: more than two dims, a number below 0, or one that comes again in its row after another.
        """
        rows = _rows_of_integers(segment_ids, name)
        if rows.size and rows.min() < 0:
            raise InvalidValueError(
                f"{name} must not be below 0",
                got=int(rows.min()),
                fix="number documents from 1 on, and padding 0",
            )
        is_start = np.ones(rows.shape, dtype=bool)
        is_start[:, 1:] = rows[:, 1:] != rows[:, :-1]
        starts = np.flatnonzero(is_start)
        numbers = rows.reshape(-1)[starts]
        _refuse_twice(starts // max(1, rows.shape[1]), numbers, starts, name)
        offsets = np.append(starts, rows.size)
        runs = np.stack([offsets[:-1], offsets[1:]], axis=1)
        return cls(offsets, runs[numbers != 0])

    @property
    def num_documents(self) -> int:
        """How many documents, empty ones included."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Physical tokens of the stream."""
        return int(self.offsets[-1])

    @property
    def num_valid_tokens(self) -> int:
        """Real tokens of the stream."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())

    @property
    def lengths(self) -> Table:
        """``[D]`` physical lengths."""
        return np.diff(self.offsets)

    @property
    def max_length(self) -> int:
        """Physical length of the longest document; 0 where there is none."""
        return int(self.lengths.max(initial=0))

    @property
    def valid_offsets(self) -> Table:
        """``[D + 1]`` offsets of the valid tokens alone, as ``cu_seqlens`` of the stream with padding removed."""
        document = np.searchsorted(self.offsets, self.runs[:, 0], side="right") - 1
        lengths = np.zeros(self.num_documents, dtype=np.int64)
        np.add.at(lengths, document, self.runs[:, 1] - self.runs[:, 0])
        return frozen(offsets_of(lengths))

    @cached_property
    def valid_starts(self) -> Table:
        """``[D]`` first real token of each document; the document's start where it has none."""
        starts: Table = self.offsets[:-1].copy()
        document = self.document_of(self.runs[:, 0])
        first = np.flatnonzero(np.diff(document, prepend=-1))
        starts[document[first]] = self.runs[first, 0]
        return frozen(starts)

    @cached_property
    def valid_ends(self) -> Table:
        """``[D]`` one past the last real token of each document; the document's start where it has none."""
        ends: Table = self.offsets[:-1].copy()
        np.maximum.at(ends, self.document_of(self.runs[:, 0]), self.runs[:, 1])
        return frozen(ends)

    @property
    def has_padding(self) -> bool:
        """True where some physical token is not a real one."""
        return self.num_valid_tokens != self.num_tokens

    @cached_property
    def valid_tokens(self) -> Table:
        """``[num_valid_tokens]`` ascending indices of the real tokens."""
        return frozen(expand(self.runs[:, 0], self.runs[:, 1] - self.runs[:, 0]))

    def chosen(self, which: Table) -> Documents:
        """Some of the documents, laid end to end in the order of ``which``, as a stream of their own."""
        offsets = offsets_of(self.lengths[which])
        first, last = (np.searchsorted(self.runs[:, 0], self.offsets[which + end]) for end in (0, 1))
        counts = (last - first).astype(np.int64)
        runs = self.runs[expand(first.astype(np.int64), counts)]
        return Documents(offsets, runs + np.repeat(offsets[:-1] - self.offsets[which], counts)[:, None])

    def document_of(self, tokens: Table) -> Table:
        """Index of the document that owns each token."""
        return np.searchsorted(self.offsets, tokens, side="right").astype(np.int64) - 1

    def is_valid(self, tokens: Table) -> Flags:
        """True for each token that is real."""
        if not len(self.runs):
            return np.zeros(tokens.shape, dtype=bool)
        run = np.searchsorted(self.runs[:, 0], tokens, side="right") - 1
        valid: Flags = (run >= 0) & (tokens < self.runs[np.maximum(run, 0), 1])
        return valid


def _prefix_runs(starts: Table, lengths: Table) -> Table:
    runs = np.stack([starts, starts + lengths], axis=1)
    return runs[lengths > 0]


def _refuse_twice(rows: Table, numbers: Table, starts: Table, name: str) -> None:
    """Refuse a segment that had ended in its row and begins anew; padding may come and go."""
    real = np.flatnonzero(numbers)
    order = real[np.lexsort((starts[real], numbers[real], rows[real]))]
    again = (np.diff(rows[order]) == 0) & (np.diff(numbers[order]) == 0)
    if again.any():
        i = int(order[1:][again].min())
        raise InvalidValueError(
            f"a segment of {name} is one run of tokens",
            got=f"{int(numbers[i])} again at token {int(starts[i])}, in row {int(rows[i])}",
            fix="number each document of a row differently; holes in a document are for a dense handler's "
            "key_padding_mask",
        )


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor whose numbers can be read one by one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def _holds_integers(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a plain tensor of integers; truth values are none."""
    return (
        _is_plain(value)
        and value.dtype != torch.bool
        and not value.is_floating_point()
        and not value.is_complex()
        and not value.is_quantized
    )


def _kind(value: object) -> object:
    """What was given in place of a plain tensor, or of its dtype."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return value.dtype if _is_plain(value) else f"a {value.layout} tensor on {value.device.type}"


def host_integers(values: object, name: str, fix: str) -> npt.NDArray[Any]:
    """A host array of integers of any kind, perhaps the caller's own memory.

    Raises:
        InvalidTypeError: not integers (float and bool included), or a tensor without numbers to read.
    """
    if isinstance(values, Tensor):
        if not _holds_integers(values):
            raise InvalidTypeError(
                f"{name} must hold integers", got=str(_kind(values)).removeprefix("torch."), fix=f"{fix}, on any device"
            )
        return values.detach().cpu().numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise InvalidTypeError(f"{name} must hold integers", got=type(values).__name__, fix=fix) from error
    if array.size == 0 and array.dtype == np.float64:  # what numpy makes of no numbers
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidTypeError(f"{name} must hold integers", got=array.dtype, fix=fix)
    return array


def _rows_of_integers(values: object, name: str) -> Table:
    """``[rows, S]`` of a tensor ``[T]`` or ``[B, S]``.

    Raises:
        InvalidTypeError: not an integer tensor.
        InvalidValueError: another number of dims.
    """
    if not _holds_integers(values):
        raise InvalidTypeError(f"{name} must be an integer tensor", got=_kind(values), fix="pass [T], [1, T] or [B, S]")
    if values.dim() not in (1, 2):
        raise InvalidValueError(
            f"{name} must be [T], [1, T] or [B, S]",
            got=f"shape {list(values.shape)}",
            fix="pass one number per token; of several axes only the one that counts tokens",
        )
    return np.atleast_2d(values.detach().cpu().numpy().astype(np.int64))


def host_offsets(given: Mapping[str, Offsets]) -> dict[str, Table]:
    """Checked offsets by name; each tensor leaves its device once, and those of one device leave it together.

    Raises:
        InvalidTypeError: as :func:`checked_offsets`.
        InvalidValueError: as :func:`checked_offsets`.
    """
    far: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for value in given.values():
        if isinstance(value, Tensor) and _is_plain(value) and value.device.type != "cpu":
            far.setdefault((value.device, value.dtype), {})[id(value)] = value.detach()
    near: dict[int, Tensor] = {}
    for tensors in far.values():
        together = torch.cat([x.reshape(-1) for x in tensors.values()]).cpu()
        parts = together.split([x.numel() for x in tensors.values()])
        near |= {key: part.view(x.shape) for (key, x), part in zip(tensors.items(), parts, strict=True)}
    checked: dict[int, Table] = {}
    for name, value in given.items():
        if id(value) not in checked:
            checked[id(value)] = checked_offsets(near.get(id(value), value), name)
    return {name: checked[id(value)] for name, value in given.items()}


def checked_offsets(values: Offsets, name: str) -> Table:
    """Copy ``cu_seqlens`` to a host int64 array, refusing what cannot be offsets.

    Raises:
        InvalidTypeError: not integers (float and bool included).
        InvalidValueError: not 1-D, empty, not starting at 0, decreasing, or past any batch.
    """
    array = host_integers(values, name, "pass int32 or int64 offsets such as [0, 5, 12]")
    if array.ndim != 1:
        raise InvalidValueError(
            f"{name} must be 1-D",
            got=f"shape {list(array.shape)}",
            fix="pass one offset per document plus one; squeeze a leading batch dim",
        )
    if array.size == 0:
        raise InvalidValueError(f"{name} must hold at least one offset", got="none", fix="an empty batch is [0]")
    if int(array.max()) > MOST_TOKENS:  # unsigned ones would wrap
        raise InvalidValueError(
            f"{name} counts more tokens than any batch has",
            got=int(array.max()),
            fix="pass cumulative offsets such as [0, 5, 12]",
        )
    array = array.astype(np.int64)
    if array[0] != 0:
        raise InvalidValueError(
            f"{name} must start at 0", got=int(array[0]), fix="pass cumulative offsets such as [0, 5, 12], not lengths"
        )
    drop = np.flatnonzero(np.diff(array) < 0)
    if len(drop):
        i = int(drop[0])
        raise InvalidValueError(
            f"{name} must not decrease",
            got=f"{int(array[i])} then {int(array[i + 1])} at entry {i + 1}",
            fix="pass cumulative offsets such as [0, 5, 12]",
        )
    return array
