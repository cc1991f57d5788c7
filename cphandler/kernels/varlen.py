"""Kernels that take all tasks of one shape in one launch: the loop over launches, and what flash kernels ask for."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cphandler.errors import UnsupportedError
from cphandler.kernels.fused import narrowed, padded
from cphandler.kernels.kernel import Gradients, Kernel, Saved, Softmax
from cphandler.kernels.launches import Gathered, Launch, Launches, Offsets, Window, launches
from cphandler.kernels.reference import ReferenceKernel
from cphandler.kernels.shapes import NK, NQ, cut, plain
from cphandler.kernels.sums import ALL, AttentionSum, RowSum
from cphandler.kernels.task import Tasks
from cphandler.tokens.intervals import UNBOUNDED

ALIGNMENT = 8
"""Head dims of flash kernels are multiples of this."""

VECTOR = 16
"""Bytes that a kernel reads at once."""

PARTS = 3
"""Channels that carry a gradient of the log-sum-exp: what float32 holds, in three numbers of bfloat16's 8 bits."""


class Inputs(NamedTuple):
    """What one launch computes on; all of one head dim, with last strides of 1.

    With offsets tensors are ``[rows, heads, D]``, the rows of all tasks in order; else ``[B, rows, heads, D]``, and the
    whole is one task in each row of the batch.

    Attributes:
        q: queries, N heads.
        k: keys, G heads.
        v: values.
        window: what each task's rows see.
        offsets: of the tasks.
        softmax: scale and softcap, and whether two runs must give the same bits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window: Window
    offsets: Offsets | None
    softmax: Softmax


class Result(NamedTuple):
    """The query side of a backward pass, in the shapes of :class:`Inputs`.

    Attributes:
        out: the output, merged over all keys.
        lse: ``[N, rows]`` contiguous, or ``[B, N, rows]``; natural logarithm, float32.
        grad_out: gradient of the output.
        grad_lse: gradient of the log-sum-exp, in its shape; None where there is none or it travels in the channels.
    """

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class Work(NamedTuple):
    """What a kernel does for the tasks over one block of keys.

    Attributes:
        launches: of the kernel.
        rest: tasks whose window it does not take, for the reference; None where there are none.
    """

    launches: Launches
    rest: Tasks | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tables."""
        return self.launches.nbytes + (0 if self.rest is None else self.rest.table.nbytes + self.rest.nbytes)


class VarlenKernel(Kernel):
    """A kernel with packed sequences: each launch computes all tasks of one window, however many documents there are.

    A backend implements :meth:`launch_forward` and :meth:`launch_backward` by one call each of its package.
    """

    deterministic = False
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    widest_head: ClassVar[int] = 256
    takes_windows: ClassVar[bool] = True
    """Whether a launch may have a window other than none and causal; else such tasks are computed densely."""

    most_tasks: ClassVar[int] = 1024
    """Tasks of a launch. A grid of 65,535 is the hard limit; and the backward pass of flash kernels takes 128 rows of
    float32 in every head for each task, however short it is: 4 MiB with 64 heads of 128."""

    least_rows: ClassVar[int] = 1
    """Rows and keys of the smallest task that a launch may have; smaller ones are computed densely."""

    takes_grad_lse: ClassVar[bool] = False
    """Whether the backward call has an argument for the gradient of the log-sum-exp."""

    takes_room: ClassVar[bool] = False
    """Whether offsets may hold empty sequences, end before the rows do, and name a longest length that none has: then
    one launch serves every packing; see :mod:`cphandler.kernels.room`."""

    @abstractmethod
    def launch_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Attention of a launch: ``out`` in the shape of ``q``, and the natural log-sum-exp in float32; new tensors.

        The latter is ``[N, rows]`` with offsets, else ``[B, N, rows]``.
        """

    @abstractmethod
    def launch_backward(self, inputs: Inputs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` in the shapes of ``q, k, v``, new tensors."""

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Needs 16-bit inputs, and head dims that fit once they are padded."""
        if q.dtype not in self.dtypes:
            return f"dtype {q.dtype}; it takes {', '.join(str(dtype) for dtype in self.dtypes)}"
        widest = max(q.shape[-1], v.shape[-1])
        return None if widest <= self.widest_head else f"head dim {widest}: at most {self.widest_head} is possible"

    def fuses_windows(self, dtype: torch.dtype) -> bool:
        """See :meth:`Kernel.fuses_windows`."""
        return self.takes_windows

    def serves_packings(self, dtype: torch.dtype) -> bool:
        """See :meth:`Kernel.serves_packings`."""
        return self.takes_room and dtype in self.dtypes

    def prepare(self, tasks: Tasks, dtype: torch.dtype, device: torch.device) -> Work:
        """The launches for one row of a batch."""
        return self._work(tasks, 1, device)

    def _work(self, tasks: Tasks, batch: int, device: torch.device) -> Work:
        table = cut(tasks.table)
        fits = np.asarray(table[:, [NQ, NK]].min(axis=1, initial=UNBOUNDED) >= self.least_rows)
        if not self.takes_windows:
            fits &= plain(table)
        rest = None if fits.all() else Tasks(table[~fits])
        return Work(launches(table[fits], batch, device, self.most_tasks), rest)

    def _prepared_for(self, tasks: Tasks, q: Tensor) -> Work:
        """The work for as many rows of a batch as the queries have; made once and kept with the plan."""
        batch, device = q.shape[0], q.device
        if batch == 1:
            made: Work = self.prepared(tasks, q)
            return made
        return tasks.prepared((type(self), batch, device), lambda: self._work(tasks, batch, device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, result: AttentionSum) -> None:
        """See :meth:`Kernel.forward`."""
        self._check(softmax)
        if q.shape[0] == 0:
            return
        channels, wanted = _channels(q.shape[-1], v.shape[-1]), v.shape[-1]
        wide = [padded(x, channels) for x in (q, k, v)]
        work = self._prepared_for(tasks, q)
        for launch in work.launches:
            inputs = inputs_of(launch, wide, softmax)
            out, lse = self.launch_forward(inputs)
            out, lse = _unpacked(narrowed(out, wanted), launch, q.shape[0]), _rows_first(lse, launch, q.shape[0])
            _scatter_attention(result, launch.queries, out, lse)
        if work.rest is not None:
            ReferenceKernel().forward(q, k, v, work.rest, softmax, result)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, tasks: Tasks, softmax: Softmax, grads: Gradients) -> None:
        """See :meth:`Kernel.backward`.

        A gradient of the log-sum-exp travels in further channels where the kernel has no argument for it: v is 0 in
        them, the incoming gradient 1 and the output minus that gradient, so that the row sum of output times incoming
        gradient, which the kernel subtracts from every score's gradient, has it subtracted.
        """
        self._check(softmax)
        if saved.q.shape[0] == 0:
            return
        carried = saved.grad_lse is not None and not self.takes_grad_lse
        values = v.shape[-1] + (PARTS if carried else 0)
        channels = _channels(saved.q.shape[-1], values)
        if channels > self.widest_head:  # no room for the channels that carry it
            ReferenceKernel().backward(saved, k, v, tasks, softmax, grads)
            return
        q, keys, wide_v = (padded(x, channels) for x in (saved.q, k, v))
        out, grad_out = saved.out, saved.grad_out
        if carried and saved.grad_lse is not None:
            out = torch.cat([out, _in_parts(-saved.grad_lse, out.dtype)], dim=-1)
            grad_out = torch.nn.functional.pad(grad_out, (0, PARTS), value=1.0)
        sides = padded(out, channels), saved.lse, padded(grad_out, channels), None if carried else saved.grad_lse
        work = self._prepared_for(tasks, saved.q)
        for launch in work.launches:
            parts = self.launch_backward(inputs_of(launch, [q, keys, wide_v], softmax), result_of(launch, *sides))
            for total, side, part in zip(grads, (launch.queries, launch.keys, launch.keys), parts, strict=True):
                _scatter(total, side, narrowed(_unpacked(part, launch, q.shape[0]), total.shape[-1]))
        if work.rest is not None:
            ReferenceKernel().backward(saved, k, v, work.rest, softmax, grads)

    def _check(self, softmax: Softmax) -> None:
        """Refuse an option this kernel does not compute, which would otherwise pass without a word."""
        refused = self.refused_option(softcap=softmax.softcap is not None, dropout=softmax.dropout is not None)
        if refused is not None:
            raise UnsupportedError(
                f"kernel {self.name!r} cannot be used here", got=refused, fix='use CPConfig(kernel="reference")'
            )


def _channels(of_queries: int, of_values: int) -> int:
    """The head dim that queries, keys and values are padded to."""
    return -(-max(of_queries, of_values) // ALIGNMENT) * ALIGNMENT


def _in_parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as sums of ``PARTS`` numbers of a narrower dtype, ``[..., PARTS]``."""
    parts = []
    for _ in range(PARTS):
        part = x.to(dtype)
        x = x - part
        parts.append(part)
    return torch.stack(parts, dim=-1)


def _packed(x: Tensor, launch: Launch) -> Tensor:
    """``[B, rows, ...]`` as the kernel takes it: a last stride of 1, and vectors of 16 bytes that lie on 16 bytes."""
    x = x.flatten(0, 1) if launch.offsets is not None else x
    return x if _is_aligned(x) else x.contiguous()


def _is_aligned(x: Tensor) -> bool:
    """Whether each row of channels begins where a vector may be read; kernels look at this late, or never."""
    if x.data_ptr() % VECTOR:
        return False
    each = x.itemsize
    if x.is_contiguous():  # every other stride is a multiple of the channels
        return x.shape[-1] * each % VECTOR == 0
    if x.stride(-1) != 1:
        return False
    return all(size == 1 or stride * each % VECTOR == 0 for size, stride in zip(x.shape[:-1], x.stride(), strict=False))


def _unpacked(x: Tensor, launch: Launch, batch: int) -> Tensor:
    """What the kernel gave as ``[B, rows, ...]``."""
    return x.unflatten(0, (batch, -1)) if launch.offsets is not None else x


def inputs_of(launch: Launch, tensors: list[Tensor], softmax: Softmax) -> Inputs:
    """What a launch computes on, of queries, keys and values ``[B, rows, heads, D]`` of one head dim."""
    sides = zip((launch.queries, launch.keys, launch.keys), tensors, strict=True)
    q, k, v = (_packed(side.of(x), launch) for side, x in sides)
    return Inputs(q, k, v, launch.window, launch.offsets, softmax)


def _rows_first(lse: Tensor, launch: Launch, batch: int) -> Tensor:
    """A kernel's ``[N, rows]`` or ``[B, N, rows]`` as ``[B, rows, N]``."""
    return lse.unflatten(1, (batch, -1)).movedim(0, -1) if launch.offsets is not None else lse.transpose(1, 2)


def _heads_first(x: Tensor, launch: Launch) -> Tensor:
    """``[B, rows, N]`` as a kernel's ``[N, rows]`` or ``[B, N, rows]``, contiguous."""
    return (x.flatten(0, 1).t() if launch.offsets is not None else x.transpose(1, 2)).contiguous()


def result_of(launch: Launch, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Result:
    """The query side of a launch's backward pass, of ``[B, rows, N, ...]``."""
    side = launch.queries
    of_lse = None if grad_lse is None else _heads_first(side.of(grad_lse), launch)
    return Result(
        _packed(side.of(out), launch), _heads_first(side.of(lse), launch), _packed(side.of(grad_out), launch), of_lse
    )


def _scatter(total: RowSum, side: Gathered, part: Tensor) -> None:
    """Add rows to where they belong."""
    if side.rows is not None:
        total.add(side.rows, part)
    for source, missing in side.pulls:
        total.add(ALL, _pulled(part, source, missing, 0.0))
    for chosen, index in side.turns:
        total.add_at(index, part if chosen is None else part.index_select(1, chosen))


def _scatter_attention(result: AttentionSum, side: Gathered, out: Tensor, lse: Tensor) -> None:
    """Merge rows into where they belong."""
    if side.rows is not None:
        result.merge(side.rows, out, lse)
    for source, missing in side.pulls:
        result.merge(ALL, _pulled(out, source, missing, 0.0), _pulled(lse, source, missing, float("-inf")))
    for chosen, index in side.turns:
        some = (out, lse) if chosen is None else (out.index_select(1, chosen), lse.index_select(1, chosen))
        result.merge_at(index, *some)


def _pulled(part: Tensor, source: Tensor, missing: Tensor, filler: float) -> Tensor:
    """``[B, L, ...]`` rows out of ``[B, number, ...]``; those that take none hold a number, never what memory held."""
    rows = part.index_select(1, source)
    return rows.masked_fill_(missing.view(1, -1, *[1] * (part.dim() - 2)), filler)
