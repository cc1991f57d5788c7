"""What a Megatron config says of communication, as a handler class and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cphandler.config import CPConfig
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls

TWO_LEVELS = ("a2a+p2p", "a2a+ring", "usp")
"""Comm types to which hierarchical sizes mean something."""

DEFAULT = "p2p"
"""What Megatron uses where a config names nothing."""


def cp_handler_cls(
    config: Any, cp_comm_type: str | Sequence[str] | None = None, *, backend: str = "local"
) -> type[ContextParallelHandler]:
    """The handler class for a ``TransformerConfig``.

    Args:
        config: read for ``cp_comm_type`` (a name, a list with one for each layer, or None for ``"p2p"``),
            ``num_layers`` and ``mtp_num_layers``: layers of multi-token prediction, which a list does not name, are
            like the last one.
        cp_comm_type: in place of the config's. Megatron-Core 0.16 builds no model from a config with a list (it looks
            one layer too far), so that a list is given here.
        backend: see :func:`cphandler.get_cp_handler_cls`.

    Raises:
        InvalidTypeError: neither a name nor a list of names.
        InvalidValueError: a list of another length than the layers, or an unknown name.
    """
    chosen = getattr(config, "cp_comm_type", None) if cp_comm_type is None else cp_comm_type
    if chosen is None:
        chosen = DEFAULT
    if isinstance(chosen, str):
        return get_cp_handler_cls(backend, chosen)
    if not isinstance(chosen, (list, tuple)) or not chosen:
        raise InvalidTypeError(
            "cp_comm_type must be a name, or a list with one for each layer", got=repr(chosen), fix='"p2p", say'
        )
    if len(chosen) != config.num_layers:
        raise InvalidValueError(
            "cp_comm_type must name one comm type for each layer",
            got=f"{len(chosen)} for {config.num_layers} layers",
            fix="name one for each layer of the whole model, on every pipeline stage alike",
        )
    further = getattr(config, "mtp_num_layers", None) or 0
    return get_cp_handler_cls(backend, [*chosen, *[chosen[-1]] * further])


def cp_config(config: Any, cp_comm_type: str | Sequence[str] | None = None, **settings: Any) -> CPConfig:
    """The handler settings that a ``TransformerConfig`` implies.

    Args:
        config: read for ``hierarchical_context_parallel_sizes``, ``[a2a, p2p]``, whose first number is the ranks of an
            inner group where a comm type has two levels, and for ``deterministic_mode``.
        cp_comm_type: in place of the config's.
        **settings: of :class:`cphandler.CPConfig`; they win.

    Raises:
        InvalidValueError: hierarchical sizes that are not two.
    """
    sizes = getattr(config, "hierarchical_context_parallel_sizes", None)
    chosen = getattr(config, "cp_comm_type", None) if cp_comm_type is None else cp_comm_type
    names = [chosen] if isinstance(chosen, str) else list(chosen or ())
    implied: dict[str, Any] = {}
    if sizes is not None and any(name in TWO_LEVELS for name in names):
        if len(sizes) != 2:
            raise InvalidValueError(
                "hierarchical_context_parallel_sizes must be two numbers", got=repr(sizes), fix="pass [a2a, p2p]"
            )
        implied["ulysses_degree"] = int(sizes[0])
    if getattr(config, "deterministic_mode", False):
        implied["deterministic"] = True
    return CPConfig(**(implied | settings))
