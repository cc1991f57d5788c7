"""Rope whose frequencies depend on the longest position of a batch, told that of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

_BY_LENGTH = ("dynamic", "longrope")
"""Values of ``rope_type`` that look at the largest position they are given."""


class RotaryForward:
    """The forward pass of a rotary embedding, with one position more: the largest of the whole batch.

    Stands in the layer's ``__dict__`` in front of the class's own.

    Args:
        layer: the rotary embedding.
    """

    def __init__(self, layer: Any) -> None:
        self.inner: Callable[..., Any] = layer.forward
        self.largest: Tensor | None = None
        update_wrapper(self, self.inner)

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives for the positions, without that of the largest."""
        if self.largest is None:
            return self.inner(x, position_ids, *args, **kwargs)
        largest = self.largest.to(position_ids.device).expand(*position_ids.shape[:-1], 1)
        tables = self.inner(x, torch.cat([position_ids, largest], -1), *args, **kwargs)
        if isinstance(tables, tuple):
            return tuple(table[..., :-1, :] for table in tables)
        return tables[..., :-1, :]


def rotary_forwards(model: Any) -> list[RotaryForward]:
    """A forward pass for each rotary embedding of a model that depends on lengths, put in its place."""
    found = []
    for layer in model.modules():
        kinds = getattr(layer, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and any(name in kind for name in _BY_LENGTH) for kind in kinds):
            layer.forward = RotaryForward(layer)
            found.append(layer.forward)
    return found
