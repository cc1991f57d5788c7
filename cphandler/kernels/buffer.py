"""Index tables side by side in one buffer, so that one copy brings all of them to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cphandler.errors import InvalidValueError

Array: TypeAlias = "npt.NDArray[Any]"
"""A table on the host, of any dtype that torch has too."""

ALIGNMENT = 16
"""Bytes that every table begins at a multiple of: kernels read several numbers at a time."""


class Buffer:
    """Tables on a device, in memory of their own that stays where it is.

    Args:
        tables: what it holds first.
        device: where.
    """

    def __init__(self, tables: Sequence[Array], device: torch.device) -> None:
        self._forms = [(table.dtype, table.shape) for table in tables]
        self._starts, end = [], 0
        for table in tables:
            self._starts.append(end)
            end += -(-table.nbytes // ALIGNMENT) * ALIGNMENT
        with torch.inference_mode(mode=False):  # an evaluation may ask first, and training later
            self._bytes = torch.empty(end, dtype=torch.uint8, device=device)
            self.write(tables)
            self.views = [
                self._bytes[start : start + table.nbytes].view(_dtype(table)).view(table.shape)
                for start, table in zip(self._starts, tables, strict=True)
            ]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._bytes.nbytes

    def write(self, tables: Sequence[Array]) -> None:
        """Write other tables of the same shapes in the place of these.

        On CUDA it is one copy from pinned memory, in the order of the current stream, which nothing waits for.

        Args:
            tables: as many, in the same order.

        Raises:
            InvalidValueError: tables of other shapes or dtypes; nothing has been written then.
        """
        forms = [(table.dtype, table.shape) for table in tables]
        if forms != self._forms:
            raise InvalidValueError(
                "tables must have the shapes of those whose place they take",
                got=f"{forms} for {self._forms}",
                fix="make a buffer for them",
            )
        on_host = self._bytes.device.type == "cpu"
        host = self._bytes if on_host else self._room()
        flat = host.numpy()
        for start, table in zip(self._starts, tables, strict=True):
            flat[start : start + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
        if not on_host:
            self._bytes.copy_(host, non_blocking=True)

    def _room(self) -> Tensor:
        """As many bytes on the host, whatever the default device is."""
        pinned = self._bytes.device.type == "cuda"
        return torch.empty(len(self._bytes), dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _dtype(table: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=table.dtype)).dtype


def on_device(tables: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Tables as tensors, brought to a device by one copy."""
    return Buffer(tables, device).views
