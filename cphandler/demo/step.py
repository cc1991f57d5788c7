"""One training step's parts: the loss of a batch on this rank, and gradients summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cphandler import (
    ContextParallelHandler,
    gather_tokens,
    get_batch_on_this_cp_rank,
    language_model_loss,
    loss_scale,
    next_token_labels,
    token_log_probs,
)
from cphandler.training.reductions import Reduction

FURTHER_WEIGHT = 0.3
"""What the mean loss of further tokens counts beside that of the next."""


@dataclass(frozen=True)
class Totals:
    """Of all batches of a step, for each depth of prediction.

    Attributes:
        tokens: labels.
        sequences: documents with a label.
        rows: physical tokens.
    """

    tokens: list[int]
    sequences: list[int]
    rows: int

    @classmethod
    def of(cls, batches: list[dict[str, Any]], further: int) -> Totals:
        """Counted from the documents' lengths: the last ``depth`` tokens of each have no label."""
        lengths = torch.cat([batch["cu_seqlens"].diff() for batch in batches])
        left = [(lengths - depth).clamp(min=0) for depth in range(1, further + 2)]
        rows = sum(len(batch["tokens"]) for batch in batches)
        return cls([int(x.sum()) for x in left], [int((x > 0).sum()) for x in left], rows)

    def divisor(self, reduction: Reduction, depth: int) -> dict[str, float]:
        """What the loss of one depth divides by, so that the batches of a step are counted once."""
        if reduction == "token_mean":
            return {"num_tokens": max(1, self.tokens[depth])}
        if reduction == "fixed":
            return {"normalizer": self.rows}
        return {"num_sequences": max(1, self.sequences[depth])}


@dataclass(frozen=True)
class Objective:
    """What a step minimizes.

    Attributes:
        reduction: over tokens and sequences.
        totals: of the step's batches.
        data_group: the data-parallel group; None for one rank.
    """

    reduction: Reduction
    totals: Totals
    data_group: dist.ProcessGroup | None = None


def batch_loss(
    model: nn.Module, batch: dict[str, Any], handler: ContextParallelHandler, device: str, objective: Objective
) -> Tensor:
    """A batch's part of the step's loss; its gradient on each rank is that rank's part."""
    tokens = get_batch_on_this_cp_rank(batch, cp_handler=handler)["tokens"].to(device)
    depths = len(objective.totals.tokens)
    labels = next_token_labels(tokens, handler, depths=depths)
    logits = model(tokens, cp_handler=handler, labels=labels)
    losses = [
        language_model_loss(
            logits[depth],
            labels[depth],
            handler,
            reduction=objective.reduction,
            group=objective.data_group,
            **objective.totals.divisor(objective.reduction, depth),
        )
        for depth in range(depths)
    ]
    return losses[0] + FURTHER_WEIGHT * torch.stack(losses[1:]).mean() if depths > 1 else losses[0]


def training_step(model: nn.Module, batch: dict[str, Any], handler: ContextParallelHandler, device: str) -> float:
    """Forward, backward and the sum over ranks of one batch; returns the mean loss over its tokens."""
    loss = batch_gradient(model, batch, handler, device)
    if handler.cp_size > 1:
        sum_gradients(model, [handler.group])
    return loss


def batch_gradient(model: nn.Module, batch: dict[str, Any], handler: ContextParallelHandler, device: str) -> float:
    """Forward and backward of one batch: this rank's part of the gradient; returns the mean loss over its tokens."""
    loss = batch_loss(model, batch, handler, device, Objective("token_mean", Totals.of([batch], 0)))
    (loss * loss_scale("sum", handler)).backward()
    return float(loss.detach())


def sum_gradients(model: nn.Module, groups: Sequence[Any]) -> None:
    """Sum all gradients over the ranks of each group, in one message."""
    parameters = list(model.parameters())
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in parameters if parameter.grad is not None])
    for group in groups:
        dist.all_reduce(gradient, group=group)
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def scores_of(model: nn.Module, batch: dict[str, Any], handler: ContextParallelHandler, device: str) -> Tensor:
    """``[T]`` log-probabilities of a batch's labels, as one rank has them."""
    tokens = get_batch_on_this_cp_rank(batch, cp_handler=handler)["tokens"].to(device)
    scores = token_log_probs(model(tokens, cp_handler=handler), next_token_labels(tokens, handler))
    assert isinstance(scores, Tensor)
    return gather_tokens(scores, handler).cpu()


@torch.no_grad()
def rows_are_alone(model: nn.Module, rows: int, local_rows: int) -> bool:
    """Whether a row of each linear layer has the same bits among all rows as among a rank's: a probe."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight = layer.weight.full_tensor() if hasattr(layer.weight, "full_tensor") else layer.weight
        x = torch.randn(rows, layer.in_features, generator=generator).to(weight)
        whole = nn.functional.linear(x, weight)
        for start in range(0, rows, max(1, local_rows)):
            part = slice(start, start + local_rows)
            if not torch.equal(nn.functional.linear(x[part], weight), whole[part]):
                return False
    return True
