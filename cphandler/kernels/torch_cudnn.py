"""cuDNN's attention inside torch: ``aten::_cudnn_attention_forward`` and its backward pass, a launch for each task.

Packed sequences are not given to it: up to torch 2.11 at least the backward pass takes the head dim for the longest
sequence (pytorch#186142), and plans are built anew for every call. What else it demands, and what this file therefore
takes care of: heads before rows; more than one row and key; gradients laid out as outputs are, since plans are found
again by the strides of queries, keys and values alone. The log-sum-exp has one dim more or less from version to version
of torch. It promises no order of its sums.
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
    """cuDNN's attention; float16 and bfloat16, head dims up to 128, grouped-query heads; for few and long documents."""

    name = "torch_cudnn"
    widest_head = 128
    takes_windows = False
    most_tasks = 1
    least_rows = 2
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`."""
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        causal, scale = inputs.window.is_causal, inputs.softmax.scale
        out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, None, None, q.shape[2], k.shape[2], True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.reshape(q.shape[:3])

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        q, k, v, out = (x.transpose(1, 2) for x in (*inputs[:3], result.out))
        grad_out, lse = result.grad_out.contiguous().transpose(1, 2), result.lse
        if _has_last_dim():
            lse = lse.unsqueeze(-1)
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # without dropout nothing is drawn
        lengths, causal, scale = (q.shape[2], k.shape[2]), inputs.window.is_causal, inputs.softmax.scale
        dq, dk, dv = torch.ops.aten._cudnn_attention_backward(
            grad_out, q, k, v, out, lse, unused, unused, None, None, None, *lengths, 0.0, causal, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@lru_cache
def _has_last_dim() -> bool:
    """Whether this torch's log-sum-exp of a dense batch is ``[B, N, rows, 1]``: its own shape function tells."""
    x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="meta")
    _, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)
    return bool(lse.dim() == 4)
