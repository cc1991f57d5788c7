"""The flash kernel inside torch for CPUs, over blocks chosen so that little hidden work is computed.

The kernel is ``aten::_scaled_dot_product_flash_attention_for_cpu``. What it demands, and what this file therefore takes
care of: its causal flag is right for square blocks only; its mask must be floating point; last strides must be 1;
values need the head dim of queries; it kills the process on empty inputs; it skips hidden keys in runs of 512 only, so
that short causal blocks cost as much as full ones, and strips with a mask are faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cphandler.kernels.blocks import BlockKernel
from cphandler.kernels.kernel import Gradients, Saved, Softmax
from cphandler.kernels.strips import additive_mask, strips
from cphandler.kernels.task import Task
from cphandler.precision import ATTENTION_DTYPES
from cphandler.tokens.intervals import UNBOUNDED

WIDEST = 2048
"""Keys of a strip that all its rows see, from which on they are a block of their own and need no mask."""

OPTIONS = {
    "softcap": "softcap",
    "dropout": "dropout: its generator is its own, and the mask would depend on the number of ranks",
}
"""What the kernels inside torch refuse, and what they say."""


def causal_square(task: Task) -> int:
    """Side of the largest square on a causal task's diagonal; 0 for tasks that are not bounded above only."""
    if task.lo != -UNBOUNDED or task.hi == UNBOUNDED:
        return 0
    return min(task.nq, task.nk - task.hi)


def around_square(task: Task, side: int) -> Iterator[Task]:
    """A causal task as the full blocks left of and below its square, and the square."""
    if task.hi > 0:
        yield Task(task.q, task.nq, task.k, task.hi, -UNBOUNDED, UNBOUNDED)
    yield Task(task.q, side, task.k + task.hi, side, -UNBOUNDED, 0)
    if side < task.nq:
        yield Task(task.q + side, task.nq - side, task.k + task.hi, task.nk - task.hi, -UNBOUNDED, UNBOUNDED)


def is_square_causal(block: Task) -> bool:
    """What the causal flag of a kernel means everywhere: ``nq == nk`` and row i sees keys 0 to i."""
    return block.lo == -UNBOUNDED and block.hi == 0 and block.nq == block.nk


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with a last stride of 1, as ``[B, heads, rows, D]``."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def padded(x: Tensor, channels: int) -> Tensor:
    """``x`` with zeros after its last dim, up to a number of channels; ``x`` itself where it has that many."""
    missing = channels - x.shape[-1]
    return x if missing == 0 else torch.nn.functional.pad(x, (0, missing))


def narrowed(x: Tensor, channels: int) -> Tensor:
    """The first channels of ``x``, without what :func:`padded` appended."""
    return x if x.shape[-1] == channels else x[..., :channels]


def _widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors, each padded to the most channels that one of them has."""
    channels = [x.shape[-1] for x in tensors]
    widest = max(channels)
    return [x if own == widest else padded(x, widest) for x, own in zip(tensors, channels, strict=True)]


class TorchCpuKernel(BlockKernel):
    """torch's CPU flash attention; float16, bfloat16, float32, float64, grouped-query heads."""

    name = "torch"
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Needs one of the usual dtypes."""
        return None if q.dtype in ATTENTION_DTYPES else f"dtype {q.dtype}"

    def blocks(self, task: Task, q: Tensor) -> Iterator[Task]:
        """Full blocks whole, long prefixes apart, long diagonals as squares, everything else in masked strips."""
        wide = q.dtype in (torch.float32, torch.float64)
        rows, square_from = (128, 2049) if wide else (256, 769)
        side = causal_square(task)
        if task.is_full or (is_square_causal(task) and task.nq <= rows):
            yield task
        elif side and task.hi >= rows:  # keys that every row sees need no mask
            yield Task(task.q, task.nq, task.k, task.hi, -UNBOUNDED, UNBOUNDED)
            yield from self.blocks(Task(task.q, task.nq, task.k + task.hi, task.nk - task.hi, -UNBOUNDED, 0), q)
        elif side >= square_from:
            yield from around_square(task, side)
        else:
            yield from strips(task, rows, WIDEST)

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockKernel.block_forward`.

        Zeros appended to the narrower of queries and values change no score, and no channel that was there.
        """
        causal, mask = self._masking(block, q, softmax)
        tensors: list[Any] = [unit_stride(x) for x in _widened(q, k, v)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, causal, attn_mask=mask, scale=softmax.scale
        )
        return narrowed(out.transpose(1, 2), v.shape[-1]), lse.transpose(1, 2)

    def block_backward(self, saved: Saved, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> Gradients:
        """See :meth:`BlockKernel.block_backward`.

        The gradient of ``lse`` enters through one more channel of the values in which v is 0, the incoming gradient is
        1 and the output is minus that gradient: the kernel's row sum of output times gradient then has it subtracted.
        """
        causal, mask = self._masking(block, saved.q, softmax)
        q, out, grad_out = saved.q, saved.out, saved.grad_out
        if saved.grad_lse is not None:
            out = torch.cat([out, -saved.grad_lse.unsqueeze(-1).to(out.dtype)], dim=-1)
            grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
        tensors: list[Any] = [unit_stride(x) for x in _widened(grad_out, q, k, v, out)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, saved.lse.transpose(1, 2), 0.0, causal, attn_mask=mask, scale=softmax.scale
        )
        widths = (q.shape[-1], k.shape[-1], v.shape[-1])
        return Gradients(*(narrowed(x.transpose(1, 2), width) for x, width in zip(grads, widths, strict=True)))

    @staticmethod
    def _masking(block: Task, q: Tensor, softmax: Softmax) -> tuple[bool, Tensor | None]:
        if block.is_full:
            return False, None
        if is_square_causal(block):
            return True, None
        return False, additive_mask(block, q.dtype, q.device, softmax.masks)
