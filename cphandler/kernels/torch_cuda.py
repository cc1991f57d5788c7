"""torch's own kernels for CUDA as one: flash for 16-bit inputs, memory-efficient for float32, dense for float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cphandler.kernels.fused import OPTIONS, follows_torch
from cphandler.kernels.kernel import Gradients, Kernel, Saved, Softmax
from cphandler.kernels.reference import ReferenceKernel
from cphandler.kernels.sums import AttentionSum
from cphandler.kernels.task import Tasks
from cphandler.kernels.torch_efficient import TorchEfficientKernel
from cphandler.kernels.torch_flash import TorchFlashKernel
from cphandler.precision import ATTENTION_DTYPES

_BY_DTYPE: Mapping[torch.dtype, Kernel] = {
    torch.float16: TorchFlashKernel(),
    torch.bfloat16: TorchFlashKernel(),
    torch.float32: TorchEfficientKernel(),
    torch.float64: ReferenceKernel(),
}


class TorchCudaKernel(Kernel):
    """What needs no package beside torch, for every dtype."""

    name = "torch"
    deterministic = False
    refuses: ClassVar[Mapping[str, str]] = OPTIONS

    def nondeterminism(self) -> str | None:
        """See :meth:`Kernel.nondeterminism`."""
        return follows_torch()

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Needs one of the usual dtypes, and head dims that the kernel for it takes."""
        return _BY_DTYPE[q.dtype].misfit(q, k, v) if q.dtype in ATTENTION_DTYPES else f"dtype {q.dtype}"

    def fuses_windows(self, dtype: torch.dtype) -> bool:
        """As the kernel for a dtype does."""
        return _BY_DTYPE[dtype].fuses_windows(dtype)

    def serves_packings(self, dtype: torch.dtype) -> bool:
        """As the kernel for a dtype does."""
        return _BY_DTYPE[dtype].serves_packings(dtype)

    def prepare(self, tasks: Tasks, dtype: torch.dtype, device: torch.device) -> Any:
        """What the kernel for a dtype prepares."""
        return _BY_DTYPE[dtype].prepare(tasks, dtype, device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, result: AttentionSum) -> None:
        """See :meth:`Kernel.forward`."""
        _BY_DTYPE[q.dtype].forward(q, k, v, tasks, softmax, result)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`."""
        _BY_DTYPE[saved.q.dtype].backward(saved, k, v, tasks, softmax, grads)
