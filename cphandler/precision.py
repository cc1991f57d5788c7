"""Which dtypes attention computes in, and which ones sums are kept in."""

from __future__ import annotations

import torch

ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of queries, keys and values; narrower floats need scales that nobody here knows."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums over ranks and blocks are kept: float64 for float64, float32 for other floats, else the dtype."""
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.float32
