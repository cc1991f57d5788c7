"""Values of tokens and of whole sequences, back in the caller's own order: what RL loops and evaluation work on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.collectives import all_gather
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.sharding.dispatch import DispatchGrad, GradMode, as_movable, filler, restored
from cphandler.tensors import check_plain, device_copy
from cphandler.tokens.counts import checked_flag
from cphandler.tokens.documents import Documents
from cphandler.tokens.intervals import Flags, Table
from cphandler.training.arguments import MASKS, check_floats, check_mask, check_rows, checked_handler
from cphandler.training.reductions import sum_over_tokens
from cphandler.training.rows import (
    agreed,
    check_one_per_token,
    holders,
    real_rows,
    rows_dim,
    sequence_numbers,
    sequence_places,
)


def gather_tokens(
    values: Tensor,
    handler: ContextParallelHandler,
    *,
    nested: bool = False,
    padding_value: float | None = None,
    grad: GradMode = "replicated",
) -> Tensor:
    """Values of local tokens as the caller's batch had them, on every rank; padding and layout never show.

    Args:
        values: of local rows, ``[L, ...]`` or ``[1, L, ...]`` packed; ``[B, L, ...]``, or ``[L, B, ...]`` for ``sbhd``.
        handler: the batch's.
        nested: give a jagged nested tensor, one component of real tokens for each sequence.
        padding_value: packed: give ``[D, longest, ...]``, each sequence from the left, this behind it. Dense: what
            padding of the batch holds, 0 unless told.
        grad: as in ``handler.combine``: ``"replicated"`` where every rank computes the same loss of the result.

    Returns:
        Packed: ``[T, ...]`` real tokens as ``cu_seqlens_q`` numbers them. Dense: ``[B, S, ...]``, or ``[S, B, ...]``
        for ``sbhd``. Or what was asked for. Differentiable.

    Raises:
        InvalidTypeError: no plain tensor.
        InvalidValueError: rows that are not this rank's, or a padding value beside ``nested``.
    """
    handler, nested = checked_handler(handler), checked_flag("nested", nested)
    _check_tensor("values", values)
    if nested and padding_value is not None:
        raise InvalidValueError(
            "nested sequences have no padding", got=f"padding_value {padding_value!r}", fix="ask for one of the two"
        )
    dim = rows_dim("values", values, handler)
    if padding_value is not None:
        filler(padding_value, values)
    whole = handler.combine(values, dim, grad=grad)
    if handler.qkv_format != "thd":
        return _dense(whole, dim, handler, padding_value or 0, nested=nested)
    documents = handler.documents
    whole = whole.squeeze(0) if dim == 1 else whole
    real = _real_tokens(documents)
    packed = whole if len(real) == documents.num_tokens else whole.index_select(0, device_copy(real, whole.device))
    lengths = _lengths(documents)
    if nested:
        return _jagged(packed, lengths)
    if padding_value is None:
        return packed
    places = device_copy(_padded_places(lengths), whole.device)
    longest = int(lengths.max(initial=0))
    rows: Tensor = _spread(packed, len(lengths) * longest, places, padding_value)
    filled: Tensor = rows.unflatten(0, (len(lengths), longest))
    return filled


def scatter_tokens(
    values: Tensor | list[Tensor] | tuple[Tensor, ...],
    handler: ContextParallelHandler,
    *,
    padded: bool = False,
    pad_value: float = 0,
    grad: DispatchGrad = "full",
) -> Tensor:
    """This rank's rows of values in the caller's own order: the way back of :func:`gather_tokens`.

    Args:
        values: the same on every rank. Packed: ``[T, ...]`` real tokens as ``cu_seqlens_q`` numbers them, a nested
            tensor or a list of each sequence's, or with ``padded`` ``[D, longest or more, ...]``. Dense:
            ``[B, S, ...]``, or ``[S, B, ...]`` for ``sbhd``.
        handler: the batch's.
        padded: packed: each sequence has a row of its own.
        pad_value: what padding and pad rows hold.
        grad: as in ``handler.dispatch``.

    Returns:
        ``[L, ...]`` packed, else the format's own. Differentiable.

    Raises:
        InvalidTypeError: no plain tensor, nor a list of such.
        InvalidValueError: other numbers of tokens or sequences than the batch's.
    """
    handler, padded = checked_handler(handler), checked_flag("padded", padded)
    dense = handler.qkv_format != "thd"
    lengths = _lengths(handler.documents)
    if isinstance(values, Tensor) and values.is_nested:
        values = values.unbind()
    if isinstance(values, (list, tuple)):
        values = _joined(values, lengths, dense=dense)
    _check_tensor("values", values)
    filler(pad_value, values)
    if dense:
        if padded:
            raise InvalidValueError("rows of a dense batch are padded as they are", got="padded=True", fix="leave it")
        return handler.dispatch(values, 0 if handler.qkv_format == "sbhd" else 1, pad_value=pad_value, grad=grad)
    packed = _unpadded(values, lengths) if padded else values
    wanted = int(lengths.sum())
    if packed.dim() == 0 or len(packed) != wanted:
        raise InvalidValueError(
            f"values must have the {wanted} real tokens of the batch in their first dim",
            got=f"shape {list(values.shape)}",
            fix="pass them as cu_seqlens_q numbers them, or one row a sequence with padded=True",
        )
    documents = handler.documents
    if wanted != documents.num_tokens:
        packed = _spread(packed, documents.num_tokens, device_copy(_real_tokens(documents), packed.device), pad_value)
    return handler.dispatch(packed, 0, pad_value=pad_value, grad=grad)


def gather_last_tokens(values: Tensor, handler: ContextParallelHandler, mask: Tensor | None = None) -> Tensor:
    """The value at each sequence's last token, whichever rank holds it, on every rank: a score of the sequence.

    Args:
        values: of local tokens, floating point; ``[L]`` or ``[1, L]`` packed, else the batch's local rows.
        handler: the batch's.
        mask: which tokens count, such as those of the response; the shape of ``values``. None for all real ones.

    Returns:
        ``[D]`` of a packed batch's sequences, ``[B]`` of a dense one's rows; 0 for one without such a token. Backward
        the owner of each gets its gradient.
    """
    handler = checked_handler(handler)

    def rows() -> Tensor:
        check_floats("values", values)
        return values

    owned, sequence, number = _last_rows("gather_last_tokens", rows, handler, mask)
    chosen = values.masked_fill(~owned, 0.0).flatten()
    return sum_over_tokens(values.new_zeros(number).index_add(0, sequence, chosen), handler)


def scatter_last_tokens(scalars: Tensor, handler: ContextParallelHandler, mask: Tensor | None = None) -> Tensor:
    """Each sequence's scalar at its last token, 0 elsewhere: an outcome's reward, on the rank that owns the token.

    Args:
        scalars: ``[D]`` of a packed batch's sequences, ``[B]`` of a dense one's rows; the same on every rank.
        handler: the batch's.
        mask: which tokens count, such as those of the response, local; a scalar of a sequence without one is nowhere.

    Returns:
        ``[L]`` packed, ``[B, L]`` or for ``sbhd`` ``[L, B]`` dense. Gradients of ``scalars`` sum over ranks.

    Raises:
        InvalidValueError: another number of scalars than of sequences.
    """
    handler = checked_handler(handler)

    def rows() -> Tensor:
        _check_tensor("scalars", scalars)
        if mask is not None:
            check_rows("mask", mask, MASKS, "bool or numbers")
        return _any_rows(handler, scalars) if mask is None else mask

    owned, sequence, number = _last_rows("scatter_last_tokens", rows, handler, mask)
    if scalars.shape != (number,):
        raise InvalidValueError(
            f"scalars must be one for each of the {number} sequences",
            got=f"shape {list(scalars.shape)}",
            fix="pass those of all sequences of the batch on every rank",
        )
    if not number:
        return scalars.new_zeros(owned.shape)
    return scalars.index_select(0, sequence).view(owned.shape).where(owned, scalars.new_zeros(()))


def _any_rows(handler: ContextParallelHandler, scalars: Tensor) -> Tensor:
    """Local rows of a batch with as many sequences as there are scalars."""
    if handler.qkv_format == "thd":
        return scalars.new_empty(handler.num_local_tokens)
    shape = (handler.num_local_tokens, scalars.numel())
    return scalars.new_empty(shape if handler.qkv_format == "sbhd" else shape[::-1])


def _last_rows(
    name: str, rows: Callable[[], Tensor], handler: ContextParallelHandler, mask: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Which local rows are the last of their sequence among those that count, each row's sequence, and their number.

    Args:
        name: of the function.
        rows: checks its arguments, and gives a tensor of local rows.
        handler: the batch's.
        mask: which rows count; None for all real ones.
    """

    def check() -> tuple[Tensor, Tensor, tuple[str, ...]]:
        values = rows()
        real = real_rows(handler, values, check_one_per_token("values", values, handler))
        if mask is not None:
            check_mask(mask, values)
            real = real & (mask != 0)
        return values, real, holders(handler)

    values, real, names = agreed(handler, name, check, lambda found: str(list(found[0].shape)))
    sequence, number = sequence_numbers(values, handler)
    places = sequence_places(values, handler).masked_fill(~real, -1)
    last = places.new_full((number,), -1).scatter_reduce(0, sequence, places.flatten(), "amax")
    for each in names:
        last = all_gather(last.unsqueeze(0), each).amax(0)
    owned = real if not number else real & (places == last.index_select(0, sequence).view(places.shape))
    return owned, sequence, number


def _dense(whole: Tensor, dim: int, handler: ContextParallelHandler, padding_value: float, *, nested: bool) -> Tensor:
    """A whole dense batch with its padding filled, or its real tokens alone."""
    real = _real_of_dense(handler, whole.shape[1 - dim])
    if nested:
        rowed = (whole.transpose(0, 1) if dim == 0 else whole).flatten(0, 1)
        kept = device_copy(np.flatnonzero(real), whole.device)
        return _jagged(rowed.index_select(0, kept), real.sum(1))
    if real.all():
        return whole
    keep = device_copy(real if dim == 1 else real.T, whole.device)
    padding = ~keep.view(*keep.shape, *[1] * (whole.dim() - 2))
    return restored(as_movable(whole).masked_fill(padding, filler(padding_value, whole)), whole.dtype)


def _spread(rows: Tensor, count: int, places: Tensor, fill_value: float) -> Tensor:
    """``count`` rows, some of which are these, others filled."""
    bits = as_movable(rows)
    others = bits.new_full((count, *bits.shape[1:]), filler(fill_value, rows))
    return restored(others.index_copy(0, places, bits), rows.dtype)


def _real_of_dense(handler: ContextParallelHandler, batch: int) -> Flags:
    """``[B, S]``: which tokens of a dense batch are real."""
    rows = handler.queries.padded_rows
    if rows is None:
        return np.broadcast_to(
            handler.documents.is_valid(np.arange(handler.documents.num_tokens)), (batch, handler.documents.num_tokens)
        )
    real: Flags = rows.is_valid(np.arange(rows.num_tokens)).reshape(batch, -1)
    return real


def _jagged(packed: Tensor, lengths: Table) -> Tensor:
    offsets = device_copy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), packed.device)
    jagged: Tensor = torch.nested.nested_tensor_from_jagged(packed, offsets)
    return jagged


def _joined(values: list[Tensor] | tuple[Tensor, ...], lengths: Table, *, dense: bool) -> Tensor:
    """One packed tensor of one for each sequence."""
    if dense:
        raise InvalidTypeError(
            "a dense batch is scattered from one tensor", got="a list", fix="pass [B, S, ...], padded as the batch is"
        )
    for value in values:
        _check_tensor("each of the values", value)
    found = [len(value) if value.dim() else -1 for value in values]
    if found != lengths.tolist():
        odd = next((i for i, pair in enumerate(zip(found, lengths.tolist(), strict=False)) if pair[0] != pair[1]), None)
        got = f"{len(found)} of {len(lengths)}" if odd is None else f"{found[odd]} tokens in sequence {odd}"
        wanted = "" if odd is None else f"; it has {int(lengths[odd])}"
        raise InvalidValueError(
            "values must be one tensor for each sequence, as long as it is",
            got=f"{got}{wanted}",
            fix="pass those of all sequences on every rank, without padding",
        )
    if not values:
        raise InvalidValueError("values of no sequence have no dtype", got="[]", fix="pass an empty tensor")
    return torch.cat(list(values))


def _unpadded(values: Tensor, lengths: Table) -> Tensor:
    longest = int(lengths.max(initial=0))
    if values.dim() < 2 or values.shape[0] != len(lengths) or values.shape[1] < longest:
        raise InvalidValueError(
            f"padded values must be one row for each of {len(lengths)} sequences, {longest} long or longer",
            got=f"shape {list(values.shape)}",
            fix="pad each sequence behind its tokens",
        )
    places = _padded_places(lengths, values.shape[1])
    return values.flatten(0, 1).index_select(0, device_copy(places, values.device))


def _padded_places(lengths: Table, width: int | None = None) -> Table:
    """Where each real token is in ``[D * width]``."""
    width = int(lengths.max(initial=0)) if width is None else width
    starts = np.cumsum(lengths) - lengths
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
    places: Table = np.repeat(np.arange(len(lengths), dtype=np.int64) * width, lengths) + within
    return places


def _real_tokens(documents: Documents) -> Table:
    real: Table = np.flatnonzero(documents.is_valid(np.arange(documents.num_tokens)))
    return real


def _lengths(documents: Documents) -> Table:
    """``[D]`` real tokens of each document."""
    of = documents.document_of(documents.runs[:, 0])
    lengths = np.bincount(of, weights=np.diff(documents.runs, axis=1)[:, 0], minlength=documents.num_documents)
    return lengths.astype(np.int64)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise InvalidTypeError(f"{name} must be a tensor", got=type(x).__name__, fix="torch.as_tensor makes one")
    check_plain(x, name)
