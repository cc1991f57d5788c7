"""A stand-in for the package ``flash_attn``, whose kernels are for CUDA: its functions over torch's CPU kernel.

Peers that import ``flash_attn`` then run the very kernel that everybody else runs here. The names, the order of the
arguments, and what is returned follow flash-attn 2.8. Gradients are written to the buffers that a caller gives, as the
package does; the CPU operator returns new ones, so that a copy of each block's gradients is paid here.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VERSION = "2.8.3"
"""What the stand-in says it is; peers choose the signature they call by it."""


def install() -> None:
    """Make ``import flash_attn`` find the stand-in, in this process."""
    package, interface = (_module(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    functions = (flash_attn_func, _flash_attn_forward, _flash_attn_backward)
    unused = ("flash_attn_varlen_func", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    for module in (package, interface):
        for function in functions:
            setattr(module, function.__name__, function)
        for name in unused:
            setattr(module, name, _absent)
    vars(package).update(__version__=VERSION, __path__=[], flash_attn_interface=interface)
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})


def _module(name: str) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__spec__ = ModuleSpec(name, None)
    return module


def _absent(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("the benchmark's stand-in for flash_attn has no packed sequences")


def _refuse(dropout_p: float, window: tuple[int, int], softcap: float | None, alibi_slopes: Any) -> None:
    if dropout_p or tuple(window) != (-1, -1) or softcap or alibi_slopes is not None:
        raise NotImplementedError("the benchmark's stand-in for flash_attn has neither dropout, window, cap nor slopes")


def flash_attn_func(  # noqa: PLR0917 (the package's own signatures)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``[B, S, N, D]`` attention, differentiable."""
    _refuse(dropout_p, window_size, softcap, alibi_slopes)
    if return_attn_probs:
        raise NotImplementedError("the benchmark's stand-in for flash_attn returns no probabilities")
    del deterministic
    return _flash_attn_forward(q, k, v, 0.0, softmax_scale, causal)[0]


def _flash_attn_forward(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``out [B, S, N, D]``, ``lse [B, N, S]``, and two that are None here."""
    _refuse(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    if causal and q.shape[1] != k.shape[1]:
        raise NotImplementedError("the CPU kernel has another causal mask where queries and keys differ in number")
    del return_softmax
    tensors: list[Any] = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(  # noqa: PLR0913, PLR0917
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """Writes the gradients to ``dq``, ``dk`` and ``dv``."""
    _refuse(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    del deterministic, rng_state
    tensors: list[Any] = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, softmax_lse, 0.0, causal, scale=softmax_scale
    )
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        if buffer is not None:
            buffer.copy_(grad.transpose(1, 2))
