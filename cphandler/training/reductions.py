"""A loss over the tokens of the whole batch from the rows of one rank: its value everywhere, its gradient in parts."""

from __future__ import annotations

from reprlib import repr as short_repr
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from cphandler.comm.collectives import all_gather
from cphandler.comm.groups import GroupSource
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.precision import accumulator_dtype
from cphandler.training.arguments import check_floats, check_mask, checked_divisor, checked_handler
from cphandler.training.log_probs import token_log_probs
from cphandler.training.rows import (
    agreed,
    check_one_per_token,
    further_holders,
    holders,
    real_rows,
    sequence_numbers,
)

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
    handler = checked_handler(handler)

    def check() -> tuple[str, ...]:
        check_floats("values", values)
        return *holders(handler), *further_holders(group)

    names = agreed(handler, "sum_over_tokens", check, lambda _: f"{_dtype_of(values)} {list(values.shape)}")
    return _summed(values, names)


def _summed(values: Tensor, names: tuple[str, ...]) -> Tensor:
    """See :func:`sum_over_tokens`."""
    total: Tensor = _Everyone.apply(values, names)  # type: ignore[no-untyped-call]
    return total


def _dtype_of(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def reduce_token_loss(
    values: Tensor,
    mask: Tensor,
    handler: ContextParallelHandler,
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    group: GroupSource = None,
) -> Tensor:
    """One loss from per-token values: the whole batch's on every rank, with this rank's part of the gradient.

    Parameter gradients are to be summed over the ranks of the context-parallel group and of ``group``; dividing by a
    rank's own tokens, or averaging ranks' means, is wrong wherever ranks hold other numbers of them. A sequence's
    denominator counts all its tokens, also those on other ranks. Padding never counts, whatever the mask says. Values
    under a zero of the mask count as 0 whatever they hold, and their gradients exist and are 0; with no tokens at all
    the loss is 0.

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
        num_sequences: the same for the means over sequences: how many with a token that counts the step has.
        group: the data-parallel group, for a mean over all its batches.

    Returns:
        A number in float32 (float64 for float64).

    Raises:
        InvalidTypeError: values that are not floating point.
        InvalidValueError: shapes that do not fit, an unknown reduction, a divisor that is missing or not asked for.
    """
    handler = checked_handler(handler)
    divisors = {"normalizer": normalizer, "num_tokens": num_tokens, "num_sequences": num_sequences}

    def check() -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
        _check(values, mask, reduction, divisors)
        real = real_rows(handler, values, check_one_per_token("values", values, handler))
        return real, holders(handler), further_holders(group)

    real, names, further = agreed(handler, "reduce_token_loss", check, lambda _: f"{reduction} of {_dtype_of(values)}")
    weights = mask.to(accumulator_dtype(values.dtype)).masked_fill(~real, 0.0)
    kept = values.to(weights.dtype).masked_fill(weights == 0, 0.0)
    if reduction.startswith("sequence"):
        of_sequences = _over_sequences(kept * weights, weights, handler, reduction, names)
        total, count = _summed(of_sequences, further).unbind()
        return _divided(total, count if num_sequences is None else num_sequences)
    sums = torch.stack([(kept * weights).sum(), weights.sum()])
    total, count = _summed(sums, names + further).unbind()
    if reduction == "token_sum":
        return total
    if reduction == "fixed":
        assert normalizer is not None
        return _divided(total, normalizer)
    return _divided(total, count if num_tokens is None else num_tokens)


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    handler: ContextParallelHandler,
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
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
        num_sequences: see :func:`reduce_token_loss`.
        group: the data-parallel group.
        **options: of :func:`token_log_probs`: ``temperature``, ``chunk_size``, ``tp_group``, ``vocab_size``, ``exact``.
    """
    handler = checked_handler(handler)

    def check() -> Tensor:
        values = token_log_probs(logits, labels, **options)
        if not isinstance(values, Tensor):
            fix = "call token_log_probs"
            raise InvalidTypeError("a loss is one number", got="return_entropy or return_top1", fix=fix)
        return values

    values = agreed(handler, "language_model_loss", check, _dtype_of)
    divisors: dict[str, Any] = {"normalizer": normalizer, "num_tokens": num_tokens, "num_sequences": num_sequences}
    return reduce_token_loss(-values, labels >= 0, handler, reduction=reduction, group=group, **divisors)


def _divided(total: Tensor, divisor: float | Tensor) -> Tensor:
    """A quotient without a gradient of what divides; 0 of 0 is 0."""
    by = torch.as_tensor(divisor, dtype=total.dtype, device=total.device).detach().reshape(())
    return total / by.masked_fill(by == 0, 1.0)


def _over_sequences(
    values: Tensor, weights: Tensor, handler: ContextParallelHandler, reduction: str, names: tuple[str, ...]
) -> Tensor:
    """The sum over the batch's sequences, and how many have a token that counts."""
    sequence, number = sequence_numbers(values, handler)
    sums = values.new_zeros(2, number).index_add(1, sequence, torch.stack([values.flatten(), weights.flatten()]))
    totals, counts = _summed(sums, names).unbind()
    counts = counts.detach()
    present = counts > 0
    if reduction == "sequence_mean_of_token_mean":
        totals = totals / counts.masked_fill(~present, 1.0)
    return torch.stack([totals.sum(), present.sum().to(totals.dtype)])


DIVISORS = {
    "normalizer": ("fixed",),
    "num_tokens": ("token_mean",),
    "num_sequences": ("sequence_mean_of_token_mean", "sequence_mean_of_token_sum"),
}
"""Which reductions each divisor is for."""


def _check(values: Tensor, mask: Tensor, reduction: str, divisors: dict[str, float | Tensor | None]) -> None:
    check_floats("values", values)
    check_mask(mask, values)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise InvalidValueError("unknown reduction", got=short_repr(reduction), fix=f"choose {', '.join(REDUCTIONS)}")
    for name, divisor in divisors.items():
        if divisor is not None and reduction not in DIVISORS[name]:
            raise InvalidValueError(
                f"{name} belongs to the reduction {' or '.join(DIVISORS[name])}",
                got=f"{name} with {reduction}",
                fix=f"choose that, or leave {name} out",
            )
        if divisor is not None:
            checked_divisor(name, divisor)
    if reduction == "fixed" and divisors["normalizer"] is None:
        raise InvalidValueError("the reduction fixed divides by a normalizer", got="none", fix="pass normalizer=")
