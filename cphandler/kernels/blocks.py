"""The loop that kernels over dense blocks share: cut tasks into blocks, compute each, put the results together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.kernels.kernel import Gradients, Kernel, Saved, Softmax
from cphandler.kernels.merge import merge_into
from cphandler.kernels.task import Task, Tasks


class BlockKernel(Kernel):
    """A kernel that computes one block of query rows against one block of key rows at a time."""

    @abstractmethod
    def blocks(self, task: Task, q: Tensor) -> Iterator[Task]:
        """Cut a task into blocks this kernel takes in one call."""

    @abstractmethod
    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """Attention of a block's rows: ``out [B, nq, N, D_v]`` and ``lse [B, nq, N]``."""

    @abstractmethod
    def block_backward(self, saved: Saved, k: Tensor, v: Tensor, block: Task, softmax: Softmax) -> Gradients:
        """The block's share of the gradients of its rows and keys."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, out: Tensor, lse: Tensor
    ) -> None:
        """See :meth:`Kernel.forward`."""
        for block, part in self._cut(tasks, q, softmax):
            rows, keys = block.rows, block.keys
            block_out, block_lse = self.block_forward(q[:, rows], k[:, keys], v[:, keys], block, part)
            merge_into(out[:, rows], lse[:, rows], block_out, block_lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`."""
        for block, part in self._cut(tasks, saved.q, softmax):
            rows, keys = block.rows, block.keys
            seen_from = Saved(*(None if x is None else x[:, rows] for x in saved))  # type: ignore[arg-type]
            dq, dk, dv = self.block_backward(seen_from, k[:, keys], v[:, keys], block, part)
            grads.dq[:, rows] += dq
            grads.dk[:, keys] += dk
            grads.dv[:, keys] += dv

    def _cut(self, tasks: Tasks, q: Tensor, softmax: Softmax) -> Iterator[tuple[Task, Softmax]]:
        """All blocks, each with the softmax of its rows and keys.

        Raises:
            UnsupportedError: an option this kernel does not compute, which would otherwise pass without a word.
        """
        refused = self.refused_option(softcap=softmax.softcap is not None, dropout=softmax.dropout is not None)
        if refused is not None:
            raise UnsupportedError(
                f"kernel {self.name!r} cannot be used here", got=refused, fix='use CPConfig(kernel="reference")'
            )
        softmax = softmax.prepared()
        for task in tasks:
            for block in self.blocks(task, q):
                yield block, softmax if softmax.dropout is None else softmax.of(block.rows, block.keys)
