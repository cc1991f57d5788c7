"""CUDA graphs: what a captured call may depend on. A replay runs the launches of the batch that was captured."""

from __future__ import annotations

import torch

from cphandler.errors import UnsupportedError

CAPTURED = "cuda"
"""The kind of device whose work a graph may capture."""


def is_capturing() -> bool:
    """Whether this thread's stream is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(name: str, exchange: str, *, packed: bool, padded: bool) -> None:
    """Refuse to capture attention whose launches or messages follow from one batch's documents or padding.

    A dense batch without padding has the launches and messages of its shape, so that a graph serves all batches of it.

    Args:
        name: the handler's class.
        exchange: how keys reach the queries; empty where they are here.
        packed: whether the batch is one of documents.
        padded: whether rows of a dense batch have padding of their own.

    Raises:
        UnsupportedError: a packed or padded batch.
    """
    if not packed and not padded:
        return
    what = "documents" if packed else "padding"
    moved = f"the launches, and the messages of {exchange!r}," if exchange else "the launches"
    way_out = "capture the handler of a CapturedBatch, made of this one (local, ulysses and all_gather have it), or "
    raise UnsupportedError(
        f"{name}: a CUDA graph of this batch would replay its {what} for every other batch, without a word",
        got=f"a capture of core_attn, where {moved} follow from the {what}",
        fix=f"{way_out if packed else ''}leave attention out of the graph, or capture dense batches without padding",
    )


def check_facts(name: str, method: str, *, packed: bool, padded: bool, served: bool = False) -> None:
    """Refuse to capture what else a handler does with tables that follow from one batch's documents or padding.

    Args:
        name: the handler's class.
        method: what was asked of it.
        packed: whether the batch is one of documents.
        padded: whether rows of a dense batch have padding of their own.
        served: whether the handler of a :class:`~cphandler.CapturedBatch` has it from tables that stay in place.

    Raises:
        UnsupportedError: a packed or padded batch.
    """
    if not packed and not padded:
        return
    outside = (
        f"call {method} before the capture and before each replay, and copy what it gives into a tensor that stays"
    )
    raise UnsupportedError(
        f"{name}.{method} in a CUDA graph would replay this batch's rows for every other batch, without a word",
        got=f"a capture of {method}",
        fix=f"ask the handler of a CapturedBatch, or {outside}" if served and packed else outside,
    )
