"""What a backend is tested with: a dense reference, tolerances by dtype, a pool of persistent ranks, and a kit.

``pytest --pyargs cphandler.testing --cp-backend mypackage.module:MyHandler`` holds a handler class to the laws of the
contract. As in the package above, names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cphandler.testing.pool import RankError, RankPool, partition_group
    from cphandler.testing.reference import (
        dense_attention,
        dense_gradients,
        dense_max_logit,
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
    "dense_max_logit",
    "dense_roll",
    "dense_rope",
    "partition_group",
    "relative_error",
    "visible_pairs",
]

_MODULES: dict[str, str] = {
    "RankError": "pool",
    "RankPool": "pool",
    "TOLERANCES": "tolerance",
    "assert_close": "tolerance",
    "dense_attention": "reference",
    "dense_gradients": "reference",
    "dense_max_logit": "reference",
    "dense_roll": "reference",
    "dense_rope": "reference",
    "partition_group": "pool",
    "relative_error": "tolerance",
    "visible_pairs": "reference",
}
"""Where each public name lives: a module of this package."""

if not TYPE_CHECKING:  # a type checker would take it for leave to import any name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
