"""cuDNN's attention inside torch: ``aten::_cudnn_attention_forward`` and its backward pass, dense and packed.

What it demands, and what this file therefore takes care of: dense batches have their heads before their rows; packed
sequences lie contiguous, since it counts offsets in elements; the log-sum-exp of packed sequences is ``[rows, N, 1]``,
that of dense batches has one dim more or less from version to version of torch. It promises no order of its sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from cphandler.kernels.fused import OPTIONS
from cphandler.kernels.varlen import Inputs, Result, VarlenKernel


class TorchCudnnKernel(VarlenKernel):
    """cuDNN's attention; float16 and bfloat16, head dims up to 128, grouped-query heads."""

    name = "torch_cudnn"
    widest_head = 128
    takes_windows = False
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`."""
        q, k, v = _arranged(inputs, inputs.q, inputs.k, inputs.v)
        causal, scale = inputs.window.is_causal, inputs.softmax.scale
        out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, *_sequences(inputs), True, 0.0, causal, False, scale=scale
        )
        if inputs.offsets is not None:
            return out, lse.reshape(q.shape[:2]).t()
        return out.transpose(1, 2), lse.reshape(q.shape[:3])

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        q, k, v, out, grad_out = _arranged(inputs, inputs.q, inputs.k, inputs.v, result.out, result.grad_out)
        packed = inputs.offsets is not None
        lse = result.lse.t().contiguous().unsqueeze(-1) if packed else result.lse
        if not packed and _has_last_dim():
            lse = lse.unsqueeze(-1)
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # without dropout nothing is drawn
        causal, scale = inputs.window.is_causal, inputs.softmax.scale
        dq, dk, dv = torch.ops.aten._cudnn_attention_backward(
            grad_out, q, k, v, out, lse, unused, unused, None, *_sequences(inputs), 0.0, causal, scale=scale
        )
        return (dq, dk, dv) if packed else (dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))


def _sequences(inputs: Inputs) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Offsets, none for a dense batch, and the longest lengths."""
    return inputs.offsets or (None, None, inputs.q.shape[1], inputs.k.shape[1])


def _arranged(inputs: Inputs, *tensors: Tensor) -> list[Tensor]:
    """Packed sequences contiguous, dense batches as ``[B, heads, rows, D]``."""
    return [x.contiguous() if inputs.offsets is not None else x.transpose(1, 2) for x in tensors]


@lru_cache
def _has_last_dim() -> bool:
    """Whether this torch's log-sum-exp of a dense batch is ``[B, N, rows, 1]``: its own shape function tells."""
    x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="meta")
    _, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)
    return bool(lse.dim() == 4)
