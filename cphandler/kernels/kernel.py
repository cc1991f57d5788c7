"""The kernel interface, and how partial results are put together.

Shapes: B batch rows, L query rows, M key rows, N query heads, G key/value heads (N divisible by G), D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cphandler.intervals import UNBOUNDED


class Task(NamedTuple):
    """Query rows ``[q, q + nq)`` against key rows ``[k, k + nk)``; row i sees row j where ``lo <= j - i <= hi``.

    Every row of a task sees at least one key. Bounds that exclude nothing are ``-UNBOUNDED`` and ``UNBOUNDED``.
    """

    q: int
    nq: int
    k: int
    nk: int
    lo: int
    hi: int

    @property
    def is_full(self) -> bool:
        """Every row sees every key."""
        return self.lo == -UNBOUNDED and self.hi == UNBOUNDED


Tasks: TypeAlias = Iterable[Task]


class Kernel(ABC):
    """Adds the result of tasks to accumulators.

    All tensors are ``[B, rows, heads, D]`` with any strides; accumulators are float32 (float64 for float64).
    """

    name: str
    deterministic: bool = True
    """Whether two runs give the same bits, forward and backward."""

    @abstractmethod
    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot take these tensors, or None. Looks at dtype, device and head dims only."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, scale: float, out: Tensor, lse: Tensor) -> None:
        """Merge each task's softmax-weighted values into ``out [B, L, N, D_v]`` and ``lse [B, L, N]``, in order.

        Args:
            q: ``[B, L, N, D]``.
            k: ``[B, M, G, D]``.
            v: ``[B, M, G, D_v]``.
            tasks: what to compute.
            scale: factor on the scores.
            out: zeros where no task has been merged yet.
            lse: natural log-sum-exp of the scaled scores, ``-inf`` where no task has been merged yet.
        """

    @abstractmethod
    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, scale: float, grads: Gradients) -> None:
        """Add each task's share of the gradients, given the merged forward result.

        Args:
            saved: what the forward pass left on the query side.
            k: ``[B, M, G, D]``.
            v: ``[B, M, G, D_v]``.
            tasks: what the forward pass computed over these keys.
            scale: factor on the scores.
            grads: accumulators.
        """


class Saved(NamedTuple):
    """The query side of a backward pass: all ``[B, L, N, ...]``, ``out`` and ``lse`` merged over all keys."""

    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class Gradients(NamedTuple):
    """Accumulators ``dq [B, L, N, D]``, ``dk [B, M, G, D]``, ``dv [B, M, G, D_v]``."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's attention over further keys into ``out`` and ``lse``, in place.

    ``out`` becomes the average of both weighted by ``exp(lse)``. Where both are ``-inf`` the result is 0 and ``-inf``;
    where one is, it is the other to the last bit.
    """
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, block_lse))
