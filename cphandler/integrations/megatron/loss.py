"""The loss that Megatron's schedules ask for, over a batch whose tokens are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cphandler.integrations.megatron.parameters import handler_of
from cphandler.integrations.megatron.roll import batch_tokens


def loss_func(loss_mask: Tensor, packed_seq_params: Any, config: Any, losses: Tensor) -> tuple[Any, ...]:
    """What a ``forward_step`` hands to a schedule, once ``functools.partial`` holds all but the losses.

    Schedules multiply two values by the context-parallel size, divide three by this rank's own count, and with
    ``calculate_per_token_loss`` leave both to the sum over all ranks; DDP averages over ranks, or adds up. So that the
    gradient is that of the mean over each micro-batch's tokens, or with ``calculate_per_token_loss`` over the tokens of
    all, whatever share of them a rank holds.

    Args:
        loss_mask: ``[..]`` weights of this rank's tokens, in the shape of ``losses``.
        packed_seq_params: of the micro-batch; Megatron's own parameters get what Megatron's own function gives.
        config: the model's.
        losses: the model's output, a loss for each of this rank's tokens.

    Returns:
        ``(loss, report)`` or ``(sum, count, report)``, with the report of Megatron's own function: this rank's sum and
        count, which the training loop adds up over ranks before it divides.
    """
    weights = loss_mask.reshape(-1).float()
    total, count = (losses.reshape(-1).float() * weights).sum(), weights.sum()
    report = {"lm loss": torch.stack([total.detach(), count])}
    if config.calculate_per_token_loss or handler_of(packed_seq_params) is None:
        return total, count.to(torch.int32), report
    share = batch_tokens(count, packed_seq_params) * config.context_parallel_size  # which the schedule multiplies by
    return total / share.to(total.dtype), report
