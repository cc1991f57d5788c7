"""The loop that kernels over dense blocks share: cut tasks into blocks, compute each, put the results together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.kernels.kernel import Gradients, Kernel, Saved, Softmax
from cphandler.kernels.sums import AttentionSum
from cphandler.kernels.task import Task, Tasks


class Piece(NamedTuple):
    """A block, or several alike that lie side by side, and where they lie.

    Attributes:
        block: the first of them.
        rows: the query rows of all.
        keys: their keys.
        number: how many they are.
    """

    block: Task
    rows: slice
    keys: slice
    number: int

    def fold(self, x: Tensor) -> Tensor:
        """Their rows ``[B, number * n, ...]`` of a tensor as rows of a batch, ``[B * number, n, ...]``."""
        return x if self.number == 1 else x.unflatten(1, (self.number, -1)).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """What :meth:`fold` was given, from what it gave."""
        return x if self.number == 1 else x.unflatten(0, (-1, self.number)).flatten(1, 2)


def joined(blocks: Iterable[Task]) -> Iterator[Piece]:
    """Blocks, with runs of equal ones that lie side by side as one piece."""
    count, first, last = 0, None, None
    for block in blocks:
        if last is not None and first is not None:
            if block == (last.q + last.nq, last.nq, last.k + last.nk, *last[3:]):
                count, last = count + 1, block
                continue
            yield _piece(first, last, count)
        count, first, last = 1, block, block
    if last is not None and first is not None:
        yield _piece(first, last, count)


def _piece(first: Task, last: Task, count: int) -> Piece:
    return Piece(first, slice(first.q, last.q + last.nq), slice(first.k, last.k + last.nk), count)


class BlockKernel(Kernel):
    """A kernel that computes one block of query rows against one block of key rows at a time."""

    batches: ClassVar[bool] = False
    """Whether equal blocks side by side, as of equal documents, may come as rows of a batch; never with dropout."""

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
        blocks = (block for task in tasks for block in self.blocks(task, dtype))
        return list(joined(blocks)) if self.batches else [_piece(block, block, 1) for block in blocks]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, result: AttentionSum) -> None:
        """See :meth:`Kernel.forward`."""
        softmax = self._accepted(softmax)
        for piece in self.prepared(tasks, q):
            block, rows, keys, number = piece
            part = softmax if softmax.dropout is None else softmax.of(rows, keys)
            queries, own_keys, values = q[:, rows], k[:, keys], v[:, keys]
            if number > 1:
                queries, own_keys, values = piece.fold(queries), piece.fold(own_keys), piece.fold(values)
            out, lse = self.block_forward(queries, own_keys, values, block, part)
            if number > 1:
                out, lse = piece.unfold(out), piece.unfold(lse)
            result.merge(rows, out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`."""
        softmax = self._accepted(softmax)
        for piece in self.prepared(tasks, saved.q):
            block, rows, keys, number = piece
            part = softmax if softmax.dropout is None else softmax.of(rows, keys)
            seen_from, own_keys, values = saved.of(rows), k[:, keys], v[:, keys]
            if number > 1:
                seen_from = Saved(*(None if x is None else piece.fold(x) for x in seen_from))  # type: ignore[arg-type]
                own_keys, values = piece.fold(own_keys), piece.fold(values)
            dq, dk, dv = self.block_backward(seen_from, own_keys, values, block, part)
            if number > 1:
                dq, dk, dv = piece.unfold(dq), piece.unfold(dk), piece.unfold(dv)
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
