"""The kernels of FlashAttention 4, module ``flash_attn.cute``: Hopper and Blackwell, compiled when first used.

Read in 4.0.0b36. A side of a window that hides nothing is None. The gradient of the log-sum-exp has an argument of its
own (``dlse``), so that no channels carry it. Its own autograd functions are not used: the backward pass starts from an
output and a log-sum-exp merged over all keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cphandler.kernels.fused import NO_DROPOUT
from cphandler.kernels.launches import UNLIMITED
from cphandler.kernels.packages import Package, device_lacks, function, lacking, missing
from cphandler.kernels.varlen import Inputs, Result, VarlenKernel

PACKAGE = Package(
    ("flash-attn-4",),
    "flash_attn.cute.interface",
    (4, 0, 0, 36),
    (4, 1),
    'pip install "cphandler[fa4]"',
)

_SHARED = ("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right")
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
NEEDS: dict[str, tuple[str, ...]] = {
    "_flash_attn_fwd": (*_SHARED, *_PACKED, "return_lse", "num_splits"),
    "_flash_attn_bwd": (*_SHARED, *_PACKED, "deterministic", "dlse"),
}
"""What is called, with the parameters that are passed by keyword."""


class FlashAttn4Kernel(VarlenKernel):
    """flash-attn 4; float16 and bfloat16, head dims up to 256, windows, grouped-query heads."""

    name = "flash_attn_4"
    package = PACKAGE
    deterministic = True
    takes_grad_lse = True
    takes_room = True
    refuses: ClassVar[Mapping[str, str]] = NO_DROPOUT

    def unusable(self) -> str | None:
        """See :meth:`Kernel.unusable`."""
        return missing(PACKAGE) or device_lacks(90, 130, "flash-attn 4") or lacking(PACKAGE, NEEDS)

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`. One split, so that sums have one order."""
        call = function(PACKAGE, "_flash_attn_fwd")
        softcap = inputs.softmax.softcap
        out, lse, *_ = call(
            inputs.q, inputs.k, inputs.v, softcap=softcap, return_lse=True, num_splits=1, **_options(inputs)
        )
        return out, lse

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        call = function(PACKAGE, "_flash_attn_bwd")
        dq, dk, dv, *_ = call(
            inputs.q,
            inputs.k,
            inputs.v,
            result.out,
            result.grad_out,
            result.lse,
            softcap=inputs.softmax.softcap or 0.0,
            deterministic=inputs.softmax.deterministic,
            dlse=result.grad_lse,
            **_options(inputs),
        )
        return dq, dk, dv


def _options(inputs: Inputs) -> dict[str, Any]:
    left, right = (None if side == UNLIMITED else side for side in inputs.window)
    causal = inputs.window.is_causal
    sequences = {} if inputs.offsets is None else dict(zip(_PACKED, inputs.offsets, strict=True))
    return sequences | {
        "softmax_scale": inputs.softmax.scale,
        "causal": causal,
        "window_size_left": None if causal else left,
        "window_size_right": None if causal else right,
    }
