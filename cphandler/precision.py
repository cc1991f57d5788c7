"""Which dtypes sums are kept in."""

from __future__ import annotations

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums over ranks and blocks are kept: float64 for float64, float32 for other floats, else the dtype."""
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.float32
