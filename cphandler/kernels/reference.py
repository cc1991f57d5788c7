"""The reference kernel: attention as the formula says, in strips of dense scores. Slow, exact, any dtype and device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cphandler.comm import accumulator_dtype
from cphandler.kernels.blocks import BlockKernel
from cphandler.kernels.kernel import Gradients, Saved, Task
from cphandler.kernels.strips import additive_mask, strips

ROWS = 256
"""Query rows of a strip; the scores of a strip are the largest temporary, ``[B, N, ROWS, keys]``."""


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, rows, N, ...]`` as ``[B, G, N / G, rows, ...]``."""
    grouped: Tensor = x.to(dtype).unflatten(2, (groups, -1)).movedim(1, 3)
    return grouped


def _ungrouped(x: Tensor) -> Tensor:
    """``[B, G, N / G, rows, ...]`` as ``[B, rows, N, ...]``."""
    return x.movedim(3, 1).flatten(2, 3)


class ReferenceKernel(BlockKernel):
    """Softmax attention by matrix products; 16-bit inputs are computed in float32."""

    name = "reference"

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Takes everything."""
        return None

    def blocks(self, task: Task, q: Tensor) -> Iterator[Task]:
        """Strips of ``ROWS`` query rows."""
        return strips(task, ROWS, task.nk)

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, scale: float) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockKernel.block_forward`."""
        scores, values, _, _ = self._scores(q, k, v, block, scale)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.exp(scores - lse.unsqueeze(-1)) @ values
        return _ungrouped(out), _ungrouped(lse)

    def block_backward(self, saved: Saved, k: Tensor, v: Tensor, block: Task, scale: float) -> Gradients:
        """See :meth:`BlockKernel.block_backward`."""
        scores, values, queries, keys = self._scores(saved.q, k, v, block, scale)
        groups, dtype = k.shape[2], scores.dtype
        weights = torch.exp(scores - _grouped(saved.lse, groups, dtype).unsqueeze(-1))
        grad_out = _grouped(saved.grad_out, groups, dtype)
        delta = (grad_out * _grouped(saved.out, groups, dtype)).sum(-1)
        if saved.grad_lse is not None:
            delta = delta - _grouped(saved.grad_lse, groups, dtype)
        grad_scores = weights * (grad_out @ values.mT - delta.unsqueeze(-1)) * scale
        dq = grad_scores @ keys
        dk = (grad_scores.mT @ queries).sum(2).movedim(2, 1)
        dv = (weights.mT @ grad_out).sum(2).movedim(2, 1)
        return Gradients(_ungrouped(dq), dk, dv)

    @staticmethod
    def _scores(q: Tensor, k: Tensor, v: Tensor, block: Task, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled, masked scores ``[B, G, N / G, nq, nk]``, and values, queries and keys in the same arrangement."""
        groups, dtype = k.shape[2], accumulator_dtype(q.dtype)
        queries = _grouped(q, groups, dtype)
        keys, values = _grouped(k, groups, dtype), _grouped(v, groups, dtype)
        scores = (queries @ keys.mT) * scale
        if not block.is_full:
            scores = scores + additive_mask(block, dtype, q.device)
        return scores, values, queries, keys
