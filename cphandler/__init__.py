"""cphandler: one object that carries context parallelism through a training loop and a model.

Names are imported when they are first used: pytest loads this package in every run, for its plugin, and must not load
torch there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cphandler.attention import AttentionResult
    from cphandler.batch import get_batch_on_this_cp_rank, pack_documents, pack_lengths, unpack_documents
    from cphandler.batch_plan import BatchPlan, PlanStats, plan_batch
    from cphandler.comm import Traffic, record_traffic
    from cphandler.config import CPConfig
    from cphandler.core_attention import AttentionModule, AttentionOptions, CoreAttention
    from cphandler.errors import (
        CPError,
        InvalidTypeError,
        InvalidValueError,
        MissingPackageError,
        RankMismatchError,
        UnsupportedError,
    )
    from cphandler.factory import available_cp_handlers, get_cp_handler_cls, register_cp_handler
    from cphandler.handler import ContextParallelHandler
    from cphandler.kernels import merge_attention as merge
    from cphandler.layout import Layout
    from cphandler.layout_handler import LayoutHandler
    from cphandler.loss import connect_zero_loss
    from cphandler.mask import (
        AcrossDocuments,
        Bands,
        BlockCausal,
        Causal,
        Chunked,
        Full,
        Mask,
        PerDocument,
        PrefixLM,
        PrefixWindow,
        SharedQuestion,
        SlidingWindow,
    )
    from cphandler.placement import Balanced
    from cphandler.sequence import Documents
    from cphandler.stream import Fragments

__version__ = "0.1.0"

__all__ = [
    "AcrossDocuments",
    "AttentionModule",
    "AttentionOptions",
    "AttentionResult",
    "Balanced",
    "Bands",
    "BatchPlan",
    "BlockCausal",
    "CPConfig",
    "CPError",
    "Causal",
    "Chunked",
    "ContextParallelHandler",
    "CoreAttention",
    "Documents",
    "Fragments",
    "Full",
    "InvalidTypeError",
    "InvalidValueError",
    "Layout",
    "LayoutHandler",
    "Mask",
    "MissingPackageError",
    "PerDocument",
    "PlanStats",
    "PrefixLM",
    "PrefixWindow",
    "RankMismatchError",
    "SharedQuestion",
    "SlidingWindow",
    "Traffic",
    "UnsupportedError",
    "available_cp_handlers",
    "connect_zero_loss",
    "get_batch_on_this_cp_rank",
    "get_cp_handler_cls",
    "merge",
    "pack_documents",
    "pack_lengths",
    "plan_batch",
    "record_traffic",
    "register_cp_handler",
    "unpack_documents",
]

_MODULES: dict[str, str] = {
    "AcrossDocuments": "mask",
    "AttentionModule": "core_attention",
    "AttentionOptions": "core_attention",
    "AttentionResult": "attention",
    "Balanced": "placement",
    "Bands": "mask",
    "BatchPlan": "batch_plan",
    "BlockCausal": "mask",
    "CPConfig": "config",
    "CPError": "errors",
    "Causal": "mask",
    "Chunked": "mask",
    "ContextParallelHandler": "handler",
    "CoreAttention": "core_attention",
    "Documents": "sequence",
    "Fragments": "stream",
    "Full": "mask",
    "InvalidTypeError": "errors",
    "InvalidValueError": "errors",
    "Layout": "layout",
    "LayoutHandler": "layout_handler",
    "Mask": "mask",
    "MissingPackageError": "errors",
    "PerDocument": "mask",
    "PlanStats": "batch_plan",
    "PrefixLM": "mask",
    "PrefixWindow": "mask",
    "RankMismatchError": "errors",
    "SharedQuestion": "mask",
    "SlidingWindow": "mask",
    "Traffic": "comm",
    "UnsupportedError": "errors",
    "available_cp_handlers": "factory",
    "connect_zero_loss": "loss",
    "get_batch_on_this_cp_rank": "batch",
    "get_cp_handler_cls": "factory",
    "merge": "kernels:merge_attention",
    "pack_documents": "batch",
    "pack_lengths": "batch",
    "plan_batch": "batch_plan",
    "record_traffic": "comm",
    "register_cp_handler": "factory",
    "unpack_documents": "batch",
}
"""Where each public name lives: a module of this package, and the name there if it is another one."""

if not TYPE_CHECKING:  # a type checker would take it for leave to import any name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _MODULES[name].partition(":")
        value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
