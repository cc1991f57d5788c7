"""The kernels of the package flash-attn, FlashAttention 2 (Dao, 2023, arXiv:2307.08691).

Its private functions are called, since a backward pass from an outside output and log-sum-exp is in no public one.
Read in 2.7.0 to 2.8.3: the window is two arguments from 2.7 on. What it demands, and what this file therefore takes
care of: gradients are written into tensors given to it; ``softcap`` is 0 for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cphandler.kernels.fused import NO_DROPOUT
from cphandler.kernels.packages import Package, device_lacks, function, lacking, missing
from cphandler.kernels.varlen import Inputs, Result, VarlenKernel

PACKAGE = Package(
    ("flash-attn",),
    "flash_attn.flash_attn_interface",
    (2, 7),
    (2, 8, 4),
    'pip install --no-build-isolation "cphandler[flash-attn]"',
)

_OPTIONS = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_GRADIENTS = ("dq", "dk", "dv", "deterministic")
NEEDS: dict[str, tuple[str, ...]] = {
    "_flash_attn_forward": (*_OPTIONS, "return_softmax"),
    "_flash_attn_backward": (*_OPTIONS, *_GRADIENTS),
    "_flash_attn_varlen_forward": (*_OPTIONS, *_PACKED, "return_softmax"),
    "_flash_attn_varlen_backward": (*_OPTIONS, *_PACKED, *_GRADIENTS),
}
"""What is called, with the parameters that are passed by keyword."""


class FlashAttn2Kernel(VarlenKernel):
    """flash-attn 2; float16 and bfloat16, head dims up to 256, windows, soft caps, grouped-query heads."""

    name = "flash_attn_2"
    package = PACKAGE
    deterministic = True
    takes_room = True
    refuses: ClassVar[Mapping[str, str]] = NO_DROPOUT

    def unusable(self) -> str | None:
        """See :meth:`Kernel.unusable`."""
        return missing(PACKAGE) or device_lacks(80, 130, "flash-attn 2") or lacking(PACKAGE, NEEDS)

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`."""
        call = function(PACKAGE, "_flash_attn_varlen_forward" if inputs.offsets else "_flash_attn_forward")
        out, lse, *_ = call(inputs.q, inputs.k, inputs.v, **_options(inputs), return_softmax=False)
        return out, lse

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        call = function(PACKAGE, "_flash_attn_varlen_backward" if inputs.offsets else "_flash_attn_backward")
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
        call(
            result.grad_out,
            inputs.q,
            inputs.k,
            inputs.v,
            result.out,
            result.lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=inputs.softmax.deterministic,
            **_options(inputs),
        )
        return dq, dk, dv


def _options(inputs: Inputs) -> dict[str, Any]:
    left, right = inputs.window
    sequences = {} if inputs.offsets is None else dict(zip(_PACKED, inputs.offsets, strict=True))
    return sequences | {
        "dropout_p": 0.0,
        "softmax_scale": inputs.softmax.scale,
        "causal": inputs.window.is_causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": inputs.softmax.softcap or 0.0,
        "alibi_slopes": None,
    }
