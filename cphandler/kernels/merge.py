"""Putting together attention over disjoint sets of keys: in place for kernels, differentiable for models.

Attention over the union of two sets is the average of the two outputs weighted by ``exp(lse)`` (Rabe and Staats,
*Self-attention Does Not Need O(n^2) Memory*, arXiv:2112.05682, section 2).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.precision import accumulator_dtype


def merge_into(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, index: Tensor | None = None) -> None:
    """Merge a block's attention over further keys into ``out`` and ``lse``, in place.

    ``out`` becomes the average of both weighted by ``exp(lse)``. Where both are ``-inf`` the result is 0 and ``-inf``;
    where one is, it is the other to the last bit.

    Args:
        out: ``[B, L, N, D]`` in the accumulators' dtype.
        lse: ``[B, L, N]``.
        block_out: ``[B, n, N, D]``.
        block_lse: ``[B, n, N]``.
        index: ``[n]`` different rows that the block's belong to; None where n is L.
    """
    fused = _fused(out.device) if out.is_cuda else None
    if fused is not None and fused.takes(out):
        fused.merge_rows(out, lse, block_out, block_lse, index)
        return
    whole, total = out, lse
    if index is not None:
        out, lse = out.index_select(1, index), lse.index_select(1, index)
    weight = torch.sub(block_lse, lse).sigmoid_().nan_to_num_(0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, block_lse, out=lse)
    if index is not None:
        whole.index_copy_(1, index, out)
        total.index_copy_(1, index, lse)


@lru_cache
def _fused(device: torch.device) -> ModuleType | None:
    """The merge in one pass; None where there is no Triton, or one that does not work with this torch and device.

    Tried once: Triton looks for a C compiler when it first launches, not when it is imported.
    """
    try:
        fused = import_module("cphandler.kernels.fused_merge")
        out, lse = torch.zeros(1, 1, 1, 16, device=device), torch.zeros(1, 1, 1, device=device)
        fused.merge_rows(out, lse, out.clone(), lse.clone())
    except Exception:  # a broken Triton raises what it likes, and torch's operations do the same
        return None
    return fused


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each; differentiable in all four.

    Where one ``lse`` is ``-inf`` (a row that saw nothing) the result is the other pair to the last bit. Where both are,
    it is 0 and ``-inf``, and all gradients are 0, whatever the outputs hold there. Computed in float32, float64 for
    float64. The gradient cannot be differentiated again.

    Args:
        out1: ``[..., D]``, attention over the first keys.
        lse1: ``[...]``, natural log-sum-exp of its scaled scores; float32, float64 if ``out1`` is float64.
        out2: like ``out1``, over the second keys.
        lse2: like ``lse1``, over the second keys.

    Returns:
        ``out [..., D]`` in the dtype of ``out1``, and ``lse [...]`` in the dtype of ``lse1``.

    Raises:
        InvalidTypeError: no tensors, or wrong dtypes.
        InvalidValueError: wrong shapes, or several devices.
    """
    _check({"out1": out1, "lse1": lse1, "out2": out2, "lse2": lse2})
    out, lse = _Merge.apply(out1, lse1, out2, lse2)  # type: ignore[no-untyped-call]
    return out, lse


def _check(named: dict[str, Any]) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise InvalidTypeError(
                f"{name} must be a dense tensor",
                got=x.layout if isinstance(x, Tensor) else type(x).__name__,
                fix="merge takes out1, lse1, out2, lse2, in this order",
            )
    out1, lse1, out2, lse2 = named.values()
    if not out1.is_floating_point() or out1.dtype != out2.dtype:
        raise InvalidTypeError(
            "out1 and out2 must share one floating-point dtype",
            got=f"{out1.dtype}, {out2.dtype}",
            fix="cast one of them",
        )
    wanted = accumulator_dtype(out1.dtype)
    if (lse1.dtype, lse2.dtype) != (wanted, wanted):
        raise InvalidTypeError(
            f"lse1 and lse2 must be {wanted} beside outputs in {out1.dtype}",
            got=f"{lse1.dtype}, {lse2.dtype}",
            fix="return_lse=True gives it so; cast what comes from elsewhere",
        )
    if out1.dim() == 0 or out1.shape != out2.shape:
        raise InvalidValueError(
            "out1 and out2 must have one shape [..., D]",
            got=f"{list(out1.shape)}, {list(out2.shape)}",
            fix="both are attention of the same queries, over other keys",
        )
    if not lse1.shape == lse2.shape == out1.shape[:-1]:
        raise InvalidValueError(
            f"lse1 and lse2 must be {list(out1.shape[:-1])}, the outputs' shape without its last dim",
            got=f"{list(lse1.shape)}, {list(lse2.shape)}",
            fix="return_lse=True gives them in the order of the output's dims",
        )
    if len({x.device for x in named.values()}) > 1:
        devices = ", ".join(str(x.device) for x in named.values())
        raise InvalidValueError("all four must be on one device", got=devices, fix="move them first")


def _share(lse: Tensor, other: Tensor) -> Tensor:
    """Weight of a side, ``[..., 1]``; 0 for one that saw nothing, also where the other one saw nothing either."""
    return torch.sigmoid(lse - other).masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out1, lse1, out2, lse2)
        ctx.set_materialize_grads(False)
        first, second = out1.to(lse1.dtype), out2.to(lse1.dtype)
        blind1, blind2 = lse1 == float("-inf"), lse2 == float("-inf")
        out = first * _share(lse1, lse2) + second * _share(lse2, lse1)
        # Chosen, not multiplied by 0 and 1: a side that saw nothing may hold NaN, and zeros must keep their sign.
        out = torch.where(blind1.unsqueeze(-1), second, torch.where(blind2.unsqueeze(-1), first, out))
        out = out.masked_fill((blind1 & blind2).unsqueeze(-1), 0.0)
        lse = torch.where(blind1, lse2, torch.where(blind2, lse1, torch.logaddexp(lse1, lse2)))
        return out.to(out1.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """With shares w1 + w2 = 1: d out = w1 d out1 + w2 d out2 + w1 w2 (out1 - out2) (d lse1 - d lse2)."""
        out1, lse1, out2, lse2 = ctx.saved_tensors
        share1, share2 = _share(lse1, lse2), _share(lse2, lse1)
        of_lse1 = of_lse2 = torch.zeros_like(lse1)
        of_out1 = of_out2 = None
        if grad_out is not None:
            grad_out = grad_out.to(lse1.dtype)
            of_out1, of_out2 = (_kept(share, grad_out * share).to(out1.dtype) for share in (share1, share2))
            both = share1 * share2
            pull = _kept(both, both * grad_out * (out1.to(lse1.dtype) - out2.to(lse1.dtype))).sum(-1)
            of_lse1, of_lse2 = pull, -pull
        if grad_lse is not None:
            of_lse1, of_lse2 = (
                of_lse + _kept(share, grad_lse.unsqueeze(-1) * share).squeeze(-1)
                for of_lse, share in ((of_lse1, share1), (of_lse2, share2))
            )
        return of_out1, of_lse1, of_out2, of_lse2


def _kept(share: Tensor, grad: Tensor) -> Tensor:
    """A gradient, 0 where a share is: what such rows hold or are sent may be NaN, which 0 times it would stay."""
    return grad.masked_fill(share == 0, 0.0)
