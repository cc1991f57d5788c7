"""Rotary position embedding at the positions a rank holds (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.precision import accumulator_dtype

Freqs: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""Angles in radians, ``[rows, R]`` or ``[rows, 1, 1, R]``, both halves of the rotary dim present (Megatron's form); or
a pair ``(cos, sin)`` in either shape. One for each row of a dense batch: ``[B, rows, R]`` or ``[B, rows, 1, 1, R]``."""


def rotate(
    tensor: Tensor,
    freqs: Freqs,
    *,
    seq_dim: int,
    batch_dim: int | None = None,
    interleaved: bool = False,
    mscale: float = 1.0,
    inverse: bool = False,
) -> Tensor:
    """Rotate the first R channels of each row by that row's angles; the other channels pass through.

    Args:
        tensor: ``[..., heads, D]`` with the sequence at ``seq_dim``, D at least R.
        freqs: one row per row of the tensor; see :data:`Freqs`.
        seq_dim: dim of the sequence.
        batch_dim: dim of the batch, 0 or 1; None where there is none.
        interleaved: channels are paired (0, 1), (2, 3), ... instead of (i, i + R / 2).
        mscale: factor on cos and sin (YaRN's attention scaling, arXiv 2309.00071 section 3.4).
        inverse: undo the rotation, ``mscale`` included.

    Returns:
        The dtype and shape of ``tensor``; computed in float32 (float64 for float64).

    Raises:
        InvalidTypeError: not floating point, or freqs that are neither a tensor nor a pair.
        InvalidValueError: a wrong number of rows, or a rotary dim that is odd or larger than D.
    """
    dtype = accumulator_dtype(tensor.dtype)
    if not tensor.is_floating_point():
        raise InvalidTypeError("rope needs a floating-point tensor", got=tensor.dtype, fix="cast it first")
    cos, sin = _cos_sin(freqs, dtype, mscale, inverse)
    rotary = cos.shape[-1]
    if cos.shape[1] != tensor.shape[seq_dim]:
        raise InvalidValueError(
            f"rope needs one row of freqs for each of the {tensor.shape[seq_dim]} local rows",
            got=f"{cos.shape[1]} rows",
            fix="pass the table through get_emb_on_this_cp_rank first",
        )
    if rotary % 2 or rotary > tensor.shape[-1]:
        raise InvalidValueError(
            "the rotary dim must be even and at most the head dim",
            got=f"{rotary} for head dim {tensor.shape[-1]}",
            fix="freqs hold the whole rotary dim, both halves",
        )
    cos, sin = (_beside(table, tensor, seq_dim, batch_dim) for table in (cos, sin))
    turned = tensor[..., :rotary].to(dtype)
    turned = turned * cos + _half_turned(turned, interleaved) * sin
    turned = turned.to(tensor.dtype)
    return turned if rotary == tensor.shape[-1] else torch.cat([turned, tensor[..., rotary:]], dim=-1)


def _beside(table: Tensor, tensor: Tensor, seq_dim: int, batch_dim: int | None) -> Tensor:
    """A table ``[B, rows, R]`` with its dims where the tensor has them.

    Raises:
        InvalidValueError: a table for several rows of a batch that the tensor does not have.
    """
    shape = [1] * tensor.dim()
    shape[seq_dim], shape[-1] = table.shape[1:]
    if len(table) == 1:
        return table.view(shape)
    if batch_dim is None or tensor.dim() < 3 or tensor.shape[batch_dim] != len(table):
        raise InvalidValueError(
            "freqs are for another batch than the tensor",
            got=f"{len(table)} tables for shape {list(tensor.shape)}",
            fix="pass [L, R], or [B, L, R] for a dense batch of B rows; join the sections of several rotary axes first",
        )
    shape[batch_dim] = len(table)
    return (table if batch_dim < seq_dim else table.transpose(0, 1)).reshape(shape)


def _cos_sin(freqs: Freqs, dtype: torch.dtype, mscale: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """``[B, rows, R]`` cos and sin with the scale in them; B is 1 for one table."""
    pair = freqs if isinstance(freqs, tuple) else (freqs,)
    if len(pair) > 2 or not all(isinstance(part, Tensor) and part.is_floating_point() for part in pair):
        raise InvalidTypeError(
            "freqs must be a floating-point tensor or a pair (cos, sin)",
            got=type(freqs).__name__,
            fix="pass what get_emb_on_this_cp_rank gives",
        )
    flat = [_batched_table(part) for part in pair]
    # Angles grow with the position: cos and sin of a float64 table are taken before anything is rounded.
    exact = [part.to(torch.promote_types(part.dtype, dtype)) for part in flat]
    cos, sin = (exact[0].cos(), exact[0].sin()) if len(exact) == 1 else exact
    if cos.shape != sin.shape:
        raise InvalidValueError(
            "cos and sin must have one shape",
            got=f"{list(cos.shape)} and {list(sin.shape)}",
            fix="take both from one table of angles",
        )
    scale = 1.0 / mscale if inverse else mscale
    return (cos * scale).to(dtype), (sin * (-scale if inverse else scale)).to(dtype)


def flat_table(table: Tensor, name: str) -> Tensor:
    """A rope table ``[rows, R]`` or ``[rows, 1, 1, R]`` as ``[rows, R]``.

    Raises:
        InvalidValueError: another shape.
    """
    if table.dim() == 2:
        return table
    if table.dim() == 4 and table.shape[1] == table.shape[2] == 1:
        return table[:, 0, 0]
    raise InvalidValueError(
        f"{name} must be [rows, R] or [rows, 1, 1, R]",
        got=f"shape {list(table.shape)}",
        fix="pass one row for each position, with both halves of the rotary dim",
    )


def _batched_table(table: Tensor) -> Tensor:
    """Freqs for one row of a batch or for several as ``[B, rows, R]``.

    Raises:
        InvalidValueError: another shape.
    """
    if table.dim() in (4, 5) and table.shape[-3:-1] == (1, 1):
        table = table[..., 0, 0, :]
    if table.dim() in (2, 3):
        return table if table.dim() == 3 else table.unsqueeze(0)
    raise InvalidValueError(
        "freqs must be [L, R] or [L, 1, 1, R], or [B, L, R] for each row of a dense batch",
        got=f"shape {list(table.shape)}",
        fix="of a table [L, B, 1, R] pass x[:, :, 0].transpose(0, 1)",
    )


def _half_turned(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair of channels ``(a, b)`` as ``(-b, a)``."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def yarn_scale(config: object) -> float:
    """The factor on cos and sin that YaRN settings ask for: attributes as in Megatron's multi-latent-attention config.

    1 unless ``rope_type`` is ``"yarn"``; then the ratio of ``0.1 * m * ln(s) + 1`` for ``m = mscale`` and
    ``m = mscale_all_dim``, with ``s = rotary_scaling_factor`` (arXiv 2309.00071 section 3.4).
    """
    if getattr(config, "rope_type", None) != "yarn":
        return 1.0
    factor = float(getattr(config, "rotary_scaling_factor", 1.0))
    if factor <= 1.0:
        return 1.0

    def attention_scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0

    return attention_scale(float(getattr(config, "mscale", 1.0))) / attention_scale(
        float(getattr(config, "mscale_all_dim", 0.0))
    )


def deinterleaved(tensor: Tensor, rotary: int) -> Tensor:
    """Channels (0, 1, 2, 3, ...) of the rotary part as (0, 2, ..., 1, 3, ...), as multi-latent attention wants them."""
    head = tensor[..., :rotary]
    return torch.cat([head[..., 0::2], head[..., 1::2], tensor[..., rotary:]], dim=-1)
