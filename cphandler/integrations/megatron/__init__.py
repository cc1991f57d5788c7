"""Megatron-Core's own models under context parallelism, with a handler for each micro-batch.

``megatron.core`` is imported when one of these names is first used, never before. ``docs/megatron.md`` has each call of
Megatron beside its replacement.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cphandler.errors import MissingPackageError

if TYPE_CHECKING:
    from cphandler.integrations.megatron.attention import CPDotProductAttention as CPDotProductAttention
    from cphandler.integrations.megatron.attention import CPMLASelfAttention as CPMLASelfAttention
    from cphandler.integrations.megatron.attention import CPSelfAttention as CPSelfAttention
    from cphandler.integrations.megatron.batch import get_batch_on_this_cp_rank as get_batch_on_this_cp_rank
    from cphandler.integrations.megatron.batch import get_thd_batch_on_this_cp_rank as get_thd_batch_on_this_cp_rank
    from cphandler.integrations.megatron.comm_types import cp_config as cp_config
    from cphandler.integrations.megatron.comm_types import cp_handler_cls as cp_handler_cls
    from cphandler.integrations.megatron.loss import loss_func as loss_func
    from cphandler.integrations.megatron.model import with_handlers as with_handlers
    from cphandler.integrations.megatron.parameters import HandlerParams as HandlerParams
    from cphandler.integrations.megatron.parameters import handler_from_params as handler_from_params
    from cphandler.integrations.megatron.parameters import handler_of as handler_of
    from cphandler.integrations.megatron.parameters import packed_params as packed_params
    from cphandler.integrations.megatron.roll import batch_tokens as batch_tokens
    from cphandler.integrations.megatron.roll import roll_tensor as roll_tensor
    from cphandler.integrations.megatron.rope import apply_rotary_pos_emb as apply_rotary_pos_emb
    from cphandler.integrations.megatron.spec import handler_spec as handler_spec
    from cphandler.integrations.megatron.views import context_parallel_batch as context_parallel_batch

_MODULES = {
    "attention": ("CPDotProductAttention", "CPMLASelfAttention", "CPSelfAttention"),
    "batch": ("get_batch_on_this_cp_rank", "get_thd_batch_on_this_cp_rank"),
    "comm_types": ("cp_config", "cp_handler_cls"),
    "loss": ("loss_func",),
    "model": ("with_handlers",),
    "parameters": ("HandlerParams", "handler_from_params", "handler_of", "packed_params"),
    "roll": ("batch_tokens", "roll_tensor"),
    "rope": ("apply_rotary_pos_emb",),
    "spec": ("handler_spec",),
    "views": ("context_parallel_batch",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import_module("megatron.core")
    except Exception as error:  # a package that is half installed may raise anything
        raise MissingPackageError(
            f"{__name__}.{name} needs megatron-core, which cannot be imported",
            got=f"{type(error).__name__}: {error}",
            fix="pip install 'cphandler[megatron]'",
        ) from error
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
