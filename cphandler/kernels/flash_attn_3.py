"""The kernels of FlashAttention 3 for Hopper (Shah et al., 2024, arXiv:2407.08608), module ``flash_attn_interface``.

It has no release on the package index and is built from its repository. Keywords changed their names between its
states (``causal`` and ``is_causal``, a window as one pair or two numbers): the installed signature decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cphandler.kernels.fused import NO_DROPOUT
from cphandler.kernels.packages import Package, chosen, device_lacks, function, lacking, missing, required
from cphandler.kernels.varlen import Inputs, Result, VarlenKernel

PACKAGE = Package(
    ("flash_attn_3", "flash-attn-3"),
    "flash_attn_interface",
    (3, 0),
    (3, 1),
    "build it from the folder hopper of https://github.com/Dao-AILab/flash-attention; the index has no release",
)

_SHARED = (
    "softmax_scale",
    "causal|is_causal",
    "window_size|window_size_left",
    "softcap",
    "cu_seqlens_q",
    "max_seqlen_q",
)
NEEDS: dict[str, tuple[str, ...]] = {
    "_flash_attn_forward": (*_SHARED, "num_splits"),
    "_flash_attn_backward": (*_SHARED, "dq", "dk", "dv", "deterministic"),
}
"""What is called, with the parameters that are passed by keyword."""


class FlashAttn3Kernel(VarlenKernel):
    """flash-attn 3; float16 and bfloat16, head dims up to 256, windows, soft caps, grouped-query heads; Hopper only."""

    name = "flash_attn_3"
    package = PACKAGE
    deterministic = True
    takes_room = True
    refuses: ClassVar[Mapping[str, str]] = NO_DROPOUT

    def unusable(self) -> str | None:
        """See :meth:`Kernel.unusable`."""
        return missing(PACKAGE) or device_lacks(90, 100, "flash-attn 3") or lacking(PACKAGE, NEEDS)

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`. One split, so that sums have one order."""
        call = function(PACKAGE, "_flash_attn_forward")
        options = {**_options(call, inputs), **chosen(call, num_splits=1)}
        out, lse, *_ = call(inputs.q, inputs.k, inputs.v, **options, **_others(call, 3, options))
        return out, lse

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        call = function(PACKAGE, "_flash_attn_backward")
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
        into = {"dq": dq, "dk": dk, "dv": dv, "deterministic": inputs.softmax.deterministic}
        options = {**into, **_options(call, inputs)}
        call(
            result.grad_out,
            inputs.q,
            inputs.k,
            inputs.v,
            result.out,
            result.lse,
            **options,
            **_others(call, 6, options),
        )
        return dq, dk, dv


def _others(call: Any, first: int, given: Mapping[str, Any]) -> dict[str, None]:
    """Nothing for what an older state asks for without a default, behind the first parameters."""
    return {name: None for name in required(call)[first:] if name not in given}


def _options(call: Any, inputs: Inputs) -> dict[str, Any]:
    left, right = inputs.window
    sequences: dict[str, Any] = {}
    if inputs.offsets is not None:
        starts_q, starts_k, longest_q, longest_k = inputs.offsets
        sequences = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
        sequences |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    return chosen(
        call,
        softmax_scale=inputs.softmax.scale,
        causal__is_causal=inputs.window.is_causal,
        window_size=(left, right),
        window_size_left=left,
        window_size_right=right,
        softcap=inputs.softmax.softcap or 0.0,
        **sequences,
    )
