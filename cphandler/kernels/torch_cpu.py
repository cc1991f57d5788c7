"""The flash kernel inside torch for CPUs, over blocks chosen so that little hidden work is computed.

The kernel is ``aten::_scaled_dot_product_flash_attention_for_cpu``. What it demands, and what this file therefore takes
care of: its causal flag is right for square blocks only; its mask must be floating point; last strides must be 1;
values need the head dim of queries; it kills the process on empty inputs; it skips hidden keys in runs of 512 only, so
that short causal blocks cost as much as full ones, and strips with a mask are faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cphandler.kernels.blocks import BlockKernel
from cphandler.kernels.fused import (
    OPTIONS,
    around_square,
    causal_square,
    is_square_causal,
    narrowed,
    padded,
    unit_stride,
)
from cphandler.kernels.kernel import Saved, Softmax
from cphandler.kernels.strips import additive_mask, strips
from cphandler.kernels.task import Task
from cphandler.precision import ATTENTION_DTYPES
from cphandler.tokens.intervals import UNBOUNDED

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Cut(NamedTuple):
    """How a causal task is cut.

    Attributes:
        rows: query rows of a strip.
        square_from: side of a square on the diagonal from which on it is one block.
    """

    rows: int
    square_from: int


WIDE, NARROW = Cut(128, 769), Cut(256, 513)
"""For float32 and float64, and for 16-bit inputs.

In ``benchmarks/blocks.py``, on a Xeon core with torch 2.13 and 4 heads of 64, forward and backward, strips of 128 take
1.15 times a square of 1024 in float32, and strips of 256 1.3 times a square of 768 in bfloat16. Wider strips than 128
are no slower there, but hide more of a narrow window."""

WIDEST = 2048
"""Keys of a strip that all its rows see, from which on they are a block of their own and need no mask. From 1024
to 8192 it makes no difference above the noise in ``benchmarks/blocks.py``; it bounds the masks' memory."""


def _widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernel takes them, each padded to the most channels that one of them has."""
    channels = [x.shape[-1] for x in tensors]
    widest = max(channels)
    return [unit_stride(x if own == widest else padded(x, widest)) for x, own in zip(tensors, channels, strict=True)]


class TorchCpuKernel(BlockKernel):
    """torch's CPU flash attention; float16, bfloat16, float32, float64, grouped-query heads."""

    name = "torch"
    batches = True
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Needs one of the usual dtypes."""
        return None if q.dtype in ATTENTION_DTYPES else f"dtype {q.dtype}"

    def blocks(self, task: Task, dtype: torch.dtype) -> Iterator[Task]:
        """Full blocks whole, long prefixes apart, long diagonals as squares, everything else in masked strips."""
        rows, square_from = WIDE if dtype in (torch.float32, torch.float64) else NARROW
        side = causal_square(task)
        if task.is_full or (is_square_causal(task) and task.nq <= rows):
            yield task
        elif side and task.hi >= rows:  # keys that every row sees need no mask
            yield Task(task.q, task.nq, task.k, task.hi, -UNBOUNDED, UNBOUNDED)
            yield from self.blocks(Task(task.q, task.nq, task.k + task.hi, task.nk - task.hi, -UNBOUNDED, 0), dtype)
        elif side >= square_from:
            yield from around_square(task, side)
        else:
            yield from strips(task, rows, WIDEST)

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockKernel.block_forward`.

        Zeros appended to the narrower of queries and values change no score, and no channel that was there.
        """
        causal, mask = self._masking(block, q, softmax)
        channels = v.shape[-1]
        alike = channels == q.shape[-1]
        tensors: Any = (unit_stride(q), unit_stride(k), unit_stride(v)) if alike else _widened(q, k, v)
        out, lse = _forward(*tensors, 0.0, causal, attn_mask=mask, scale=softmax.scale)
        return narrowed(out.transpose(1, 2), channels), lse.transpose(1, 2)

    def block_backward(
        self, saved: Saved, k: Tensor, v: Tensor, block: Task, softmax: Softmax
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`BlockKernel.block_backward`.

        The gradient of ``lse`` enters through one more channel of the values in which v is 0, the incoming gradient is
        1 and the output is minus that gradient: the kernel's row sum of output times gradient then has it subtracted.
        """
        causal, mask = self._masking(block, saved.q, softmax)
        q, out, grad_out = saved.q, saved.out, saved.grad_out
        if saved.grad_lse is not None:
            out = torch.cat([out, -saved.grad_lse.unsqueeze(-1).to(out.dtype)], dim=-1)
            grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
        tensors: list[Any] = _widened(grad_out, q, k, v, out)
        lse = saved.lse.transpose(1, 2)
        grads = _backward(*tensors, lse, 0.0, causal, attn_mask=mask, scale=softmax.scale)
        widths = (q.shape[-1], k.shape[-1], v.shape[-1])
        dq, dk, dv = (narrowed(x.transpose(1, 2), width) for x, width in zip(grads, widths, strict=True))
        return dq, dk, dv

    @staticmethod
    def _masking(block: Task, q: Tensor, softmax: Softmax) -> tuple[bool, Tensor | None]:
        if block.is_full:
            return False, None
        if is_square_causal(block):
            return True, None
        return False, additive_mask(block, q.dtype, q.device, softmax.masks)
