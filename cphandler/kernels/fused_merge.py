"""One pass over an output and its log-sum-exp that merges a further block into them; Triton, for CUDA.

torch's own operations read and write the output several times, and once more for rows that lie apart. The arithmetic is
that of :func:`cphandler.kernels.merge.merge_into`, step by step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Rows of a program: a guess, timed on no GPU yet."""


# What differs from packing to packing is not specialized: each new kind of number would be compiled while ranks wait.


@triton.jit(do_not_specialize=["number", "rows", "out_b", "lse_b", "part_b", "norm_b", "norm_r", "norm_h"])
def _merge(
    out,
    lse,
    block_out,
    block_lse,
    index,
    number,
    rows,
    heads,
    channels,
    out_b,
    out_r,
    out_h,
    lse_b,
    lse_r,
    lse_h,
    part_b,
    part_r,
    part_h,
    norm_b,
    norm_r,
    norm_h,
    INDEXED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = place < number
    head, row, batch = place % heads, (place // heads) % rows, place // (heads * rows)
    target = tl.load(index + row, mask=there, other=0) if INDEXED else row
    at_lse = lse + batch * lse_b + target * lse_r + head * lse_h
    before = tl.load(at_lse, mask=there, other=float("-inf")).to(tl.float32)
    after = tl.load(block_lse + batch * norm_b + row * norm_r + head * norm_h, mask=there, other=float("-inf"))
    largest = tl.maximum(before, after)
    blind = largest == float("-inf")
    first = tl.where(blind, 0.0, tl.exp(before - largest))
    second = tl.where(blind, 0.0, tl.exp(after - largest))
    weight = tl.where(blind, 0.0, second / tl.where(blind, 1.0, first + second))
    tl.store(at_lse, tl.where(blind, largest, largest + tl.log(first + second)), mask=there)
    column = tl.arange(0, WIDTH)
    inside = there[:, None] & (column < channels)[None, :]
    at_out = out + (batch * out_b + target * out_r + head * out_h)[:, None] + column[None, :]
    at_part = block_out + (batch * part_b + row * part_r + head * part_h)[:, None] + column[None, :]
    old = tl.load(at_out, mask=inside, other=0.0)
    new = tl.load(at_part, mask=inside, other=0.0).to(tl.float32)
    share = weight[:, None]
    merged = tl.where(share < 0.5, old + share * (new - old), new - (new - old) * (1.0 - share))
    # Chosen where one side saw nothing, so that the other comes through to the bit whatever the blind one holds.
    merged = tl.where(share == 0.0, old, tl.where(share == 1.0, new, merged))
    tl.store(at_out, merged, mask=inside)


def merge_rows(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, index: Tensor | None = None) -> None:
    """Merge attention over further keys into rows of ``out`` and ``lse``, in place.

    Args:
        out: ``[B, L, N, D]`` float32, last stride 1.
        lse: ``[B, L, N]`` float32.
        block_out: ``[B, n, N, D]``; a last stride other than 1 costs a copy.
        block_lse: ``[B, n, N]`` float32.
        index: ``[n]`` int64, the rows of ``out`` that the block's belong to; None where n is L.
    """
    if block_out.stride(-1) != 1:
        block_out = block_out.contiguous()
    if block_out.numel() == 0:
        return
    if out.is_cuda and out.get_device() != torch.cuda.current_device():  # a launch goes where the process is
        with torch.cuda.device(out.device):
            merge_rows(out, lse, block_out, block_lse, index)
        return
    batch, rows, heads, channels = block_out.shape
    number = batch * rows * heads
    strides = (x.stride()[:3] for x in (out, lse, block_out, block_lse))
    _merge[(triton.cdiv(number, ROWS),)](
        out,
        lse,
        block_out,
        block_lse,
        out if index is None else index,
        number,
        rows,
        heads,
        channels,
        *(stride for four in strides for stride in four),
        INDEXED=index is not None,
        ROWS=ROWS,
        WIDTH=triton.next_power_of_2(channels),
    )


def takes(out: Tensor) -> bool:
    """Whether rows can be merged here: float32 on CUDA, channels side by side."""
    return out.is_cuda and out.dtype == torch.float32 and out.dim() == 4 and out.stride(-1) == 1
