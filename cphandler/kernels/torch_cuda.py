"""The attention kernels inside torch for CUDA: flash for 16-bit inputs, memory-efficient for float32.

Blocks are full or square-causal, where every kernel's causal flag means the same; the remaining strips (windows, ragged
edges), float64 and the gradient of the log-sum-exp are computed densely, a strip or tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cphandler.kernels.fused import (
    OPTIONS,
    around_square,
    causal_square,
    is_square_causal,
    narrowed,
    padded,
    unit_stride,
)
from cphandler.kernels.kernel import Gradients, Saved, Softmax
from cphandler.kernels.reference import ReferenceKernel
from cphandler.kernels.strips import strips
from cphandler.kernels.task import Task, Tasks

ALIGNMENT, WIDEST_HEAD = 8, 256
"""Head dims that flash takes: multiples of the one, up to the other."""

LSE_BLOCK = 32
"""The memory-efficient kernel keeps its log-sum-exp in rows of a multiple of this: ``kAlignLSE`` in its source."""

SMALLEST_SQUARE = 32
"""Diagonals shorter than this are not worth two more launches. A guess, like the strips of 256: timed on no GPU yet."""


class TorchCudaKernel(ReferenceKernel):
    """torch's CUDA attention kernels; their backward passes add in an order that changes from run to run."""

    name = "torch"
    deterministic = False
    takes_prefix = False
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Needs head dims that flash takes once they are padded."""
        widest = max(q.shape[-1], v.shape[-1])
        return None if widest <= WIDEST_HEAD else f"head dim {widest}: at most {WIDEST_HEAD} is possible"

    def blocks(self, task: Task, dtype: torch.dtype) -> Iterator[Task]:
        """Full blocks and squares whole, the rest in strips."""
        side = causal_square(task)
        if dtype == torch.float64:
            yield from super().blocks(task, dtype)
        elif task.is_full:
            yield task
        elif side >= SMALLEST_SQUARE:
            yield from around_square(task, side)
        else:
            yield from strips(task, 256, 256)

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockKernel.block_forward`."""
        causal = is_square_causal(block)
        if not (block.is_full or causal) or q.dtype == torch.float64:
            return super().block_forward(q, k, v, block, softmax)
        channels, scale = _channels(q, v), softmax.scale
        queries, keys, values = unit_stride(padded(q, channels)), *_repeated(q, k, v, channels)
        if q.dtype == torch.float32:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                queries, keys, values, None, True, 0.0, causal, scale=scale
            )
        else:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                queries, keys, values, 0.0, causal, False, scale=scale
            )
        return narrowed(out.transpose(1, 2), v.shape[-1]), lse[:, :, : block.nq].transpose(1, 2)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`.

        The fused operators know no gradient of the log-sum-exp, and blocks chosen for them are too large to be dense.
        """
        if saved.grad_lse is None:
            super().backward(saved, k, v, tasks, softmax, grads)
        else:
            ReferenceKernel().backward(saved, k, v, tasks, softmax, grads)

    def block_backward(
        self, saved: Saved, k: Tensor, v: Tensor, block: Task, softmax: Softmax
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`BlockKernel.block_backward`."""
        causal = is_square_causal(block)
        fused = (block.is_full or causal) and saved.q.dtype != torch.float64 and saved.grad_lse is None
        if not fused:
            return super().block_backward(saved, k, v, block, softmax)
        channels, groups = _channels(saved.q, v), k.shape[2]
        grad_out, queries, out = (unit_stride(padded(x, channels)) for x in (saved.grad_out, saved.q, saved.out))
        keys, values = _repeated(saved.q, k, v, channels)
        lse = saved.lse.transpose(1, 2)
        backward = _efficient_backward if saved.q.dtype == torch.float32 else _flash_backward
        dq, dk, dv = backward(grad_out, queries, keys, values, out=out, lse=lse, causal=causal, scale=softmax.scale)
        dq, dk, dv = (narrowed(x, to.shape[-1]) for x, to in ((dq, saved.q), (dk, k), (dv, v)))
        return dq.transpose(1, 2), _summed(dk, groups), _summed(dv, groups)


def _channels(q: Tensor, v: Tensor) -> int:
    """The head dim that queries, keys and values are padded to."""
    return -(-max(q.shape[-1], v.shape[-1]) // ALIGNMENT) * ALIGNMENT


def _repeated(q: Tensor, k: Tensor, v: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Keys and values with one head per query head, as ``[B, N, rows, D]``: the fused operators ask for equal heads."""
    times = q.shape[2] // k.shape[2]
    keys, values = unit_stride(padded(k, channels)), unit_stride(padded(v, channels))
    return (keys, values) if times == 1 else (keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1))


def _summed(grad: Tensor, groups: int) -> Tensor:
    """Add the gradients of the query heads that share a key head, in float32: ``[B, rows, G, D]``."""
    grouped: Tensor = grad.unflatten(1, (groups, -1))
    total = grouped.squeeze(2) if grouped.shape[2] == 1 else grouped.sum(2, dtype=torch.float32)
    return total.transpose(1, 2)


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The memory-efficient backward pass from an outside ``out`` and ``lse``; no dropout, so no random state."""
    rows = -(-q.shape[2] // LSE_BLOCK) * LSE_BLOCK
    whole = lse.new_full((*lse.shape[:2], rows), float("inf"))
    whole[:, :, : lse.shape[2]] = lse
    none = torch.zeros((), dtype=torch.int64, device="cpu")
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, whole, none, none, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, dk, dv


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The flash backward pass from an outside ``out`` and ``lse``."""
    none = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        none,
        none,
        scale=scale,
    )
    return gradients
