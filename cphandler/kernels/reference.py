"""The reference kernel: attention as the formula says, in tiles of dense scores. Slow, exact, any dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cphandler.kernels.blocks import BlockKernel
from cphandler.kernels.dropout import keep_mask
from cphandler.kernels.kernel import COLUMNS, ROWS, Saved, Softmax, grouped
from cphandler.kernels.strips import additive_mask, tiles
from cphandler.kernels.task import Task
from cphandler.precision import accumulator_dtype


class _Dense(NamedTuple):
    """A block in the accumulators' dtype, heads in groups.

    Attributes:
        queries: ``[B, G, N / G, nq, D]``.
        keys: ``[B, G, 1, nk, D]``.
        values: ``[B, G, 1, nk, D_v]``.
        scores: scaled, capped and masked, ``[B, G, N / G, nq, nk]``.
        slope: derivative of a seen score by ``q.k``; a tensor where scores are capped.
        factor: what dropout multiplies the weights by, 0 or ``1 / (1 - p)``; None without.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    slope: Tensor | float
    factor: Tensor | None


class ReferenceKernel(BlockKernel):
    """Softmax attention by matrix products; 16-bit inputs are computed in float32."""

    name = "reference"
    takes_prefix = True
    refuses: ClassVar[Mapping[str, str]] = {}

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Takes everything."""
        return None

    def blocks(self, task: Task, dtype: torch.dtype) -> Iterator[Task]:
        """Tiles of ``ROWS`` query rows and ``COLUMNS`` keys."""
        return tiles(task, ROWS, COLUMNS)

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockKernel.block_forward`."""
        dense = _dense(q, k, v, block, softmax)
        lse = torch.logsumexp(dense.scores, dim=-1)
        weights = torch.exp(dense.scores - lse.unsqueeze(-1))
        if dense.factor is not None:
            weights *= dense.factor
        return _ungrouped(weights @ dense.values), _ungrouped(lse)

    def block_backward(
        self, saved: Saved, k: Tensor, v: Tensor, block: Task, softmax: Softmax
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`BlockKernel.block_backward`.

        With dropout the row sum of output times gradient still is the sum of weights times their gradients: the factor
        that is in the output's weights is in those gradients.
        """
        dense = _dense(saved.q, k, v, block, softmax)
        groups, dtype = k.shape[2], dense.scores.dtype
        grad_out = grouped(saved.grad_out, groups, dtype)
        delta = (grad_out * grouped(saved.out, groups, dtype)).sum(-1)
        if saved.grad_lse is not None:
            delta = delta - grouped(saved.grad_lse, groups, dtype)
        weights = torch.exp(dense.scores - grouped(saved.lse, groups, dtype).unsqueeze(-1))
        used, grad_weights = weights, grad_out @ dense.values.mT
        if dense.factor is not None:
            used, grad_weights = weights * dense.factor, grad_weights * dense.factor
        grad_scores = weights * (grad_weights - delta.unsqueeze(-1)) * dense.slope
        dq = grad_scores @ dense.keys
        dk = (grad_scores.mT @ dense.queries).sum(2).movedim(2, 1)
        dv = (used.mT @ grad_out).sum(2).movedim(2, 1)
        return _ungrouped(dq), dk, dv


def _dense(q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> _Dense:
    groups, dtype = k.shape[2], accumulator_dtype(q.dtype)
    queries, keys, values = (grouped(x, groups, dtype) for x in (q, k, v))
    scores = (queries @ keys.mT) * softmax.scale
    slope: Tensor | float = softmax.scale
    if softmax.softcap is not None:
        bent = torch.tanh(scores / softmax.softcap)
        scores, slope = bent * softmax.softcap, (1 - bent * bent) * softmax.scale
    if not block.is_full:
        scores = scores + additive_mask(block, dtype, q.device, softmax.masks)
    factor = None
    if softmax.dropout is not None:
        kept = keep_mask(softmax.dropout).unflatten(1, (groups, -1))
        factor = kept.to(dtype) / (1 - softmax.dropout.p)
    return _Dense(queries, keys, values, scores, slope, factor)


def _ungrouped(x: Tensor) -> Tensor:
    """``[B, G, N / G, rows, ...]`` as ``[B, rows, N, ...]``."""
    return x.movedim(3, 1).flatten(2, 3)
