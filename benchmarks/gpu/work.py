"""Attention by a kernel over tasks, its reference in float64, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cphandler.kernels import AttentionSum, Kernel, RowSum, Softmax, Tasks, get_kernel
from cphandler.kernels.kernel import Gradients, Saved
from cphandler.kernels.registry import available_kernels
from cphandler.kernels.varlen import VarlenKernel, inputs_of, result_of

SEED = 20


class Inputs(NamedTuple):
    """``q [1, L, N, D]``, ``k, v [1, L, G, D]`` and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    @classmethod
    def drawn(
        cls, rows: int, heads: tuple[int, int], channels: int, dtype: torch.dtype, device: torch.device
    ) -> Inputs:
        """Normal numbers, the same in every run."""
        generator = torch.Generator(device=device).manual_seed(SEED)
        shapes = [(1, rows, n, channels) for n in (heads[0], heads[1], heads[1], heads[0])]
        return cls(*(torch.randn(s, generator=generator, device=device, dtype=torch.float32).to(dtype) for s in shapes))

    def double(self) -> Inputs:
        """The same numbers in float64."""
        return Inputs(*(x.double() for x in self))


class Blocks(NamedTuple):
    """What one rank computes: its query rows, and for each owner of keys their rows and the tasks over them."""

    rows: Tensor | slice
    owners: Sequence[tuple[Tensor | slice, Tasks]]


Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""``out`` of the rows, and ``dq, dk, dv`` as far as these rows give them, the last two of all rows."""


def attend(kernel: Kernel, inputs: Inputs, blocks: Blocks, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a rank's rows, merged over all owners."""
    q = inputs.q[:, blocks.rows]
    result = AttentionSum(q, inputs.v.shape[-1])
    for keys, tasks in blocks.owners:
        kernel.forward(q, inputs.k[:, keys], inputs.v[:, keys], tasks, softmax, result)
    return result.total()


def pull(kernel: Kernel, inputs: Inputs, blocks: Blocks, softmax: Softmax, out: Tensor, lse: Tensor) -> Gradients:
    """Gradients of a rank's queries, and of the keys and values of all rows, from the merged result."""
    rows = blocks.rows
    saved = Saved(inputs.q[:, rows], out, lse, inputs.grad_out[:, rows], None)
    dq, dk, dv = RowSum.like(saved.q), RowSum.like(inputs.k), RowSum.like(inputs.v)
    for keys, tasks in blocks.owners:
        own = [RowSum.like(inputs.k[:, keys]), RowSum.like(inputs.v[:, keys])]
        kernel.backward(saved, inputs.k[:, keys], inputs.v[:, keys], tasks, softmax, Gradients(dq, *own))
        for total, part in zip((dk, dv), own, strict=True):
            if isinstance(keys, slice):
                total.add(keys, part.total())
            else:
                total.add_at(keys, part.total())
    return Gradients(dq, dk, dv)


def direct(kernel: Kernel, inputs: Inputs, blocks: Blocks, softmax: Softmax, *, backward: bool) -> Callable[[], object]:
    """The kernel's own calls and nothing around them, for one owner's tasks; all of it where a kernel makes many."""
    (_, tasks), *others = blocks.owners
    if others or not isinstance(kernel, VarlenKernel):
        return partial(computed if backward else attend, kernel, inputs, blocks, softmax)
    launches = kernel.prepare(tasks, inputs.q.dtype, inputs.q.device).launches
    out, lse = attend(kernel, inputs, blocks, softmax)
    own = [inputs_of(launch, [inputs.q, inputs.k, inputs.v], softmax) for launch in launches]
    results = [result_of(launch, out, lse, inputs.grad_out, None) for launch in launches]

    def call() -> None:
        for given, result in zip(own, results, strict=True):
            kernel.launch_forward(given)
            if backward:
                kernel.launch_backward(given, result)

    return call


def computed(kernel: Kernel, inputs: Inputs, blocks: Blocks, softmax: Softmax) -> Results:
    """Forward and backward."""
    out, lse = attend(kernel, inputs, blocks, softmax)
    grads = pull(kernel, inputs, blocks, softmax, out, lse)
    return out, grads.dq.total(), grads.dk.total(), grads.dv.total()


def reference(inputs: Inputs, blocks: Blocks, softmax: Softmax) -> Results:
    """The same in float64, by matrix products."""
    return computed(get_kernel("reference", inputs.q.device.type), inputs.double(), blocks, softmax)


def errors(results: Results, expected: Results) -> list[float]:
    """Relative L2 errors of out, dq, dk and dv."""
    found = []
    for a, e in zip(results, expected, strict=True):
        found.append(float((a.double() - e).norm() / e.norm().clamp_min(1e-300)))
    return found


def usable(device: torch.device) -> dict[str, str | None]:
    """Every kernel for the device, with the reason why it cannot run there."""
    return {name: get_kernel(name, device.type).unusable() for name in available_kernels(device.type)}


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of a call, on the device's own clock where it has one; after three calls that do not count."""
    for _ in range(3):
        call()
    taken: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)
