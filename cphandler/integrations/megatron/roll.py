"""Rolls of multi-token prediction inside each document, by the micro-batch's handler."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

from cphandler.integrations.megatron.parameters import handler_of
from cphandler.training.reductions import sum_over_tokens

MEGATRONS = multi_token_prediction.roll_tensor
"""Megatron's own, whatever stands in its place later."""


def roll_tensor(
    tensor: Tensor | None, shifts: int = -1, dims: int = -1, cp_group: Any = None, packed_seq_params: Any = None
) -> tuple[Tensor | None, Tensor | None]:
    """Megatron's ``roll_tensor``: by the handler that the parameters carry, else Megatron's own.

    Args:
        tensor: local, ``[b, L]``.
        shifts: tokens to shift by; Megatron's packed roll knows -1 alone.
        dims: dim of the sequence; Megatron's packed roll knows the last one alone.
        cp_group: for Megatron's own; a handler has its group.
        packed_seq_params: of the micro-batch.

    Returns:
        The rolled tensor and its sum over this rank's rows, as Megatron's: see :func:`batch_tokens`.
    """
    handler = handler_of(packed_seq_params)
    if handler is None:
        rolled: tuple[Tensor, Tensor] = MEGATRONS(tensor, shifts, dims, cp_group, packed_seq_params)
        return rolled
    return handler.roll_tensor(tensor, shifts, dims)


def roll_and_count(
    tensor: Tensor | None, shifts: int = -1, dims: int = -1, cp_group: Any = None, packed_seq_params: Any = None
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`roll_tensor` with :func:`batch_tokens` in place of this rank's sum: what the loss divides by."""
    rolled, number = roll_tensor(tensor, shifts, dims, cp_group, packed_seq_params)
    return rolled, number if number is None else batch_tokens(number, packed_seq_params)


def batch_tokens(number: Tensor, packed_seq_params: Any) -> Tensor:
    """The tokens of the batch over its ranks: what each rank divides its sum of losses by, in a loop of your own.

    Megatron averages gradients, and the losses it logs, over data- and context-parallel ranks. The average of local
    sums over this number is the sum of all over the batch's tokens; over each rank's own count it is a mean of means,
    which is another number as soon as ranks hold other counts, and 0 / 0 on a rank without any. Megatron's schedules
    multiply or divide once more: :func:`~cphandler.integrations.megatron.loss_func` is for them.

    Args:
        number: this rank's tokens that count, 0-dim.
        packed_seq_params: of the micro-batch; Megatron's own parameters leave the number as it is.

    Returns:
        float64, at least the smallest positive share, so that a batch without tokens has loss 0.
    """
    handler = handler_of(packed_seq_params)
    if handler is None:
        return number
    total = sum_over_tokens(number.detach().to(torch.float64), handler)
    return total.clamp_min(1.0) / handler.effective_cp_size
