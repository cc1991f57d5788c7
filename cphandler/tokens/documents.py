"""Documents: where each sequence of a packed batch starts, and which of its rows are real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.tokens.intervals import Flags, Table, expand, frozen, offsets_of

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
    """

    offsets: Table
    runs: Table = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", frozen(self.offsets))
        object.__setattr__(self, "runs", frozen(self.runs.reshape(-1, 2)))

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
        valid, physical = _same_device_host_copies(cu_seqlens, cu_seqlens_padded)
        offsets = checked_offsets(valid, name)
        padded = checked_offsets(physical, f"{name}_padded")
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
        """One document of ``seq_len`` valid tokens: a dense batch, whose batch dim rides along."""
        offsets = np.array([0, seq_len], dtype=np.int64)
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
        if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point() or attention_mask.is_complex():
            got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise InvalidTypeError(
                f"{name} must be a bool or integer tensor [B, S]", got=got, fix="True marks a real token"
            )
        if attention_mask.dim() != 2:
            raise InvalidValueError(
                f"{name} must be [B, S]",
                got=f"shape {list(attention_mask.shape)}",
                fix="one row per sequence, True marks a real token",
            )
        values = attention_mask.detach().cpu().numpy()
        if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
            raise InvalidValueError(f"{name} must hold only 0 and 1", fix="pass a bool mask, True marks a real token")
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
        if not isinstance(position_ids, Tensor) or position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            got = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
            raise InvalidTypeError("position_ids must be an integer tensor", got=got)
        if position_ids.dim() not in (1, 2):
            raise InvalidValueError(
                "position_ids must be [T], [1, T] or [B, S]", got=f"shape {list(position_ids.shape)}"
            )
        rows = position_ids.detach().cpu().numpy().astype(np.int64).reshape(-1, position_ids.shape[-1])
        is_start = np.ones(rows.shape, dtype=bool)
        is_start[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
        starts = np.flatnonzero(is_start)
        wrong = np.flatnonzero(rows.reshape(-1)[starts] != 0)
        if len(wrong):
            at = int(starts[wrong[0]])
            raise InvalidValueError(
                "position_ids must restart at 0 where a document starts",
                got=f"{int(rows.reshape(-1)[at])} at token {at}",
                fix="pass ids that count up by one inside a document, or cu_seqlens",
            )
        offsets = np.append(starts, rows.size).astype(np.int64)
        return cls(offsets, _prefix_runs(offsets[:-1], np.diff(offsets)))

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

    @cached_property
    def valid_offsets(self) -> Table:
        """``[D + 1]`` offsets of the valid tokens alone, as ``cu_seqlens`` of the stream with padding removed."""
        document = np.searchsorted(self.offsets, self.runs[:, 0], side="right") - 1
        lengths = np.zeros(self.num_documents, dtype=np.int64)
        np.add.at(lengths, document, self.runs[:, 1] - self.runs[:, 0])
        return offsets_of(lengths)

    @cached_property
    def valid_ends(self) -> Table:
        """``[D]`` one past the last real token of each document; the document's start where it has none."""
        ends: Table = self.offsets[:-1].copy()
        np.maximum.at(ends, self.document_of(self.runs[:, 0]), self.runs[:, 1])
        return ends

    @property
    def has_padding(self) -> bool:
        """True where some physical token is not a real one."""
        return self.num_valid_tokens != self.num_tokens

    @cached_property
    def valid_tokens(self) -> Table:
        """``[num_valid_tokens]`` ascending indices of the real tokens."""
        return frozen(expand(self.runs[:, 0], self.runs[:, 1] - self.runs[:, 0]))

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


def _same_device_host_copies(first: Offsets, second: Offsets) -> tuple[Offsets, Offsets]:
    """Bring two offset tensors to the host in one transfer where they share an accelerator."""
    if (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.device.type != "cpu"
        and first.device == second.device
        and first.dim() == second.dim() == 1
        and first.dtype == second.dtype
    ):
        both = torch.cat([first, second]).cpu()
        return both[: first.numel()], both[first.numel() :]
    return first, second


def checked_offsets(values: Offsets, name: str) -> Table:
    """Copy ``cu_seqlens`` to a host int64 array, refusing what cannot be offsets.

    Raises:
        InvalidTypeError: not integers (float and bool included).
        InvalidValueError: not 1-D, empty, not starting at 0, or decreasing.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidTypeError(
            f"{name} must hold integers", got=array.dtype, fix="pass int32 or int64 offsets such as [0, 5, 12]"
        )
    if array.ndim != 1:
        raise InvalidValueError(
            f"{name} must be 1-D",
            got=f"shape {list(array.shape)}",
            fix="pass one offset per document plus one; squeeze a leading batch dim",
        )
    if array.size == 0:
        raise InvalidValueError(f"{name} must hold at least one offset", got="none", fix="an empty batch is [0]")
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
