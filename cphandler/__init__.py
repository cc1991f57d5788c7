"""cphandler: one object that carries context parallelism through a training loop and a model.

Names are imported when they are first used: pytest loads this package in every run, for its plugin, and must not load
torch there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cphandler.attention.attention import Attention
    from cphandler.attention.call import AttentionCall
    from cphandler.attention.capabilities import COMMON, FEATURES, Capabilities
    from cphandler.attention.exchange import Exchange, register_exchange
    from cphandler.attention.loop import AttentionResult
    from cphandler.attention.options import AttentionModule, AttentionOptions, CoreAttention
    from cphandler.comm.traffic import Traffic, record_traffic
    from cphandler.config import CPConfig
    from cphandler.errors import (
        CPError,
        InvalidTypeError,
        InvalidValueError,
        MissingPackageError,
        RankMismatchError,
        UnsupportedError,
    )
    from cphandler.handler.contract import ContextParallelHandler
    from cphandler.handler.factory import available_cp_handlers, get_cp_handler_cls, register_cp_handler
    from cphandler.handler.layout_handler import LayoutHandler
    from cphandler.kernels import Kernel, register_kernel
    from cphandler.kernels import merge_attention as merge
    from cphandler.layouts.layout import Layout
    from cphandler.layouts.placement import Balanced
    from cphandler.plan.batch_plan import BatchPlan, PlanStats, plan_batch
    from cphandler.sharding.shard import EngineShard, Fragments
    from cphandler.tokens.documents import Documents
    from cphandler.tokens.masks import (
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
    from cphandler.tokens.packing import pack_documents, pack_lengths, unpack_documents
    from cphandler.training.batch import get_batch_on_this_cp_rank
    from cphandler.training.losses import connect_zero_loss

__version__ = "0.1.0"

__all__ = [
    "COMMON",
    "FEATURES",
    "AcrossDocuments",
    "Attention",
    "AttentionCall",
    "AttentionModule",
    "AttentionOptions",
    "AttentionResult",
    "Balanced",
    "Bands",
    "BatchPlan",
    "BlockCausal",
    "CPConfig",
    "CPError",
    "Capabilities",
    "Causal",
    "Chunked",
    "ContextParallelHandler",
    "CoreAttention",
    "Documents",
    "EngineShard",
    "Exchange",
    "Fragments",
    "Full",
    "InvalidTypeError",
    "InvalidValueError",
    "Kernel",
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
    "register_exchange",
    "register_kernel",
    "unpack_documents",
]

_MODULES: dict[str, str] = {
    "Attention": "attention.attention",
    "AttentionCall": "attention.call",
    "COMMON": "attention.capabilities",
    "FEATURES": "attention.capabilities",
    "Capabilities": "attention.capabilities",
    "Exchange": "attention.exchange",
    "register_exchange": "attention.exchange",
    "Kernel": "kernels",
    "register_kernel": "kernels",
    "EngineShard": "sharding.shard",
    "AcrossDocuments": "tokens.masks",
    "AttentionModule": "attention.options",
    "AttentionOptions": "attention.options",
    "AttentionResult": "attention.loop",
    "Balanced": "layouts.placement",
    "Bands": "tokens.masks",
    "BatchPlan": "plan.batch_plan",
    "BlockCausal": "tokens.masks",
    "CPConfig": "config",
    "CPError": "errors",
    "Causal": "tokens.masks",
    "Chunked": "tokens.masks",
    "ContextParallelHandler": "handler.contract",
    "CoreAttention": "attention.options",
    "Documents": "tokens.documents",
    "Fragments": "sharding.shard",
    "Full": "tokens.masks",
    "InvalidTypeError": "errors",
    "InvalidValueError": "errors",
    "Layout": "layouts.layout",
    "LayoutHandler": "handler.layout_handler",
    "Mask": "tokens.masks",
    "MissingPackageError": "errors",
    "PerDocument": "tokens.masks",
    "PlanStats": "plan.batch_plan",
    "PrefixLM": "tokens.masks",
    "PrefixWindow": "tokens.masks",
    "RankMismatchError": "errors",
    "SharedQuestion": "tokens.masks",
    "SlidingWindow": "tokens.masks",
    "Traffic": "comm.traffic",
    "UnsupportedError": "errors",
    "available_cp_handlers": "handler.factory",
    "connect_zero_loss": "training.losses",
    "get_batch_on_this_cp_rank": "training.batch",
    "get_cp_handler_cls": "handler.factory",
    "merge": "kernels:merge_attention",
    "pack_documents": "tokens.packing",
    "pack_lengths": "tokens.packing",
    "plan_batch": "plan.batch_plan",
    "record_traffic": "comm.traffic",
    "register_cp_handler": "handler.factory",
    "unpack_documents": "tokens.packing",
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
