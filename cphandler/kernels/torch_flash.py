"""Flash attention inside torch for CUDA, dense and packed: ``aten::_flash_attention_forward`` and its backward pass.

It is FlashAttention 2 (Dao, 2023, arXiv:2307.08691) as torch builds it. Options go by keyword, since versions of torch
append to its arguments. What it demands, and what this file therefore takes care of: 16-bit inputs of one head dim, a
multiple of 8; a window as two numbers beside the causal flag; random states in the backward pass even without dropout.
Fewer key heads than query heads are taken as they are, and their gradients summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cphandler.kernels.fused import OPTIONS, follows_torch
from cphandler.kernels.launches import UNLIMITED
from cphandler.kernels.varlen import Inputs, Result, VarlenKernel


class TorchFlashKernel(VarlenKernel):
    """torch's own FlashAttention 2; float16 and bfloat16, head dims up to 256, windows, grouped-query heads."""

    name = "torch_flash"
    takes_room = True
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def nondeterminism(self) -> str | None:
        """See :meth:`Kernel.nondeterminism`: the backward pass follows torch's process-wide setting."""
        return follows_torch()

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            inputs.q,
            inputs.k,
            inputs.v,
            *_sequences(inputs),
            0.0,
            inputs.window.is_causal,
            False,
            **_options(inputs),
        )
        return out, lse

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        unused = torch.empty((), dtype=torch.int64, device=inputs.q.device)  # without dropout nothing is drawn
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            result.grad_out,
            inputs.q,
            inputs.k,
            inputs.v,
            result.out,
            result.lse,
            *_sequences(inputs),
            0.0,
            inputs.window.is_causal,
            unused,
            unused,
            **_options(inputs),
        )
        return dq, dk, dv


def _sequences(inputs: Inputs) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Offsets, none for a dense batch, and the longest lengths."""
    return inputs.offsets or (None, None, inputs.q.shape[1], inputs.k.shape[1])


def _options(inputs: Inputs) -> dict[str, Any]:
    left, right = inputs.window
    windowed = not (inputs.window.is_full or inputs.window.is_causal)
    sides = {"window_size_left": left, "window_size_right": right} if windowed else {}
    return {"scale": inputs.softmax.scale, **{name: side for name, side in sides.items() if side != UNLIMITED}}
