"""One batch in several layouts, for Megatron releases whose models take a ``ContextParallelBatch``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from cphandler.errors import InvalidValueError, MissingPackageError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.integrations.megatron.batch import get_batch_on_this_cp_rank
from cphandler.integrations.megatron.parameters import packed_params, partition_mode


def context_parallel_batch(
    batch: Mapping[str, Any],
    handlers: Mapping[str, ContextParallelHandler],
    boundary_layout: str = "zigzag",
    *,
    batch_cls: Any = None,
) -> Any:
    """This rank's rows of a batch in each layout, as Megatron's ``ContextParallelBatch``.

    Args:
        batch: the global batch.
        handlers: by Megatron's name for the layout, ``"zigzag"`` or ``"contiguous"``; each has that layout.
        boundary_layout: the layout of what enters and leaves the model.
        batch_cls: the class to make; Megatron's own where the installed release has one.

    Raises:
        InvalidValueError: names that are not the handlers' layouts, or no handler for the boundary.
        UnsupportedError: a layout that Megatron has no name for, or lengths that it cuts otherwise.
        MissingPackageError: a release without ``ContextParallelBatch``.
    """
    modes = {name: partition_mode(h) if h.cp_size > 1 else name for name, h in handlers.items()}
    wrong = [f"{name!r} is {mode}" for name, mode in modes.items() if name != mode]
    if wrong or boundary_layout not in handlers:
        raise InvalidValueError(
            "handlers go by the name of their layout, the boundary's among them",
            got=", ".join(wrong) or f"no {boundary_layout!r}",
            fix="{'zigzag': handler, 'contiguous': other}, say",
        )
    made_by = _batch_cls() if batch_cls is None else batch_cls
    return made_by(
        boundary_layout=boundary_layout,
        batches_by_layout={
            name: get_batch_on_this_cp_rank(batch, cp_handler=handler) for name, handler in handlers.items()
        },
        packed_seq_params_by_layout={name: packed_params(handler) for name, handler in handlers.items()},
    )


def _batch_cls() -> Any:
    try:
        return import_module("megatron.core.context_parallel").ContextParallelBatch
    except (ImportError, AttributeError) as error:
        raise MissingPackageError(
            "this release of megatron-core has no ContextParallelBatch",
            got=str(error),
            fix="pass packed_params(handler) as packed_seq_params, or batch_cls=",
        ) from error
