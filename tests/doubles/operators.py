"""CPU kernels for torch's CUDA attention operators, registered while a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.doubles.flash import (
    Call,
    checked,
    dense_backward,
    dense_forward,
    offsets_checked,
    packed_backward,
    packed_forward,
)

HALF = (torch.float16, torch.bfloat16)
counted: list[str] = []
"""Names of the operators called since the doubles were put in place."""


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **rest: Any,
) -> tuple[Tensor, ...]:
    """``aten::_flash_attention_forward``."""
    counted.append("flash forward")
    assert not dropout_p
    assert not return_debug_mask
    assert not any(x is not None for x in rest.values())
    checked(q, k, v, dtypes=HALF)
    call = _call(is_causal, window_size_left, window_size_right, scale or q.shape[-1] ** -0.5)
    if starts_q is None or starts_k is None:
        out, lse = dense_forward(q, k, v, call)
    else:
        offsets_checked(starts_q, len(q), max_q)
        offsets_checked(starts_k, len(k), max_k)
        out, lse = packed_forward(q, k, v, (starts_q, starts_k), call)
    state = torch.empty(2, dtype=torch.int64)
    return out, lse, state, torch.empty(()), torch.empty(0, dtype=q.dtype)


def flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_flash_attention_backward``: any output and log-sum-exp are taken at their word."""
    counted.append("flash backward")
    assert not dropout_p
    checked(q, k, v, dtypes=HALF)
    assert out.dtype == grad_out.dtype == q.dtype
    assert out.shape == grad_out.shape == q.shape
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    call = _call(is_causal, window_size_left, window_size_right, scale or q.shape[-1] ** -0.5)
    if starts_q is None or starts_k is None:
        assert lse.shape == (len(q), q.shape[2], q.shape[1])
        return dense_backward(grad_out, (q, k, v), out, lse, call)
    assert lse.shape == (q.shape[1], len(q))
    offsets_checked(starts_q, len(q), max_q)
    offsets_checked(starts_k, len(k), max_k)
    return packed_backward(grad_out, (q, k, v), out, lse, (starts_q, starts_k), call)


def _call(causal: bool, left: int | None, right: int | None, scale: float) -> Call:
    return Call(causal, -1 if left is None else left, -1 if right is None else right, scale)


def _rounded(rows: int) -> int:
    return -(-rows // 32) * 32


def efficient_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    **rest: Any,
) -> tuple[Any, ...]:
    """``aten::_efficient_attention_forward``: rows of its log-sum-exp are a multiple of 32."""
    counted.append("efficient forward")
    assert bias is None
    assert not dropout_p
    assert compute_log_sumexp
    assert not any(x is not None for x in rest.values())
    checked(q, k, v, dtypes=(*HALF, torch.float32), heads_equal=True)
    call = Call(custom_mask_type == 1, -1, -1, scale or q.shape[-1] ** -0.5, top_left=True)
    if starts_q is None or starts_k is None or max_q is None or max_k is None:
        out, lse = dense_forward(q, k, v, call)
        table = lse.new_full((*lse.shape[:2], _rounded(q.shape[1])), float("inf"))
        table[:, :, : q.shape[1]] = lse
    else:
        assert len(q) == 1, "cu_seqlen only supports batch_size=1"
        offsets_checked(starts_q, q.shape[1], max_q)
        offsets_checked(starts_k, k.shape[1], max_k)
        packed, lse = packed_forward(q[0], k[0], v[0], (starts_q, starts_k), call)
        out = packed.unsqueeze(0)
        table = lse.new_full((len(starts_q) - 1, q.shape[2], _rounded(max_q)), float("inf"))
        for i, (start, end) in enumerate(zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False)):
            table[i, :, : end - start] = lse[:, start:end]
    none = torch.zeros((), dtype=torch.int64)
    return out, table, none, none.clone(), max_q or q.shape[1], max_k or k.shape[1]


def efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    table: Tensor,
    dropout_p: float,
    seed: Tensor,
    offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``aten::_efficient_attention_backward``."""
    counted.append("efficient backward")
    assert bias is None
    assert not dropout_p
    assert not bias_requires_grad
    checked(q, k, v, dtypes=(*HALF, torch.float32), heads_equal=True)
    call = Call(custom_mask_type == 1, -1, -1, scale or q.shape[-1] ** -0.5, top_left=True)
    none = torch.empty(0)
    if starts_q is None or starts_k is None:
        assert table.shape == (len(q), q.shape[2], _rounded(q.shape[1]))
        lse = table[:, :, : q.shape[1]]
        return *dense_backward(grad_out, (q, k, v), out, lse, call), none
    assert table.shape == (len(starts_q) - 1, q.shape[2], _rounded(max_q))
    lengths = starts_q.diff().tolist()
    lse = torch.cat([table[i, :, :length] for i, length in enumerate(lengths)], dim=1)
    starts = starts_q, starts_k
    grads = packed_backward(grad_out[0], (q[0], k[0], v[0]), out[0], lse, starts, call)
    dq, dk, dv = (grad.unsqueeze(0) for grad in grads)
    return dq, dk, dv, none


def cudnn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_cudnn_attention_forward``: dense batches have their heads first, packed rows are read as contiguous."""
    counted.append("cudnn forward")
    assert bias is None
    assert compute_log_sumexp
    assert not dropout_p
    assert not return_debug_mask
    turned = [x.transpose(1, 2) if starts_q is None else x for x in (q, k, v)]
    checked(*turned, dtypes=HALF)
    call = Call(is_causal, -1, -1, scale or q.shape[-1] ** -0.5, top_left=True)
    if starts_q is None or starts_k is None:
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        out, lse = dense_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call)
        out, lse = out.transpose(1, 2), lse.unsqueeze(-1)
    else:
        assert all(x.is_contiguous() for x in (q, k, v))
        offsets_checked(starts_q, len(q), max_q)
        offsets_checked(starts_k, len(k), max_k)
        out, lse = packed_forward(q, k, v, (starts_q, starts_k), call)
        lse = lse.t().contiguous().unsqueeze(-1)
    none = torch.zeros((), dtype=torch.int64)
    return out, lse, none, none.clone(), max_q, max_k, none.clone(), none.clone(), none.clone()


def cudnn_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_cudnn_attention_backward``."""
    counted.append("cudnn backward")
    assert not dropout_p
    turned = [x.transpose(1, 2) if starts_q is None else x for x in (q, k, v)]
    checked(*turned, dtypes=HALF)
    call = Call(is_causal, -1, -1, scale or q.shape[-1] ** -0.5, top_left=True)
    if starts_q is None or starts_k is None:
        assert lse.shape == (*q.shape[:3], 1)
        turned = [x.transpose(1, 2) for x in (grad_out, q, k, v, out)]
        grads = dense_backward(turned[0], (turned[1], turned[2], turned[3]), turned[4], lse.squeeze(-1), call)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv
    assert lse.shape == (*q.shape[:2], 1)
    assert all(x.is_contiguous() for x in (grad_out, q, k, v, out, lse))
    return packed_backward(grad_out, (q, k, v), out, lse.squeeze(-1).t(), (starts_q, starts_k), call)


DOUBLES = {
    "_cudnn_attention_forward": cudnn_forward,
    "_cudnn_attention_backward": cudnn_backward,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_efficient_attention_forward": efficient_forward,
    "_efficient_attention_backward": efficient_backward,
}


@contextmanager
def operators_on_cpu() -> Iterator[list[str]]:
    """torch's CUDA attention operators take CPU tensors; gives the names of those called."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in DOUBLES.items():
        library.impl(name, function, "CPU")
    counted.clear()
    try:
        yield counted
    finally:
        library._destroy()
