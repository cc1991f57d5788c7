"""By what to multiply a loss, so that the gradients that an engine reduces in its own way are the batch's."""

from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as short_repr
from typing import Literal, NamedTuple, TypeAlias, get_args

from cphandler.comm.groups import GroupSource, resolve_group
from cphandler.errors import InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.tokens.counts import checked_count
from cphandler.training.arguments import checked_handler

Convention: TypeAlias = Literal[
    "sum", "sum_over_cp_mean_over_dp", "mean", "megatron", "megatron_per_token", "huggingface"
]
"""What an engine does to gradients; see :func:`loss_scale`."""


class _Ranks(NamedTuple):
    """How many ranks do what.

    Attributes:
        cp: context-parallel ranks.
        parts: parts that the tokens of a batch are in: ``cp``, or 1 where each rank holds all of them.
        dp: data-parallel ranks.
        micro_batches: of a step.
    """

    cp: int
    parts: int
    dp: int
    micro_batches: int


_SCALES: dict[str, Callable[[_Ranks], float]] = {
    "sum": lambda ranks: ranks.parts / ranks.cp,
    "sum_over_cp_mean_over_dp": lambda ranks: ranks.dp * ranks.parts / ranks.cp,
    "mean": lambda ranks: ranks.dp * ranks.parts,
    "megatron": lambda ranks: ranks.micro_batches * ranks.dp * ranks.parts / ranks.cp,
    "megatron_per_token": lambda ranks: 1.0,
    "huggingface": lambda ranks: float(ranks.parts),
}


def loss_scale(
    convention: Convention,
    handler: ContextParallelHandler,
    *,
    group: GroupSource = None,
    num_micro_batches: int = 1,
) -> float:
    """By what to multiply a loss before ``backward()``, so that reduced gradients are those of the whole step.

    For the losses of this library, whose gradient on each rank is this rank's part and whose denominators are the
    whole step's (``group=`` and ``num_tokens=``). What the engine does afterwards decides:

    - ``"sum"``: gradients are summed over all ranks.
    - ``"sum_over_cp_mean_over_dp"``: summed over the context-parallel ranks, averaged over the data-parallel ones.
    - ``"mean"``: averaged over both, as DDP and FSDP do with their default settings.
    - ``"megatron"``: Megatron's schedule with a loss function that returns two values: it multiplies the loss by the
      context-parallel size and divides by the micro-batches; its DDP averages over both. The loss is a token mean with
      ``num_tokens`` of all micro-batches.
    - ``"megatron_per_token"``: Megatron's schedule with ``calculate_per_token_loss`` and a loss function that returns
      three: the loss is ``"token_sum"``'s gradient, the second value this rank's own number of tokens.
    - ``"huggingface"``: the Trainer's ``num_items_in_batch`` as ``num_tokens``. Each of its processes counts the batch,
      those that share one too, and it multiplies the loss by the number of processes before DDP averages.

    A layout that every rank holds whole (``"replicated"``) has its factor too: each rank's gradient is then the whole.

    Args:
        convention: one of these.
        handler: the batch's.
        group: the data-parallel group, as in the loss.
        num_micro_batches: of a step; only Megatron's schedule divides by them.

    Raises:
        InvalidValueError: an unknown convention, fewer than one micro-batch.
    """
    handler = checked_handler(handler)
    if not isinstance(convention, str) or convention not in _SCALES:
        known = ", ".join(get_args(Convention))
        raise InvalidValueError("unknown convention", got=short_repr(convention), fix=f"choose {known}")
    count = checked_count("num_micro_batches", num_micro_batches, least=1, fix="pass those of one step")
    dp = 1 if group is None else resolve_group(group).size
    return _SCALES[convention](_Ranks(handler.cp_size, handler.effective_cp_size, dp, count))
