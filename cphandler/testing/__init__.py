"""What a backend is tested with: a dense reference, tolerances by dtype, and a pool of persistent ranks."""

from __future__ import annotations

from cphandler.testing.pool import RankError, RankPool, partition_group
from cphandler.testing.reference import (
    dense_attention,
    dense_gradients,
    dense_roll,
    dense_rope,
    visible_pairs,
)
from cphandler.testing.tolerance import TOLERANCES, assert_close, relative_error

__all__ = [
    "TOLERANCES",
    "RankError",
    "RankPool",
    "assert_close",
    "dense_attention",
    "dense_gradients",
    "dense_roll",
    "dense_rope",
    "partition_group",
    "relative_error",
    "visible_pairs",
]
