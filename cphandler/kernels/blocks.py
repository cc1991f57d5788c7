"""The loop that kernels over dense blocks share: cut tasks into blocks, compute each, put the results together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from torch import Tensor

from cphandler.kernels.kernel import Gradients, Kernel, Saved, Task, Tasks, merge


class BlockKernel(Kernel):
    """A kernel that computes one block of query rows against one block of key rows at a time."""

    @abstractmethod
    def blocks(self, task: Task, q: Tensor) -> Iterator[Task]:
        """Cut a task into blocks this kernel takes in one call."""

    @abstractmethod
    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of a block's rows: ``out [B, nq, N, D_v]`` and ``lse [B, nq, N]``."""

    @abstractmethod
    def block_backward(self, saved: Saved, k: Tensor, v: Tensor, block: Task, scale: float) -> Gradients:
        """The block's share of the gradients of its rows and keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, scale: float, out: Tensor, lse: Tensor) -> None:
        """See :meth:`Kernel.forward`."""
        for task in tasks:
            for block in self.blocks(task, q):
                rows, keys = slice(block.q, block.q + block.nq), slice(block.k, block.k + block.nk)
                block_out, block_lse = self.block_forward(q[:, rows], k[:, keys], v[:, keys], block, scale)
                merge(out[:, rows], lse[:, rows], block_out, block_lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, scale: float, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`."""
        for task in tasks:
            for block in self.blocks(task, saved.q):
                rows, keys = slice(block.q, block.q + block.nq), slice(block.k, block.k + block.nk)
                part = Saved(*(None if x is None else x[:, rows] for x in saved))  # type: ignore[arg-type]
                dq, dk, dv = self.block_backward(part, k[:, keys], v[:, keys], block, scale)
                grads.dq[:, rows] += dq
                grads.dk[:, keys] += dk
                grads.dv[:, keys] += dv
