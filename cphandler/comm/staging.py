"""Host copies of what a device holds, for a transport that moves the host's memory only.

So several ranks may share one GPU over gloo, which NCCL refuses: for tests. Every message waits for the device twice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.comm import membership


class Staging:
    """The host's side of the messages of one exchange."""

    def __init__(self) -> None:
        self._arriving: list[tuple[Tensor, Tensor]] = []
        self._devices: set[torch.device] = set()

    def leaving(self, x: Tensor) -> Tensor:
        """A copy of ``x`` on the host; to be read after :meth:`settle`."""
        self._devices.add(x.device)
        return _room(x).copy_(x, non_blocking=True)

    def arriving(self, x: Tensor) -> Tensor:
        """Room on the host for what ``x`` will hold after :meth:`land`."""
        made = _room(x)
        self._arriving.append((made, x))
        return made

    def settle(self) -> None:
        """Wait until the device has made all copies."""
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def land(self) -> None:
        """Copy what has come to the device."""
        for host, x in self._arriving:
            x.copy_(host, non_blocking=True)
        self._arriving.clear()


def through_host(device: torch.device, group: dist.ProcessGroup) -> Staging | None:
    """Where messages of a device must pass through the host; None where they need not."""
    return Staging() if device.type != "cpu" and membership.on_gloo(device, group) else None


def _room(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type == "cuda")
