"""Kernels: what computes tasks on one device. A kernel knows nothing of ranks, layouts or documents."""

from __future__ import annotations

from cphandler.kernels.kernel import Kernel, Task, merge
from cphandler.kernels.registry import available_kernels, get_kernel, register_kernel, select_kernel

__all__ = ["Kernel", "Task", "available_kernels", "get_kernel", "merge", "register_kernel", "select_kernel"]
