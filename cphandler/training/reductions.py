"""A loss over the tokens of the whole batch from the rows of one rank: its value everywhere, its gradient in parts."""

from __future__ import annotations

from reprlib import repr as short_repr
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.collectives import all_gather
from cphandler.comm.groups import GroupSource, resolve_group
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.precision import ATTENTION_DTYPES, accumulator_dtype
from cphandler.training.arguments import INTEGERS, check_floats, check_rows, checked_divisor, checked_handler
from cphandler.training.log_probs import token_log_probs

Reduction: TypeAlias = Literal[
    "token_mean", "token_sum", "sequence_mean_of_token_mean", "sequence_mean_of_token_sum", "fixed"
]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


class _Everyone(torch.autograd.Function):
    """The sum over ranks, in rank order; backward every rank gets the gradient of its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, names: tuple[str, ...]) -> Tensor:
        total = part
        for name in names:
            parts = all_gather(total.unsqueeze(0), name)
            total = parts[0].clone()
            for other in parts[1:]:
                total += other
        return total.clone() if total is part else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over_tokens(values: Tensor, handler: ContextParallelHandler, *, group: GroupSource = None) -> Tensor:
    """The sum over ranks of what each rank summed over its own tokens: the batch's, on every rank alike.

    For a loss that is a ratio of sums, such as the balance of a mixture of experts: each sum is made the batch's before
    it is divided. Backward each rank's part gets the gradient of the whole, so that parameter gradients are to be
    summed over ranks, like those of all losses here.

    Args:
        values: of any shape, the same on every rank: sums over local tokens.
        handler: the batch's; on a layout that every rank holds whole nothing is summed.
        group: ranks that hold other batches of the same step (data parallel), to be summed over too.
    """
    check_floats("values", values)
    handler = checked_handler(handler)
    names = [handler.ranks.name] if handler.sequence_sharded and handler.cp_size > 1 else []
    if group is not None:
        other = resolve_group(group)
        names += [other.name] if other.size > 1 else []
    total: Tensor = _Everyone.apply(values, tuple(name for name in names if name))  # type: ignore[no-untyped-call]
    return total


def reduce_token_loss(
    values: Tensor,
    mask: Tensor,
    handler: ContextParallelHandler,
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    group: GroupSource = None,
) -> Tensor:
    """One loss from per-token values: the whole batch's on every rank, with this rank's part of the gradient.

    Parameter gradients are to be summed over the ranks of the context-parallel group and of ``group``; dividing by a
    rank's own tokens, or averaging ranks' means, is wrong wherever ranks hold other numbers of them. A sequence's
    denominator counts all its tokens, also those on other ranks. Values under a zero of the mask count as 0 whatever
    they hold, and their gradients exist and are 0; with no tokens at all the loss is 0.

    Args:
        values: local, ``[L]`` or ``[1, L]`` packed, else the batch's rows as ``dispatch`` gave them; differentiable.
        mask: which of them count, bool, or weights of 0 and above; the shape of ``values``.
        handler: the batch's.
        reduction: ``"token_mean"``; ``"token_sum"``; ``"sequence_mean_of_token_mean"`` and
            ``"sequence_mean_of_token_sum"``, the mean over sequences that have a token that counts; ``"fixed"``, the
            sum over ``normalizer``.
        normalizer: what ``"fixed"`` divides by.
        num_tokens: what ``"token_mean"`` divides by in place of this batch's tokens: those of all micro-batches of a
            step, so that accumulated gradients are the step's.
        group: the data-parallel group, for a mean over all its batches.

    Returns:
        A number in float32 (float64 for float64).

    Raises:
        InvalidTypeError: values that are not floating point.
        InvalidValueError: shapes that do not fit, an unknown reduction, a divisor that is missing or not asked for.
    """
    handler = checked_handler(handler)
    _check(values, mask, reduction, normalizer, num_tokens)
    kept = values.to(accumulator_dtype(values.dtype)).masked_fill(mask == 0, 0.0)
    weights = mask.to(kept.dtype)
    if reduction.startswith("sequence"):
        return _over_sequences(kept * weights, weights, handler, reduction, group)
    sums = torch.stack([(kept * weights).sum(), weights.sum()])
    total, count = sum_over_tokens(sums, handler, group=group).unbind()
    if reduction == "token_sum":
        return total
    divisor = normalizer if reduction == "fixed" else count.detach() if num_tokens is None else num_tokens
    divisor = torch.as_tensor(divisor, dtype=total.dtype, device=total.device)
    return total / divisor.masked_fill(divisor == 0, 1.0)


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    handler: ContextParallelHandler,
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    group: GroupSource = None,
    **options: Any,
) -> Tensor:
    """Cross entropy of local logits and labels as one loss of the whole batch: see :func:`reduce_token_loss`.

    Args:
        logits: ``[..., V]`` local.
        labels: ``[...]`` local, negative where none counts: what ``next_token_labels`` gives.
        handler: the batch's.
        reduction: over tokens and sequences.
        normalizer: see :func:`reduce_token_loss`.
        num_tokens: see :func:`reduce_token_loss`.
        group: the data-parallel group.
        **options: of :func:`token_log_probs`: ``temperature``, ``chunk_size``, ``tp_group``, ``vocab_size``, ``exact``.
    """
    values = token_log_probs(logits, labels, **options)
    if not isinstance(values, Tensor):
        raise InvalidTypeError("a loss is one number", got="return_entropy or return_top1", fix="call token_log_probs")
    divisors: dict[str, Any] = {"normalizer": normalizer, "num_tokens": num_tokens}
    return reduce_token_loss(-values, labels >= 0, handler, reduction=reduction, group=group, **divisors)


def _over_sequences(
    values: Tensor, weights: Tensor, handler: ContextParallelHandler, reduction: str, group: GroupSource
) -> Tensor:
    sequence, number = _sequences(values, handler)
    sums = values.new_zeros(2, number).index_add(1, sequence, torch.stack([values.flatten(), weights.flatten()]))
    totals, counts = sum_over_tokens(sums, handler).unbind()
    counts = counts.detach()
    present = counts > 0
    if reduction == "sequence_mean_of_token_mean":
        totals = totals / counts.masked_fill(~present, 1.0)
    own = torch.stack([totals.sum(), present.sum().to(totals.dtype)])
    if group is not None:
        own = _Everyone.apply(own, (resolve_group(group).name,))  # type: ignore[no-untyped-call]
    total, sequences = own.unbind()
    return total / sequences.detach().clamp_min(1.0)


def _sequences(values: Tensor, handler: ContextParallelHandler) -> tuple[Tensor, int]:
    """Of each local value the number of its sequence, and how many there are in the batch."""
    if handler.qkv_format == "thd":
        documents = handler.documents
        numbers = torch.from_numpy(documents.document_of(np.arange(documents.num_tokens)))
        local = handler.dispatch(numbers, 0, pad_value=0)
        return local.to(values.device).expand(values.shape).reshape(-1), max(1, documents.num_documents)
    batch_dim = 1 if handler.qkv_format == "sbhd" else 0
    rows = torch.arange(values.shape[batch_dim], device=values.device)
    shape = (1, -1) if batch_dim else (-1, 1)
    return rows.view(shape).expand(values.shape).reshape(-1), values.shape[batch_dim]


def _check(values: Tensor, mask: Tensor, reduction: str, normalizer: object, num_tokens: object) -> None:
    check_floats("values", values)
    check_rows("mask", mask, (torch.bool, *ATTENTION_DTYPES, *INTEGERS), "bool or numbers")
    if mask.shape != values.shape:
        raise InvalidValueError(
            "mask must have the shape of the values",
            got=f"{list(mask.shape)} beside {list(values.shape)}",
            fix="dispatch both, with pad_value=0 for the mask",
        )
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise InvalidValueError("unknown reduction", got=short_repr(reduction), fix=f"choose {', '.join(REDUCTIONS)}")
    if (normalizer is not None) != (reduction == "fixed"):
        raise InvalidValueError(
            "normalizer belongs to the reduction fixed",
            got=f"normalizer {short_repr(normalizer)} with {reduction}",
            fix='pass both, or num_tokens= with "token_mean"',
        )
    if num_tokens is not None and reduction != "token_mean":
        raise InvalidValueError(
            "num_tokens belongs to the reduction token_mean",
            got=f"num_tokens with {reduction}",
            fix='"fixed" with normalizer= divides a sum',
        )
    for name, divisor in (("normalizer", normalizer), ("num_tokens", num_tokens)):
        if divisor is not None:
            checked_divisor(name, divisor)
