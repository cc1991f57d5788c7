"""Kernels: what computes tasks on one device. A kernel knows nothing of ranks, layouts or documents."""

from __future__ import annotations

from cphandler.kernels.dropout import Dropout, keep_mask, query_states
from cphandler.kernels.kernel import Kernel, Softmax
from cphandler.kernels.merge import merge_attention
from cphandler.kernels.registry import (
    Asked,
    Candidate,
    available_kernels,
    candidates,
    check_kernel_name,
    choose,
    get_kernel,
    kernel_devices,
    likely_kernel,
    register_kernel,
    select_kernel,
)
from cphandler.kernels.sums import AttentionSum, RowSum
from cphandler.kernels.task import Task, Tasks

__all__ = [
    "Asked",
    "AttentionSum",
    "Candidate",
    "Dropout",
    "Kernel",
    "RowSum",
    "Softmax",
    "Task",
    "Tasks",
    "available_kernels",
    "candidates",
    "check_kernel_name",
    "choose",
    "get_kernel",
    "keep_mask",
    "kernel_devices",
    "likely_kernel",
    "merge_attention",
    "query_states",
    "register_kernel",
    "select_kernel",
]
