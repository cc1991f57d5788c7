"""Metrics of the whole batch from the rows of one rank: the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cphandler.comm.collectives import all_gather
from cphandler.comm.groups import GroupSource
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.training.arguments import INTEGERS, MASKS, check_floats, check_integers, check_rows, checked_handler
from cphandler.training.rows import agreed, check_one_per_token, further_holders, holders, real_rows


def token_count(labels_or_mask: Tensor, handler: ContextParallelHandler, group: GroupSource = None) -> Tensor:
    """How many tokens of the whole batch count: each once, however many ranks there are.

    Args:
        labels_or_mask: local: labels, of which negative ones do not count, or a bool mask.
        handler: the batch's.
        group: the data-parallel group, whose batches are counted too.

    Returns:
        A number, int64, where the argument is. A sum of it over micro-batches is the ``num_tokens`` of a step.

    Raises:
        InvalidTypeError: neither integers nor bool.
        InvalidValueError: rows that are not this rank's.
    """

    def own() -> Tensor:
        check_rows("labels_or_mask", labels_or_mask, (torch.bool, *INTEGERS), "integers or bool")
        counted = labels_or_mask if labels_or_mask.dtype == torch.bool else labels_or_mask >= 0
        return _counted(counted, handler).sum()

    return _over_ranks("token_count", own, handler, group)


@torch.no_grad()
def token_mean(values: Tensor, mask: Tensor, handler: ContextParallelHandler, group: GroupSource = None) -> Tensor:
    """The mean over all tokens that count, to be shown; no gradient. 0 where none does.

    Args:
        values: one floating-point number for each local token.
        mask: which count, bool or weights of 0 and above; the shape of ``values``.
        handler: the batch's.
        group: the data-parallel group.

    Returns:
        A number, float64.

    Raises:
        InvalidTypeError: values that are not floating point.
        InvalidValueError: rows that are not this rank's, shapes that differ.
    """

    def own() -> Tensor:
        check_floats("values", values)
        check_rows("mask", mask, MASKS, "bool or numbers")
        _check_alike("mask", mask, "values", values)
        weights = _counted(mask != 0, handler) * mask.to(torch.float64)
        kept = values.to(torch.float64).masked_fill(weights == 0, 0.0)
        return torch.stack([(kept * weights).sum(), weights.sum()])

    total, count = _over_ranks("token_mean", own, handler, group).unbind()
    return total / count.masked_fill(count == 0, 1.0)


@torch.no_grad()
def token_accuracy(
    predictions: Tensor, labels: Tensor, handler: ContextParallelHandler, group: GroupSource = None
) -> Tensor:
    """The part of all labels that was predicted; 0 where there are none.

    Args:
        predictions: local token numbers, such as ``top1`` of :func:`token_log_probs`.
        labels: local; negative ones do not count.
        handler: the batch's.
        group: the data-parallel group.

    Returns:
        A number, float64: of two exact counts, so that its bits do not depend on the ranks.

    Raises:
        InvalidTypeError: not integers.
        InvalidValueError: rows that are not this rank's, shapes that differ.
    """

    def own() -> Tensor:
        check_integers("predictions", predictions)
        check_integers("labels", labels)
        _check_alike("predictions", predictions, "labels", labels)
        counted = _counted(labels >= 0, handler)
        return torch.stack([((predictions == labels) & counted).sum(), counted.sum()])

    right, count = _over_ranks("token_accuracy", own, handler, group).to(torch.float64).unbind()
    return right / count.clamp_min(1)


@torch.no_grad()
def token_histogram(
    values: Tensor,
    mask: Tensor,
    handler: ContextParallelHandler,
    *,
    edges: Sequence[float] | Tensor,
    group: GroupSource = None,
) -> Tensor:
    """How many tokens that count have a value in each bin.

    Args:
        values: one floating-point number for each local token.
        mask: which count, bool or not 0; the shape of ``values``.
        handler: the batch's.
        edges: ``[n + 1]`` ascending; bin i is ``[edges[i], edges[i + 1])``, the last with its upper edge. Values
            outside, and NaN, are in none.
        group: the data-parallel group.

    Returns:
        ``[n]`` int64.

    Raises:
        InvalidTypeError: values that are not floating point.
        InvalidValueError: rows that are not this rank's, shapes that differ, edges that do not ascend.
    """

    def own() -> Tensor:
        check_floats("values", values)
        check_rows("mask", mask, MASKS, "bool or numbers")
        _check_alike("mask", mask, "values", values)
        bounds = _checked_edges(edges).to(values.device)
        exact = values.to(torch.float64)
        counted = _counted(mask != 0, handler) & (exact >= bounds[0]) & (exact <= bounds[-1])
        bins = (torch.bucketize(exact, bounds, right=True) - 1).clamp(0, len(bounds) - 2)
        counts = counted.new_zeros(len(bounds) - 1, dtype=torch.int64)
        return counts.index_add(0, bins.flatten(), counted.flatten().to(torch.int64))

    return _over_ranks("token_histogram", own, handler, group)


def _counted(mask: Tensor, handler: ContextParallelHandler) -> Tensor:
    """Which rows of a mask count: none of padding."""
    return mask & real_rows(handler, mask, check_one_per_token("the tensor", mask, handler))


def _over_ranks(name: str, own: Callable[[], Tensor], handler: ContextParallelHandler, group: GroupSource) -> Tensor:
    """What each rank has, summed over the ranks that hold other tokens.

    Args:
        name: of the function.
        own: checks the arguments of this rank, and gives what it has.
        handler: the batch's.
        group: the data-parallel group.
    """
    handler = checked_handler(handler)

    def check() -> tuple[Tensor, tuple[str, ...]]:
        return own(), (*holders(handler), *further_holders(group))

    part, names = agreed(handler, name, check, lambda found: str(list(found[0].shape)))
    for each in names:
        part = all_gather(part.unsqueeze(0), each).sum(0)
    return part


def _check_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise InvalidValueError(
            f"{name} must have the shape of the {other}",
            got=f"{list(x.shape)} beside {list(y.shape)}",
            fix="pass this rank's rows of both",
        )


def _checked_edges(edges: Sequence[float] | Tensor) -> Tensor:
    try:
        given = torch.as_tensor(edges).detach().cpu()
        bounds = given.to(torch.float64) if not given.is_complex() else given.new_empty(0, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError("edges must be numbers", got=type(edges).__name__, fix="[0, .5, 1], say") from error
    if bounds.dim() != 1 or len(bounds) < 2 or not bool((bounds[1:] > bounds[:-1]).all()):
        raise InvalidValueError("edges must ascend", got=f"shape {list(bounds.shape)}", fix="[0, .5, 1], say")
    return bounds
