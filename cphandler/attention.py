"""The one attention loop: exchange x kernel, forward and backward, each an opaque custom op.

Ring, point-to-point and all-gather differ only in the exchange; Ulysses runs this loop without one. The plan enters the
op as one int64 tensor, so that a compiled model sees data, not a new constant, in every batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cphandler.comm import accumulator_dtype
from cphandler.exchange import Block, get_exchange
from cphandler.kernels import Kernel, Task, get_kernel
from cphandler.kernels.kernel import Gradients, Saved
from cphandler.plan import OWNER, Plan


class AttentionResult(NamedTuple):
    """What ``core_attn`` returns when more than the output is asked for.

    Attributes:
        out: attention output in the query's format.
        lse: natural log-sum-exp of the scaled scores, shape of ``out`` without its last dim, float32 (float64 for
            float64); ``-inf`` where a row sees nothing. None unless asked for.
        max_logit: ``[N]`` largest scaled score of each head over the group; None unless asked for.
    """

    out: Tensor
    lse: Tensor | None
    max_logit: Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | Tensor,
    *,
    scale: float,
    kernel: str,
    exchange: str = "none",
    group_name: str = "",
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's query rows over all keys that the plan says they see.

    Args:
        q: ``[B, L, N, D]``, any strides.
        k: ``[B, M, G, D]``, N divisible by G; query head n uses key head ``n // (N // G)``.
        v: ``[B, M, G, D_v]``.
        plan: this rank's plan, or the tensor it packs to.
        scale: factor on the scores.
        kernel: name of the kernel (not ``"auto"``).
        exchange: how keys reach the queries: ``"none"``, ``"ring"``, ``"all_gather"`` or a registered one.
        group_name: the group to exchange in.

    Returns:
        ``out [B, L, N, D_v]`` in q's dtype, contiguous, zero where a row sees nothing; ``lse [B, L, N]`` in the
        accumulator's dtype, ``-inf`` there. Both are differentiable.
    """
    packed = plan.to_tensor() if isinstance(plan, Plan) else plan
    out, lse = attention_forward(q, k, v, packed, scale, kernel, exchange, group_name)
    return out, lse


def _tasks(block: Block) -> list[Task]:
    return [Task(*row) for row in block.tasks[:, OWNER + 1 :].tolist()]


@torch.library.custom_op("cphandler::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, scale: float, kernel: str, exchange: str, group_name: str
) -> tuple[Tensor, Tensor]:
    """See :func:`attention`."""
    accumulator = accumulator_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=accumulator)
    lse = q.new_full(q.shape[:-1], float("-inf"), dtype=accumulator)
    compute = get_kernel(kernel, q.device.type)
    for block in get_exchange(exchange).forward(Plan.from_tensor(plan), (k, v), group_name):
        keys, values = block.rows
        compute.forward(q, keys, values, _tasks(block), scale, out, lse)
    return out.to(q.dtype), lse


@torch.library.custom_op("cphandler::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    scale: float,
    kernel: str,
    exchange: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the merged ``out`` and ``lse``: keys travel again, their gradients travel home."""
    accumulator = accumulator_dtype(q.dtype)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=accumulator) for x in (q, k, v))
    compute: Kernel = get_kernel(kernel, q.device.type)
    saved = Saved(q, out, lse, grad_out, grad_lse)
    for block in get_exchange(exchange).backward(Plan.from_tensor(plan), (k, v), (dk, dv), group_name):
        keys, values = block.rows
        compute.backward(saved, keys, values, _tasks(block), scale, Gradients(dq, *block.grads))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@attention_forward.register_fake
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, scale: float, kernel: str, exchange: str, group_name: str
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))


@attention_backward.register_fake
def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, plan)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, plan = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = attention_backward(grad_out, grad_lse, q, k, v, out, lse, plan, *ctx.options)
    return (*grads, None, None, None, None, None)


attention_forward.register_autograd(_backward, setup_context=_save)
