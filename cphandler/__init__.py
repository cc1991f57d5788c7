"""cphandler: one object that carries context parallelism through a training loop and a model.

Names are imported when they are first used: pytest loads this package in every run, for its plugin, and must not load
torch there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # "as" tells type checkers that a name is public; a test compares these lines with the table below
    from cphandler.attention.attention import Attention as Attention
    from cphandler.attention.call import AttentionCall as AttentionCall
    from cphandler.attention.capabilities import COMMON as COMMON
    from cphandler.attention.capabilities import FEATURES as FEATURES
    from cphandler.attention.capabilities import Capabilities as Capabilities
    from cphandler.attention.exchange import Exchange as Exchange
    from cphandler.attention.exchange import register_exchange as register_exchange
    from cphandler.attention.loop import AttentionResult as AttentionResult
    from cphandler.attention.options import AttentionModule as AttentionModule
    from cphandler.attention.options import AttentionOptions as AttentionOptions
    from cphandler.attention.options import CoreAttention as CoreAttention
    from cphandler.comm.traffic import Traffic as Traffic
    from cphandler.comm.traffic import record_traffic as record_traffic
    from cphandler.config import CPConfig as CPConfig
    from cphandler.data.agreement import check_same_batch as check_same_batch
    from cphandler.data.collator import PackingCollator as PackingCollator
    from cphandler.data.manifest import SampleManifest as SampleManifest
    from cphandler.data.sampler import ContextParallelSampler as ContextParallelSampler
    from cphandler.data.samples import ShardedSample as ShardedSample
    from cphandler.data.samples import read_manifest as read_manifest
    from cphandler.data.samples import read_sample as read_sample
    from cphandler.data.samples import write_sample as write_sample
    from cphandler.data.stores import SafetensorsStore as SafetensorsStore
    from cphandler.errors import CPError as CPError
    from cphandler.errors import InvalidTypeError as InvalidTypeError
    from cphandler.errors import InvalidValueError as InvalidValueError
    from cphandler.errors import MissingPackageError as MissingPackageError
    from cphandler.errors import RankLostError as RankLostError
    from cphandler.errors import RankMismatchError as RankMismatchError
    from cphandler.errors import UnsupportedError as UnsupportedError
    from cphandler.handler.captured import CapturedBatch as CapturedBatch
    from cphandler.handler.contract import ContextParallelHandler as ContextParallelHandler
    from cphandler.handler.explanation import Explanation as Explanation
    from cphandler.handler.factory import Availability as Availability
    from cphandler.handler.factory import available_cp_handlers as available_cp_handlers
    from cphandler.handler.factory import get_cp_handler_cls as get_cp_handler_cls
    from cphandler.handler.factory import register_cp_handler as register_cp_handler
    from cphandler.handler.layout_handler import LayoutHandler as LayoutHandler
    from cphandler.kernels import Kernel as Kernel
    from cphandler.kernels import merge_attention
    from cphandler.kernels import register_kernel as register_kernel
    from cphandler.layouts.layout import Layout as Layout
    from cphandler.layouts.placement import Balanced as Balanced
    from cphandler.plan.batch_plan import BatchPlan as BatchPlan
    from cphandler.plan.batch_plan import PlanStats as PlanStats
    from cphandler.plan.batch_plan import plan_batch as plan_batch
    from cphandler.sharding.cache import clear_plan_cache as clear_plan_cache
    from cphandler.sharding.shard import EngineShard as EngineShard
    from cphandler.sharding.shard import Fragments as Fragments
    from cphandler.tokens.documents import Documents as Documents
    from cphandler.tokens.masks import AcrossDocuments as AcrossDocuments
    from cphandler.tokens.masks import Bands as Bands
    from cphandler.tokens.masks import BlockCausal as BlockCausal
    from cphandler.tokens.masks import Causal as Causal
    from cphandler.tokens.masks import Chunked as Chunked
    from cphandler.tokens.masks import Full as Full
    from cphandler.tokens.masks import Mask as Mask
    from cphandler.tokens.masks import PerDocument as PerDocument
    from cphandler.tokens.masks import PrefixLM as PrefixLM
    from cphandler.tokens.masks import PrefixTree as PrefixTree
    from cphandler.tokens.masks import PrefixWindow as PrefixWindow
    from cphandler.tokens.masks import SharedQuestion as SharedQuestion
    from cphandler.tokens.masks import SlidingWindow as SlidingWindow
    from cphandler.tokens.multiples import length_multiple as length_multiple
    from cphandler.tokens.offsets import cu_seqlens_of as cu_seqlens_of
    from cphandler.tokens.packing import pack_documents as pack_documents
    from cphandler.tokens.packing import pack_lengths as pack_lengths
    from cphandler.tokens.packing import unpack_documents as unpack_documents
    from cphandler.training.batch import get_batch_on_this_cp_rank as get_batch_on_this_cp_rank
    from cphandler.training.dynamic import DocumentSchedule as DocumentSchedule
    from cphandler.training.dynamic import SubGroup as SubGroup
    from cphandler.training.dynamic import SubGroups as SubGroups
    from cphandler.training.dynamic import assign_documents as assign_documents
    from cphandler.training.labels import next_token_labels as next_token_labels
    from cphandler.training.labels import shift_labels as shift_labels
    from cphandler.training.log_probs import TokenLogProbs as TokenLogProbs
    from cphandler.training.log_probs import token_log_probs as token_log_probs
    from cphandler.training.losses import connect_zero_loss as connect_zero_loss
    from cphandler.training.meshes import CPMesh as CPMesh
    from cphandler.training.meshes import cp_mesh as cp_mesh
    from cphandler.training.metrics import token_accuracy as token_accuracy
    from cphandler.training.metrics import token_count as token_count
    from cphandler.training.metrics import token_histogram as token_histogram
    from cphandler.training.metrics import token_mean as token_mean
    from cphandler.training.reductions import language_model_loss as language_model_loss
    from cphandler.training.reductions import reduce_token_loss as reduce_token_loss
    from cphandler.training.reductions import sum_over_tokens as sum_over_tokens
    from cphandler.training.scales import loss_scale as loss_scale
    from cphandler.training.sequences import gather_last_tokens as gather_last_tokens
    from cphandler.training.sequences import gather_tokens as gather_tokens
    from cphandler.training.sequences import scatter_last_tokens as scatter_last_tokens
    from cphandler.training.sequences import scatter_tokens as scatter_tokens

    merge = merge_attention

__version__ = "0.1.0"

_MODULES: dict[str, str] = {
    "COMMON": "attention.capabilities",
    "FEATURES": "attention.capabilities",
    "AcrossDocuments": "tokens.masks",
    "Attention": "attention.attention",
    "AttentionCall": "attention.call",
    "AttentionModule": "attention.options",
    "AttentionOptions": "attention.options",
    "AttentionResult": "attention.loop",
    "Availability": "handler.factory",
    "Balanced": "layouts.placement",
    "Bands": "tokens.masks",
    "BatchPlan": "plan.batch_plan",
    "BlockCausal": "tokens.masks",
    "CPConfig": "config",
    "CPError": "errors",
    "CPMesh": "training.meshes",
    "Capabilities": "attention.capabilities",
    "CapturedBatch": "handler.captured",
    "Causal": "tokens.masks",
    "Chunked": "tokens.masks",
    "ContextParallelHandler": "handler.contract",
    "ContextParallelSampler": "data.sampler",
    "CoreAttention": "attention.options",
    "DocumentSchedule": "training.dynamic",
    "Documents": "tokens.documents",
    "EngineShard": "sharding.shard",
    "Exchange": "attention.exchange",
    "Explanation": "handler.explanation",
    "Fragments": "sharding.shard",
    "Full": "tokens.masks",
    "InvalidTypeError": "errors",
    "InvalidValueError": "errors",
    "Kernel": "kernels",
    "Layout": "layouts.layout",
    "LayoutHandler": "handler.layout_handler",
    "Mask": "tokens.masks",
    "MissingPackageError": "errors",
    "PackingCollator": "data.collator",
    "PerDocument": "tokens.masks",
    "PlanStats": "plan.batch_plan",
    "PrefixLM": "tokens.masks",
    "PrefixTree": "tokens.masks",
    "PrefixWindow": "tokens.masks",
    "RankLostError": "errors",
    "RankMismatchError": "errors",
    "SafetensorsStore": "data.stores",
    "SampleManifest": "data.manifest",
    "ShardedSample": "data.samples",
    "SharedQuestion": "tokens.masks",
    "SlidingWindow": "tokens.masks",
    "SubGroup": "training.dynamic",
    "SubGroups": "training.dynamic",
    "Traffic": "comm.traffic",
    "UnsupportedError": "errors",
    "assign_documents": "training.dynamic",
    "available_cp_handlers": "handler.factory",
    "check_same_batch": "data.agreement",
    "clear_plan_cache": "sharding.cache",
    "TokenLogProbs": "training.log_probs",
    "connect_zero_loss": "training.losses",
    "language_model_loss": "training.reductions",
    "next_token_labels": "training.labels",
    "reduce_token_loss": "training.reductions",
    "sum_over_tokens": "training.reductions",
    "shift_labels": "training.labels",
    "token_log_probs": "training.log_probs",
    "gather_last_tokens": "training.sequences",
    "gather_tokens": "training.sequences",
    "loss_scale": "training.scales",
    "scatter_last_tokens": "training.sequences",
    "scatter_tokens": "training.sequences",
    "token_accuracy": "training.metrics",
    "token_count": "training.metrics",
    "token_histogram": "training.metrics",
    "token_mean": "training.metrics",
    "cp_mesh": "training.meshes",
    "cu_seqlens_of": "tokens.offsets",
    "get_batch_on_this_cp_rank": "training.batch",
    "get_cp_handler_cls": "handler.factory",
    "length_multiple": "tokens.multiples",
    "merge": "kernels:merge_attention",
    "pack_documents": "tokens.packing",
    "pack_lengths": "tokens.packing",
    "plan_batch": "plan.batch_plan",
    "read_manifest": "data.samples",
    "read_sample": "data.samples",
    "record_traffic": "comm.traffic",
    "register_cp_handler": "handler.factory",
    "register_exchange": "attention.exchange",
    "register_kernel": "kernels",
    "unpack_documents": "tokens.packing",
    "write_sample": "data.samples",
}
"""Where each public name lives: a module of this package, and the name there if it is another one."""

if not TYPE_CHECKING:  # a type checker can read no such list, and takes such a function for leave to import any name
    __all__ = list(_MODULES)

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _MODULES[name].partition(":")
        value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
