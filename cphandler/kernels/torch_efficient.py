"""Memory-efficient attention inside torch for CUDA: ``aten::_efficient_attention_forward`` and its backward pass.

It is CUTLASS's fused attention as xFormers shaped it, and takes float32. What it demands, and what this file therefore
takes care of: as many key heads as query heads; a mask by number, aligned at the top left (1); the log-sum-exp of
packed sequences as a table with a row per sequence, padded to the longest in steps of 32. Windows are not among its
masks: tasks with one are computed densely, tile by tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cphandler.kernels.fused import OPTIONS, follows_torch
from cphandler.kernels.launches import Offsets
from cphandler.kernels.varlen import Inputs, Result, VarlenKernel

FULL, CAUSAL = 0, 1
"""``custom_mask_type``: none, and causal from the top left."""

LSE_BLOCK = 32
"""The log-sum-exp comes in rows of a multiple of this: ``kAlignLSE`` in its source."""


class TorchEfficientKernel(VarlenKernel):
    """torch's memory-efficient attention; float16, bfloat16 and float32, head dims up to 256, grouped-query heads."""

    name = "torch_efficient"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    takes_windows = False
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def nondeterminism(self) -> str | None:
        """See :meth:`Kernel.nondeterminism`: the backward pass follows torch's process-wide setting."""
        return follows_torch()

    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_forward`."""
        offsets = inputs.offsets
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            *_batched(inputs),
            None,
            *(offsets or (None, None, None, None)),
            0.0,
            _mask(inputs),
            True,
            scale=inputs.softmax.scale,
        )
        if offsets is None:
            return out, lse[:, :, : inputs.q.shape[1]]
        sequence, place = _cells(offsets, len(inputs.q))
        return out[0], lse[sequence, :, place].t()

    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`VarlenKernel.launch_backward`."""
        offsets, groups = inputs.offsets, inputs.k.shape[-2]
        q, k, v = _batched(inputs)
        out, grad_out = (x if offsets is None else x.unsqueeze(0) for x in (result.out, result.grad_out))
        unused = torch.zeros((), dtype=torch.int64, device="cpu")  # without dropout nothing is drawn
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            grad_out,
            q,
            k,
            v,
            None,
            out,
            *(offsets or (None, None, q.shape[1], k.shape[1])),
            _table_of(result.lse, offsets),
            0.0,
            unused,
            unused,
            _mask(inputs),
            False,
            scale=inputs.softmax.scale,
        )
        dk, dv = _summed(dk, groups), _summed(dv, groups)
        return (dq, dk, dv) if offsets is None else (dq[0], dk[0], dv[0])


def _mask(inputs: Inputs) -> int:
    return CAUSAL if inputs.window.is_causal else FULL


def _batched(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, rows, N, D]`` each, of packed sequences ``[1, rows, N, D]``; a key head for every query head."""
    times = inputs.q.shape[-2] // inputs.k.shape[-2]
    tensors = [x if inputs.offsets is None else x.unsqueeze(0) for x in inputs[:3]]
    q, k, v = tensors
    return (q, k, v) if times == 1 else (q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))


def _summed(grad: Tensor, groups: int) -> Tensor:
    """Add the gradients of the query heads that share a key head, in float32: ``[B, rows, G, D]``."""
    shared = grad.unflatten(2, (groups, -1))
    return grad if shared.shape[3] == 1 else shared.sum(3, dtype=torch.float32)


_known_cells: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What :func:`_cells` gave for offsets that a plan keeps, every layer of which asks again; gone with them."""


def _cells(offsets: Offsets, rows: int) -> tuple[Tensor, Tensor]:
    """Of each packed row the sequence and the place in it, on the device."""
    known: tuple[Tensor, Tensor] | None = _known_cells.get(offsets.queries)
    if known is None:
        places = torch.arange(rows, device=offsets.queries.device)
        starts = offsets.queries.long()
        sequence = torch.searchsorted(starts[1:], places, right=True)
        known = _known_cells[offsets.queries] = sequence, places - starts[sequence]
    return known


def _table_of(lse: Tensor, offsets: Offsets | None) -> Tensor:
    """A log-sum-exp ``[N, rows]`` or ``[B, N, rows]`` as the kernel's own table; infinite where there is no row."""
    longest = lse.shape[-1] if offsets is None else offsets.longest_query
    sequences = len(lse) if offsets is None else len(offsets.queries) - 1
    table = lse.new_full((sequences, lse.shape[-2], -(-longest // LSE_BLOCK) * LSE_BLOCK), float("inf"))
    if offsets is None:
        table[:, :, :longest] = lse
    else:
        sequence, place = _cells(offsets, lse.shape[-1])
        table[sequence, :, place] = lse.t()
    return table
