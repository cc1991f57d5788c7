"""The loop that kernels over dense blocks share: cut tasks into blocks, compute each, put the results together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.kernels.kernel import Gradients, Kernel, Saved, Softmax
from cphandler.kernels.sums import AttentionSum, Spaced
from cphandler.kernels.task import Task, Tasks


class Piece(NamedTuple):
    """A block, or several alike at equal distances, and where they lie.

    Attributes:
        block: the first of them.
        rows: the query rows of all.
        keys: their keys.
        number: how many they are.
    """

    block: Task
    rows: slice | Spaced
    keys: slice | Spaced
    number: int

    def folded(self, x: Tensor, rows: slice | Spaced) -> Tensor:
        """Their rows, or keys, of ``[B, L, ...]`` as rows of a batch, ``[B * number, n, ...]``."""
        apart: Tensor = rows.of(x) if isinstance(rows, Spaced) else x[:, rows].unflatten(1, (self.number, -1))
        return apart.flatten(0, 1)

    def unfolded(self, x: Tensor, rows: slice | Spaced) -> Tensor:
        """What a sum takes for these rows, from ``[B * number, n, ...]``."""
        apart: Tensor = x.unflatten(0, (-1, self.number))
        return apart if isinstance(rows, Spaced) else apart.flatten(1, 2)


def joined(blocks: Iterable[Task]) -> Iterator[Piece]:
    """Blocks, with runs of equal ones at equal distances as one piece; no row or key of it is another one's too."""
    run: list[Task] = []
    for block in blocks:
        if run:
            last = run[-1]
            apart = block.q - last.q, block.k - last.k
            alike = block == (block.q, last.nq, block.k, *last[3:]) and apart[0] >= last.nq and apart[1] >= last.nk
            if alike and (len(run) == 1 or apart == (last.q - run[-2].q, last.k - run[-2].k)):
                run.append(block)
                continue
            yield _piece(run)
        run = [block]
    if run:
        yield _piece(run)


def _piece(run: Sequence[Task]) -> Piece:
    first, number = run[0], len(run)
    rows, keys = _laid([block.q for block in run], first.nq), _laid([block.k for block in run], first.nk)
    return Piece(first, rows, keys, number)


def _laid(starts: Sequence[int], length: int) -> slice | Spaced:
    """Where equal runs of rows lie."""
    if starts[-1] - starts[0] == (len(starts) - 1) * length:
        return slice(starts[0], starts[-1] + length)
    return Spaced(starts[0], length, starts[1] - starts[0], len(starts))


class BlockKernel(Kernel):
    """A kernel that computes one block of query rows against one block of key rows at a time."""

    batches: ClassVar[bool] = False
    """Whether equal blocks at equal distances, as of equal documents, may be rows of a batch; never with dropout."""

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
        return list(joined(blocks)) if self.batches else [_piece([block]) for block in blocks]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, result: AttentionSum) -> None:
        """See :meth:`Kernel.forward`."""
        softmax, rows_in_all, keys_in_all = self._accepted(softmax), q.shape[1], k.shape[1]
        for piece in self.prepared(tasks, q):
            block, rows, keys, number = piece
            part = softmax if softmax.dropout is None else softmax.of(block.rows, block.keys)
            queries, own_keys, values = q, k, v
            if number > 1:
                queries, own_keys, values = piece.folded(q, rows), piece.folded(k, keys), piece.folded(v, keys)
            else:  # a view costs as much as ten of these lines
                if block.nq != rows_in_all:
                    queries = q[:, rows]
                if block.nk != keys_in_all:
                    own_keys, values = k[:, keys], v[:, keys]
            out, lse = self.block_forward(queries, own_keys, values, block, part)
            if number > 1:
                out, lse = piece.unfolded(out, rows), piece.unfolded(lse, rows)
            result.merge(rows, out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`."""
        softmax, rows_in_all, keys_in_all = self._accepted(softmax), saved.q.shape[1], k.shape[1]
        for piece in self.prepared(tasks, saved.q):
            block, rows, keys, number = piece
            part = softmax if softmax.dropout is None else softmax.of(block.rows, block.keys)
            seen_from, own_keys, values = saved, k, v
            if number > 1:
                sides = (None if x is None else piece.folded(x, rows) for x in saved)
                seen_from = Saved(*sides)  # type: ignore[arg-type]
                own_keys, values = piece.folded(k, keys), piece.folded(v, keys)
            else:
                if block.nq != rows_in_all:
                    seen_from = saved.of(rows)
                if block.nk != keys_in_all:
                    own_keys, values = k[:, keys], v[:, keys]
            dq, dk, dv = self.block_backward(seen_from, own_keys, values, block, part)
            if number > 1:
                dq, dk, dv = piece.unfolded(dq, rows), piece.unfolded(dk, keys), piece.unfolded(dv, keys)
            grads.dq.add(rows, dq)
            grads.dk.add(keys, dk)
            grads.dv.add(keys, dv)

    def _accepted(self, softmax: Softmax) -> Softmax:
        """The same with a place for masks.

        Raises:
            UnsupportedError: an option this kernel does not compute, which would otherwise pass without a word.
        """
        if softmax.softcap is None and softmax.dropout is None:
            return softmax if softmax.masks is not None else softmax.prepared()
        refused = self.refused_option(softcap=softmax.softcap is not None, dropout=softmax.dropout is not None)
        if refused is not None:
            raise UnsupportedError(
                f"kernel {self.name!r} cannot be used here", got=refused, fix='use CPConfig(kernel="reference")'
            )
        return softmax.prepared()
