"""The loop that kernels over dense blocks share: cut tasks into blocks, compute each, put the results together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.kernels.kernel import Gradients, Kernel, Saved, Softmax
from cphandler.kernels.sums import AttentionSum
from cphandler.kernels.task import Task, Tasks


class Piece(NamedTuple):
    """A block and where it lies."""

    block: Task
    rows: slice
    keys: slice


class BlockKernel(Kernel):
    """A kernel that computes one block of query rows against one block of key rows at a time."""

    @abstractmethod
    def blocks(self, task: Task, dtype: torch.dtype) -> Iterator[Task]:
        """Cut a task into blocks this kernel takes in one call."""

    @abstractmethod
    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """Attention of a block's rows: ``out [B, nq, N, D_v]`` and ``lse [B, nq, N]``, new tensors."""

    @abstractmethod
    def block_backward(
        self, saved: Saved, k: Tensor, v: Tensor, block: Task, softmax: Softmax
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's share of the gradients of its rows, keys and values, new tensors."""

    def prepare(self, tasks: Tasks, dtype: torch.dtype, device: torch.device) -> list[Piece]:
        """All blocks of the tasks, in order."""
        return [Piece(block, block.rows, block.keys) for task in tasks for block in self.blocks(task, dtype)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, result: AttentionSum) -> None:
        """See :meth:`Kernel.forward`."""
        softmax = self._accepted(softmax)
        for block, rows, keys in self.prepared(tasks, q):
            part = softmax if softmax.dropout is None else softmax.of(rows, keys)
            out, lse = self.block_forward(q[:, rows], k[:, keys], v[:, keys], block, part)
            result.merge(rows, out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`."""
        softmax = self._accepted(softmax)
        for block, rows, keys in self.prepared(tasks, saved.q):
            part = softmax if softmax.dropout is None else softmax.of(rows, keys)
            dq, dk, dv = self.block_backward(saved.of(rows), k[:, keys], v[:, keys], block, part)
            grads.dq.add(rows, dq)
            grads.dk.add(keys, dk)
            grads.dv.add(keys, dv)

    def _accepted(self, softmax: Softmax) -> Softmax:
        """The same with a place for masks.

        Raises:
            UnsupportedError: an option this kernel does not compute, which would otherwise pass without a word.
        """
        refused = self.refused_option(softcap=softmax.softcap is not None, dropout=softmax.dropout is not None)
        if refused is not None:
            raise UnsupportedError(
                f"kernel {self.name!r} cannot be used here", got=refused, fix='use CPConfig(kernel="reference")'
            )
        return softmax.prepared()
