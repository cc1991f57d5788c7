"""cphandler: one object that carries context parallelism through a training loop and a model."""

from __future__ import annotations

from cphandler.attention import AttentionResult
from cphandler.batch import get_batch_on_this_cp_rank, pack_documents, pack_lengths, unpack_documents
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
from cphandler.layout import Layout
from cphandler.layout_handler import LayoutHandler
from cphandler.loss import connect_zero_loss
from cphandler.mask import Bands, Causal, Full, Mask, SlidingWindow
from cphandler.sequence import Documents
from cphandler.stream import Fragments

__version__ = "0.1.0"

__all__ = [
    "AttentionModule",
    "AttentionOptions",
    "AttentionResult",
    "Bands",
    "CPConfig",
    "CPError",
    "Causal",
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
    "RankMismatchError",
    "SlidingWindow",
    "Traffic",
    "UnsupportedError",
    "available_cp_handlers",
    "connect_zero_loss",
    "get_batch_on_this_cp_rank",
    "get_cp_handler_cls",
    "pack_documents",
    "pack_lengths",
    "record_traffic",
    "register_cp_handler",
    "unpack_documents",
]
