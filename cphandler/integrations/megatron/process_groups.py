"""Megatron's process groups, where it has set them up."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state


def context_parallel_group(pg_collection: Any = None) -> Any:
    """The context-parallel group of a collection, else of Megatron's parallel state; None where there is neither."""
    own = getattr(pg_collection, "cp", None)
    return own if own is not None else parallel_state.get_context_parallel_group(check_initialized=False)


def tensor_parallel_group(pg_collection: Any = None) -> Any:
    """The tensor-parallel group, alike."""
    own = getattr(pg_collection, "tp", None)
    return own if own is not None else parallel_state.get_tensor_model_parallel_group(check_initialized=False)
