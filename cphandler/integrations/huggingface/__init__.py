"""Transformers of Hugging Face under context parallelism: ``parallelize(model, group)``, and a Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cphandler.integrations.huggingface.parallelism import parallelize, unparallelize

if TYPE_CHECKING:
    from cphandler.integrations.huggingface.trainer import ContextParallelTrainerMixin, Trainer

__all__ = ["ContextParallelTrainerMixin", "Trainer", "parallelize", "unparallelize"]


def __getattr__(name: str) -> Any:
    """What needs transformers to be made is made when it is asked for."""
    if name in ("Trainer", "ContextParallelTrainerMixin"):
        return getattr(import_module(f"{__name__}.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
