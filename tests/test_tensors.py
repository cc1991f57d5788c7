"""How tables come to a device: copies, and to a GPU from memory that nothing has to wait for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from cphandler.tensors import device_copy


def test_a_gpu_gets_pinned_memory() -> None:
    """Pinned first, then sent without a wait; counted, since there may be no GPU here."""
    seen: list[Any] = []

    def pinned(self: Tensor) -> Tensor:
        seen.append("pinned")
        return self

    def sent(self: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        seen.append((device.type, non_blocking))
        return self

    with mock.patch.object(Tensor, "pin_memory", pinned), mock.patch.object(Tensor, "to", sent):
        device_copy(np.arange(3), torch.device("cuda", 1))
        assert seen == ["pinned", ("cuda", True)]
        seen.clear()
        device_copy(np.arange(3), torch.device("cpu"))
        assert seen == [("cpu", False)]


def test_a_copy_is_the_callers_own() -> None:
    table = np.arange(4)
    table.flags.writeable = False
    with torch.inference_mode():
        made = device_copy(table, torch.device("cpu"))
    assert not made.is_inference()
    made += 1
    assert table.tolist() == [0, 1, 2, 3]
    assert device_copy(np.zeros((0, 2), dtype=bool), torch.device("cpu")).shape == (0, 2)
