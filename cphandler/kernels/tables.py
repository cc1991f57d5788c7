"""Tensors on a device that follow from a plan: masks and row numbers, made once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor


class DeviceTables:
    """Tables by key, made when they are first asked for, and freed with whoever keeps this object.

    On CUDA each stream has its own: where a table is made, read and freed in the order of one stream, no other stream
    reads it half made, or has its memory given away. What is made while a graph is captured serves that graph alone.

    Args:
        most: tables to keep; beyond them all are dropped and made anew. None for no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._made: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._made.values())

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The table of a key, not to be written to.

        Args:
            key: what tells this table from others.
            device: where it is to be.
            make: makes it on that device.
        """
        where = key, device, _stream(device)
        table = self._made.get(where)
        if table is None:
            if self._most is not None and len(self._made) >= self._most:
                self._made.clear()
            with torch.inference_mode(mode=False):  # asked for by an evaluation first, it may serve training later
                table = self._made[where] = make()
        return table


def _stream(device: torch.device) -> Hashable:
    """The stream that work on a device goes to now, and whether it is only recorded there; None on the host."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
